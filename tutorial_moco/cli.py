"""The command line. Each command is a record of its flags and a function; mistakes end in one line and status 2 or 3."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tutorial_moco import __version__
from tutorial_moco.errors import BadPicture, DataError, LostProcess, UsageError
from tutorial_moco.files import write_whole
from tutorial_moco.recipes import RECIPES, Recipe, flag

HELP = f"""tutorial-moco {__version__}: learn Momentum Contrast by building it.

usage: tutorial-moco COMMAND [FLAGS]

  compare    train end-to-end, memory bank and MoCo side by side, with equal budgets
  pretrain   train one mechanism
  evaluate   read a checkpoint's features on any images
  transfer   start another task from a checkpoint: few labels, detection, segmentation, keypoints
  export     an encoder for torchvision, timm, Detectron2 or ONNX
  data       look at a data set: sizes, classes, a contact sheet
  doctor     is everything here that the chapters need? [OK], or [FAIL] and the mend
  check      the visible checks of an assignment on your notebook: check A2 my_notebook.ipynb
  grade      points, feedback and a class report for a folder or zip of notebooks (for lecturers)

Every command says more with --help. Images (--data) are `shapes`, drawn by the program; `digits`; `cifar10`, `cifar100`
or `stl10`, downloaded once; or a folder split/class/image, or a .tar, .tar.xz, .tar.gz or .zip of one.

  tutorial-moco compare --data shapes --minutes 1
  tutorial-moco pretrain --data cifar10 --minutes 10
"""


@dataclass(frozen=True)
class DataFlags:
    """Which images, and where results go."""

    data: str = "shapes"
    """Images: shapes, digits, cifar10, cifar100, stl10, a folder split/class/image, or an archive of one."""
    image_size: int | None = None
    """Resize images to this many pixels a side; as they are if they are small and all alike, else 64."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """When a file of a folder or an archive cannot be decoded: end with its name, or leave it out and list it in the report."""
    hold_out: float = 0.0
    """Evaluate on this share of the training images in place of the test images: for choosing settings."""
    json: Path | None = None
    """Also write the result, with where it comes from, to this file."""


@dataclass(frozen=True)
class RunFlags(DataFlags):
    """Which images, how long, and where results go."""

    recipe: str = "small"
    """Start from these settings: shapes (the default with --data shapes), small (two cores and minutes, the default with
    other images), cifar10-resnet18 (the official notebook's, for a GPU), or one of the papers' for ImageNet, for several GPUs:
    imagenet-moco-v1, imagenet-moco-v2 and others. `doctor --recipe` tells what each reaches and costs."""
    minutes: float | None = None
    """Stop after this much training time for each mechanism, the schedule fitted to it, in place of --epochs."""
    out: Path | None = None
    """Folder for checkpoint, result and report; runs/... if left out. The same command again goes on from there."""
    monitor: int = 5
    """How many times the quick kNN is taken during training."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the encoders; auto measures which of the first two is faster here. float16 is for GPUs before Ampere."""
    compile: bool = False
    """Let torch.compile write the encoders' kernels: about a minute once, then faster steps on a GPU."""
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)


@dataclass(frozen=True)
class Pretrain(RunFlags):
    """Pre-train an encoder without labels, then read its features: kNN, linear classifier, t-SNE, nearest neighbours."""


@dataclass(frozen=True)
class Compare(RunFlags):
    """Train end-to-end, memory bank and MoCo side by side, with equal budgets, beside raw pixels and an untrained encoder.

    Without --minutes or --epochs each gets 3 minutes. --symmetric and --shuffle are MoCo's and apply to it alone.
    """

    minutes: float | None = 3.0
    """Stop after this much training time for each mechanism, unless --epochs is given."""


