"""Scenes: what is said of every pixel and corner is what was drawn, and nothing that is named is hidden."""

import math

import pytest
import torch
from torch import nn

from tutorial_moco import scenes, shapes
from tutorial_moco.errors import UsageError
from tutorial_moco.scenes import ARROW_RICH, KEYPOINTS, draw_scenes, semantic
from tutorial_moco.shapes import SHAPE_CLASSES, draw_masks

N, SIZE, ARROW = 300, 96, SHAPE_CLASSES.index("arrow") + 1
LUMA = torch.tensor([0.299, 0.587, 0.114])


def draw_with_factors(*args, **kwargs):
    """Images and targets, and the factors of grounds and objects behind them, each object with the number of its scene."""
    parts, render = [], scenes._render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_render", lambda *args: parts.append(args[:2]) or render(*args))
        images, targets = draw_scenes(*args, **kwargs)
    for i, (_, things) in enumerate(parts):
        things["scene"] = things["scene"] + i * scenes.CHUNK
    grounds, things = ({name: torch.cat([p[name] for p in part]) for name in part[0]} for part in zip(*parts, strict=True))
    return images, targets, grounds, things


@pytest.fixture(scope="module")
def drawn():
    """Many arrows, and more objects than usual, so that they often overlap."""
    return draw_with_factors(N, seed=3, objects=(1, 6), kinds=ARROW_RICH)


def every(targets, name):
    return torch.cat([target[name] for target in targets])


