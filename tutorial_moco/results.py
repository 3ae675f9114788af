"""What is shipped in data/: measured runs, a row each; encoders; features through a training. All say where they come from."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev, variance

from scipy import stats
from torch import Tensor

from tutorial_moco.checkpoint import load_checkpoint, single, unpack
from tutorial_moco.encoders import Encoder, build_encoder
from tutorial_moco.errors import DataError
from tutorial_moco.recipes import Recipe

NAMES = {"cifar10-jpeg.tar.xz": "CIFAR-10 (JPEG)", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}
CLASSES = {"cifar10-jpeg.tar.xz": 10, "cifar10": 10, "cifar100": 100, "stl10": 10, "shapes": 10}
DEFAULTS = asdict(Recipe())  # what a setting was that a row does not name
VARIED = {  # in which settings the rows of an experiment and a mechanism differ on purpose
    "K": ("K", "batch_size", "lr"),
    "m": ("m",),
    "temperature": ("temperature", "head"),
    "shuffling_bn": ("norm", "shuffle"),
    "symmetric": ("symmetric", "epochs"),
    "reference": ("symmetric",),
    "loss": ("loss",),
    "data_size": ("n", "epochs"),
    "cost": ("K", "batch_size"),
    "drift": ("m",),
    "versions": (
        "encoder",
        "head",
        "temperature",
        "augmentation",
        "schedule",
        "epochs",
        "optimizer",
        "lr",
        "weight_decay",
        "warmup",
    ),
}

Measure = Callable[[dict], float | None]


# Rows ----------------------------------------------------------------------------------------------------------------


def load_rows(experiment: str | None = None, scale: str = "cpu", path: Path | None = None) -> list[dict]:
    """The finished runs of the study, in the order they finished.

    Args:
        experiment: only the rows of this one, such as ``K``; all if None.
        scale: ``cpu`` (small encoder) or ``gpu`` (ResNet-18), which don't belong in one curve; or ``transfer``, other tasks.
        path: another file; by default ``data/study-SCALE.jsonl`` of this checkout, else of the folder one works in.

    Raises:
        DataError: there is no such file, or a line of it is no row.
    """
    path = path or find(f"study-{scale}.jsonl", "transfer" if scale == "transfer" else "study")
    try:
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): make it with python -m benchmarks.study") from error
    if torn:
        print(f"{path}: the last line was cut off while it was written, and is dropped", file=sys.stderr)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: line {number} is no row ({error}): take it out") from error
    return [row for row in rows if experiment in (None, row.get("experiment"))]


def of_experiment(rows: Iterable[dict], experiment: str) -> list[dict]:
    """The rows of an experiment.

    Raises:
        DataError: there are none; or they differ in what the experiment does not vary, so that a mean would mix two recipes.
    """
    rows = [row for row in rows if row["experiment"] == experiment]
    if not rows:
        raise DataError(f"nothing measured yet for {experiment}: run python -m benchmarks.study --only {experiment}")
    fixed = [name for name in ("n", "data_hash", *DEFAULTS) if name not in ("seed", *VARIED.get(experiment, ()))]
    for (mechanism,), alike in by(rows, "mechanism").items():
        for name in fixed:
            found = {row.get(name, DEFAULTS.get(name)) for row in alike}
            if len(found) > 1:
                told = " and ".join(sorted(map(str, found)))
                raise DataError(f"rows of {experiment} ({mechanism}) have {name} {told}: keep those of one in the file")
    return rows


def by(rows: Sequence[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Rows in groups that agree in these fields; keys are tuples of the fields' values, in the order they first occur."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def along(rows: Sequence[dict], field: str) -> dict[float, list[dict]]:
    """Rows in groups by the value of one field, in rising order."""
    return {value: group for (value,), group in sorted(by(rows, field).items())}


def field(name: str) -> Measure:
    """The measure that is a field of the row; null where a run failed."""
    return lambda row: row[name]


def pretext_accuracy(row: dict) -> float | None:
    """Share of own keys found at the end, in percent: the mean of the last ten batches that were logged."""
    return None if row["failed"] else mean(point["pretext_accuracy"] for point in row["losses"][-10:])


def step_memory(row: dict) -> float | None:
    """MiB that the steps took beyond what the process, dictionary and all, held before them; of a row of ``cost``."""
    return None if row["failed"] else (row["peak_memory_bytes"] - row["memory_before_bytes"]) / 2**20


def step_ms(row: dict) -> float | None:
    """Milliseconds of a training step; of a row of ``cost``."""
    return None if row["failed"] else 1000 * row["seconds_per_step"]


def values(rows: Iterable[dict], measure: Measure) -> list[float]:
    """A measure of the rows that have it."""
    return [value for row in rows if (value := measure(row)) is not None]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); of one value the latter is NaN."""
    n = len(values)
    if n < 2:
        return float(mean(values)), math.nan
    return float(mean(values)), float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)