@dataclass(frozen=True)
class Evaluate(DataFlags):
    """Read the features of a checkpoint: kNN and linear classifier, in percent of the test images."""

    checkpoint: Path = Path("checkpoint.safetensors")
    """The checkpoint.safetensors of a run, or a .pth.tar of the published MoCo (then with --view-size 224)."""
    view_size: int | None = None
    """Take so many pixels of whole pictures of a folder or a .tar, which stay encoded; if left out as in the training, where
    --data is a path and there is no --image-size."""
    probe: Literal["regression", "sgd"] | None = None
    """The linear classifier: a regression on the features as they are (if left out, for images in memory), or the papers'
    training on random crops (for pictures that stay encoded)."""
    lr: tuple[float, ...] = (30.0,)
    """sgd: learning rates, all tried in one pass; linear_top1 is of the first. Choose among them with --hold-out."""
    epochs: int = 100
    """sgd: passes over the images; the learning rate falls to a tenth at 60 % and again at 80 %."""
    batch_size: int = 256
    """sgd: images of a step, of all processes together."""
    out: Path | None = None
    """sgd: folder for what goes on when the same command is given again; beside the checkpoint if left out."""


@dataclass(frozen=True)
class Transfer:
    """Start another task from an encoder, pre-trained or fresh, and see what the start was worth.

    classify: a linear classifier and fine-tuning with a share of the labels. detect: boxes, and masks where the data has
    them. segment: the class of each pixel. keypoints: objects' corner points. Judged by COCO's AP, and by VOC's mIoU.
    """

    task: Literal["classify", "detect", "segment", "keypoints"] = "classify"
    """What to train for."""
    data: str | None = None
    """classify: shapes (if left out), digits, cifar10, a folder, …; else scenes (if left out), drawn of several shapes, or
    a folder in PASCAL VOC's or COCO's layout."""
    checkpoint: tuple[str, ...] = ("none",)
    """The checkpoint.safetensors of runs to start from, several to compare them; none stands for fresh weights."""
    encoder: Literal["tiny", "small", "wide", "resnet18", "resnet50"] = "small"
    """The encoder of fresh weights; a checkpoint knows its own."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """classify: shares of the labels to use."""
    epochs: int | None = None
    """Passes over all images; 5 for classify, where fewer images are seen more often, 16 for segment, else 8."""
    lr: float | None = None
    """Learning rate; 0.1 for classify (of a transformer 0.001), 0.02 for detect and keypoints, 0.2 for segment."""
    batch_size: int | None = None
    """Images of a step; 64 for classify, else 8."""
    neck: Literal["fpn", "c4"] = "fpn"
    """detect, keypoints: a pyramid of maps, or the last map but one, as in the paper's R50-C4."""
    frozen: bool = False
    """detect, keypoints, segment: the encoder keeps its weights."""
    image_size: int | None = None
    """Shorter side in pixels that images are brought to; if left out 96 for detection with an encoder for small images, 800
    with a ResNet-50, and for segment as they are."""
    seeds: int = 1
    """Trainings from each start."""
    out: Path | None = None
    """Folder for result, report and models; runs/transfer-TASK-... if left out."""
    json: Path | None = None
    """Also write the result, with where it comes from, to this file."""


@dataclass(frozen=True)
class Export:
    """An encoder for another program, written to a folder with a card that says how it is read; compared with what it was."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The checkpoint.safetensors of a run, or a .pth.tar of the published MoCo."""
    format: Literal["safetensors", "torchvision", "timm", "detectron2", "onnx"] = "safetensors"
    """torchvision, timm and detectron2 have a ResNet-50 (the first two a transformer, too); onnx and safetensors take any."""
    out: Path | None = None
    """Folder for model and card; exported/FORMAT if left out."""
    json: Path | None = None
    """Also write what was done to this file."""


@dataclass(frozen=True)
class Data(DataFlags):
    """Look at a data set: how many images, which classes, their hash; and a contact sheet as a PNG."""

    sheet: Path | None = None
    """Write a contact sheet, ten images of each class, to this PNG."""


@dataclass(frozen=True)
class Doctor:
    """Is everything here that the chapters need? One line for each thing: [OK], or [FAIL] with what to do.

    With --recipe instead: what a training reaches and costs, and [WARN] for settings that don't go together.
    """

    data: str | None = None
    """The images to look for; those of the chapters if left out. cifar10, cifar100 and stl10 are downloaded if not there."""
    recipe: str | None = None
    """Tell the cost of this recipe's training, with the settings below in place of its own."""
    gpus: int = 1
    """On so many GPUs, of one machine or several."""
    images: int | None = None
    """Training on so many images; ImageNet's 1,281,167 for its recipes, 50,000 for others if left out."""
    images_per_second: float | None = None
    """That one GPU trains on; if left out what a V100 did for the papers, in proportion to the work."""
    json: Path | None = None
    """Also write the answers to this file."""
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)


