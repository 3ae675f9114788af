"""Views: against torchvision's functions for fixed parameters, its distributions for random ones, and the laws of ours."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from tutorial_moco import augment
from tutorial_moco.augment import AUGMENTATIONS, Augmentation

NOTHING = AUGMENTATIONS["none"][0]
SQUARE = (0.75, 4 / 3)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_images(n=8, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def smooth_images(n=16, size=16, seed=0, low=0.1, high=0.9):
    coarse = uniform(n, 3, 3, 3, seed=seed) * (high - low) + low
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)


def view_of(images, recipe, index=None, **key):
    index = torch.arange(len(images)) if index is None else index
    return augment.random_view(images, index, recipe, **{"seed": 0, "epoch": 0, "view": 0, **key})


def denormalised(view):
    return view * torch.tensor(augment.STD)[:, None, None] + torch.tensor(augment.MEAN)[:, None, None]


# ---- geometry


@pytest.mark.parametrize("size", [5, 16, 40])
@pytest.mark.parametrize("mirrored", [False, True])
def test_crop_and_resize_are_torchvisions(size, mirrored):
    x = uniform(6, 3, 24, 20)
    boxes = [(0, 0, 24, 20), (3, 5, 7, 11), (10, 0, 1, 1), (23, 19, 1, 1), (2, 2, 20, 3), (0, 7, 24, 13)]
    top, left, height, width = torch.tensor(boxes).float().unbind(1)
    found = augment.crop_resize(x, top, left, height, width, torch.full((6,), mirrored), size)
    for image, box, view in zip(x, boxes, found, strict=True):
        expected = TF.resized_crop(image, *box, [size, size], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(view, TF.horizontal_flip(expected) if mirrored else expected, rtol=0, atol=2e-6)


def test_only_the_chosen_images_are_mirrored():
    x, flip = uniform(4, 3, 9, 9), torch.tensor([True, False, False, True])
    zero, nine = torch.zeros(4), torch.full((4,), 9.0)
    found = augment.crop_resize(x, zero, zero, nine, nine, flip, 9)
    torch.testing.assert_close(found, torch.where(flip[:, None, None, None], x.flip(3), x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extent", [8, 33])
@pytest.mark.parametrize("size", [3, 8, 50])
def test_rows_of_the_resize_matrix_sum_to_one_and_stay_in_the_box(extent, size):
    start, length = torch.tensor([0.0, 2.0, extent - 1.0]), torch.tensor([float(extent), 5.0, 1.0])
    weights = augment.resize_weights(start, length, size, extent)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, size))
    assert (weights >= 0).all()
    pixel = torch.arange(extent)
    outside = (pixel < start[:, None]) | (pixel >= (start + length)[:, None])
    assert (weights.transpose(1, 2)[outside] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.5, 0.6)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    n = 3000
    top, left, h, w = augment.crop_boxes(uniform(n, 22, seed=1), height, width, scale, SQUARE)
    for whole in (top, left, h, w):
        assert torch.equal(whole, whole.round())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    if height == width:  # there is practically always a box that fits: area and ratio in range, up to whole pixels
        assert ((h - 0.5) * (w - 0.5) <= scale[1] * height * width + 1e-3).all()
        assert ((h + 0.5) * (w + 0.5) >= scale[0] * height * width - 1e-3).all()
        assert ((w - 0.5) / (h + 0.5) <= SQUARE[1]).all()
        assert ((w + 0.5) / (h - 0.5) >= SQUARE[0]).all()
    torch.manual_seed(0)
    image, crop = torch.zeros(3, height, width), v2.RandomResizedCrop(8, scale=scale, ratio=SQUARE, antialias=True)
    theirs = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).float()
    ours = torch.stack([top, left, h, w], dim=1)
    for name, statistic in {
        "area": lambda b: b[:, 2] * b[:, 3], "ratio": lambda b: (b[:, 3] / b[:, 2]).log(), "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1], "centre": lambda b: b[:, 0] + b[:, 2] / 2, "spread": lambda b: (b[:, 2] * b[:, 3]).square(),
    }.items():  # fmt: skip
        a, b = statistic(ours), statistic(theirs)
        sigma = math.sqrt((a.var() + b.var()).item() / n)
        assert abs(a.mean() - b.mean()).item() < 4.5 * sigma + 1e-6, name


@pytest.mark.parametrize(("height", "width"), [(8, 64), (64, 8), (20, 21)])
def test_a_box_that_never_fits_becomes_torchvisions_central_one(height, width):
    scale = (0.9, 1.0) if max(height, width) == 64 else (3.0, 3.0)
    found = augment.crop_boxes(uniform(5, 22), height, width, scale, SQUARE)
    crop = v2.RandomResizedCrop(8, scale=scale, ratio=SQUARE, antialias=True).make_params([torch.zeros(3, height, width)])
    for row in torch.stack(found, dim=1).tolist():
        assert row == [crop["top"], crop["left"], crop["height"], crop["width"]]


# ---- colour


def with_one_factor(x, which, value):
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(x), 1)
    factors[:, which] = value
    order = torch.arange(4).repeat(len(x), 1)
    return augment.apply_colour(x, *augment.colour_matrices(x, factors, order, torch.zeros(len(x), dtype=torch.bool)))


@pytest.mark.parametrize("value", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(("which", "name"), [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_brightness_contrast_and_saturation_are_torchvisions(which, name, value):
    x = uniform(8, 3, 12, 12)
    expected = torch.stack([getattr(TF, f"adjust_{name}")(image, value) for image in x])
    torch.testing.assert_close(with_one_factor(x, which, value), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_operations_is_torchvisions(order):
    x, values = smooth_images(low=0.3, high=0.6), (1.2, 0.7, 1.3)
    expected = x
    for which in order:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[which]
        expected = torch.stack([adjust(image, values[which]) for image in expected])
    assert 0 < expected.min() < expected.max() < 1  # nothing was clipped on the way, where ours clips at the end
    n = len(x)
    factors, order = torch.tensor([[*values, 0.0]]).repeat(n, 1), torch.tensor([[*order, 3]]).repeat(n, 1)
    found = augment.apply_colour(x, *augment.colour_matrices(x, factors, order, torch.zeros(n, dtype=torch.bool)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("hue", [-0.1, -0.05, 0.0, 0.05, 0.1])
def test_a_small_turn_of_the_hue_is_near_torchvisions(hue):
    """On muted colours: torchvision goes around the HSV cone, and the difference grows with the saturation."""
    x = smooth_images(64, low=0.38, high=0.62)
    expected = torch.stack([TF.adjust_hue(image, hue) for image in x])
    difference = (with_one_factor(x, 3, hue) - expected).abs().mean()
    assert difference < (0.014 if hue else 1e-5)
    assert not hue or (with_one_factor(x, 3, -hue) - expected).abs().mean() > 2 * difference  # the right way round


def test_turning_the_hue_keeps_grays_and_intensity_and_a_third_turns_red_into_green():
    gray = uniform(4, 1, 8, 8).expand(4, 3, 8, 8)
    torch.testing.assert_close(with_one_factor(gray, 3, 0.37), gray, rtol=0, atol=1e-5)
    x = smooth_images(low=0.4, high=0.6)
    torch.testing.assert_close(with_one_factor(x, 3, 0.2).sum(1), x.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(with_one_factor(x, 3, 1.0), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(with_one_factor(x, 3, 1 / 3), x.roll(1, dims=1), rtol=0, atol=1e-5)


def test_grayscale_is_torchvisions_and_equal_in_all_colours():
    x = uniform(4, 3, 8, 8)
    nothing, order = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(4, 1), torch.arange(4).repeat(4, 1)
    found = augment.apply_colour(x, *augment.colour_matrices(x, nothing, order, torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close(found, TF.rgb_to_grayscale(x, num_output_channels=3), rtol=0, atol=2e-4)
    view = denormalised(view_of(random_images(), dataclasses.replace(AUGMENTATIONS["small"][0], grayscale=1.0)))
    torch.testing.assert_close(view, view[:, :1].expand_as(view), rtol=0, atol=1e-5)


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4, 0.1), (0.2, 0.3, 1.5, 0.5), (0.0, 0.0, 0.0, 0.0)])
def test_jitter_factors_fill_colorjitters_ranges(jitter):
    transform = v2.ColorJitter(*jitter)
    ranges = [getattr(transform, name) for name in ("brightness", "contrast", "saturation", "hue")]
    ranges = [found or (default, default) for found, default in zip(ranges, (1.0, 1.0, 1.0, 0.0), strict=True)]
    ends = augment.jitter_factors(torch.tensor([[0.0] * 4, [1.0] * 4]), jitter)
    torch.testing.assert_close(ends, torch.tensor(ranges, dtype=torch.float32).T, rtol=0, atol=1e-6)
    middle = augment.jitter_factors(torch.full((1, 4), 0.5), jitter)
    torch.testing.assert_close(middle, ends.mean(dim=0, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_is_torchvisions_and_touches_the_chosen_only(sigma):
    x, chosen = uniform(5, 3, 16, 16), torch.tensor([True, False, True, True, False])
    found = augment.blur_some(x, chosen, torch.full((5,), sigma))
    expected = TF.gaussian_blur(x, kernel_size=[31, 31], sigma=[sigma, sigma])
    torch.testing.assert_close(found, torch.where(chosen[:, None, None, None], expected, x), rtol=0, atol=1e-5)
    assert torch.equal(found[~chosen], x[~chosen])
    assert augment.blur_some(x, torch.zeros(5, dtype=torch.bool), torch.ones(5)) is x


def test_solarize_is_torchvisions():
    images = random_images()
    view = view_of(images, dataclasses.replace(NOTHING, solarize=1.0))
    torch.testing.assert_close(denormalised(view), TF.solarize(images, 128) / 255, rtol=0, atol=1e-5)


# ---- the whole view


def test_the_augmentation_that_does_nothing_gives_the_plain_view():
    images = random_images()
    torch.testing.assert_close(view_of(images, NOTHING), augment.plain_view(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(denormalised(augment.plain_view(images)), images / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [None, 12])
def test_views_are_float32_of_the_asked_size_in_channels_last_memory_and_leave_the_images_alone(name, size):
    images = random_images()
    views = augment.two_views(images, torch.arange(8), name, size=size)
    for view in views:
        assert view.shape == (8, 3, size or 16, size or 16)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        values = denormalised(view)
        assert values.min() > -1e-5
        assert values.max() < 1 + 1e-5
    assert torch.equal(images, random_images())
    assert (name == "none") == torch.allclose(*views)


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "cifar", "small", "shapes"])
def test_a_view_depends_on_its_image_and_key_and_not_on_the_batch_around_it(name):
    images, index = random_images(20), torch.arange(100, 120)
    key = {"seed": 3, "epoch": 4}
    whole = augment.two_views(images, index, name, **key)
    order = torch.tensor([7, 0, 19, 3])
    some = augment.two_views(images[order], index[order], name, **key)
    alone = augment.two_views(images[7:8], index[7:8], name, **key)
    for view, part, single in zip(whole, some, alone, strict=True):
        torch.testing.assert_close(part, view[order], rtol=0, atol=2e-5)
        torch.testing.assert_close(single, view[7:8], rtol=0, atol=2e-5)


def test_an_epoch_may_be_a_tensor_as_a_recorded_step_needs_it():
    images, index = random_images(), torch.arange(8)
    for number, tensor in zip(
        augment.two_views(images, index, "cifar", epoch=3),
        augment.two_views(images, index, "cifar", epoch=torch.tensor(3)), strict=True,
    ):  # fmt: skip
        assert torch.equal(number, tensor)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"index": torch.arange(8) + 8}])
def test_each_part_of_the_key_gives_another_view(change):
    images, recipe = random_images(), AUGMENTATIONS["cifar"][0]
    differs = (view_of(images, recipe) - view_of(images, recipe, **change)).abs().amax(dim=(1, 2, 3))
    assert (differs > 1e-2).all()
    assert torch.equal(view_of(images, recipe), view_of(images, recipe))


@pytest.mark.parametrize(
    ("change", "share"),
    [
        ({"flip": 0.5}, 0.5),
        ({"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8}, 0.8),
        ({"grayscale": 0.2}, 0.2),
        ({"blur": 0.5, "blur_sigma": (30.0, 60.0)}, 0.5),
        ({"blur": 0.1, "blur_sigma": (30.0, 60.0)}, 0.1),
        ({"solarize": 0.2}, 0.2),
        ({"flip": 0.0}, 0.0),
        ({"flip": 1.0}, 1.0),
    ],
    ids=str,
)
def test_each_operation_happens_as_often_as_its_probability_says(change, share):
    images, n = random_images(4000, size=8), 4000
    view = view_of(images, dataclasses.replace(NOTHING, **change))
    changed = ((view - augment.plain_view(images)).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean().item()
    assert abs(changed - share) <= 4.5 * math.sqrt(share * (1 - share) / n)


def test_operations_are_drawn_independently_of_each_other_and_of_the_other_view():
    images = random_images(4000, size=8)
    recipe = {"flip": {"flip": 0.5}, "gray": {"grayscale": 0.5}, "solarize": {"solarize": 0.5}}
    plain = augment.plain_view(images)
    events = {
        f"{name} {view}": ((view_of(images, dataclasses.replace(NOTHING, **change), view=view) - plain).abs() > 1e-3).flatten(1)
        for name, change in recipe.items()
        for view in (0, 1)
    }
    events = {name: differs.any(dim=1).float() for name, differs in events.items()}
    for a, b in itertools.combinations(events, 2):
        assert abs(torch.corrcoef(torch.stack([events[a], events[b]]))[0, 1]) < 0.07, (a, b)


def test_blur_is_scaled_with_the_size_of_the_view():
    """A sigma of 28 pixels of 224 is one of 1 pixel of 8."""
    images = random_images(size=8)
    found = view_of(images, dataclasses.replace(NOTHING, blur=1.0, blur_sigma=(28.0, 28.0)))
    expected = TF.gaussian_blur(images / 255, kernel_size=[15, 15], sigma=[1.0, 1.0])
    torch.testing.assert_close(denormalised(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [96, 224, 448])
def test_a_strong_blur_is_whole_whatever_the_size_of_the_view(size):
    images = random_images(n=2, size=size)
    found = view_of(images, dataclasses.replace(NOTHING, blur=1.0, blur_sigma=(2.0, 2.0)))
    sigma = 2 * size / 224
    expected = TF.gaussian_blur(images / 255, kernel_size=[65, 65], sigma=[sigma, sigma])
    torch.testing.assert_close(denormalised(found), expected, rtol=0, atol=1e-4)


def test_the_recipes_say_what_their_papers_say():
    v1, v2_, v3 = (AUGMENTATIONS[name] for name in ("v1", "v2", "v3"))
    assert v1[0] == v1[1] == Augmentation((0.2, 1.0), SQUARE, (0.4, 0.4, 0.4, 0.4), 1.0, 0.2)
    assert v2_[0] == v2_[1] == Augmentation((0.2, 1.0), SQUARE, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur=0.5)
    common = Augmentation((0.08, 1.0), SQUARE, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert v3 == (dataclasses.replace(common, blur=1.0), dataclasses.replace(common, blur=0.1, solarize=0.2))
    assert all(recipe.blur_sigma == (0.1, 2.0) and recipe.flip == 0.5 for recipe in (*v1, *v2_, *v3))
