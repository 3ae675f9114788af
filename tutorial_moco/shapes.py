"""Shapes: an image set drawn by code, with everything about every image known.

Ten classes of object told apart by their OUTLINE alone. Colour, place, size, rotation, slant, lighting and background
are drawn independently of the class, so raw pixels say little about it, while features that hold still under
augmentation can say a lot. The known factors show which invariances were learned, and give masks and boxes for free.
Geometry: x runs right and y down, in pixels; the centre of the top-left pixel is (0.5, 0.5).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from tutorial_moco.errors import UsageError

# The amounts that decide how hard the data is. Lengths are in pixels of a 32x32 image and grow with `size`.
RADIUS = (10.0, 13.0)  # so large that half the object, which is what a crop often leaves, still names its class
OVERHANG = 3.0  # how far the object's circle may leave the frame: more places to defeat raw pixels, little is cut off
SQUEEZE = (0.8, 1.0)  # width along one random axis, as if seen at a slant: costs raw pixels, spares the outline
LUMINANCE_GAP = (0.35, 0.45)  # the outline stays the strongest edge after jitter; a wide range would name the image
LUMINANCE_LIMITS = (0.18, 0.82)  # room for texture and light, so that clipping seldom eats the outline
SATURATION = (0.10, 0.60)  # share of the strongest colour possible; more makes hue the easiest way to tell images apart
LIGHT = 0.04  # largest change of luminance from centre to edge, in x and in y: more would name the image by its light
TEXTURE_CONTRAST = (0.02, 0.04)  # amplitude in luminance: visible, a tenth of the outline's step, so no identity card
TEXTURE_PERIOD = (4.0, 10.0)  # over 2 px or sampling destroys it; under the diameter or it passes for an object
NOISE = 0.1  # standard deviation per pixel and colour: exact values are worth little to raw pixels
LUMA_SAFE = ((1.402, -0.714136, 0.0), (0.0, -0.344136, 1.772))  # Cr and Cb: RGB directions that keep Rec. 601 luminance
CHUNK = 512  # images drawn at once: some 30 MB of temporaries, small enough for the caches

# Outlines: signed distance to the edge, negative inside, in units of the radius. Each is its own mirror image in the
# x axis, so they are only ever asked about y >= 0, and half an outline describes the whole.
Outline = Callable[[Tensor, Tensor], Tensor]


def _disc(x: Tensor, y: Tensor, radius: float, at: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    return torch.hypot(x - at[0], y - at[1]) - radius


def _box(x: Tensor, y: Tensor, half_length: float, half_width: float) -> Tensor:
    return torch.maximum(x.abs() - half_length, y - half_width)


def _polygon(*corners: tuple[float, float]) -> Outline:
    """A polygon from its corners with y >= 0, listed from where it leaves the x axis to where it meets it again."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nearest = torch.full_like(x, math.inf)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (x0, y0), (x1, y1) in pairwise(corners):
            dx, dy, px, py = x1 - x0, y1 - y0, x - x0, y - y0
            along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clamp_(0, 1)
            nearest = torch.minimum(nearest, (px - along * dx).square_() + (py - along * dy).square_())
            if dx:  # inside, if a ray towards larger y crosses the outline an odd number of times
                inside ^= ((x >= x0) != (x >= x1)) & (py < px * (dy / dx))
        return nearest.sqrt_() * torch.where(inside, -1.0, 1.0)

    return distance


_star = [(math.cos(0.2 * math.pi * k), math.sin(0.2 * math.pi * k), 0.42 if k % 2 else 1.0) for k in range(6)]
ARROW = ((1.0, 0.0), (0.1, 0.85), (0.1, 0.27), (-0.95, 0.27), (-0.95, 0.0))  # tip, barb, neck, tail, its middle
_heart_tip = _polygon((0.46, 0.0), (0.3, 0.42), (0.02, 0.772), (-0.95, 0.0))  # its long side touches the disc below
OUTLINES: dict[str, Outline] = {
    "disc": lambda x, y: _disc(x, y, 0.85),
    "ring": lambda x, y: _disc(x, y, 0.7).abs_() - 0.22,
    "crescent": lambda x, y: torch.maximum(_disc(x, y, 0.95), -_disc(x, y, 0.8, at=(0.45, 0.0))),
    "heart": lambda x, y: torch.minimum(_heart_tip(x, y), _disc(x, y, 0.45, at=(0.3, 0.42))),
    "triangle": _polygon((1.0, 0.0), (-0.5, math.sqrt(0.75)), (-0.5, 0.0)),
    "square": lambda x, y: _box(x, y, 0.72, 0.72),
    "star": _polygon(*((r * cos, r * sin) for cos, sin, r in _star)),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95)),
    "arrow": _polygon(*ARROW),
    "hourglass": _polygon((0.8, 0.0), (0.8, 0.6), (0.0, 0.15), (-0.8, 0.6), (-0.8, 0.0)),
}
SHAPE_CLASSES: tuple[str, ...] = tuple(OUTLINES)

