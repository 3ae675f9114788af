"""Random views of a whole batch at once, as tensor operations on the device the batch is on.

The usual way draws each view image by image in worker processes; on a laptop that costs more than the training itself.
Here every geometric operation is a pair of small matrices per image (one for rows, one for columns) and every colour
operation one 3x3 matrix and an offset per image, so a batch is a handful of matrix products.

Shapes: B images of a batch, C = 3 colours, H x W pixels.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco.randomness import uniform
from tutorial_moco.speed import products_in

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, the weights of torchvision and Pillow
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # CIFAR-10's; any fixed numbers near the data's serve
_QUARTER_TURN = ((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0))  # about the gray axis, red to green to blue
_AS_IT_IS = (1.0, 1.0, 1.0, 0.0)  # the factors of a colour jitter that does nothing
BLUR_REACH = 8  # pixels at 224: four times the largest spread of any recipe here, which grows with the view
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, before it falls back to the central crop


@dataclass(frozen=True)
class Augmentation:
    """What one random view may do to an image, in torchvision's terms and ranges, in the order of the fields.

    ``crop_scale`` and ``crop_ratio`` are RandomResizedCrop's; ``jitter`` is ColorJitter's (brightness, contrast, saturation,
    hue), applied with probability ``jitter_p`` in random order; ``grayscale``, ``blur``, ``solarize`` and ``flip`` are
    probabilities in [0, 1]; ``blur_sigma`` is in pixels of a 224-pixel view and scaled with the view's size.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    flip: float = 0.5


_V2 = Augmentation(blur=0.5)
_V3 = Augmentation(crop_scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1))
# Each recipe names the augmentation of its two views; only v3 treats them differently.
AUGMENTATIONS: dict[str, tuple[Augmentation, Augmentation]] = {
    "v1": (Augmentation(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0),) * 2,  # MoCo, section 3.3 and its published code
    "v2": (_V2, _V2),  # MoCo v2 (arXiv 2003.04297), section 2
    "v3": (  # MoCo v3 (arXiv 2104.02057), after BYOL
        Augmentation(**{**_V3.__dict__, "blur": 1.0}),
        Augmentation(**{**_V3.__dict__, "blur": 0.1, "solarize": 0.2}),
    ),
    "v3-resnet": (  # as v3, whose ResNets are shown at least a fifth of the picture
        Augmentation(**{**_V3.__dict__, "crop_scale": (0.2, 1.0), "blur": 1.0}),
        Augmentation(**{**_V3.__dict__, "crop_scale": (0.2, 1.0), "blur": 0.1, "solarize": 0.2}),
    ),
    # SimCLR (arXiv 2002.05709), appendix A
    "simclr": (Augmentation(crop_scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5),) * 2,
    "cifar": (Augmentation(crop_scale=(0.08, 1.0)),) * 2,  # the official CIFAR-10 notebook: no blur at 32 pixels
    "small": (Augmentation(jitter=(0.2, 0.2, 0.2, 0.05)),) * 2,  # what short runs of a small encoder learn fastest from
    # Every hue and, half the time, none: on drawn shapes colour is the shortcut, and whole outlines are what is left.
    "shapes": (Augmentation(crop_scale=(0.5, 1.0), jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grayscale=0.5),) * 2,
    # As labels are usually trained with: crop and mirror.
    "probe": (Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, grayscale=0.0),) * 2,
    "none": (Augmentation((1.0, 1.0), (1.0, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0, 0.0, flip=0.0),) * 2,
}


