"""Encoders: a backbone that turns an image into features, and a head that turns features into a key or query.

The head's output is what the loss sees; it is thrown away after training and the backbone's features are used.
"""

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tutorial_moco.augment import MEAN, STD
from tutorial_moco.errors import UsageError

WIDEST = 4 * 4096  # of a layer in a head: 4 C, the most that a recipe's dim allows


class Encoder(nn.Module):
    """f_q or f_k of the paper: images (B, 3, H, W) to unit vectors (B, dim)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, head: str = "linear", dim: int = 128):
        super().__init__()
        self.backbone, self.head = backbone, build_head(head, feature_dim, dim)
        self.feature_dim, self.dim, self.hidden = feature_dim, dim, hidden_of(head, dim)

    def forward(self, x: Tensor, unit: bool = True) -> Tensor:
        """Queries or keys (B, dim); without ``unit`` as the head gives them, before they are brought to length 1."""
        found = self.head(self.backbone(x))
        return F.normalize(found.float(), dim=1) if unit else found


def build_encoder(
    name: str = "small", *, head: str = "linear", dim: int = 128, norm: str = "batch", images: Tensor | None = None
) -> Encoder:
    """An encoder with fresh weights, in channels_last memory.

    Args:
        name: ``tiny``, ``small`` or ``wide`` (`SmallBackbone`, width 16, 32 or 48), ``resnet18`` (torchvision's, with the
            3x3 stem for small images), ``resnet50`` (torchvision's, as for ImageNet), ``vit`` or ``vit-learned``
            (`ViTBackbone` for 32 pixels, its patch projection fixed or learned), ``vit-small`` (for 224 pixels, fixed).
        head: a name as for `build_head`.
        dim: C, the length of keys and queries.
        norm: ``batch``, ``split:S`` (`SplitBatchNorm2d` of S groups) or ``group`` (GroupNorm).
        images: float32 (n, 3, H, W), normalised. The small backbone computes its fixed first layer from them.

    Raises:
        UsageError: unknown name, head or norm.
    """
    if name not in ENCODERS:
        raise UsageError(f"--encoder {name} is not known: choose one of {', '.join(ENCODERS)}")
    encoder = Encoder(*ENCODERS[name](norm_layer(norm)), head, dim)
    if images is not None and isinstance(encoder.backbone, SmallBackbone):
        encoder.backbone.whitening.fit(images)
    return encoder.to(memory_format=torch.channels_last)


def build_head(kind: str, feature_dim: int, dim: int) -> nn.Module:
    """The projection to C dimensions.

    Args:
        kind: ``linear`` (MoCo v1), ``mlp`` (two layers with a ReLU between: SimCLR, v2), ``mlp2`` or ``mlp3`` (two or three
            layers with BatchNorm: v3 of a ResNet and of a transformer), 4 C wide between, or as told: ``mlp3:4096``.
    """
    name, colon, width = kind.partition(":")
    if kind == "linear":
        return nn.Linear(feature_dim, dim)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(inplace=True), nn.Linear(feature_dim, dim))
    if name in ("mlp2", "mlp3") and (not colon or (width.isdigit() and 0 < int(width) <= WIDEST)):
        hidden = hidden_of(kind, dim)
        between = nn.Sequential(*_normed(feature_dim, hidden), *(_normed(hidden, hidden) if name == "mlp3" else []))
        return nn.Sequential(between, nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=False))
    raise UsageError(
        f"--head {kind} is not known: choose linear, mlp, mlp2 or mlp3, or a width up to {WIDEST} with these two: mlp3:4096"
    )


def hidden_of(kind: str, dim: int) -> int:
    """How wide the layers of v3's heads and predictor are."""
    width = kind.partition(":")[2]
    return int(width) if width else 4 * dim


def build_predictor(dim: int, hidden: int) -> nn.Module:
    """What MoCo v3 puts behind the query's projection alone: two layers, (B, dim) to (B, dim)."""
    return nn.Sequential(*_normed(dim, hidden), nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=False))