@dataclass(frozen=True)
class Check:
    """The visible checks of an assignment on your notebook: what is right, what is not yet, and the likely mistake."""

    assignment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ASSIGNMENT")]
    """A1 to A6."""
    notebook: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NOTEBOOK")]
    """Your notebook; functions are found in it by their names."""
    json: Path | None = None
    """Also write the result to this file."""


@dataclass(frozen=True)
class Grade:
    """Grade a folder or zip of notebooks with nbgrader: points, reasons, a feedback page each, a report for the lecturer."""

    assignment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ASSIGNMENT")]
    """A1 to A6."""
    submissions: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SUBMISSIONS")]
    """Folder or zip with a folder or notebook for each student; Moodle's and Canvas's are understood."""
    out: Path = Path("graded")
    """Folder for the results, one for all assignments; what was graded by hand stays."""
    course: Path = Path("notebooks/assignments")
    """The folder of the repository that holds source/ and nbgrader_config.py."""
    secret: Path | None = None
    """A file with any text that students don't know, which decides the inputs of the hidden tests; drawn anew if left out."""
    json: Path | None = None
    """Also write the result to this file."""


def run_pretrain(flags: Pretrain) -> dict:
    """One mechanism."""
    return _train(flags, [flags.settings], baselines=False)


def run_compare(flags: Compare) -> dict:
    """All three of Figure 2, from the same settings."""
    if flags.settings.mechanism != "moco":
        raise UsageError("--mechanism has no place here: compare trains all three; use pretrain for one")
    if flags.settings.view_size:
        raise UsageError("--view-size is for pretrain: compare trains from images in memory, for which there is --image-size")
    moco = flags.settings
    others = [moco.replace(mechanism=name, symmetric=False, shuffle=False) for name in ("end_to_end", "memory_bank")]
    return _train(flags, [*others, moco], baselines=True)


def _train(flags: RunFlags, recipes: list[Recipe], baselines: bool) -> dict:
    import torch

    from tutorial_moco.compare import compare
    from tutorial_moco.pretrain import check

    train, test = load(flags, recipes[0].view_size)
    for recipe in recipes:
        check(recipe, len(train), flags.minutes)
    dtype = None if flags.precision == "auto" else getattr(torch, flags.precision)
    return compare(
        recipes, train, test, flags.out or default_out(flags, train.name),
        minutes=flags.minutes, monitor=flags.monitor, baselines=baselines, precision=dtype, compile=flags.compile,
    )  # fmt: skip


def run_evaluate(flags: Evaluate) -> dict:
    """Features of a checkpoint on any images."""
    from tutorial_moco.compare import evaluate_checkpoint
    from tutorial_moco.pretrain import load_encoder
    from tutorial_moco.probe import SETTINGS

    if not flags.lr or not all(lr > 0 for lr in flags.lr):
        raise UsageError(f"--lr must be above 0, not {' '.join(map(str, flags.lr))}")
    view_size = flags.view_size
    if view_size is None and flags.image_size is None and os.path.exists(flags.data):
        view_size = load_encoder(flags.checkpoint)[1].view_size
    if view_size and flags.probe == "regression":
        raise UsageError("--probe regression is for images in memory: leave it out with pictures that stay encoded")
    by_sgd = flags.probe == "sgd" or view_size
    if not by_sgd:
        only_for("--probe sgd", flags, "lr", "epochs", "batch_size", "out")
    sgd = SETTINGS.replace(epochs=flags.epochs, batch_size=flags.batch_size, lr=flags.lr[0])
    train, test = load(flags, view_size)
    how = {"sgd": sgd, "lrs": flags.lr, "out": flags.out or flags.checkpoint.parent}
    if not (result := evaluate_checkpoint(flags.checkpoint, train, test, **(how if by_sgd else {}))):
        return {}

    def percent(top1: float | None) -> str:
        return "exploded" if top1 is None else f"{top1:.2f} %"

    linear = percent(result["linear_top1"])
    print(f"kNN {result['knn_top1']:.2f} %, linear {linear} of {len(test):,} {test.split} images")
    if len(flags.lr) > 1 and by_sgd:
        print("linear by --lr: " + ", ".join(f"{lr}: {percent(top1)}" for lr, top1 in result["linear_top1_of_lr"].items()))
    return result


