"""A masked auto-encoder in small (arXiv 2111.06377): the pretext task that the MoCo paper's last paragraph asks for.

Three quarters of an image's patches are hidden; the encoder sees the rest, and a light decoder paints what is missing.
There is no dictionary, no second view and no negative: so none of `mechanisms`, but the same batches, crops and schedule.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_moco import speed
from tutorial_moco.augment import Augmentation, plain_view, random_view
from tutorial_moco.checkpoint import halved, load_checkpoint, pack, save_checkpoint, single, unpack
from tutorial_moco.encoders import Encoder, ViTBackbone, build_encoder, sines
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import check, descend
from tutorial_moco.randomness import uniform
from tutorial_moco.recipes import Recipe
from tutorial_moco.results import find

CROP = Augmentation(jitter_p=0.0, grayscale=0.0)  # crop and flip alone: colours are part of what is to be painted
MASK_DRAW = 2  # of the numbers of (seed, epoch, view, image), after the two views


class MaskedAutoencoder(nn.Module):
    """Hide patches, encode the others, paint the hidden ones.

    Args:
        backbone: with a learned patch projection. hidden: share of the patches that is hidden.
        dim, layers: of the decoder, which is thrown away after training.
    """

    def __init__(self, backbone: ViTBackbone, *, hidden: float = 0.75, dim: int = 64, layers: int = 1):
        super().__init__()
        self.backbone, self.patch = backbone, backbone.patch_size
        grid, width = backbone.image_size // self.patch, backbone.hidden_dim
        self.patches, self.seen = grid**2, round((1 - hidden) * grid**2)
        self.to_decoder, self.mask_token = nn.Linear(width, dim), nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sines(grid, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.to_pixels = nn.Linear(dim, 3 * self.patch**2)

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """Painted patches (N, patches, 3 * patch * patch), in the scale of `targets`.

        Args:
            images: (N, 3, H, W), normalised. order: int64 (N, patches), a permutation for each image; the first are seen.
        """
        encoder = self.backbone.encoder
        tokens = self.backbone.conv_proj(images).flatten(2).transpose(1, 2) + encoder.pos_embedding[:, 1:]
        seen = order[:, : self.seen, None].expand(-1, -1, tokens.shape[2])
        first = self.backbone.class_token.expand(len(images), -1, -1)
        encoded = encoder.ln(encoder.layers(torch.cat([first, tokens.gather(1, seen)], dim=1)))
        known = self.to_decoder(encoded)
        guesses = self.mask_token.to(known.dtype).expand(len(images), self.patches - self.seen, -1)
        back = torch.argsort(order)[:, :, None].expand(-1, -1, known.shape[2])
        whole = torch.cat([known[:, 1:], guesses], dim=1).gather(1, back)
        painted = self.decoder(torch.cat([known[:, :1], whole], dim=1) + self.positions)
        return self.to_pixels(painted[:, 1:]).float()

    def patchify(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) as patches (N, patches, 3 * patch * patch), row by row."""
        return F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The images that `patchify` cut."""
        return F.fold(patches.transpose(1, 2), self.backbone.image_size, self.patch, stride=self.patch)

    def targets(self, images: Tensor) -> Tensor:
        """The patches, each brought to mean 0 and spread 1, which the paper found better."""
        patches = self.patchify(images)
        return (patches - patches.mean(dim=2, keepdim=True)) / (patches.std(dim=2, keepdim=True) + 1e-3)

    def loss(self, images: Tensor, order: Tensor) -> Tensor:
        """Mean squared error over the hidden patches alone; a scalar. Painting 0 everywhere costs about 1."""
        error = (self(images, order) - self.targets(images)).square().mean(dim=2)
        return error.gather(1, order[:, self.seen :]).mean()


def mask_order(index: Tensor, patches: int, *, seed: int, epoch: int) -> Tensor:
    """For each image (N,) a permutation (N, patches) that is a function of (seed, epoch, image)."""
    draws = uniform(seed, epoch, MASK_DRAW, index[:, None], torch.arange(patches, device=index.device))
    return draws.argsort(dim=1)


def pretrain_masked(
    recipe: Recipe, train: ImageSet, *, dtype: torch.dtype | None = None, progress: bool = True
) -> tuple[Encoder, MaskedAutoencoder, dict[str, object]]:
    """Pre-train an encoder by painting.

    Args:
        recipe: ``encoder`` must be ``vit-learned``; batch, epochs, optimizer, schedule and seed serve, the mechanism does not.

    Returns:
        The encoder (its head untrained), the auto-encoder around its backbone, and the run's figures as `Run.summary` has
        them, with ``losses``.

    Raises:
        UsageError: another encoder; fewer images than a batch; the loss is not finite.
    """
    if recipe.encoder != "vit-learned":
        raise UsageError(f"--encoder must be vit-learned for a masked auto-encoder, which hides patches, not {recipe.encoder}")
    check(recipe, len(train), None)
    torch.manual_seed(recipe.seed)
    device = speed.default_device()
    encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim).to(device)
    dtype = dtype or speed.choose_precision(encoder, plain_view(train.images[:128]).to(device))
    net = MaskedAutoencoder(encoder.backbone).to(device)
    images = train.images.to(device)

    def loss_of(epoch: int, index: Tensor) -> Tensor:
        view = random_view(images[index], index, CROP, seed=recipe.seed, epoch=epoch, view=0)
        order = mask_order(index, net.patches, seed=recipe.seed, epoch=epoch)
        with speed.autocast(device, dtype):
            return net.loss(view, order)

    losses, seconds = descend(net, recipe, len(train), loss_of, dtype=dtype, title="masked", progress=progress)
    seen = losses[-1]["images_seen"]
    return encoder, net, {
        "steps": len(losses), "images_seen": seen, "train_seconds": round(seconds, 2),
        "images_per_second": round(seen / seconds, 1), "precision": str(dtype).removeprefix("torch."), "losses": losses,
    }  # fmt: skip


def save_painter(path: Path, net: MaskedAutoencoder, facts: dict[str, object]) -> None:
    """Write an auto-encoder, its matrices in float16, and facts about its training."""
    save_checkpoint(path, halved(pack(painter=net)), facts)


def load_painter(path: Path | None = None) -> tuple[MaskedAutoencoder, dict[str, object]]:
    """The auto-encoder that `save_painter` wrote, in eval mode, float32, on the CPU; and its facts.

    Args:
        path: by default the one that the repository ships, trained on CIFAR-10.

    Raises:
        DataError: the file is missing or damaged, or holds no painter.
    """
    path = path or find("painter.safetensors", "transfer")
    tensors, facts = load_checkpoint(path)
    if not any(name.startswith("painter.") for name in tensors):
        raise DataError(f"{path} holds no masked auto-encoder: give one that save_painter wrote")
    net = MaskedAutoencoder(build_encoder("vit-learned").backbone)
    unpack(single(tensors), painter=net)
    return net.eval(), facts
