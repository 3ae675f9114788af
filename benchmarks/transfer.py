"""What pre-training is worth on other tasks: ``python -m benchmarks.transfer``, a row for each training, resumable.

Encoders are pre-trained on `shapes` and on CIFAR-10, by each mechanism, with labels, and not at all, with equal budgets;
each is then the start of each task, with one recipe. Rows go to ``data/study-transfer.jsonl``.
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.plan import version_3, with_mechanism
from benchmarks.study import append, make_ready
from tutorial_moco import speed
from tutorial_moco.annotated import load_annotated
from tutorial_moco.checkpoint import pack, save_checkpoint
from tutorial_moco.cli import exit_status, parse
from tutorial_moco.compare import untrained
from tutorial_moco.errors import UsageError
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.masked import pretrain_masked, save_painter
from tutorial_moco.pretrain import Run, pretrain, start
from tutorial_moco.provenance import provenance
from tutorial_moco.recipes import RECIPES, TRANSFORMER, Recipe
from tutorial_moco.results import load_rows
from tutorial_moco.supervised import classifier, train_classifier
from tutorial_moco.transfer import Start, classify, dense, load_start, save_trained

STARTS = ("moco", "end_to_end", "memory_bank", "supervised", "untrained")
TRANSFORMERS = ("masked", "untrained", "moco_v3")  # of photographs, judged by classification alone
SOURCES = ("shapes", "photographs")
SHARES = (0.01, 0.1, 1.0)
DENSE = ("detect", "segment", "keypoints")
DRAWN = {  # `shapes` of an Intel and of an AMD processor, which round a few pixels differently
    "cb1b00bbea10f2e6967d6e2ae6adbf4736c87cb1355d84510dbcaa154bf5c0ec",
    "eea3be556e97be8e1ff8b3b8e86e36652d4c993c65388cafbba12990ce9db176",
}
SCENES = 1000  # to train on: half of what there is
KEPT = {"moco": DENSE, "untrained": ("detect", "segment")}  # models for the chapter, from `shapes`, seed 0


@dataclass(frozen=True)
class Flags:
    """Measure what each pre-training is worth on other tasks. Stop it at any time; the same command goes on."""

    data: str = "cifar10"  # the photographs: cifar10, a folder split/class/image, or an archive of one
    only: str = ""  # tasks: classify, digits, detect, segment, keypoints, separated by commas; all if left out
    source: str = ""  # shapes or photographs; both if left out
    seeds: int = 2  # of pre-training and task together
    epochs: int = 5  # of pre-training on the photographs; on shapes the recipe's
    encoders: Path = Path("runs/transfer")  # where pre-trained encoders are kept
    out: Path = Path("data")  # folder of the rows


@dataclass(frozen=True)
class Job:
    """A pre-training and what it is the start of."""

    source: str  # shapes or photographs
    start: str
    seed: int
    task: str
    encoder: str
    how: str = ""  # of classify: linear or fine_tuned
    share: float = 1.0


def plan(flags: Flags) -> Iterator[Job]:
    """All jobs, seed 0 first."""
    if flags.source not in ("", *SOURCES):
        raise UsageError(f"--source must be {' or '.join(SOURCES)}, not {flags.source}")
    sources = [flags.source] if flags.source else SOURCES
    tasks = flags.only.split(",") if flags.only else ["classify", "digits", *DENSE]
    for seed in range(flags.seeds):
        for task in tasks:
            for source in sources:
                encoder = "tiny" if source == "shapes" else "small"
                for begin in STARTS:
                    yield from jobs_of(Job(source, begin, seed, task, encoder))
                if (source, task) == ("photographs", "classify"):
                    for begin in TRANSFORMERS:
                        yield from jobs_of(Job(source, begin, seed, task, "vit-learned"))


def jobs_of(job: Job) -> Iterator[Job]:
    """A start's jobs for a task: one, or one for each way to classify and each share of the labels."""
    if job.task in DENSE:
        yield job
    elif job.task in ("classify", "digits"):
        yield from (replace(job, how=how, share=share) for how in ("linear", "fine_tuned") for share in SHARES)
    else:
        raise UsageError(f"--only {job.task} is not known: choose of classify, digits, {', '.join(DENSE)}")


def recipe_of(flags: Flags, job: Job, n: int) -> Recipe:
    """Pre-training: the recipe of the source with the start's mechanism."""
    base = RECIPES["shapes"] if job.source == "shapes" else RECIPES["small"].replace(epochs=flags.epochs)
    base = base.replace(seed=job.seed)
    if job.encoder != base.encoder:
        return version_3(base, n, encoder=job.encoder, **TRANSFORMER)
    return with_mechanism(base, job.start, n) if job.start in STARTS[:3] else base