def run_transfer(flags: Transfer) -> dict:
    """Starts, data, and the task."""
    must_be_above_0(flags, "seeds", "epochs", "batch_size", "lr")
    if not flags.labels or not all(0 < share <= 1 for share in flags.labels):
        raise UsageError(f"--labels must be shares in (0, 1], not {' '.join(map(str, flags.labels))}")
    if flags.image_size is not None and flags.image_size < 8:
        raise UsageError(f"--image-size must be at least 8, not {flags.image_size}")
    if flags.frozen and flags.task == "classify":
        raise UsageError("--frozen is for detect, keypoints and segment: classify's linear classifier is of frozen features")
    if flags.task != "classify":
        only_for("--task classify", flags, "labels")
    if flags.task not in ("detect", "keypoints"):
        only_for("--task detect and keypoints", flags, "neck")
    from tutorial_moco.annotated import load_splits
    from tutorial_moco.transfer import FRESH, load_start
    from tutorial_moco.transfer_report import sample, transfer_classify, transfer_dense

    if flags.task == "classify":
        train, test = load(DataFlags(data=flags.data or "shapes", image_size=flags.image_size))
    else:
        train, test = load_splits(flags.data or "scenes", flags.task)
    names = list(dict.fromkeys(flags.checkpoint))
    few = sample(train, flags.image_size) if FRESH in names else None

    @functools.cache
    def start(name: str, seed: int):
        return load_start(name, few, encoder=flags.encoder, seed=seed)

    told = repr(replace(flags, json=None, out=None))  # another command has another folder
    out = flags.out or Path("runs") / f"transfer-{flags.task}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    how = {"epochs": flags.epochs, "lr": flags.lr, "batch_size": flags.batch_size}
    if flags.task == "classify":
        return transfer_classify(names, start, train, test, flags.labels, flags.seeds, out, **how)
    how |= {"neck": flags.neck, "frozen": flags.frozen, "image_size": flags.image_size}
    return transfer_dense(names, start, flags.task, train, test, flags.seeds, out, **how)


def run_export(flags: Export) -> dict:
    """A file for another program."""
    from tutorial_moco.export import export

    found = export(flags.checkpoint, flags.format, flags.out or Path("exported") / flags.format)
    why = "it is on no package index; its names are tested" if flags.format == "detectron2" else "it is not installed"
    compared = f"not read again by {flags.format}: {why}"
    if found["largest_difference"] is not None:
        compared = f"read again, the features differ by {found['largest_difference']:.0e} of the largest at most"
    print(f"{found['path']}: {found['bytes'] / 2**20:.1f} MiB; {compared}")
    return found


def run_data(flags: Data) -> dict:
    """Sizes, classes, hash, contact sheet."""
    from tutorial_moco.figures import contact_sheet
    from tutorial_moco.provenance import provenance
    from tutorial_moco.report import png
    from tutorial_moco.speed import default_device

    train, test = load(flags)
    print(f"classes: {', '.join(train.classes)}")
    print(f"sha256 of the training images and labels: {train.hash}")
    if flags.sheet:
        write_file("--sheet", flags.sheet, png(contact_sheet(train)))
        print(f"contact sheet: {flags.sheet}")
    facts = provenance(train, default_device())
    return {**facts, "train": len(train), "test": len(test), "classes": train.classes}


def run_doctor(flags: Doctor) -> dict:
    """Versions, widgets, memory, disk, images, measured runs."""
    if flags.recipe:
        return tell_cost(flags)
    from tutorial_moco.doctor import report

    found = report(flags.data)
    result = {"checks": [{"well": well, "line": line} for well, line in found]}
    if failed := sum(not well for well, _ in found):
        if flags.json:  # what is not well is what one wants to read there
            write_json(flags.json, result)
        raise DataError(f"{failed} of {len(found)} things are not well: the lines with [FAIL] say what to do")
    return result


