"""What a training costs, told from shapes: against what the papers say, and by hand."""

import json

import pytest

from tutorial_moco import cli
from tutorial_moco.cost import estimate, mismatches
from tutorial_moco.encoders import build_encoder
from tutorial_moco.errors import UsageError
from tutorial_moco.recipes import PUBLISHED, RECIPES, Recipe

IMAGENET = 1_281_167


def test_mocos_hours_are_the_papers():
    cost = estimate(RECIPES["imagenet-moco-v2"], IMAGENET, 8)
    assert cost.hours == pytest.approx(53, rel=0.01)  # a head more than v1
    assert cost.steps == 200 * 5004
    assert cost.flops == pytest.approx(4 * 2 * 4.1e9, rel=0.02)  # 4.1 G multiplications forward; twice that backward; a key
    assert estimate(RECIPES["imagenet-moco-v2-800"], IMAGENET, 8).hours == pytest.approx(4 * cost.hours, rel=1e-6)


def test_memory_and_bytes_are_those_of_the_formula():
    recipe = Recipe(encoder="tiny", K=1000, dim=16, batch_size=64)
    weights = sum(p.numel() for p in build_encoder("tiny", dim=16).parameters())
    cost, more = estimate(recipe, 10_000, 2), estimate(recipe.replace(K=3000), 10_000, 2)
    assert more.memory_bytes - cost.memory_bytes == 4 * (2000 * 16 + 32 * 2 * 2000)  # keys; logits and their gradient
    assert cost.sent_bytes == 4 * (weights + 32 * 16)  # a ring of two: as much as there is, once
    assert estimate(recipe, 10_000, 1).sent_bytes == 0
    assert estimate(recipe, 10_000, 4).sent_bytes == pytest.approx(4 * (1.5 * weights + 3 * 16 * 16))
    assert cost.images_sent_bytes == 32 * 4 * 3 * 32 * 32
    symmetric = estimate(recipe.replace(symmetric=True), 10_000, 2)
    assert symmetric.sent_bytes - cost.sent_bytes == 4 * 32 * 16  # keys of the other views
    both = recipe.replace(mechanism="simclr"), recipe.replace(mechanism="end_to_end")
    simclr, end_to_end = (estimate(each, 10_000, 2).sent_bytes for each in both)
    assert simclr == 4 * (weights + 6 * 32 * 16)  # both views, and what comes back to each
    assert end_to_end == 4 * (2 * weights + 3 * 32 * 16)
    halves = estimate(recipe.replace(accumulate=2), 10_000, 2)
    assert halves.memory_bytes < cost.memory_bytes
    assert halves.hours == cost.hours


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_cost_and_goes_together(name):
    cost = estimate(RECIPES[name], 50_000, 8)
    assert cost.hours > 0
    assert cost.memory_bytes > 0
    n = IMAGENET if name.startswith("imagenet-") else 126_689 if name.startswith("imagenet") else 50_000
    gpus = 1 if n == 50_000 else 8
    assert mismatches(name, RECIPES[name], n, gpus) == []


def test_published_figures_belong_to_recipes():
    assert set(PUBLISHED) <= set(RECIPES)
    assert {name for name in RECIPES if name.startswith("imagenet-")} <= set(PUBLISHED)


@pytest.mark.parametrize(
    ("changes", "gpus", "told"),
    [
        ({"batch_size": 1024}, 8, "which in proportion (arXiv 1706.02677) is 0.12"),
        ({"K": 1_000_000}, 8, "a query meets old keys of its own image"),
        ({"m": 0.9}, 8, "the queue its encoder is renewed 25.6 times"),
        ({}, 1, "--shuffle on one GPU does nothing without --norm split:8"),
        ({}, 32, "8 images on each GPU are few for BatchNorm"),
    ],
)
def test_what_does_not_go_together_is_told(changes, gpus, told):
    recipe = RECIPES["imagenet-moco-v1"].replace(**changes)
    assert any(told in line for line in mismatches("imagenet-moco-v1", recipe, IMAGENET, gpus))


def test_the_command_tells_a_recipes_cost(tmp_path, capsys):
    path = tmp_path / "cost.json"
    assert cli.main(["doctor", "--recipe", "imagenet-moco-v2", "--gpus", "8", "--lr", "3", "--json", str(path)]) == 0
    told = capsys.readouterr().out
    assert "published: 67.5 % linear, 53 h on 8 V100 (arXiv 2003.04297, tables 1 and 3)" in told
    assert "time: 53.0 h at 168 images/s on each" in told
    assert "[WARN] --lr 3 with --batch-size 256" in told
    assert json.loads(path.read_text())["lines"] == told.splitlines()
    assert cli.main(["doctor", "--recipe", "imagenet-moco-v2", "--gpus", "8", "--images-per-second", "1000"]) == 0
    assert "time: 8.9 h at 1,000 images/s on each (as you say)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe", "imagenet"], "--recipe imagenet is not known: choose one of small,"),
        (["--recipe", "imagenet-moco-v1", "--gpus", "3"], "--gpus 3: so many do not share a batch of 256"),
        (["--recipe", "imagenet-moco-v1", "--images", "0"], "--images must be above 0, not 0"),
    ],
)
def test_a_mistake_is_told_in_a_line(words, told, capsys):
    assert cli.main(["doctor", *words]) == 2
    assert told in capsys.readouterr().err


def test_more_gpus_than_images_of_a_batch_are_refused():
    with pytest.raises(UsageError, match="do not share"):
        estimate(RECIPES["imagenet-moco-v1"], IMAGENET, 512)
