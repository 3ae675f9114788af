"""The paper's claims, measured: every experiment of `benchmarks.plan`, a row for each finished run.

Rows go to ``data/study-SCALE.jsonl``, one JSON object a line, and are read with `tutorial_moco.results.load_rows`. A row
that is there is not run again, so the study can be stopped at any time, and the same command goes on.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from tqdm.auto import tqdm

from benchmarks.measures import measure
from benchmarks.plan import BASES, Job, chosen, plan
from tutorial_moco import speed
from tutorial_moco.cli import exit_status, parse
from tutorial_moco.errors import UsageError
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.recipes import Recipe
from tutorial_moco.report import text_table
from tutorial_moco.results import load_rows


@dataclass(frozen=True)
class Flags:
    """Measure the paper's claims: a row for each finished run. Stop it at any time; the same command goes on."""

    data: str = "cifar10"  # cifar10, shapes, a folder split/class/image, or an archive of one
    encoder: Literal["small", "tiny", "resnet18"] = "small"  # resnet18: the official notebook's recipe, for a GPU
    only: str = ""  # experiments to run, separated by commas; all if left out (--list names them)
    seeds: int = 3  # runs of each setting
    epochs: int | None = None  # passes over the images; the recipe's if left out
    scale: Literal["cpu", "gpu"] | None = None  # which file of rows; the device's if left out
    threads: int = 0  # of the processor; 0 is PyTorch's choice
    out: Path = Path("data")  # folder of the rows
    list: bool = False  # print the plan, what of it is done and how long the rest will take, and stop


def study(flags: Flags) -> str:
    """Run what is not there yet, or list the plan; returns the last line to print."""
    if flags.seeds < 1 or flags.threads < 0:
        raise UsageError(f"--seeds must be at least 1 and --threads at least 0, not {flags.seeds} and {flags.threads}")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    base = BASES[flags.encoder].replace(**({} if flags.epochs is None else {"epochs": flags.epochs}))
    only = chosen(flags.only)  # a wrong name is told before anything is loaded
    jobs = plan(base, load(flags.data)[0].labels, flags.seeds, only)
    if not jobs:
        raise UsageError(f"--only {flags.only} has no runs for --encoder {flags.encoder}: it is for another")
    scale = flags.scale or ("gpu" if speed.default_device().type == "cuda" else "cpu")
    path = flags.out / f"study-{scale}.jsonl"
    if not flags.list:
        make_ready(path)
    rows = load_rows(path=path) if path.exists() else []
    if flags.list:
        print(text_table(listing(jobs, rows, flags.data)))
    else:
        run_all(jobs, rows, path, flags.data, base)
    return f"{len(rows)} rows in {path}"


def run_all(jobs: list[Job], rows: list[dict], path: Path, data: str, base: Recipe) -> None:
    """Run the jobs that have no row, and add theirs to the file and to ``rows``.

    A run that several experiments share is trained once and written for each of them.
    """
    todo = [job for job in jobs if find(rows, job, data, job.experiment) is None]
    with tqdm(todo, unit="run") as bar:
        for job in bar:
            bar.set_description_str(title(job, base))
            twin, began = find(rows, job, data), time.perf_counter()
            row = twin | {"experiment": job.experiment, "note": job.note} if twin else measure(job, *images_of(job, data))
            append(path, row)
            rows.append(row)
            bar.write(f"{title(job, base)}: {outcome(row)}, {time.perf_counter() - began:.0f} s")


def images_of(job: Job, data: str) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of a job: the study's, but those of ``check`` are always the drawn ones."""
    return load("shapes" if job.kind == "check" else data)


@cache
def load(data: str) -> tuple[ImageSet, ImageSet]:
    """Training and test images, once for all jobs."""
    return load_images(data, "train"), load_images(data, "test")


def find(rows: list[dict], job: Job, data: str, experiment: str | None = None) -> dict | None:
    """The row of this job in this experiment, or in any. A setting that a row does not name had its default then.

    The images of ``check`` are drawn by code, and another processor rounds some of their pixels differently: any will do.
    """
    wanted, defaults = job.identity(images_of(job, data)[0].hash), asdict(Recipe())
    if job.kind == "check":
        del wanted["data_hash"]
    for row in rows:
        if experiment in (None, row["experiment"]) and all(row.get(k, defaults.get(k)) == v for k, v in wanted.items()):
            return row
    return None


