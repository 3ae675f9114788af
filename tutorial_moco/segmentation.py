"""Semantic segmentation: which class does each pixel belong to? A fully convolutional network around our encoder.

As the paper's VOC experiment (section 4.2), which MoCo did not win, but in small: one 3x3 convolution and one 1x1 behind the
encoder, where the paper has two 3x3 of 256 channels before it, dilated by 6 (appendix A.5).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from tutorial_moco.augment import MEAN, STD
from tutorial_moco.dense import freeze, trunk
from tutorial_moco.errors import DataError

IGNORED = 255  # a pixel without a label, as in VOC


class Segmenter(nn.Module):
    """The encoder's last map, two convolutions, and as many classes as there are and the ground for each pixel.

    In training mode it takes lists of images (3, H, W) in [0, 1] and targets with ``semantic`` (H, W), and returns a
    dictionary with the loss; else a list of dictionaries with ``semantic``, int64 (H, W). Images may differ in size; with
    an ``image_size`` their shorter side is brought to so many pixels for the network, and its answer back to theirs.
    ``mean`` and ``std`` are those of the images as the encoder takes them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        *,
        frozen: bool = False,
        image_size: int | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ):
        super().__init__()
        self.image_size = image_size
        self.net, stages = trunk(backbone)
        channels, _ = list(stages.values())[-1]
        _dilate(self.net, stages)
        if frozen:
            freeze(self.net)
        self.head = FCNHead(channels, classes + 1)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        originals, images = [image.shape[-2:] for image in images], [self._fit(image) for image in images]
        sizes = [image.shape[-2:] for image in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        batch = torch.stack([_padded((i - self.mean) / self.std, height, width, 0.0) for i in images])
        logits = self.head(self.net(batch.contiguous(memory_format=torch.channels_last))).float()
        logits = F.interpolate(logits, size=(height, width), mode="bilinear")
        if targets is not None:
            marks = [_resized(target["semantic"], size) for target, size in zip(targets, sizes, strict=True)]
            wanted = torch.stack([_padded(mark, height, width, IGNORED) for mark in marks])
            return {"loss": F.cross_entropy(logits, wanted, ignore_index=IGNORED)}
        found = [labels[:h, :w] for labels, (h, w) in zip(logits.argmax(dim=1), sizes, strict=True)]
        return [{"semantic": _resized(labels, size)} for labels, size in zip(found, originals, strict=True)]

    def _fit(self, image: Tensor) -> Tensor:
        """An image (3, H, W) with a shorter side of ``image_size``."""
        if self.image_size in (None, min(image.shape[-2:])):
            return image
        scale = self.image_size / min(image.shape[-2:])
        size = [round(scale * side) for side in image.shape[-2:]]
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _resized(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Numbers of classes (H, W) at another size: each pixel has the number that lies nearest."""
    if labels.shape == size:
        return labels
    return F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0].long()


def _padded(x: Tensor, height: int, width: int, value: float) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)


def _dilate(net: nn.Sequential, stages: dict[str, tuple[int, int]]) -> None:
    """Let later stages keep the second one's grid and look further apart instead (arXiv 1606.00915): each cell sees what it
    saw, but there are enough of them to draw an outline with: one in 8 pixels of a ResNet-50's, in 4 of a small encoder's."""
    grid = max(4, list(stages.values())[1][1])
    for name, (_, stride) in stages.items():
        apart = stride // grid  # in cells of the grid, what were neighbours after this stage's stride
        for module in net.get_submodule(name).modules() if apart > 1 else ():
            if isinstance(module, nn.Conv2d):
                at = apart // 2 if module.stride == (2, 2) else apart
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (at, at)


def mean_iou(pairs: Iterable[tuple[dict, dict]], classes: int) -> float:
    """Mean over the classes and the ground of intersection over union, in percent; classes that nobody named are left out.

    Args:
        pairs: for each image its target and the answer, both with ``semantic`` int64 (H, W); where the target is 255
            nothing is judged. classes: without the ground.

    Raises:
        DataError: nothing is judged anywhere.
    """
    counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    for target, answer in pairs:
        judged = target["semantic"] != IGNORED
        both = target["semantic"][judged] * (classes + 1) + answer["semantic"][judged]
        counts += both.bincount(minlength=counts.numel()).view_as(counts)
    union = counts.sum(dim=0) + counts.sum(dim=1) - counts.diag()
    if not union.any():
        raise DataError("no pixel of the test images has a label to judge by: label some")
    return 100 * (counts.diag()[union > 0] / union[union > 0]).mean().item()
