"""Any configuration either trains or ends in one line and status 2: many are drawn. `make faults` has the full count."""

import random

import pytest
import torch
from trainings import FULL

from tutorial_moco import cli, compare
from tutorial_moco import pretrain as training
from tutorial_moco.images import ImageSet

COUNT = 3000 if FULL else 150
CPU = torch.device("cpu")
WILD = [
    "",
    "nonsense",
    "-1",
    "0",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "3.7",
    "0x10",
    "1_000",
    "999999999999",
    "--",
    "ä",
    "None",
    "1e-320",
]
FLAGS = {  # sensible values; now and then a wild one takes their place
    "mechanism": ["moco", "memory_bank", "end_to_end", "simclr", "moco_v3"],
    "encoder": ["tiny"],
    "head": ["linear", "mlp", "mlp3"],
    "dim": ["2", "8", "128"],
    "norm": ["batch", "split:2", "split:8", "group", "split:0", "split:x"],
    "K": ["1", "16", "63", "64", "1000"],
    "m": ["0", "0.5", "0.99", "1"],
    "m-rises": ["True", "False"],
    "temperature": ["0.07", "0.2", "5"],
    "loss": ["info_nce", "nce"],
    "symmetric": ["True", "False"],
    "shuffle": ["True", "False"],
    "bank-momentum": ["0", "0.5", "0.9"],
    "augmentation": ["v1", "v2", "v3", "cifar", "small", "shapes", "none"],
    "batch-size": ["2", "3", "16", "64", "65"],
    "accumulate": ["1", "2", "8", "16"],
    "epochs": ["1", "5"],
    "minutes": ["0.1", "3"],
    "optimizer": ["sgd", "adamw", "lars"],
    "lr": ["0.001", "0.12"],
    "schedule": ["cosine", "steps"],
    "warmup": ["0", "0.3"],
    "weight-decay": ["0", "5e-4"],
    "seed": ["0", "17"],
    "monitor": ["1", "5"],
    "hold-out": ["0", "0.2"],
    "precision": ["auto", "float32"],
    "recipe": ["small", "shapes"],
    "on-bad-image": ["raise", "skip"],
}


def configuration(draw):
    """Words of a command line: a handful of flags, each wild once in eight."""
    words = []
    for name in draw.sample(sorted(FLAGS), draw.randint(1, 8)):
        value = draw.choice(WILD if draw.random() < 0.12 else FLAGS[name])
        if name in ("symmetric", "shuffle", "m-rises") and value in ("True", "False"):
            words.append(f"--{name}" if value == "True" else f"--no-{name}")
        else:
            words += [f"--{name}", value] if draw.random() < 0.7 else [f"--{name}={value}"]
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words) + 1), draw.choice(["--unknown", "extra", "-x", "--K"]))
    return words if any(word.startswith("--encoder") for word in words) else ["--encoder", "tiny", *words]


def images(n, split):
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return ImageSet("random", split, pixels, torch.arange(n) % 2, ("even", "odd"), "")


def first_step(recipes, train, test, out, *, minutes, precision, **_):
    """In place of the whole training: the run is built, and takes a step."""
    for recipe in recipes:
        run = training.start(recipe, train, CPU, precision or torch.float32)
        epoch, index = next(training.batches(len(train), recipe, 0, CPU))
        training.set_learning_rate(run.optimizer, recipe, 0.5)
        training.train_step(run, train.images[index], index, epoch)
    return {}


@pytest.mark.timeout(1200)
def test_any_configuration_trains_or_ends_in_one_line(monkeypatch, capsys, held):
    sets = {"train": images(64, "train"), "test": images(20, "test")}
    monkeypatch.setattr("tutorial_moco.images.load_images", lambda data, split, **_: sets[split])
    monkeypatch.setattr(compare, "compare", first_step)
    draw, ended = random.Random(0), {0: 0, 2: 0}
    for _ in range(COUNT):
        words = [draw.choice(["pretrain", "pretrain", "compare"]), *configuration(draw)]
        try:
            status = cli.main(words)
        except BaseException as error:
            raise AssertionError(f"{words} ended in {type(error).__name__}: {error}") from error
        told = capsys.readouterr().err.strip().splitlines()
        assert status in ended, (words, told)
        ended[status] += 1
        if status:
            assert told[-1].startswith("tutorial-moco: "), (words, told)
            assert not any(line.startswith(("Traceback", "  File")) for line in told), (words, told)
            assert len(told) <= 2, (words, told)  # the images may have been told before
    assert min(ended.values()) > COUNT / 5
    told = f"drawn configurations: {ended[0]} took a step, {ended[2]} were refused"
    held("any configuration trains or is told in a line", told, sum(ended.values()), COUNT)