def title(job: Job, base: Recipe) -> str:
    """The experiment, and in what the job differs from the base recipe."""
    fields = asdict(base) | {"seed": None}
    changes = {name: value for name, value in asdict(job.recipe).items() if value != fields[name]}
    draws = [f"share {job.share:g}"] * (job.share < 1) + ["long tail"] * job.long_tail
    settings = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in changes.items()]
    return f"{job.experiment}: " + ", ".join([job.kind] * (job.kind != "pretrain") + draws + settings)


def outcome(row: dict) -> str:
    """What a row found, in a few words."""
    if row["failed"]:
        return f"failed ({row['failed']})"
    if row["kind"] == "cost":
        return f"{1000 * row['seconds_per_step']:.0f} ms a step, peak {row['peak_memory_bytes'] / 2**20:,.0f} MiB"
    if row["kind"] == "drift":
        return f"cosine {row['drift'][0]['cosine']:.3f} of the newest keys, {row['drift'][-1]['cosine']:.3f} of the oldest"
    return f"kNN {row['knn_top1']:.1f}" + (f", linear {row['linear_top1']:.1f}" if row["linear_top1"] is not None else "")


def listing(jobs: list[Job], rows: list[dict], data: str) -> list[list[str]]:
    """The plan as a table: for each experiment its runs, those done, those to do, and the minutes they will take."""
    table, trained = [["experiment", "runs", "done", "to do", "minutes"]], list(rows)
    for name in dict.fromkeys(job.experiment for job in jobs):
        own = [job for job in jobs if job.experiment == name]
        todo, seconds = [job for job in own if find(rows, job, data, name) is None], 0.0
        for job in todo:
            if find(trained, job, data) is None:  # else it is another experiment's as well, and is trained there
                seconds += expected_seconds(job, rows)
                trained.append({"experiment": name, **job.identity(images_of(job, data)[0].hash)})
        minutes = "?" if math.isnan(seconds) else f"{seconds / 60:.0f}"
        table.append([name, str(len(own)), str(len(own) - len(todo)), str(len(todo)), minutes])
    return table


def expected_seconds(job: Job, rows: list[dict]) -> float:
    """From the rows of its kind, those of its mechanism if there are some; NaN if there are none."""

    def images(recipe: dict, kind: str, n: int) -> float:
        trains = kind in ("pretrain", "check", "drift", "supervised", "masked")
        return n * recipe["epochs"] * (2 if recipe["symmetric"] else 1) if trains else 1

    kin = [row for row in rows if (row["kind"], row["encoder"]) == (job.kind, job.recipe.encoder) and not row["failed"]]
    closest = [row for row in kin if row["mechanism"] == job.recipe.mechanism] or kin
    each = [row["wall_seconds"] / images(row, row["kind"], row["n"]) for row in closest]
    return median(each) * images(asdict(job.recipe), job.kind, job.n) if each else math.nan


# The file ------------------------------------------------------------------------------------------------------------


def make_ready(path: Path) -> None:
    """See that rows can be written, and cut off the part of one that a kill has left, so that the next begins on a new line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            print(f"{path}: the last line was cut off while it was written, and is dropped", file=sys.stderr)
            os.truncate(path, whole)
    except OSError as error:
        raise UsageError(f"--out {path} could not be written: {error.strerror or error}") from error


def append(path: Path, row: dict) -> None:
    """Add a row as one line, and see it onto the disk."""
    line = json.dumps(row, allow_nan=False) + "\n"
    try:
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"--out {path} could not be written: {error.strerror or error}") from error


def main() -> int:
    """Run the study; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data, 130 interrupted."""
    return exit_status(
        "study",
        lambda: print(study(parse(Flags, sys.argv[1:], "python -m benchmarks.study"))),
        "goes on with the run it was at",
    )


if __name__ == "__main__":
    sys.exit(main())
