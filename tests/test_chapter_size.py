"""Chapter 10: what it builds by hand agrees with the package; its checks name the mistake."""

import numpy as np
import pytest
import torch
from PIL import Image

from notebooks import checks_as_tests, functions_of
from tutorial_moco import cost, size_figures
from tutorial_moco.distributed import mine
from tutorial_moco.encoded import cut
from tutorial_moco.encoders import build_encoder
from tutorial_moco.mechanisms import MoCo
from tutorial_moco.recipes import RECIPES, Recipe
from tutorial_moco.size_checks import check_fixed_bytes, check_hours, check_rows, check_shuffled_keys


@pytest.fixture(scope="module")
def book():
    return functions_of("10_imagenet.ipynb")


def test_the_hours_by_hand_are_the_packages(book):
    for name in ("imagenet-moco-v2", "imagenet-simclr"):
        recipe = RECIPES[name]
        told = cost.estimate(recipe, 1_281_167, 8, 200.0)
        assert book["hours"](1_281_167, recipe.epochs, 200.0, 8) == pytest.approx(
            told.hours, rel=4e-3
        )  # an odd rest is left out


def test_the_bytes_by_hand_are_the_packages(book):
    recipe = Recipe(encoder="tiny", K=100_000, batch_size=2)
    count = sum(p.numel() for p in build_encoder("tiny").parameters())
    whole = cost.estimate(recipe, 1000, 1).memory_bytes
    assert book["fixed_bytes"](count, recipe.K, recipe.dim) < whole < 1.1 * book["fixed_bytes"](count, recipe.K, recipe.dim)


def test_two_crops_by_hand_are_the_packages(book, tmp_path):
    path, boxes = tmp_path / "a.png", [(1, 2, 40, 30), (5, 0, 20, 20)]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    assert (book["two_crops"](path, boxes, 16) == np.stack(cut(Image.open(path), boxes, 16))).all()


def test_a_processs_rows_by_hand_are_the_packages(book):
    index = torch.randperm(12)
    assert torch.equal(book["rows_of"](index, 0, 1), mine(index))


def test_keys_shuffled_by_hand_are_the_packages(book):
    torch.manual_seed(0)
    moco = MoCo(build_encoder("tiny", norm="split:4", dim=8), 64, shuffle=True)
    images, order = torch.randn(16, 3, 16, 16), moco.order(16)
    whole = MoCo(build_encoder("tiny", dim=8), 64)
    whole.key_encoder.load_state_dict(moco.key_encoder.state_dict())
    with torch.no_grad():
        found = book["shuffled_keys"](whole.key_encoder, images, order, 4)
    torch.testing.assert_close(found, moco.encode_keys(images), rtol=1e-4, atol=1e-5)


def test_a_network_costs_nothing_alone_and_more_with_each(book):
    assert book["speed_up"](1, 10) == pytest.approx(1)
    shares = [book["speed_up"](W, 10) / W for W in (1, 2, 8, 64)]
    assert shares == sorted(shares, reverse=True)
    assert book["speed_up"](64, 1e9) == pytest.approx(64, rel=1e-3)


def test_what_was_measured_is_shipped_and_drawn():
    result = size_figures.load_scale()
    assert {"pictures", "training", "keys", "batches", "processes", "bytes"} <= set(result)
    rates = result["pictures"]["pictures_per_second_and_core"]
    assert rates["torchvision"] < rates["pillow_blur"] < rates["ours"] < rates["crops_alone"]  # as the chapter says
    size_figures.measured(result)


# Checks --------------------------------------------------------------------------------------------------------------


def right_hours(images, epochs, rate, gpus):
    return images * epochs / rate / gpus / 3600


def right_bytes(weights, K, C):
    return 4 * (4 * weights + K * C)


def right_rows(index, r, W):
    return index.chunk(W)[r]


def right_keys(encode, images, order, W):
    return torch.cat([encode(part) for part in images[order].chunk(W)])[order.argsort()]


def in_parts(encode, images, W):
    return torch.cat([encode(part) for part in images.chunk(W)])


CHECKS = {
    "hours": (check_hours, {
        "these are seconds": lambda *given: 3600 * right_hours(*given),
        "these are minutes": lambda *given: 60 * right_hours(*given),
        "these are days": lambda *given: right_hours(*given) / 24,
        "the GPUs share the work": lambda n, e, r, g: right_hours(n, e, r, 1),
        "more GPUs take longer": lambda n, e, r, g: right_hours(n, e, r, 1) * g,
        "that is one epoch": lambda n, e, r, g: right_hours(n, 1, r, g),
        "none of the usual": lambda n, e, r, g: 53.0,
        "not one number": lambda *given: None,
    }, right_hours),
    "fixed_bytes": (check_fixed_bytes, {
        "one copy of the weights is missing": lambda w, K, C: 4 * (3 * w + K * C),
        "two copies of the weights are missing": lambda w, K, C: 4 * (2 * w + K * C),
        "the weights alone are counted once": lambda w, K, C: 4 * (w + K * C),
        "the key encoder has no gradient": lambda w, K, C: 4 * (6 * w + K * C),
        "the queue is missing": lambda w, K, C: 16 * w,
        "K keys of C numbers": lambda w, K, C: 4 * (4 * w + K),
        "a float32 has four bytes": lambda w, K, C: 4 * w + K * C,
        "none of the usual": lambda w, K, C: 7.0,
    }, right_bytes),
    "rows_of": (check_rows, {
        "every W-th row is taken": lambda index, r, W: index[r::W],
        "counted from 1": lambda index, r, W: right_rows(index, (r - 1) % W, W),
        "places in the batch": lambda index, r, W: right_rows(torch.arange(len(index)), r, W),
        "each process has the first rows": lambda index, r, W: right_rows(index, 0, W),
        "none of the usual": lambda index, r, W: right_rows(index.flip(0), r, W),
    }, right_rows),
    "shuffled_keys": (check_shuffled_keys, {
        "stay in their shuffled order": lambda encode, x, order, W: in_parts(encode, x[order], W),
        "brought back with order itself": lambda encode, x, order, W: in_parts(encode, x[order], W)[order],
        "not shuffled, only cut": lambda encode, x, order, W: in_parts(encode, x, W),
        "encoded as a whole": lambda encode, x, order, W: encode(x),
        "by the inverse of the order": lambda encode, x, order, W: in_parts(encode, x[order.argsort()], W)[order],
        "none of the usual": lambda encode, x, order, W: in_parts(encode, x[order], 2)[order.argsort()],
    }, right_keys),
}  # fmt: skip

test_a_check_passes_what_is_right, test_a_check_names_the_mistake = checks_as_tests(CHECKS, "10")