def encoder_of(flags: Flags, job: Job) -> Start:
    """The start, pre-trained now if it was not before; an untrained one has BatchNorm statistics of its source."""
    train, _ = images_of(flags, job.source)
    recipe = recipe_of(flags, job, len(train))
    how = hashlib.sha256(f"{recipe.to_json()} {train.hash}".encode()).hexdigest()[:8]
    path = flags.encoders / f"{job.source}-{job.start}-{job.encoder}-{job.seed}-{how}.safetensors"
    if not path.exists():
        device = speed.default_device()
        if job.start == "untrained":
            run = untrained(recipe, train, device)
        elif job.start == "supervised":
            run = with_labels(recipe, train, device)
        elif job.start == "masked":
            run = by_painting(flags, recipe, train, device)
        else:
            run = pretrain(recipe, train, progress=False)
        state = {"recipe": recipe.to_json(), "dtype": str(run.dtype).removeprefix("torch."), "step": run.step}
        encoder = {f"mechanism.{name}": tensor for name, tensor in pack(encoder=run.mechanism.encoder).items()}
        save_checkpoint(path, encoder, state | {"seconds": run.seconds, "data_hash": train.hash})
    return load_start(path, torch.empty(0))


def with_labels(recipe: Recipe, train: ImageSet, device: torch.device) -> Run:
    """The encoder trained with labels, with the same views and schedule."""
    run = start(recipe, train, device)
    encoder = run.mechanism.encoder
    net = classifier(encoder.backbone, encoder.feature_dim, len(train.classes))
    curve, run.seconds = train_classifier(net, recipe, train, run.dtype)
    run.step = len(curve)
    return run


def by_painting(flags: Flags, recipe: Recipe, train: ImageSet, device: torch.device) -> Run:
    """The encoder trained by painting hidden patches; with seed 0 the painter is kept for its chapter."""
    run = start(recipe, train, device)
    run.mechanism.encoder, painter, found = pretrain_masked(recipe, train, progress=False)
    run.step, run.seconds = found["steps"], found["train_seconds"]
    if recipe.seed == 0:
        facts = provenance(train, device) | {
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            "final_loss": found["losses"][-1]["loss"],
        }
        save_painter(flags.out / "painter.safetensors", painter, facts)
    return run


def pretraining(flags: Flags, job: Job) -> dict[str, object]:
    """What a row says of the images and the epochs that its start was made of."""
    train, _ = images_of(flags, job.source)
    return {"pretrain_epochs": recipe_of(flags, job, len(train)).epochs, "pretrain_data_hash": train.hash}


def is_of(row: dict, wanted: dict[str, object]) -> bool:
    """Whether a row is of these settings.

    The first rows do not name the images of the pre-training, which were these. A row of `shapes` as another kind of processor
    draws them counts.
    """
    asked = wanted["pretrain_data_hash"]
    given = row.get("pretrain_data_hash", asked)
    same = given == asked or {given, asked} <= DRAWN
    return same and all(row.get(name) == value for name, value in wanted.items() if name != "pretrain_data_hash")


@cache
def images_of(flags: Flags, source: str) -> tuple[ImageSet, ImageSet]:
    name = source if source in ("shapes", "digits") else flags.data
    return load_images(name, "train"), load_images(name, "test")


@cache
def scenes(task: str):
    return load_annotated("scenes", "train", task, n=SCENES), load_annotated("scenes", "test", task)


def measure(flags: Flags, job: Job) -> dict[str, object]:
    """The row of a job."""
    began, first = time.perf_counter(), encoder_of(flags, job)
    facts = {
        **asdict(job),
        "pretrain_steps": first.steps,
        **pretraining(flags, job),
    }
    if job.task in DENSE:
        train, test = scenes(job.task)
        dtype = torch.bfloat16 if first.recipe.encoder != "tiny" else torch.float32
        trained = dense(first, job.task, train, test, seed=job.seed, dtype=dtype, progress=False)
        if job.source == "shapes" and job.seed == 0 and job.task in KEPT.get(job.start, ()):
            where = flags.out / f"{job.task}-{job.start}.safetensors"
            save_trained(where, trained, provenance(train, speed.default_device()), half=True)
        found = trained.result | {"train_seconds": trained.seconds, "precision": str(dtype).removeprefix("torch.")}
    else:
        train, test = images_of(flags, "digits" if job.task == "digits" else job.source)
        found = classify(first, train, test, share=job.share, how=job.how, seed=job.seed, progress=False)
    wall = round(time.perf_counter() - began, 1)
    return facts | found | {"wall_seconds": wall} | provenance(train, speed.default_device())


def run(flags: Flags) -> str:
    """Measure what is not there yet; returns the last line to print."""
    path = flags.out / "study-transfer.jsonl"
    make_ready(path)
    rows, jobs = load_rows(path=path), list(plan(flags))
    wanted = {job: asdict(job) | pretraining(flags, job) for job in jobs}
    todo = [job for job in jobs if not any(is_of(row, wanted[job]) for row in rows)]
    with tqdm(todo, unit="run") as bar:
        for job in bar:
            bar.set_description(" ".join(str(value) for value in asdict(job).values() if value != ""))
            append(path, measure(flags, job))
    return f"{len(jobs)} rows in {path}, {len(todo)} of them new"


def main() -> int:
    """Measure; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data, 130 interrupted."""
    return exit_status(
        "transfer",
        lambda: print(run(parse(Flags, sys.argv[1:], "python -m benchmarks.transfer"))),
        "goes on with the run it was at",
    )


if __name__ == "__main__":
    sys.exit(main())
