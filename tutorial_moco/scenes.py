"""Scenes: several of the objects of `shapes` in one image, with box, mask, class and corners of each known.

For detection, segmentation and keypoints. A scene of 96 pixels is three by three images of shapes wide, and an object in
it has about the pixels it has in one of those: so features learned there can be put to use here. What differs:

- Each object lies somewhere in a cell of its own of a grid that lies somewhere in the frame. Its cells are narrow, so that
  some objects overlap, the later on top. Where one would show less than half of itself, the whole scene is laid out anew:
  what is named can be seen.
- The ground is shared, and an object lighter or darker than it by the gap that shapes have, so each stands out. Hues of a
  scene are spread round the circle, or two objects that overlap would often pass for one.
- Only arrows have keypoints, since of all classes theirs alone are corners that can be told apart at any rotation.

Geometry as in `shapes`: x runs right and y down, in pixels; the centre of the top-left pixel is (0.5, 0.5).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tutorial_moco.errors import UsageError
from tutorial_moco.shapes import (
    ARROW,
    LUMINANCE_GAP,
    LUMINANCE_LIMITS,
    OVERHANG,
    SATURATION,
    SHAPE_CLASSES,
    _colour,
    _draw_factors,
    _ground,
    _paint,
    _photograph,
    _signed_distance,
    _turned,
    boxes,
)

SIDE = 96  # lengths are in pixels of a scene of 96 and grow with `size`
CELLS, CELL = 3, 20.0  # cells along the grid's side, and theirs: so narrow that one object in a dozen is partly covered
RESIZED = (0.7, 1.1)  # times the radius it would have in an image of shapes: sizes vary, each near one that was learned
LEAST_VISIBLE = 0.5  # share of what the frame holds of an object
CHUNK = 64  # scenes drawn at once: some 50 MB of temporaries

_TIP, _BARB, _NECK, _TAIL, _ = ARROW
# In units of the radius, as in `shapes`. Along the arrow, +x, the left hand points to -y, since y runs down.
KEYPOINT_PLACES = (_TIP, (_BARB[0], -_BARB[1]), _BARB, (_TAIL[0], -_TAIL[1]), _TAIL)
KEYPOINTS: tuple[str, ...] = ("tip", "left barb", "right barb", "left tail", "right tail")
ARROW_RICH: tuple[str, ...] = (*SHAPE_CLASSES, *("arrow",) * 8)  # `kinds` of which half are arrows

Target = dict[str, Tensor]


def draw_scenes(
    n: int, seed: int, size: int = 96, objects: tuple[int, int] = (1, 4), kinds: Sequence[str] | None = None
) -> tuple[Tensor, list[Target]]:
    """Draw `n` scenes, with what is in them in torchvision's format of targets.

    Args:
        n: number of scenes, at least 1.
        seed: the same arguments give the same bytes on the same processor; another seed gives other scenes.
        size: height and width in pixels, at least 48; all but the noise's grain grows with it.
        objects: least and most objects of a scene, in 1..9; each number between is as likely.
        kinds: names out of `SHAPE_CLASSES`, drawn equally often over all scenes; a name given twice is drawn twice as
            often, as in `ARROW_RICH`. All classes if None.

    Returns:
        images: uint8 (n, 3, size, size), RGB in 0..255.
        targets: for each scene a dictionary of its k objects, a later one on top. All but `keypoints` tell of the pixels
            one sees, those in the frame and under no other object:
            ``boxes`` float32 (k, 4), x0, y0, x1, y1 in pixels, the outer edges of the outermost pixels;
            ``labels`` int64 (k,), in 1..10, one more than the index into `SHAPE_CLASSES`: 0 is the ground;
            ``masks`` uint8 (k, size, size), 0 or 1, no pixel in two of them;
            ``area`` float32 (k,), number of pixels;
            ``keypoints`` float32 (k, 5, 3), x, y in pixels and visibility of the corners `KEYPOINTS` of an arrow, left
            and right as seen when looking towards its tip: 2 visible, 1 under another object, 0 out of the frame or of
            another class, where x and y are 0.

    Raises:
        UsageError: `n`, `size`, `objects` or `kinds` is none of the above.

    Example:
        >>> images, targets = draw_scenes(3, seed=0)
        >>> tuple(images.shape), [len(target["labels"]) for target in targets]
        ((3, 3, 96, 96), [1, 4, 2])
    """
    kinds = SHAPE_CLASSES if kinds is None else tuple(kinds)
    _check(n, size, objects, kinds)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(objects[0], objects[1] + 1, (n,), generator=generator)
    grounds, things = _draw(counts, [SHAPE_CLASSES.index(kind) for kind in kinds], size, generator)
    images, targets = [], []
    for start in range(0, n, CHUNK):
        ground = {name: values[start : start + CHUNK] for name, values in grounds.items()}
        part = {name: values[things["scene"] // CHUNK == start // CHUNK] for name, values in things.items()}
        part["scene"] = part["scene"] - start
        distance, owner = _lay_out(part, size, generator)
        images.append(_render(ground, part, distance, generator))
        targets += _targets(part, owner)
    return torch.cat(images), targets


def semantic(target: Target) -> Tensor:
    """The class of each pixel of a scene, int64 (H, W) in 0..10: 0 is the ground. The target is as from `draw_scenes`."""
    return (target["masks"] * target["labels"][:, None, None]).sum(0)


def _check(n: int, size: int, objects: tuple[int, int], kinds: tuple[str, ...]) -> None:
    if n < 1 or size < SIDE // 2:
        raise UsageError(f"n={n}, size={size}: n must be at least 1, and size at least {SIDE // 2} to tell the outlines apart")
    if not 1 <= objects[0] <= objects[1] <= CELLS**2:
        raise UsageError(f"objects={objects}: take the least and the most objects of a scene, in 1..{CELLS**2}, as (1, 4)")
    unknown = [kind for kind in kinds if kind not in SHAPE_CLASSES]
    if unknown or not kinds:
        raise UsageError(f"kinds={kinds}: take one or more of {', '.join(SHAPE_CLASSES)}")


def _draw(counts: Tensor, kinds: list[int], size: int, generator: torch.Generator) -> tuple[Target, Target]:
    """Factors of the grounds, and of all objects but for their places; ``scene`` and ``layer``, from 0, say whose they are."""
    n, total, scale = len(counts), int(counts.sum()), size / SIDE

    def uniform(low: float, high: float, many: int) -> Tensor:
        return low + (high - low) * torch.rand(many, generator=generator)

    grounds, things = (_draw_factors(many, 32, generator) for many in (n, total))
    scene = torch.arange(n).repeat_interleave(counts)
    layer = torch.arange(total) - (counts.cumsum(0) - counts)[scene]
    things |= {"scene": scene, "layer": layer, "radius": things["radius"] * scale * uniform(*RESIZED, total)}
    kind = torch.tensor(kinds)[torch.randperm(len(kinds), generator=generator)]  # or few objects were the first kinds only
    things["class"] = kind[torch.randperm(total, generator=generator) % len(kinds)]
    grounds["texture_period"] *= scale
    # Far enough from one end for the widest gap: which gap an object has is its own.
    side = torch.where(uniform(0, 1, n) < 0.5, 1.0, -1.0)
    from_end = uniform(0, LUMINANCE_LIMITS[1] - LUMINANCE_LIMITS[0] - LUMINANCE_GAP[1], n)
    luminance = torch.where(side > 0, LUMINANCE_LIMITS[0] + from_end, LUMINANCE_LIMITS[1] - from_end)
    grounds["background"] = _colour(luminance, grounds["hue"], uniform(*SATURATION, n))
    hue = uniform(0, 2 * math.pi, n)[scene] + 2 * math.pi * (layer + uniform(0, 0.5, total)) / counts[scene]
    above = luminance[scene] + side[scene] * uniform(*LUMINANCE_GAP, total)
    things["colour"] = _colour(above, hue, uniform(*SATURATION, total))
    return grounds, things


def _lay_out(things: Target, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give the objects places, as ``centre``: signed distances (m, size, size), and the layer each pixel of a scene shows.

    The second is int8 (n, size, size), -1 for the ground.
    """
    scene, layer = things["scene"], things["layer"]
    things["centre"], distance = torch.empty(len(scene), 2), torch.empty(len(scene), size, size)
    redo = torch.ones(len(scene), dtype=torch.bool)
    while redo.any():
        part = {name: values[redo] for name, values in things.items()}
        part["centre"] = things["centre"][redo] = _places(part, size, generator)
        distance[redo] = _signed_distance(part, size)
        owner = _topmost(distance < 0, scene, layer)
        visible = (owner[scene] == layer[:, None, None]).sum((1, 2))
        redo = torch.isin(scene, scene[visible < LEAST_VISIBLE * (distance < 0).sum((1, 2))])
    return distance, owner


