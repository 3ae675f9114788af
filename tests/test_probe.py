"""The papers' linear classification on a frozen encoder: several learning rates in one pass, as each alone would be."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import random_images, together
from torch import nn

from tutorial_moco import cli
from tutorial_moco import probe as module
from tutorial_moco.checkpoint import load_checkpoint
from tutorial_moco.errors import UsageError
from tutorial_moco.evaluate import extract_features, knn_top1, knn_top1_at_size, linear_top1
from tutorial_moco.images import load_images
from tutorial_moco.pretrain import load_encoder
from tutorial_moco.probe import SETTINGS, probe

DATA = Path(__file__).parent.parent / "data"
RECIPE = SETTINGS.replace(batch_size=32, epochs=3)


@pytest.fixture(scope="module")
def backbone():
    return load_encoder(DATA / "moco-shapes.safetensors")[0].backbone


@pytest.fixture(scope="module")
def shapes():
    return load_images("shapes", "train").take(slice(1000)), load_images("shapes", "test").take(slice(500))


def test_what_it_learns_is_about_what_a_regression_learns(backbone, shapes):
    train, test = shapes
    (found,) = probe(
        backbone, 64, train, test, RECIPE.replace(epochs=20, augmentation="none"), lrs=(3.0,), progress=False
    ).values()
    features = [extract_features(backbone, images.images) for images in shapes]
    assert abs(found - linear_top1(features[0], train.labels, features[1], test.labels)) < 8
    assert found > 30


def test_each_learning_rate_learns_as_if_it_were_alone(backbone, shapes):
    both = probe(backbone, 64, *shapes, RECIPE, lrs=(1.0, 10.0), progress=False)
    for lr in both:
        assert probe(backbone, 64, *shapes, RECIPE, lrs=(lr,), progress=False) == {lr: pytest.approx(both[lr], abs=0.5)}
    assert both[1.0] != both[10.0]


def test_the_encoder_is_not_changed(backbone, shapes):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()
    probe(backbone, 64, *shapes, RECIPE.replace(epochs=1), progress=False)
    assert backbone.training
    backbone.eval()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_one_that_explodes_is_told_and_does_not_touch_the_other(backbone, shapes):
    found = probe(backbone, 64, *shapes, RECIPE, lrs=(1.0, 1e38), progress=False)
    assert math.isnan(found[1e38])
    assert found[1.0] > 20
    with pytest.raises(UsageError, match="has exploded with --lr 1e\\+38: try a lower one"):
        probe(backbone, 64, *shapes, RECIPE, lrs=(1e38,), progress=False)


def test_stopped_anywhere_it_goes_on_to_the_same_bits(backbone, shapes, tmp_path, monkeypatch):
    straight = probe(backbone, 64, *shapes, RECIPE, lrs=(1.0, 3.0), out=tmp_path / "straight", progress=False)

    class Died(Exception):
        pass

    whole, seen = module.set_learning_rate, []

    def die(*args):
        seen.append(args)
        if len(seen) == 40:
            raise Died
        return whole(*args)

    monkeypatch.setattr(module, "set_learning_rate", die)
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    with pytest.raises(Died):
        probe(backbone, 64, *shapes, RECIPE, lrs=(1.0, 3.0), out=tmp_path / "died", progress=False)
    found = probe(backbone, 64, *shapes, RECIPE, lrs=(1.0, 3.0), out=tmp_path / "died", progress=False)
    assert found == straight
    assert len(seen) == 3 * 31 + 1  # of 31 steps an epoch none was done twice but the one it died in
    kept = [load_checkpoint(next((tmp_path / name).glob("probe-*.safetensors"))) for name in ("straight", "died")]
    assert kept[0][1] == kept[1][1]
    for name, tensor in kept[0][0].items():
        assert torch.equal(tensor, kept[1][0][name]), name
    probe(backbone, 64, *shapes, RECIPE.replace(epochs=1), lrs=(1.0, 3.0), out=tmp_path / "died", progress=False)
    assert len(list((tmp_path / "died").glob("probe-*.safetensors"))) == 2  # other settings begin a file of their own


def of_processes():
    images = random_images()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten())
    width = net(torch.zeros(1, 3, 16, 16)).shape[1]
    found = probe(net, width, images, images, RECIPE.replace(batch_size=16), lrs=(0.1,), progress=False)
    return found, knn_top1_at_size(net, images, images.take(slice(30)), k=7)


def test_several_processes_find_what_one_finds():
    (alone,) = together(1, of_processes)
    for W in (2, 4):
        for found in together(W, of_processes):
            assert found == (pytest.approx(alone[0], abs=2), pytest.approx(alone[1]))


def test_the_knn_at_size_is_the_knn(backbone, shapes):
    train, test = shapes
    features = [extract_features(backbone, images.images) for images in shapes]
    assert knn_top1_at_size(backbone, train, test) == knn_top1(features[0], train.labels, features[1], test.labels)


def neighbours():
    """65 images are not to be shared by two or three: some are seen twice, and must not vote twice."""
    images, net = random_images(65), nn.Flatten()
    net.weight = nn.Parameter(torch.zeros(()))  # which tells the device
    return knn_top1_at_size(net, images, images.take(slice(31)), k=2)


@pytest.mark.parametrize("W", [2, 3])
def test_no_image_votes_twice(W):
    (alone,) = together(1, neighbours)
    assert together(W, neighbours) == [pytest.approx(alone)] * W


def test_the_command_sweeps(tmp_path, capsys):
    flags = ["--checkpoint", str(DATA / "moco-shapes.safetensors"), "--data", "shapes", "--probe", "sgd", "--lr", "1", "10"]
    flags += ["--epochs", "1", "--out", str(tmp_path), "--json", str(tmp_path / "found.json")]
    assert cli.main(["evaluate", *flags]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["linear_top1_of_lr"]) == {"1", "10"}
    assert found["linear_top1"] == found["linear_top1_of_lr"]["1"]
    assert "linear by --lr: 1: " in capsys.readouterr().out
    assert cli.main(["evaluate", *flags[:4], "--lr", "0"]) == 2
    assert "--lr must be above 0" in capsys.readouterr().err