def _normed(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


class Renormalise(nn.Module):
    """Images normalised by this package's `augment.MEAN` and ``STD``, brought to another mean and standard deviation."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        here, there = torch.tensor((MEAN, STD)), torch.tensor((mean, std))
        self.register_buffer("scale", (here[1] / there[1])[:, None, None])
        self.register_buffer("shift", ((here[0] - there[0]) / there[1])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def reading(backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """The backbone as it takes what `augment.plain_view` gives, if it was trained on images of this mean and std."""
    same = (tuple(mean), tuple(std)) == (MEAN, STD)
    return backbone if same else nn.Sequential(Renormalise(mean, std), backbone).to(next(backbone.parameters()).device)


# Backbones -----------------------------------------------------------------------------------------------------------


class SmallBackbone(nn.Module):
    """A residual network for two cores; of width 32 it takes about 14 million multiplications for a 32-pixel image.

    A fixed whitening layer, a stem that halves the resolution, and one residual block at each of three resolutions.
    (B, 3, H, W) to (B, 4 * width).
    """

    def __init__(self, norm, width: int = 32):
        super().__init__()
        self.whitening = Whitening()
        self.stem = nn.Sequential(
            nn.Conv2d(self.whitening.filters, width, 3, stride=2, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(
            Block(width, width, 1, norm), Block(width, 2 * width, 2, norm), Block(2 * width, 4 * width, 2, norm)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(self.whitening(x))).mean(dim=(2, 3))


class Whitening(nn.Module):
    """A fixed first layer: 2x2 patches in a basis in which natural images' patches are uncorrelated, each sign by itself.

    Neighbouring pixels are nearly equal, and a fresh convolution sees little else. Dividing each principal direction of
    the patches by its spread brings edges and colours up to the size of brightness. Adapted from airbench's first layer
    (https://github.com/KellerJordan/cifar10-airbench); not learned, so it also costs no gradient.
    """

    filters = 24  # 12 directions of a 2x2 patch of 3 colours, and their negatives, so that ReLU loses nothing

    def __init__(self):
        super().__init__()
        pixels = torch.eye(12).view(12, 3, 2, 2)  # before `fit`: the patch's values as they are
        self.register_buffer("weight", torch.cat([pixels, -pixels]))

    @torch.no_grad()
    def fit(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Compute the filters from images, float32 (n, 3, H, W), as the network will see them."""
        patches = F.unfold(images, 2, stride=2).transpose(1, 2).reshape(-1, 12)
        variance, directions = torch.linalg.eigh(torch.cov(patches.T.double()))
        filters = (directions / torch.sqrt(variance + epsilon)).T.reshape(12, 3, 2, 2).to(self.weight)
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight))


class Block(nn.Module):
    """The basic residual block (arXiv 1512.03385): two 3x3 convolutions beside a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.short_cut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.short_cut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.short_cut(x), inplace=True)


def resnet18(norm) -> tuple[nn.Module, int]:
    """torchvision's ResNet-18 with the stem for small images: a 3x3 convolution of stride 1 and no pooling."""
    net = torchvision.models.resnet18(norm_layer=norm)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    return net, 512


def resnet50(norm) -> tuple[nn.Module, int]:
    """torchvision's ResNet-50, the encoder of the paper's ImageNet experiments."""
    net = torchvision.models.resnet50(norm_layer=norm)
    net.fc = nn.Identity()
    return net, 2048