def mean_and_bar(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the length of its error bar: of two seeds from one to the other, of more the 95 % interval; of one NaN.

    The interval of two is thirteen times as long as the two are apart, which would hide in a picture what the rows say.
    """
    if len(values) == 2:
        return float(mean(values)), abs(values[0] - values[1]) / 2
    return mean_and_interval(values)


def difference_and_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a less mean of b, and half the width of its 95 % confidence interval (Welch's t); NaN if either has one value."""
    difference = float(mean(a)) - float(mean(b))
    if min(len(a), len(b)) < 2:
        return difference, math.nan
    va, vb = variance(a) / len(a), variance(b) / len(b)
    if va + vb == 0:
        return difference, 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return difference, float(stats.t.ppf(0.975, freedom)) * math.sqrt(va + vb)


def chance_top1(rows: Sequence[dict]) -> float | None:
    """Accuracy of guessing, in percent; None if the data is not known by name."""
    classes = CLASSES.get(rows[0]["data"]) if rows else None
    return classes and 100 / classes


def provenance_line(rows: Sequence[dict]) -> str:
    """When, with which commit, where and on which data rows were measured, with how many seeds, and where number formats are
    mixed, in which; for under a picture.
    """
    if not rows:
        return "nothing measured yet"
    days, commits, machines, data = (
        " and ".join(sorted({found(row) for row in rows}))
        for found in (
            lambda row: row["date"][:10],
            lambda row: row["commit"] or "unknown",
            lambda row: row["hardware"],
            lambda row: NAMES.get(row["data"], row["data"]),
        )
    )
    seeds = len({row["seed"] for row in rows})
    formats = sorted({row["precision"] for row in rows if row.get("precision")})
    mixed = f", in {' and '.join(formats)}" * (len(formats) > 1)
    return f"measured {days} with commit {commits}, on {machines}, {data}, {seeds} seed{'s' * (seeds > 1)}{mixed}"


# Encoders and features -----------------------------------------------------------------------------------------------


def load_run(name: str, folder: Path | None = None) -> tuple[Encoder, Recipe, dict]:
    """A shipped encoder, ready for features: in eval mode, on the CPU, float32 (its matrices were rounded to float16).

    Args:
        name: ``moco``, ``moco-mlp``, ``end_to_end``, ``memory_bank`` or ``moco-shapes``. folder: by default data/, as for rows.

    Returns:
        The query encoder, its recipe, and the facts: provenance, ``classes``, ``step`` and the last ``knn_top1``. A MoCo
        has its ``queue`` (K, C) and ``born`` (K,) among them, and some their ``key_encoder``.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    tensors, facts = load_checkpoint(find(f"{name}.safetensors", "snapshots", folder))
    recipe = Recipe.from_json(facts.pop("recipe"))
    tensors = {key.removeprefix("mechanism."): tensor for key, tensor in single(tensors).items()}
    facts |= {key: tensors[key] for key in ("queue", "born") if key in tensors}
    parts = [part for part in ("encoder", "key_encoder") if any(key.startswith(f"{part}.") for key in tensors)]
    encoders = {part: _encoder(recipe, tensors, part) for part in parts}
    return encoders.pop("encoder"), recipe, facts | encoders


def load_features(name: str, folder: Path | None = None) -> dict[str, object]:
    """Features of the same test images at some moments of a shipped run's training. Names as for `load_run`.

    Returns:
        ``features`` float32 (moments, n, D), ``epochs`` and ``knn`` (percent, of these n images against all training
        images) for each moment, ``labels`` int64 (n,), ``index`` int64 (n,) into the test images, and ``facts``:
        recipe, ``classes`` and provenance.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    tensors, facts = load_checkpoint(find(f"{name}-features.safetensors", "snapshots", folder))
    moments = {key: facts.pop(key) for key in ("epochs", "knn")}
    return single(tensors) | moments | {"facts": facts}


def _encoder(recipe: Recipe, tensors: dict[str, Tensor], part: str) -> Encoder:
    encoder = build_encoder(recipe.encoder, head=recipe.head, dim=recipe.dim, norm=recipe.norm)
    unpack(tensors, **{part: encoder})
    return encoder.eval()


def find(name: str, maker: str, folder: Path | None = None) -> Path:
    """Where a shipped file is: data/NAME, upward from this package, else from the working directory; or FOLDER/NAME.

    Raises:
        DataError: nowhere; ``maker`` is the benchmark that makes it.
    """
    places = (*Path(__file__).resolve().parents, Path.cwd(), *Path.cwd().parents)
    for place in [folder] if folder else [place / "data" for place in places]:
        if (place / name).is_file():
            return place / name
    raise DataError(
        f"{folder or 'data'}/{name} does not exist: make it with python -m benchmarks.{maker}, or take the repository's"
    )