def _places(things: Target, size: int, generator: torch.Generator) -> Tensor:
    """Centres (m, 2), each in another cell of its scene's grid."""
    scene, layer, scale = things["scene"], things["layer"], size / SIDE
    n = int(scene.max()) + 1
    cell = torch.rand(n, CELLS**2, generator=generator).argsort(1)[scene, layer]
    corner = (size - CELLS * CELL * scale) * torch.rand(n, 2, generator=generator)[scene]
    within = torch.stack([cell % CELLS, cell // CELLS], 1) + torch.rand(len(cell), 2, generator=generator)
    least = (things["radius"] - OVERHANG * scale)[:, None]  # from the frame: as little is cut off as in `shapes`
    return (corner + CELL * scale * within).clamp(least, size - least)


def _topmost(masks: Tensor, scene: Tensor, layer: Tensor) -> Tensor:
    owner = torch.full((int(scene.max()) + 1, *masks.shape[1:]), -1, dtype=torch.int8)
    for level in range(int(layer.max()) + 1):
        rows = layer == level
        owner[scene[rows]] = owner[scene[rows]].masked_fill_(masks[rows], level)
    return owner


def _render(grounds: Target, things: Target, distance: Tensor, generator: torch.Generator) -> Tensor:
    size = distance.shape[-1]
    pixels = _ground(grounds, size, generator)
    for level in range(int(things["layer"].max()) + 1):
        rows = things["layer"] == level
        at = things["scene"][rows]
        pixels[at] = _paint(pixels[at], things["colour"][rows], distance[rows])
    return _photograph(pixels, grounds["light"], size, generator)


def _targets(things: Target, owner: Tensor) -> list[Target]:
    masks = owner[things["scene"]] == things["layer"][:, None, None]
    found = {
        "boxes": boxes(masks),
        "labels": things["class"] + 1,
        "masks": masks.to(torch.uint8),
        "keypoints": _keypoints(things, owner),
        "area": masks.sum((1, 2)).float(),
    }
    parts = (values.split(things["scene"].bincount().tolist()) for values in found.values())
    return [dict(zip(found, part, strict=True)) for part in zip(*parts, strict=True)]


def _keypoints(things: Target, owner: Tensor) -> Tensor:
    """Where the corners come to lie, float32 (m, 5, 3): what `_signed_distance` does to the pixels, undone."""
    x, y = torch.tensor(KEYPOINT_PLACES).T[:, None, None]
    radius, squeeze = things["radius"][:, None, None], things["squeeze"][:, None, None]
    x, y = _turned(x, y, -things["rotation"])
    x, y = _turned(x * radius * squeeze, y * radius, -things["squeeze_angle"])
    x, y = x[:, 0] + things["centre"][:, :1], y[:, 0] + things["centre"][:, 1:]
    size = owner.shape[-1]
    there = (x >= 0) & (x < size) & (y >= 0) & (y < size) & (things["class"] == SHAPE_CLASSES.index("arrow"))[:, None]
    row, column = (at.long().clamp(0, size - 1) for at in (y, x))
    hidden = owner[things["scene"][:, None], row, column] > things["layer"][:, None]
    return torch.stack([x, y, 2.0 - hidden.float()], 2).masked_fill(~there[:, :, None], 0.0)