# Backgrounds: values of about -1..1 from two perpendicular phases u and v in radians.
TEXTURES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "plain": lambda u, v, generator: torch.zeros_like(u),
    "stripes": lambda u, v, generator: u.sin(),
    "checks": lambda u, v, generator: u.sin() * v.sin(),
    "blobs": lambda u, v, generator: (u / 2 + 1.5 * (v / 3).sin()).sin() * (v / 2 + (u / 3).cos()).cos(),  # bent waves
    "grain": lambda u, v, generator: torch.randn(u.shape, generator=generator) / 2,
}
TEXTURE_KINDS: tuple[str, ...] = tuple(TEXTURES)


def draw_shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw `n` images of shapes with their labels and all the factors behind them.

    Args:
        n: number of images, at least 1.
        seed: the same (n, seed, size) gives the same bytes on the same processor (another kind may round a few pixels
            differently); another seed gives other images.
        size: height and width in pixels, at least 16; objects and textures grow with it.

    Returns:
        images: uint8 (n, 3, size, size), RGB in 0..255.
        labels: int64 (n,), indices into `SHAPE_CLASSES`, shuffled; class counts differ by at most one.
        factors: tensors (n,) unless said otherwise, float32 but for two; angles and phases in radians in 0..2 pi.
            Object: `class`, int64, the labels; `centre` (n, 2), x then y in pixels; `radius` in pixels; `rotation`,
            clockwise; `squeeze`, width over length, along `squeeze_angle`; `colour` (n, 3), RGB in 0..1; `hue`, its
            angle in the plane of Cr and Cb. Ground: `background` (n, 3), RGB in 0..1; `texture`, int64, indices into
            `TEXTURE_KINDS`; `texture_contrast`, amplitude in 0..1; `texture_angle`; `texture_period` in pixels;
            `texture_phase` (n, 2). Both: `light` (n, 2), change of luminance from the centre to the right and lower edge.

    Raises:
        UsageError: `n` below 1 or `size` below 16.

    Example:
        >>> images, labels, factors = draw_shapes(20, seed=0)
        >>> tuple(images.shape), labels.bincount().tolist()
        ((20, 3, 32, 32), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if n < 1 or size < 16:
        raise UsageError(f"n={n}, size={size}: n must be at least 1, and size at least 16 to tell the outlines apart")
    generator = torch.Generator().manual_seed(seed)
    factors = _draw_factors(n, size, generator)
    images = torch.cat([_render(part, size, generator) for part in _chunks(factors)])
    return images, factors["class"].clone(), factors


def draw_masks(factors: dict[str, Tensor], size: int = 32) -> Tensor:
    """Mark the pixels whose centres lie on the object, bool (n, size, size); factors and size as in `draw_shapes`."""
    return torch.cat([_signed_distance(part, size) < 0 for part in _chunks(factors)])


def boxes(masks: Tensor) -> Tensor:
    """Find each mask's box: bool (n, height, width) to float32 (n, 4), x0, y0, x1, y1 of its outermost pixels' outer edges."""
    hits = masks.any(1).byte(), masks.any(2).byte()  # columns and rows with a pixel; argmax finds the first
    return torch.stack([h.argmax(1) for h in hits] + [h.shape[1] - h.flip(1).argmax(1) for h in hits], 1).float()


def _chunks(factors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(factors["class"]), CHUNK):
        yield {name: values[start : start + CHUNK] for name, values in factors.items()}


def _draw_factors(n: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale, turn = size / 32, 2 * math.pi
    radius, hue, gap = uniform(*RADIUS) * scale, uniform(0, turn), uniform(*LUMINANCE_GAP)
    dark = LUMINANCE_LIMITS[0] + (LUMINANCE_LIMITS[1] - LUMINANCE_LIMITS[0] - gap) * uniform(0, 1)
    light_object = uniform(0, 1) < 0.5  # both ways round, or "the lighter pixels" would be the object
    reach = size / 2 - radius + OVERHANG * scale
    return {
        "class": torch.randperm(n, generator=generator) % len(OUTLINES),
        "centre": size / 2 + reach[:, None] * uniform(-1, 1, 2),
        "radius": radius,
        "rotation": uniform(0, turn),
        "squeeze": uniform(*SQUEEZE),
        "squeeze_angle": uniform(0, turn),
        "colour": _colour(torch.where(light_object, dark + gap, dark), hue, uniform(*SATURATION)),
        "hue": hue,
        "background": _colour(torch.where(light_object, dark, dark + gap), uniform(0, turn), uniform(*SATURATION)),
        "light": uniform(-LIGHT, LIGHT, 2),
        "texture": torch.randint(len(TEXTURES), (n,), generator=generator),
        "texture_contrast": uniform(*TEXTURE_CONTRAST),
        "texture_angle": uniform(0, turn),
        "texture_period": uniform(*TEXTURE_PERIOD) * scale,
        "texture_phase": uniform(0, turn, 2),
    }


def _colour(luminance: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """RGB (n, 3) of exactly this luminance; `saturation` is the share of what fits into 0..1 at this hue."""
    direction = torch.stack([hue.cos(), hue.sin()], 1) @ torch.tensor(LUMA_SAFE)
    room = torch.where(direction > 0, 1 - luminance[:, None], luminance[:, None]) / direction.abs().clamp_min(1e-6)
    return luminance[:, None] + (saturation * room.amin(1))[:, None] * direction


def _render(factors: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    pixels = _paint(_ground(factors, size, generator), factors["colour"], _signed_distance(factors, size))
    return _photograph(pixels, factors["light"], size, generator)


def _ground(factors: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Backgrounds (n, 3, size, size) with their texture, in 0..1."""
    return factors["background"][:, :, None, None] + _texture(factors, size, generator)[:, None]


def _paint(pixels: Tensor, colour: Tensor, distance: Tensor) -> Tensor:
    """Lay objects of these colours (n, 3) and signed distances (n, size, size) over the pixels, in place."""
    # Smoothstep over one pixel: a hard edge would be jagged when cropped and enlarged, a wide one blurs small corners.
    t = (0.5 - distance).clamp_(0, 1)
    return pixels.lerp_(colour[:, :, None, None], (t * t * (3 - 2 * t))[:, None])


def _photograph(pixels: Tensor, light: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Light (n, 2) falls on the pixels, in place, noise comes on top; as uint8."""
    x, y = _from_centre(torch.full((1, 2), size / 2), size)
    slope = light[:, :, None, None] / (size / 2)
    pixels += (slope[:, 0] * x + slope[:, 1] * y)[:, None]
    pixels += NOISE * torch.randn(pixels.shape, generator=generator)
    return pixels.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _texture(factors: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Luminance (n, size, size) that the texture adds to the background."""
    u, v = _turned(*_from_centre(torch.zeros(1, 2), size), factors["texture_angle"])
    waves = (2 * math.pi / factors["texture_period"])[:, None, None]
    u, v = (at * waves + factors["texture_phase"][:, i, None, None] for i, at in enumerate((u, v)))
    values = torch.empty_like(u)
    for kind, texture in enumerate(TEXTURES.values()):
        rows = factors["texture"] == kind
        values[rows] = texture(u[rows], v[rows], generator)
    return values.mul_(factors["texture_contrast"][:, None, None])


def _signed_distance(factors: dict[str, Tensor], size: int) -> Tensor:
    """Distance (n, size, size) in pixels from each pixel's centre to the outline, negative inside."""
    radius, squeeze = factors["radius"][:, None, None], factors["squeeze"][:, None, None]
    x, y = _turned(*_from_centre(factors["centre"], size), factors["squeeze_angle"])
    x, y = _turned(x / (radius * squeeze), y / radius, factors["rotation"])
    distance = torch.empty_like(x)
    for kind, outline in enumerate(OUTLINES.values()):
        rows = factors["class"] == kind
        distance[rows] = outline(x[rows], y[rows].abs())
    return distance.mul_(radius * squeeze.sqrt())  # the mean of the scales along both axes; the outline itself is exact


def _from_centre(centre: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels' centres seen from (n, 2) points: x (n, 1, size) and y (n, size, 1)."""
    at = torch.arange(size) + 0.5
    return at[None, None, :] - centre[:, :1, None], at[None, :, None] - centre[:, 1:, None]


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The same points in axes turned by `angle` (n,) radians, clockwise as seen."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x