def test_images_and_targets_have_the_documented_types_shapes_and_ranges(drawn):
    images, targets, _, _ = drawn
    assert images.shape == (N, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert len(targets) == N
    kinds = {
        "boxes": torch.float32,
        "labels": torch.int64,
        "masks": torch.uint8,
        "area": torch.float32,
        "keypoints": torch.float32,
    }
    for target in targets:
        k = len(target["labels"])
        assert 1 <= k <= 6
        assert {name: values.dtype for name, values in target.items()} == kinds
        shapes_of = {name: tuple(values.shape) for name, values in target.items()}
        assert shapes_of == {"boxes": (k, 4), "labels": (k,), "masks": (k, SIZE, SIZE), "area": (k,), "keypoints": (k, 5, 3)}
    assert set(every(targets, "labels").tolist()) == set(range(1, 11))
    assert set(every(targets, "masks").unique().tolist()) == {0, 1}


def test_every_number_of_objects_is_as_likely():
    counts = torch.tensor([len(target["labels"]) for target in draw_scenes(400, seed=0, size=48)[1]]).bincount()
    assert counts[0] == 0
    assert len(counts) == 5
    assert (counts[1:] - 100).abs().max() < 35  # 4 sigma
    assert {len(target["labels"]) for target in draw_scenes(5, seed=0, objects=(9, 9))[1]} == {9}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_scenes():
    n = scenes.CHUNK + 5  # past the first chunk
    images, targets = draw_scenes(n, seed=5)
    again_images, again = draw_scenes(n, seed=5)
    assert torch.equal(images, again_images)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(targets, again, strict=True) for name in a)
    other_images, other = draw_scenes(n, seed=6)
    assert (images != other_images).float().mean() > 0.9
    assert [t["labels"].tolist() for t in targets] != [t["labels"].tolist() for t in other]


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_scenes(2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_boxes_and_areas_are_those_of_the_masks(drawn):
    for target in drawn[1]:
        for mask, box, area in zip(target["masks"], target["boxes"].tolist(), target["area"].tolist(), strict=True):
            y, x = mask.nonzero().T
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert area == len(x)


def test_masks_are_the_objects_less_what_lies_on_top_and_so_disjoint(drawn):
    _, targets, _, things = drawn
    whole = draw_masks(things, SIZE)
    for scene, target in enumerate(targets):
        assert target["masks"].sum(0).max() <= 1
        above = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for mask, expected in reversed(list(zip(target["masks"].bool(), whole[things["scene"] == scene], strict=True))):
            assert torch.equal(mask, expected & ~above)
            above |= expected


@pytest.mark.parametrize("objects", [(1, 6), (9, 9)])
def test_half_of_every_object_is_visible_and_some_are_partly_hidden(drawn, objects):
    _, targets, _, things = drawn if objects == (1, 6) else draw_with_factors(40, seed=8, objects=objects)
    share = every(targets, "area") / draw_masks(things, SIZE).sum((1, 2))
    assert share.min() >= 0.5
    assert share.max() == 1
    assert 0.05 < (share < 1).float().mean() < 0.5


@pytest.mark.parametrize("n", [1, 60, 203])
def test_classes_are_balanced_to_within_one_and_shuffled(n):
    labels = every(draw_scenes(n, seed=2, size=48)[1], "labels") - 1
    counts = labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert n == 1 or not torch.equal(labels, torch.arange(len(labels)) % 10)


def test_a_kind_that_is_named_more_often_is_drawn_more_often():
    assert ARROW_RICH.count("arrow") * 2 == len(ARROW_RICH)
    labels = every(draw_scenes(150, seed=0, size=48, kinds=ARROW_RICH)[1], "labels")
    counts = labels.bincount(minlength=11)[1:]
    assert counts[ARROW - 1] / counts.sum() == pytest.approx(0.5, abs=0.02)
    assert counts[torch.arange(10) != ARROW - 1].min() > 0
    only = every(draw_scenes(20, seed=0, size=48, kinds=("ring", "star"))[1], "labels")
    assert {SHAPE_CLASSES[label - 1] for label in only.tolist()} == {"ring", "star"}


# ---- looks


def test_visible_pixels_have_the_objects_colour_and_the_others_the_grounds(drawn):
    images, targets, grounds, things = drawn
    at = (torch.arange(SIZE) + 0.5 - SIZE / 2) / (SIZE / 2)
    light = grounds["light"][:, :1, None] * at + grounds["light"][:, 1:, None] * at[:, None]
    pixels = images / 255 - light[:, None]

    def mean_error(pixels, where, colour):
        inside = 1 - nn.functional.max_pool2d(1 - where[:, None].float(), 3, 1, 1)  # eroded by a pixel: no edge
        area = inside.sum((1, 2, 3))
        mean = (pixels * inside).sum((2, 3)) / area[:, None].clamp_min(1)
        return (mean - colour).abs().amax(1)[area >= 9]  # the thinnest crescents hold hardly any inner pixel

    own = mean_error(pixels[things["scene"]], every(targets, "masks"), things["colour"])
    assert len(own) > 0.95 * len(things["scene"])
    assert own.mean() < 0.03
    free = torch.stack([target["masks"].sum(0) == 0 for target in targets])
    assert mean_error(pixels, free, grounds["background"]).mean() < 0.02


def test_every_object_differs_from_its_ground_in_luminance_as_shapes_do(drawn):
    _, _, grounds, things = drawn
    gap = (things["colour"] - grounds["background"][things["scene"]]) @ LUMA
    assert gap.abs().min() >= shapes.LUMINANCE_GAP[0] - 1e-4
    assert gap.abs().max() <= shapes.LUMINANCE_GAP[1] + 1e-4
    assert 0.4 < (gap > 0).float().mean() < 0.6
    luminance = torch.cat([things["colour"], grounds["background"]]) @ LUMA
    assert luminance.min() >= shapes.LUMINANCE_LIMITS[0] - 1e-4
    assert luminance.max() <= shapes.LUMINANCE_LIMITS[1] + 1e-4


def test_objects_lie_everywhere_in_the_frame(drawn):
    centre = drawn[3]["centre"]
    assert (centre.mean(0) - SIZE / 2).abs().max() < 3
    assert centre.min() < 12
    assert centre.max() > SIZE - 12
    assert torch.histc(centre, 4, 0, SIZE).min() > 0.1 * centre.numel()


def test_objects_have_about_the_pixels_they_have_in_a_small_image_of_shapes(drawn):
    things = drawn[3]
    assert things["radius"].min() >= 0.7 * shapes.RADIUS[0]
    assert things["radius"].max() <= 1.1 * shapes.RADIUS[1]
    assert things["radius"].mean() == pytest.approx(0.9 * 11.5, rel=0.03)
    reach = (things["centre"] - SIZE / 2).abs().amax(1) + things["radius"]
    assert reach.max() <= SIZE / 2 + shapes.OVERHANG + 1e-3
    assert draw_with_factors(1, seed=3, size=192)[3]["radius"] == pytest.approx(2 * draw_with_factors(1, seed=3)[3]["radius"])


# ---- corners


def one_arrow(turn, **changes):
    """The factors of an arrow turned clockwise, and a scene that shows it alone."""
    things = {
        "class": torch.tensor([ARROW - 1]), "centre": torch.tensor([[40.0, 50.0]]), "radius": torch.tensor([10.0]),
        "rotation": torch.tensor([turn]), "squeeze": torch.ones(1), "squeeze_angle": torch.zeros(1),
        "scene": torch.zeros(1, dtype=torch.int64), "layer": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    things |= changes
    owner = torch.full((1, SIZE, SIZE), -1, dtype=torch.int8)
    owner[0, draw_masks(things, SIZE)[0]] = 0
    return things, owner


@pytest.mark.parametrize(
    ("turn", "expected"),
    [  # by hand, from the outline: tip at 1, barbs at (0.1, 0.85), tails at (-0.95, 0.27) radii
        (0.0, [(50, 50), (41, 41.5), (41, 58.5), (30.5, 47.3), (30.5, 52.7)]),  # to the right: left is up
        (1.5 * math.pi, [(40, 40), (31.5, 49), (48.5, 49), (37.3, 59.5), (42.7, 59.5)]),  # up: left is left
        (0.5 * math.pi, [(40, 60), (48.5, 51), (31.5, 51), (42.7, 40.5), (37.3, 40.5)]),  # down: left is right
    ],
)
def test_corners_of_an_arrow_by_hand(turn, expected):
    found = scenes._keypoints(*one_arrow(turn))[0]
    assert KEYPOINTS == ("tip", "left barb", "right barb", "left tail", "right tail")
    assert found[:, :2].flatten().tolist() == pytest.approx([v for point in expected for v in point], abs=1e-4)
    assert found[:, 2].tolist() == [2] * 5


def test_a_squeeze_moves_corners_along_its_axis_only():
    """Half as wide along y, from which an arrow is turned: across one to the right, along one that points down."""
    squeezed = {"squeeze": torch.tensor([0.5]), "squeeze_angle": torch.tensor([0.5 * math.pi])}
    for turn, expected in ((-0.5 * math.pi, [(50, 50), (41, 45.75)]), (0.0, [(40, 55), (48.5, 50.5)])):
        found = scenes._keypoints(*one_arrow(turn, **squeezed))[0, :2, :2]
        assert found.flatten().tolist() == pytest.approx([v for point in expected for v in point], abs=1e-4)


def test_corners_lie_on_the_outline_and_left_is_left(drawn):
    _, targets, _, things = drawn
    points = every(targets, "keypoints")
    arrows = every(targets, "labels") == ARROW
    assert points[~arrows].abs().max() == 0
    whole = arrows & (points[:, :, 2] > 0).all(1)
    assert whole.sum() > 200
    part = {name: values[whole] for name, values in things.items()}
    for i in range(5):  # an image of one pixel, moved so that its centre is the corner
        moved = part | {"centre": part["centre"] - points[whole, i, :2] + 0.5}
        assert shapes._signed_distance(moved, 1).abs().max() < 1e-3
    x, y, _ = points[whole].unbind(2)
    ahead_x, ahead_y = x[:, :1] - x[:, 3:].mean(1, keepdim=True), y[:, :1] - y[:, 3:].mean(1, keepdim=True)
    side = ahead_x * (y - y[:, :1]) - ahead_y * (x - x[:, :1])  # above 0 to the right, since y runs down
    assert side[:, [1, 3]].max() < 0
    assert side[:, [2, 4]].min() > 0


def test_visibility_agrees_with_the_masks_and_the_frame(drawn):
    _, targets, _, things = drawn
    seen = torch.zeros(3, dtype=torch.int64)
    for target in targets:
        for row, points in enumerate(target["keypoints"]):
            if target["labels"][row] == ARROW:
                later = target["masks"][row + 1 :].sum(0)
                for x, y, visible in points.tolist():
                    seen[int(visible)] += 1
                    assert visible == 0 or visible == 2 - int(later[int(y), int(x)])
                    assert visible > 0 or x == y == 0
    arrows = every(targets, "labels") == ARROW
    alone = {name: values[arrows] for name, values in things.items()}
    alone["scene"], alone["layer"] = (torch.zeros_like(alone["scene"]) for _ in range(2))
    wide = alone | {"centre": alone["centre"] + 100}  # the same arrows in a frame that holds them all
    x, y, _ = scenes._keypoints(wide, torch.full((1, 300, 300), -1)).unbind(2)
    outside = (x < 100) | (x >= 100 + SIZE) | (y < 100) | (y >= 100 + SIZE)
    assert torch.equal(outside, every(targets, "keypoints")[arrows][:, :, 2] == 0)
    assert seen.min() > 20


# ---- pixels' classes, and what is refused


def test_semantic_names_the_class_of_each_pixel(drawn):
    for target in drawn[1][:50]:
        found = semantic(target)
        assert found.dtype == torch.int64
        expected = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            expected[mask == 1] = label
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"n": 0}, "n=0"),
        ({"size": 47}, "size=47"),
        ({"objects": (0, 3)}, r"objects=\(0, 3\)"),
        ({"objects": (3, 2)}, r"objects=\(3, 2\)"),
        ({"objects": (1, 10)}, r"in 1\.\.9"),
        ({"kinds": ("disc", "moon")}, "'moon'.*take one or more of disc, ring"),
        ({"kinds": ()}, r"kinds=\(\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(wrong, names):
    with pytest.raises(UsageError, match=names):
        draw_scenes(**{"n": 2, "seed": 0, **wrong})