class ViTBackbone(VisionTransformer):
    """torchvision's vision transformer with what MoCo v3 changed (arXiv 2104.02057, sections 4 and 5).

    Positions are fixed sines and cosines in two dimensions. The patch projection stays as it was drawn, since training it
    made their trainings unstable, unless ``learned``. (B, 3, side, side) to the class token, (B, dim).
    """

    def __init__(self, side: int, patch: int, *, layers: int, heads: int, dim: int, learned: bool = False):
        super().__init__(side, patch, layers, heads, dim, 4 * dim)
        self.heads = nn.Identity()
        self.encoder.pos_embedding = nn.Parameter(sines(side // patch, dim), requires_grad=False)
        bound = math.sqrt(6 / (3 * patch**2 + dim))  # Xavier's, of the projection as one matrix
        nn.init.uniform_(self.conv_proj.weight, -bound, bound)
        self.conv_proj.requires_grad_(learned)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.image_size:
            raise UsageError(f"--encoder vit takes images of {self.image_size} pixels, not {x.shape[-1]}: use --image-size")
        return super().forward(x)


def sines(grid: int, dim: int) -> Tensor:
    """Positions (1, 1 + grid * grid, dim): zeros for the class token, then sines and cosines of x and of y for each patch."""
    waves = 1 / 10_000 ** (torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [at.flatten()[:, None] * waves for at in (x, y)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), table])[None]


def vit(learned: bool) -> tuple[nn.Module, int]:
    """A transformer for two cores: 64 patches of 4 pixels, four layers; about twice the work of ``small``."""
    return ViTBackbone(32, 4, layers=4, heads=3, dim=96, learned=learned), 96


ENCODERS = {
    "tiny": lambda norm: (SmallBackbone(norm, 16), 64),
    "small": lambda norm: (SmallBackbone(norm, 32), 128),
    "wide": lambda norm: (SmallBackbone(norm, 48), 192),
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit": lambda norm: vit(learned=False),
    "vit-learned": lambda norm: vit(learned=True),
    "vit-small": lambda norm: (ViTBackbone(224, 16, layers=12, heads=12, dim=384), 384),  # v3's, with its twelve heads
}


# Normalisation -------------------------------------------------------------------------------------------------------


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are taken over each of ``splits`` equal parts of the batch, as on that many GPUs.

    It lets one device show the leak that shuffling BN cures (MoCo, section 3.3): without a split, shuffling does nothing.
    Parts are runs of neighbouring images, and may differ in length by one. The running statistics are updated with the
    mean over the parts.
    """

    def __init__(self, channels: int, splits: int):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        # A processor is quick with many small calls, a GPU with few large ones, and a compiler writes those itself.
        at_once = x.is_cuda and len(x) % self.splits == 0
        return self.all_parts_at_once(x) if at_once else self.part_by_part(x)

    def part_by_part(self, x: Tensor) -> Tensor:
        """PyTorch's BatchNorm of each part (N / splits, C, H, W)."""
        running = [(self.running_mean.clone(), self.running_var.clone()) for _ in range(self.splits)]
        parts = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            for part, (mean, var) in zip(x.tensor_split(self.splits), running, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(torch.stack([mean for mean, _ in running]).mean(dim=0))
            self.running_var.copy_(torch.stack([var for _, var in running]).mean(dim=0))
        return torch.cat(parts)

    def all_parts_at_once(self, x: Tensor) -> Tensor:
        """The same of equal parts, in float32, as a formula over (splits, N / splits, C, H, W)."""
        parts = x.unflatten(0, (self.splits, -1)).float()
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), keepdim=True, correction=0)
        with torch.no_grad():
            count = parts[0].numel() // parts.shape[2]
            for running, now in (self.running_mean, mean), (self.running_var, var * (count / (count - 1))):
                running.lerp_(now.mean(dim=0).flatten(), self.momentum)
        scale = self.weight[:, None, None] * torch.rsqrt(var + self.eps)
        return ((parts - mean) * scale + self.bias[:, None, None]).to(x.dtype).flatten(0, 1)


def norm_layer(norm: str):
    """``batch``, ``split:S`` or ``group`` to a function of the number of channels that makes the layer."""
    kind, _, splits = norm.partition(":")
    if kind == "batch" and not splits:
        return nn.BatchNorm2d
    if kind == "split" and splits.isdigit() and int(splits) > 1:
        return lambda channels: SplitBatchNorm2d(channels, int(splits))
    if kind == "group" and not splits:
        return lambda channels: nn.GroupNorm(min(32, channels // 4), channels)
    raise UsageError(f"--norm {norm} is not known: choose batch, split:S with S of at least 2, or group")