def two_views(
    images: Tensor, index: Tensor, augmentation: str, *, seed: int = 0, epoch: int | Tensor = 0, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Two independent random views of each image: the query's and the key's.

    Args:
        images: uint8 (B, 3, H, W); or (2, B, 3, size, size), cropped before for each view, by `encoded.EncodedImages`.
        index: int64 (B,), each image's number in the data set: with seed and epoch it decides the view.
        augmentation: a name in ``AUGMENTATIONS``.
        size: height and width of the views in pixels; that of the images if None.

    Returns:
        Two float32 tensors (B, 3, size, size), normalised, in channels_last memory.
    """
    first, second = AUGMENTATIONS[augmentation]
    how = {"seed": seed, "epoch": epoch, "size": size, "cropped": images.dim() == 5}
    both = images if how["cropped"] else images.expand(2, *images.shape)
    if first == second:  # one batch of both is quicker than two
        view = torch.arange(2, device=images.device).repeat_interleave(len(index))
        return random_view(both.flatten(0, 1), index.repeat(2), first, view=view[:, None], **how).chunk(2)
    return tuple(random_view(both[view], index, recipe, view=view, **how) for view, recipe in enumerate((first, second)))


def one_view(
    images: Tensor, index: Tensor, augmentation: str, view: int, *, seed: int = 0, epoch: int = 0, cropped: bool = False
) -> Tensor:
    """One of `two_views` alone: the query's (0) or the key's (1), and the same as there; of images or of its crops."""
    return random_view(images, index, AUGMENTATIONS[augmentation][view], seed=seed, epoch=epoch, view=view, cropped=cropped)


class RecordedViews:
    """`two_views` on a GPU, recorded as a CUDA graph at the first call and launched as one from then on.

    The next call overwrites the views. Batch, augmentation and seed stay what they were at the first.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, images: Tensor, index: Tensor, augmentation: str, *, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self.record(images, index, augmentation, seed)
        self.images.copy_(images)
        self.index.copy_(index)
        self.epoch.fill_(epoch)
        self.graph.replay()
        return self.views

    def record(self, images: Tensor, index: Tensor, augmentation: str, seed: int) -> None:
        """Run it beside the main stream, so that libraries have what they need, and then once more for the record."""
        self.images, self.index, self.epoch = images.clone(), index.clone(), torch.zeros_like(index[0])
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            two_views(self.images, self.index, augmentation, seed=seed, epoch=self.epoch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.views = two_views(self.images, self.index, augmentation, seed=seed, epoch=self.epoch)


def random_view(
    images: Tensor,
    index: Tensor,
    recipe: Augmentation,
    *,
    seed: int,
    epoch: int | Tensor,
    view: int | Tensor,
    size: int | None = None,
    cropped: bool = False,
) -> Tensor:
    """One random view of each image; a function of (seed, epoch, view, index) and the image alone. See `two_views`."""
    size = size or images.shape[-2]
    u = draws(index.to(images.device), seed=seed, epoch=epoch, view=view)
    if cropped:
        x = images.float().div_(255)
    else:
        box, flip = framing(u, *images.shape[-2:], recipe)
        x = crop_resize(images, *box, flip, size)
    if recipe.jitter_p or recipe.grayscale:
        factors, order = jitter_factors(u[:, 23:27], recipe.jitter), torch.argsort(u[:, 27:31], dim=1)
        factors = torch.where((u[:, 31] < recipe.jitter_p)[:, None], factors, constant(_AS_IT_IS, x.device))
        with products_in(torch.float32):  # of 3x3 matrices: rounding them would cost time
            x = apply_colour(x, *colour_matrices(x, factors, order, gray=u[:, 32] < recipe.grayscale))
    if recipe.blur:
        low, high = recipe.blur_sigma
        x = blur_some(x, u[:, 33] < recipe.blur, (low + u[:, 34] * (high - low)) * (size / 224))
    if recipe.solarize:
        x = torch.where((u[:, 35] < recipe.solarize)[:, None, None, None] & (x >= 0.5), 1 - x, x)
    return normalise(x)


def draws(index: Tensor, *, seed: int, epoch: int | Tensor, view: int | Tensor) -> Tensor:
    """All that is random in a view, uniform in [0, 1), (B, 40); the first 23 are for `framing`."""
    return uniform(seed, epoch, view, index[:, None], torch.arange(40, device=index.device))


def framing(
    u: Tensor, height: int | Tensor, width: int | Tensor, recipe: Augmentation
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which part of each image a view shows, as from `crop_boxes`, and whether it is mirrored, bool (B,)."""
    return crop_boxes(u[:, :22], height, width, recipe.crop_scale, recipe.crop_ratio), u[:, 22] < recipe.flip


def plain_view(images: Tensor) -> Tensor:
    """The images as they are, for evaluation: uint8 (B, 3, H, W) to normalised float32 in channels_last memory."""
    return normalise(images.float().div_(255))


def normalise(x: Tensor) -> Tensor:
    """Values in [0, 1], (B, 3, H, W), to about zero mean and unit variance; x itself is changed."""
    x.sub_(constant(MEAN, x.device)[:, None, None]).div_(constant(STD, x.device)[:, None, None])
    return x.contiguous(memory_format=torch.channels_last)  # last: broadcasting over 3 interleaved colours is slow


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A float32 tensor of these numbers, made once: to hand a GPU numbers is to wait until all that it was told is done."""
    return torch.tensor(values, device=device)


# Geometry ------------------------------------------------------------------------------------------------------------


def crop_boxes(
    u: Tensor, height: int | Tensor, width: int | Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomResizedCrop's boxes: (top, left, height, width), each float32 (B,) holding whole pixels.

    An area in ``scale`` (share of the image) and an aspect ratio in ``ratio`` (width to height, uniform in its logarithm)
    are tried ten times until the box fits, else the largest central box of an allowed ratio is taken, as in torchvision.

    Args:
        u: uniform numbers in [0, 1), (B, 22): ten areas, ten ratios, and the place.
        height, width: of the images in pixels, one for all or float32 (B,).
    """
    if not isinstance(height, Tensor):
        height, width = torch.full_like(u[:, 0], height), torch.full_like(u[:, 0], width)
    area = (height * width)[:, None] * (scale[0] + u[:, :_CROP_ATTEMPTS] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + u[:, _CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS] * (high - low))
    box_width, box_height = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (box_width > 0) & (box_width <= width[:, None]) & (box_height > 0) & (box_height <= height[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    box_width, box_height = box_width.gather(1, first)[:, 0], box_height.gather(1, first)[:, 0]

    clamped = (width / height).clamp(*ratio)
    none = ~fits.any(dim=1)
    box_width = torch.where(none, torch.minimum(width, (height * clamped).round()), box_width)
    box_height = torch.where(none, torch.minimum(height, (width / clamped).round()), box_height)
    top = torch.where(none, (height - box_height).div(2).floor(), (u[:, 20] * (height - box_height + 1)).floor_())
    left = torch.where(none, (width - box_width).div(2).floor(), (u[:, 21] * (width - box_width + 1)).floor_())
    return top, left, box_height, box_width


def resize_weights(start: Tensor, length: Tensor, size: int, extent: int, flip: Tensor | None = None) -> Tensor:
    """The matrix that resizes pixels ``start .. start + length`` of a line of ``extent`` pixels to ``size`` pixels.

    The triangle filter of Pillow's and torchvision's antialiased bilinear resize; where ``flip`` holds, back to front.

    Args:
        start, length: float32 (B,), whole pixels.

    Returns:
        float32 (B, size, extent); each row sums to 1.
    """
    out = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        out = torch.where(flip[:, None], size - out, out)
    ratio = (length / size)[:, None]
    start, end = start[:, None, None], (start + length)[:, None, None]
    centre = (start[..., 0] + out * ratio)[..., None]
    pixel = torch.arange(extent, device=start.device) + 0.5
    weights = (centre - pixel).abs_().div_(ratio.clamp(min=1.0)[..., None]).neg_().add_(1).clamp_(min=0)
    weights.mul_((pixel > start) & (pixel < end))
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def crop_resize(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop a box of each image and resize it, antialiased, to size x size; mirrored where ``flip`` holds.

    Args:
        x: float32 in [0, 1] or uint8, (B, 3, H, W); boxes as from `crop_boxes`; flip: bool (B,).

    Returns:
        float32 in [0, 1], (B, 3, size, size), contiguous.
    """
    rows = resize_weights(top, height, size, x.shape[2])
    if x.dtype == torch.uint8:
        rows.div_(255)  # here it costs least
    return _rows_and_columns(x, rows, resize_weights(left, width, size, x.shape[3], flip))


def blur_some(x: Tensor, chosen: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, mirrored at the borders, of the images where ``chosen`` (bool (B,)) holds; sigma (B,) in pixels."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    size = x.shape[-1]
    reach = max(BLUR_REACH, math.ceil(BLUR_REACH * size / 224))
    if not x.is_cuda and size > 4 * reach:  # a processor is quicker with few taps than with a product of matrices
        return x.index_copy(0, rows, _convolved(x[rows], gaussian(sigma[rows], reach)))
    offset, kernel = torch.arange(-size + 1, size, device=x.device), gaussian(sigma[rows], size - 1)
    target = (torch.arange(size, device=x.device)[:, None] + offset).abs()
    target = torch.where(target >= size, 2 * (size - 1) - target, target)
    weights = x.new_zeros(len(rows), size, size)
    weights.scatter_add_(2, target.expand(len(rows), -1, -1), kernel[:, None].expand(-1, size, -1))
    return x.index_copy(0, rows, _rows_and_columns(x[rows], weights, weights))


def gaussian(sigma: Tensor, reach: int) -> Tensor:
    """Kernels (n, 2 * reach + 1) of spread sigma (n,) in pixels; each sums to 1."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    return kernel / kernel.sum(dim=1, keepdim=True)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Each image (n, 3, H, W) with its own kernel (n, k), along columns and along rows, mirrored at the borders."""
    n, reach = len(x) * 3, kernel.shape[1] // 2
    kernel, flat = kernel.repeat_interleave(3, dim=0), x.reshape(1, n, *x.shape[2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="reflect"), kernel[:, None, None, :], groups=n)
    return F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="reflect"), kernel[:, None, :, None], groups=n).view_as(x)


def _rows_and_columns(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows (B, h, H) @ x (B, 3, H, W) @ columns^T (B, W, w): two batched products, of all three colours at a time."""
    B, C, H, W = x.shape
    h, w = rows.shape[1], columns.shape[1]
    x = torch.bmm(rows, x.transpose(1, 2).reshape(B, H, C * W).float())
    x = torch.bmm(x.view(B, h * C, W), columns.transpose(1, 2))
    return x.view(B, h, C, w).transpose(1, 2).contiguous()


# Colour --------------------------------------------------------------------------------------------------------------


def jitter_factors(u: Tensor, jitter: tuple[float, float, float, float]) -> Tensor:
    """ColorJitter's factors, (B, 4): brightness, contrast, saturation in [max(0, 1 - j), 1 + j], hue in [-j, j] turns."""
    strength = constant(jitter, u.device)
    low = torch.cat([(1 - strength[:3]).clamp(min=0), -strength[3:]])
    high = torch.cat([1 + strength[:3], strength[3:]])
    return low + u * (high - low)


def colour_matrices(x: Tensor, factors: Tensor, order: Tensor, gray: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue in each image's own order, then grayscale: one affine map per image.

    Differs from torchvision in two ways that keep it linear: values are clipped once, at the end, and the hue turns about
    the gray axis (1, 1, 1) instead of around the HSV cone. docs/DESIGN.md gives the measured difference.

    Args:
        x: float32 (B, 3, H, W) in [0, 1]; contrast needs its mean.
        factors: (B, 4) as from `jitter_factors`; order: int64 (B, 4), a permutation of 0..3 in each row.
        gray: bool (B,).

    Returns:
        matrix (B, 3, 3) and offset (B, 3, 1).
    """
    B = x.shape[0]
    brightness, contrast, saturation, hue = factors[..., None, None].unbind(1)
    eye, luma = torch.eye(3, device=x.device), constant(GRAY, x.device)
    to_gray = luma.expand(3, 3)
    steps = torch.stack(
        [eye * brightness, eye * contrast, eye * saturation + to_gray * (1 - saturation), _hue_rotation(hue)], dim=1
    )
    mean = x.mean(dim=(2, 3))[..., None]
    matrix, offset = eye.expand(B, 3, 3), x.new_zeros(B, 3, 1)
    rows = torch.arange(B, device=x.device)
    for step in order.unbind(1):
        level = luma @ (matrix @ mean + offset)  # the mean gray that contrast turns about, as the image is at this point
        chosen = steps[rows, step]
        matrix, offset = chosen @ matrix, chosen @ offset
        offset = offset + torch.where((step == 1)[:, None, None], (1 - contrast) * level[:, None], 0.0)
    final = torch.where(gray[:, None, None], to_gray, eye)
    return final @ matrix, final @ offset


def apply_colour(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Apply each image's matrix (B, 3, 3) and offset (B, 3, 1) to its colours and clip to [0, 1]."""
    return torch.baddbmm(offset, matrix, x.flatten(2)).clamp_(0, 1).view_as(x)


def _hue_rotation(turns: Tensor) -> Tensor:
    """Rotation about the gray axis (1, 1, 1) by ``turns`` (B, 1, 1) of a full turn, (B, 3, 3) on RGB; grays stay."""
    angle = turns * (2 * math.pi)
    along = torch.full((3, 3), 1 / 3, device=turns.device)  # Rodrigues' formula: what lies along the axis stays,
    across = torch.eye(3, device=turns.device) - along  # what lies across it turns
    quarter = constant(_QUARTER_TURN, turns.device) / math.sqrt(3)
    return along + across * angle.cos() + quarter * angle.sin()