def tell_cost(flags: Doctor) -> dict:
    """Of a recipe."""
    from tutorial_moco.cost import told

    must_be_above_0(flags, "images", "images_per_second")
    lines = told(flags.recipe, flags.settings, flags.gpus, flags.images, flags.images_per_second)
    print("\n".join(lines))
    return {"recipe": flags.recipe, "gpus": flags.gpus, "lines": lines}


def only_for(what: str, flags: object, *names: str) -> None:
    """Flags that would have no effect here have to be left out, lest one believes that they had."""
    for name in names:
        if (value := getattr(flags, name)) != type(flags).__dataclass_fields__[name].default:
            raise UsageError(f"{flag(name)} {value} is for {what}: leave it out here")


def must_be_above_0(flags: object, *names: str) -> None:
    """Flags that are numbers, or left out."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise UsageError(f"{flag(name)} must be above 0, not {value}")


@contextlib.contextmanager
def told_if_missing(extra: str):
    """A package of an optional extra that is not installed is told in a line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'tutorial_moco[{extra}]'") from error


def run_check(flags: Check) -> dict:
    """A student's own look at their notebook."""
    with told_if_missing("notebooks"):
        from tutorial_moco.classroom.check import check

    return check(flags.assignment, flags.notebook)


def run_grade(flags: Grade) -> dict:
    """A lecturer's grading."""
    with told_if_missing("classroom"):
        from tutorial_moco.classroom.grade import grade

    try:
        secret = flags.secret.read_bytes().hex() if flags.secret else secrets.token_hex()
    except OSError as error:
        raise UsageError(f"--secret {flags.secret} cannot be read: {error.strerror}") from error
    hide = [flags.secret] if flags.secret else []
    return grade(flags.assignment, flags.submissions, flags.out, flags.course, secret, hide=hide)


def load(flags: DataFlags, view_size: int | None = None):
    """The training images and those to evaluate on, with a line that says what they are.

    Args:
        view_size: of a recipe: pictures stay encoded.
    """
    from tutorial_moco.distributed import one_after_another
    from tutorial_moco.images import hold_out, load_images

    if not 0 <= flags.hold_out < 1:
        raise UsageError(f"--hold-out must be in [0, 1), not {flags.hold_out}")
    how = {
        "image_size": flags.image_size,
        "view_size": view_size,
        "on_bad_image": flags.on_bad_image,
        "progress": not process(),
    }
    with one_after_another():
        train = load_images(flags.data, "train", **how)
        test = None if flags.hold_out else load_images(flags.data, "test", **how)
    if flags.hold_out:
        train, test = hold_out(train, flags.hold_out)
    if process():
        return train, test
    size = train.images.shape[-1]
    where = ", decoded when they are wanted" if view_size else ""
    print(f"{train.name}: {len(train):,} training and {len(test):,} {test.split} images of {size} x {size} pixels{where}, "
          f"{len(train.classes)} classes", file=sys.stderr)  # fmt: skip
    return train, test


def default_out(flags: RunFlags, name: str) -> Path:
    """A folder under runs/ that is a function of the settings: the same command finds it again, another does not."""
    told = repr((type(flags).__name__, flags.settings, flags.minutes, flags.image_size, flags.hold_out, flags.precision))
    stem = re.sub(r"[^\w-]+", "-", name.split(".")[0])
    what = flags.settings.mechanism if isinstance(flags, Pretrain) else "compare"
    return Path("runs") / f"{stem}-{what}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


TOGETHER = ("compare", "pretrain", "evaluate")  # what torchrun may start
COMMANDS = {
    "compare": (Compare, run_compare),
    "pretrain": (Pretrain, run_pretrain),
    "evaluate": (Evaluate, run_evaluate),
    "transfer": (Transfer, run_transfer),
    "export": (Export, run_export),
    "data": (Data, run_data),
    "doctor": (Doctor, run_doctor),
    "check": (Check, run_check),
    "grade": (Grade, run_grade),
}


