"""The embedded data: what every image is, and that only the outline gives its class away."""

import math

import pytest
import torch
from torch import nn

from tutorial_moco import shapes
from tutorial_moco.errors import UsageError
from tutorial_moco.shapes import SHAPE_CLASSES, TEXTURE_KINDS, boxes, draw_masks, draw_shapes

LUMA = torch.tensor([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def drawn():
    return draw_shapes(2000, seed=3)


def test_images_and_factors_have_the_documented_types_shapes_and_ranges(drawn):
    images, labels, factors = drawn
    assert images.shape == (2000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(labels, factors["class"])
    assert all(len(values) == 2000 for values in factors.values())
    for name in ("centre", "light", "texture_phase"):
        assert factors[name].shape == (2000, 2)
    for name in ("colour", "background"):
        assert factors[name].shape == (2000, 3)
        assert factors[name].min() >= 0
        assert factors[name].max() <= 1
    for name in ("rotation", "hue", "squeeze_angle", "texture_angle"):
        assert factors[name].min() >= 0
        assert 6 < factors[name].max() <= 2 * math.pi
    assert set(factors["texture"].tolist()) == set(range(len(TEXTURE_KINDS)))
    reach = (factors["centre"] - 16).abs().amax(1) + factors["radius"]
    assert reach.max() <= 16 + shapes.OVERHANG + 1e-3


@pytest.mark.parametrize("n", [1, 7, 25, 1003])
def test_classes_are_balanced_to_within_one_and_shuffled(n):
    _, labels, _ = draw_shapes(n, seed=0)
    counts = labels.bincount(minlength=len(SHAPE_CLASSES))
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    assert n < 10 or not torch.equal(labels, torch.arange(n) % 10)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images():
    n = shapes.CHUNK + 9  # past the first chunk
    images, labels, factors = draw_shapes(n, seed=5)
    again = draw_shapes(n, seed=5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert all(torch.equal(factors[name], again[2][name]) for name in factors)
    other = draw_shapes(n, seed=6)
    assert not torch.equal(labels, other[1])
    assert (images != other[0]).float().mean() > 0.9


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_shapes(5, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_masks_cover_the_drawn_object(drawn):
    images, _, factors = drawn
    masks = draw_masks(factors)
    inside = 1 - torch.nn.functional.max_pool2d(1 - masks[:, None].float(), 3, 1, 1)  # eroded by a pixel: no edge
    outside = 1 - torch.nn.functional.max_pool2d(masks[:, None].float(), 3, 1, 1)
    x = (torch.arange(32) + 0.5 - 16) / 16
    light = factors["light"][:, :1, None] * x + factors["light"][:, 1:, None] * x[:, None]
    pixels = images / 255 - light[:, None]
    for where, name in ((inside, "colour"), (outside, "background")):
        area = where.sum((1, 2, 3))
        mean = (pixels * where).sum((2, 3)) / area[:, None].clamp_min(1)
        error = (mean - factors[name]).abs().amax(1)[area >= 9]  # the thinnest crescents hold hardly any inner pixel
        assert len(error) > 1900
        assert error.mean() < 0.02
        assert error.quantile(0.99) < 0.12  # the rest is light clipped at black or white


def test_masks_of_chosen_rows_are_the_same_masks(drawn):
    factors = drawn[2]
    rows = torch.tensor([1999, 3, 600])
    assert torch.equal(draw_masks({k: v[rows] for k, v in factors.items()}), draw_masks(factors)[rows])


def test_areas_are_those_of_the_outlines():
    """Against geometry done by hand, for upright objects in a large image."""
    _, _, factors = draw_shapes(10, seed=0, size=256)
    order = factors["class"].argsort()
    factors = {name: values[order] for name, values in factors.items()}
    factors["centre"][:], factors["radius"][:], factors["squeeze"][:], factors["rotation"][:] = 128, 100, 1, 0.3
    area = dict(zip(SHAPE_CLASSES, (draw_masks(factors, 256).sum((1, 2)) / 100**2).tolist(), strict=True))
    assert area["disc"] == pytest.approx(math.pi * 0.85**2, rel=0.01)
    assert area["ring"] == pytest.approx(math.pi * (0.92**2 - 0.48**2), rel=0.01)
    assert area["triangle"] == pytest.approx(math.sqrt(27) / 4, rel=0.01)
    assert area["square"] == pytest.approx(1.44**2, rel=0.01)
    assert area["star"] == pytest.approx(10 * 0.5 * 0.42 * math.sin(math.pi / 5), rel=0.01)
    assert area["cross"] == pytest.approx(2 * 1.9 * 0.56 - 0.56**2, rel=0.01)
    assert area["arrow"] == pytest.approx(0.9 * 0.85 + 1.05 * 0.54, rel=0.01)
    assert area["hourglass"] == pytest.approx(1.6 * 0.75, rel=0.01)


def test_boxes_hold_their_masks_and_touch_them(drawn):
    masks = draw_masks(drawn[2])
    found = boxes(masks)
    assert found.shape == (2000, 4)
    for mask, (x0, y0, x1, y1) in zip(masks[:200], found[:200].int().tolist(), strict=True):
        part = mask[y0:y1, x0:x1]
        assert part.sum() == mask.sum()
        assert part[0].any()
        assert part[-1].any()
        assert part[:, 0].any()
        assert part[:, -1].any()


def test_object_and_background_differ_in_luminance_both_ways_round(drawn):
    gap = (drawn[2]["colour"] - drawn[2]["background"]) @ LUMA
    assert gap.abs().min() >= shapes.LUMINANCE_GAP[0] - 1e-4
    assert gap.abs().max() <= shapes.LUMINANCE_GAP[1] + 1e-4
    assert 0.45 < (gap > 0).float().mean() < 0.55


def knn_accuracy(train, train_labels, test, test_labels, k):
    train, test = (nn.functional.normalize(x.flatten(1).float(), dim=1) for x in (train, test))
    votes = nn.functional.one_hot(train_labels[(test @ train.T).topk(k).indices], 10).sum(1)
    return (votes.argmax(1) == test_labels).float().mean().item()


@pytest.mark.parametrize("k", [20, 200])
def test_raw_pixels_say_little_about_the_class(k):
    train, train_labels, _ = draw_shapes(4000, seed=1)
    test, test_labels, _ = draw_shapes(1000, seed=2)
    assert 0.10 < knn_accuracy(train, train_labels, test, test_labels, k) < 0.35


def test_the_other_factors_say_nothing_about_the_class():
    _, labels, factors = draw_shapes(6000, seed=4)
    known = [values.float().reshape(6000, -1) for name, values in factors.items() if name != "class"]
    known = torch.cat([*known, *(values.cos() for values in known)], 1)
    known = (known - known.mean(0)) / known.std(0)
    assert knn_accuracy(known[:5000], labels[:5000], known[5000:], labels[5000:], 20) < 0.14  # 4 sigma above chance
    weights = torch.linalg.lstsq(known[:5000], nn.functional.one_hot(labels[:5000], 10).float()).solution
    assert ((known[5000:] @ weights).argmax(1) == labels[5000:]).float().mean() < 0.14


def test_a_larger_image_shows_the_same_objects_larger():
    small, large = (draw_shapes(50, seed=9, size=size)[2] for size in (32, 64))
    assert torch.allclose(large["radius"], 2 * small["radius"])
    assert torch.allclose(large["centre"], 2 * small["centre"])
    ratio = draw_masks(large, 64).sum((1, 2)) / draw_masks(small).sum((1, 2))
    assert ratio.mean() == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(("n", "size", "names"), [(0, 32, "n=0"), (4, 15, "size=15")])
def test_what_cannot_be_drawn_is_refused_by_name(n, size, names):
    with pytest.raises(UsageError, match=names):
        draw_shapes(n, seed=0, size=size)
