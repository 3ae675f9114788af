"""Snapshots: what is shipped is what was trained, a run that is there is not trained again, and all of it stays small."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import snapshots
from benchmarks.snapshots import MOST, moments
from tutorial_moco import pretrain as training
from tutorial_moco.checkpoint import load_checkpoint
from tutorial_moco.compare import evaluate_checkpoint
from tutorial_moco.encoders import build_encoder
from tutorial_moco.errors import DataError
from tutorial_moco.evaluate import extract_features, knn_top1
from tutorial_moco.images import ImageSet
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import RECIPES
from tutorial_moco.results import load_features, load_run

TINY = {"encoder": "tiny", "dim": 8, "K": 32, "batch_size": 32, "lr": 0.05}
NAMES = ("moco", "moco-mlp", "end_to_end", "memory_bank", "moco-shapes")


def random_images(n, seed, split):
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet("random", split, pixels, torch.arange(n) % 4, tuple("abcd"), f"hash {seed}")


TRAIN, TEST = random_images(160, 0, "train"), random_images(60, 1, "test")


def command(patch, folder):
    """The command on random images, writing into a folder; returns its exit status."""

    def make(*flags):
        patch.setattr(sys, "argv", ["snapshots", "--epochs", "3", "--out", str(folder), *flags])
        return snapshots.main()

    make.images, make.folder = {"train": TRAIN, "test": TEST}, folder
    small = {name: recipe.replace(**TINY) for name, recipe in RECIPES.items() if name in ("small", "shapes")}
    patch.setattr(snapshots, "RECIPES", small)
    patch.setattr(snapshots, "load_images", lambda data, split: make.images[split])
    patch.setattr(snapshots, "IMAGES", 40)
    patch.setattr(training, "choose_precision", lambda *_: torch.float32)
    return make


@pytest.fixture
def make(monkeypatch, tmp_path):
    """The command, which can be given other images in ``make.images``."""
    return command(monkeypatch, tmp_path / "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What it made, once for the tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        made = command(patch, tmp_path_factory.mktemp("made") / "data")
        assert made() == 0
    return made.folder


@pytest.fixture
def trained(monkeypatch):
    """How many steps were trained so far."""
    steps, train_step = [], snapshots.train_step
    monkeypatch.setattr(snapshots, "train_step", lambda *args: (steps.append(1), train_step(*args))[1])
    return steps


def test_what_is_loaded_is_what_was_trained(folder):
    index = permutation(len(TEST), 0)[:40]
    for name in NAMES:
        encoder, recipe, facts = load_run(name, folder)
        kept = load_features(name, folder)
        assert not encoder.training
        assert kept["epochs"] == [0, 1, 2, 3]
        assert kept["features"].shape == (4, 40, 64)
        assert kept["features"].dtype == torch.float32
        assert torch.equal(kept["index"], index)
        assert torch.equal(kept["labels"], TEST.labels[index])
        again = extract_features(encoder.backbone, TEST.images[index])
        assert F.cosine_similarity(again, kept["features"][-1]).min() > 1 - 1e-4  # float16 on the way
        known = extract_features(encoder.backbone, TRAIN.images)
        assert kept["knn"][-1] == facts["knn_top1"]
        assert facts["knn_top1"] == pytest.approx(knn_top1(known, TRAIN.labels, again, kept["labels"]), abs=5)
        mechanism = name if name in ("end_to_end", "memory_bank") else "moco"
        assert (recipe.mechanism, recipe.head, recipe.epochs) == (mechanism, "mlp" if name == "moco-mlp" else "linear", 3)
        assert {"commit", "hardware", "torch", "data_hash", "date", "classes"} <= set(facts) & set(kept["facts"])
        assert ("queue" in facts) == ("born" in facts) == name.startswith("moco")
        assert ("key_encoder" in facts) == (name in ("moco", "moco-shapes"))


def test_moments_begin_with_the_untrained_encoder_and_end_with_the_shipped_one(folder):
    features = load_features("moco", folder)["features"]
    assert not torch.allclose(features[0], features[-1], rtol=0.1)
    first = {name: load_features(name, folder)["features"][0] for name in ("moco", "end_to_end")}
    assert torch.equal(first["moco"], first["end_to_end"])  # the same seed, not trained yet


def test_the_queue_is_that_of_the_run(folder):
    _, recipe, facts = load_run("moco", folder)
    steps = 3 * (len(TRAIN) // recipe.batch_size)
    assert facts["step"] == steps
    assert facts["born"].tolist() == [steps - 1] * 32  # of one batch
    assert torch.allclose(facts["queue"].norm(dim=1), torch.ones(32), atol=1e-3)


def test_a_run_that_is_there_is_not_trained_again(make, trained, capsys):
    make()
    assert "MB in" in capsys.readouterr().out.splitlines()[-1]
    steps = len(trained)
    assert steps == 5 * 15
    make()
    assert len(trained) == steps
    (make.folder / "end_to_end-features.safetensors").unlink()
    make()
    assert len(trained) == steps + 15
    make.images = {"train": random_images(160, 2, "train"), "test": TEST}
    make()
    assert len(trained) == 2 * steps + 15
    make("--epochs", "1")
    assert len(trained) == 2 * steps + 15 + 25


def test_an_interrupted_command_goes_on_with_the_run_it_was_at(make, monkeypatch, trained, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "parts_of", interrupt)
        assert make() == 130
    assert "the same command" in capsys.readouterr().err
    make()
    whole = {path.name: load_checkpoint(path)[0] for path in make.folder.iterdir()}
    assert len(trained) == 6 * 15
    for path in make.folder.iterdir():
        path.unlink()
    make()
    for path in make.folder.iterdir():
        assert all(torch.equal(tensor, whole[path.name][name]) for name, tensor in load_checkpoint(path)[0].items())


def test_no_image_is_stored(folder):
    for path in folder.iterdir():
        tensors, _ = load_checkpoint(path)
        assert not [name for name, tensor in tensors.items() if tensor.dtype == torch.uint8 or tensor.shape[-3:] == (3, 8, 8)]


def test_a_snapshot_is_a_checkpoint_that_evaluate_reads(folder):
    result = evaluate_checkpoint(folder / "moco.safetensors", TRAIN, TEST)
    assert 0 <= result["knn_top1"] <= 100
    assert result["steps"] == 15


@pytest.mark.parametrize("load", [load_run, load_features])
def test_a_missing_or_damaged_file_is_told_in_one_line(load, tmp_path):
    with pytest.raises(DataError, match=r"safetensors does not exist: make it with python -m benchmarks.snapshots") as missing:
        load("moco", tmp_path)
    assert "\n" not in str(missing.value)
    for name in ("moco", "moco-features"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="is damaged or is no checkpoint"):
        load("moco", tmp_path)


@pytest.mark.parametrize("epochs", [1, 3, 20, 200])
@pytest.mark.parametrize("most", [5, 10])
def test_moments_are_few_and_hold_both_ends(epochs, most):
    found = moments(epochs, most)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, epochs)
    assert len(found) <= most
    assert epochs < 200 or len(found) > 0.6 * most


def test_all_files_together_are_small():
    """Of the recipes as they are: counted, not trained."""
    total = 0
    for snapshot in snapshots.snapshots(50_000).values():
        recipe = snapshot.recipe
        encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim, norm=recipe.norm)
        encoders = sum(part.endswith("encoder") for part in snapshot.parts)
        total += encoders * sum(2 * t.numel() if t.ndim > 1 else 4 * t.numel() for t in encoder.state_dict().values())
        total += recipe.K * (recipe.dim * 2 + 8) * ("queue" in snapshot.parts)
        total += len(moments(recipe.epochs, snapshot.moments)) * snapshots.IMAGES * encoder.feature_dim * 2
    assert total < MOST


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--out", "/dev/null/data"]], ids=" ".join)
def test_a_mistake_ends_in_one_line(make, flags, capsys):
    assert make(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"snapshots: {flags[0]}")
    assert error.count("\n") == 1


def test_a_snapshots_recipe_keeps_everything_else(make):
    found = snapshots.snapshots(len(TRAIN))
    assert tuple(found) == NAMES
    assert found["moco-mlp"].recipe == replace(found["moco"].recipe, head="mlp")