def process() -> int | None:
    """Which of those that torchrun started this is; None if it started none."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 2 wrong usage, 3 bad or missing data, 4 another process was lost,
    130 interrupted, 143 stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    continued = {
        "compare": "the last checkpoint",
        "pretrain": "the last checkpoint",
        "evaluate": "a linear probe that was begun",
    }
    goes_on = f"goes on from {continued[argv[0]]}" if argv[0] in continued else "begins anew"
    return exit_status("tutorial-moco", lambda: run_command(*argv), goes_on)


def run_command(name: str, *words: str) -> None:
    """Run the command of this name with its flags, and write its result where ``--json`` says."""
    if name not in COMMANDS:
        raise UsageError(f"{name} is no command: choose one of {', '.join(COMMANDS)}")
    flags_type, command = COMMANDS[name]
    flags = parse(flags_type, list(words), f"tutorial-moco {name}")
    with joined(name):
        result = command(flags)
    if flags.json and result:  # of several processes the first has it
        write_json(flags.json, result)


@contextlib.contextmanager
def joined(name: str):
    """The processes that torchrun started, if it did, as one."""
    if process() is None:
        yield
        return
    if name not in TOGETHER:
        raise UsageError(f"{name} is for one process: torchrun is for {', '.join(TOGETHER)}")
    from tutorial_moco.distributed import processes

    with processes():
        yield


def exit_status(prog: str, work: Callable[[], None], again: str) -> int:
    """Do the work; a mistake that a user can mend, or Ctrl-C, ends in one line. ``again``: what the same command then does."""
    try:
        work()
    except (UsageError, DataError, LostProcess) as error:
        if isinstance(error, LostProcess | BadPicture) and process() is not None:
            prog = f"{prog} (process {process()})"
        elif process() and int(os.environ["LOCAL_RANK"]):  # other mistakes are raised on all: one of a machine tells them
            return error.exit_status
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_status
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; a name, so that --help need not wait for torch
            raise
        print(
            f"{prog}: the GPU's memory is full: take a smaller --batch-size, --image-size or --view-size, or --accumulate 2",
            file=sys.stderr,
        )
        return UsageError.exit_status
    except KeyboardInterrupt:
        if not process():
            print(f"\n{prog}: interrupted; the same command {again}", file=sys.stderr)
        return 130
    return 0


def parse(flags_type: type, argv: list[str], prog: str):
    """Flags from words; ``--recipe`` decides the defaults of the others, so that --help shows what would be used."""
    default = None
    name = _value(argv, "--recipe")
    if name is not None and name not in RECIPES:
        raise UsageError(f"--recipe {name} is not known: choose one of {', '.join(RECIPES)}")
    if flags_type is Doctor and name:
        default = Doctor(recipe=name, settings=RECIPES[name])
    if issubclass(flags_type, RunFlags):
        name = name or ("shapes" if (_value(argv, "--data") or "shapes").lower() == "shapes" else "small")
        by_epochs = _value(argv, "--epochs") is not None
        if by_epochs and _value(argv, "--minutes") is not None:
            raise UsageError("--minutes and --epochs are two budgets for one training: give one of them")
        default = flags_type(settings=RECIPES[name], recipe=name, **({"minutes": None} if by_epochs else {}))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(flags_type, default=default, args=argv, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{one_line(complaint.getvalue())}; see {prog} --help") from None


def _value(argv: list[str], flag: str) -> str | None:
    """A flag's value before the words are parsed, or None."""
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def one_line(box: str) -> str:
    """tyro's framed complaint as one line: what was wrong and, if it has one, its proposal."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()[1:]]
    sections, rule = [[]], re.compile("^[─-]+$")
    for line in lines:
        if rule.match(line):
            sections.append([])
        elif line:
            sections[-1].append(line)
    sections = [section for section in sections if section]
    message = " ".join(sections[0]).removeprefix("Error parsing settings: ").rstrip(".")
    proposal = next((s[1].split()[0] for s in sections[1:] if len(s) > 1 and s[0].startswith("Perhaps")), None)
    return f"{message} (perhaps {proposal})" if proposal else message


def write_json(path: Path, result: dict) -> None:
    """The result as JSON, in one move."""
    write_file("--json", path, (json.dumps(result, indent=1, default=str, allow_nan=False) + "\n").encode())


def write_file(flag: str, path: Path, content: bytes) -> None:
    """A file that a flag asked for."""
    try:
        write_whole(path, content)
    except DataError as error:
        raise UsageError(f"{flag} {error}") from error
