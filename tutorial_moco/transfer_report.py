"""The command ``transfer``: another task from one or several starts, a table, and a report with what was drawn."""

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from tutorial_moco import transfer_figures
from tutorial_moco.annotated import Annotated
from tutorial_moco.augment import plain_view
from tutorial_moco.dense import answers
from tutorial_moco.figures import CLASS_COLOURS
from tutorial_moco.files import write_whole
from tutorial_moco.images import ImageSet
from tutorial_moco.provenance import provenance
from tutorial_moco.report import Picture, text_table, write_report
from tutorial_moco.results import mean_and_interval
from tutorial_moco.speed import default_device
from tutorial_moco.transfer import Start, Trained, classify, dense, save_trained

SHOWN = 5  # images of the picture
NAMES = {
    "ap_boxes": "box AP", "ap50_boxes": "box AP50", "ap75_boxes": "box AP75", "ap_masks": "mask AP", "ap50_masks": "mask AP50",
    "ap75_masks": "mask AP75", "ap_keypoints": "keypoint AP", "ap50_keypoints": "keypoint AP50",
    "ap75_keypoints": "keypoint AP75", "miou": "mIoU", "linear_top1": "linear %", "fine_tuned_top1": "fine-tuned %",
}  # fmt: skip


def transfer_classify(
    starts: list[Start], train: ImageSet, test: ImageSet, shares: tuple[float, ...], seeds: int, out: Path, **how
) -> dict[str, object]:
    """Each start with each share of the labels, linear and fine-tuned; writes ``out/report.html`` and ``out/result.json``.

    Args:
        how: ``epochs`` and ``lr`` of fine-tuning, as for `transfer.classify`.
    """
    rows = []
    for start, share, seed in itertools.product(starts, shares, range(seeds)):
        row = {"start": start.name, "share": share, "seed": seed}
        for kind in ("linear", "fine_tuned"):
            row |= classify(start, train, test, share=share, how=kind, seed=seed, **how)
        rows.append(row)
        print(_line(row), flush=True)
    table = _table(rows, ("start", "labels"), ("linear_top1", "fine_tuned_top1"))
    looks = _looks(starts)
    pictures = [
        Picture(
            heading,
            transfer_figures.label_curves(rows, field, *looks, 100 / len(train.classes)),
            f"{heading}: accuracy against the number of labels, a line for each start.",
            "Each start was trained with the same recipe. Bars: 95 % interval over seeds, where there are several.",
        )
        for heading, field in (("A linear classifier", "linear_top1"), ("Fine-tuned", "fine_tuned_top1"))
    ]
    lead = f"Images of {train.name}, classified with some of the labels; all {len(test):,} {test.split} images are judged."
    return _finish(out, f"Few labels on {train.name}", lead, table, pictures, rows, provenance(train, default_device()))


def transfer_dense(
    starts: list[Start], task: str, train: Annotated, test: Annotated, seeds: int, out: Path, **how
) -> dict[str, object]:
    """Each start trained on the task; writes ``out/report.html``, ``out/result.json`` and the models.

    Args:
        task: ``detect``, ``keypoints`` or ``segment``. how: as for `transfer.dense`.
    """
    rows, drawn = [], {}
    images, targets = zip(*(test[i] for i in range(min(SHOWN, len(test)))), strict=True)
    for start, seed in itertools.product(starts, range(seeds)):
        trained = dense(start, task, train, test, seed=seed, **how)
        rows.append({"start": start.name, "task": task, "seed": seed, **trained.result, "seconds": trained.seconds})
        print(_line(rows[-1]), flush=True)
        drawn.setdefault(start.name, first_answers(trained, test))
        save_trained(out / f"model-{len(rows)}.safetensors", trained, provenance(train, default_device()) | rows[-1])
    fields = tuple(name for name in rows[0] if name in NAMES)
    titles = _looks(starts)[1]
    draw = transfer_figures.segmentations if task == "segment" else transfer_figures.detections
    pictures = [
        Picture(
            "What they draw",
            draw(images, targets, {titles[name]: found for name, found in drawn.items()}, test.classes),
            f"The first {len(images)} test images: what is there, and what each model says.",
            "Models of seed 0. Answers surer than a half are drawn." if task != "segment" else "Models of seed 0.",
        )
    ]
    lead = (
        f"{len(train):,} images of {train.name} to train on, {len(test):,} to judge by. "
        + ("mIoU: mean over classes and ground." if task == "segment" else "AP as COCO counts it: mean over IoU .50 to .95.")
    )  # fmt: skip
    table = _table(rows, ("start",), fields)
    return _finish(out, f"{task} on {train.name}", lead, table, pictures, rows, provenance(train, default_device()))


def first_answers(trained: Trained, test: Annotated) -> list[dict[str, Tensor]]:
    """What the model says of the first images."""
    few = torch.utils.data.Subset(test, range(min(SHOWN, len(test))))
    few.in_memory = test.in_memory
    pairs = answers(trained.model, few, device=default_device(), dtype=trained.dtype, progress=False)
    return [answer for _, answer in pairs]


def sample(data: ImageSet | Annotated, most: int = 2000, side: int = 32) -> Tensor:
    """Images for the first layer of a fresh encoder: float32 (n, 3, side, side) or as large as they are, normalised."""
    if isinstance(data, ImageSet):
        return plain_view(data.images[:most])
    crops = [image[:, :side, :side] for image, _ in map(data.__getitem__, range(min(most, len(data))))]
    return plain_view(torch.stack([crop for crop in crops if crop.shape[-2:] == (side, side)]))


def _looks(starts: list[Start]) -> tuple[dict[str, str], dict[str, str]]:
    """A colour and a title for each start."""
    colours = {start.name: colour for start, colour in zip(starts, itertools.cycle(CLASS_COLOURS))}
    return colours, {start.name: title(start) for start in starts}


def title(start: Start) -> str:
    """A checkpoint by its folder and the mechanism that made it; or that it is fresh."""
    if not start.steps:
        return "fresh weights"
    path = Path(start.name)
    return f"{start.recipe.mechanism.replace('_', ' ')} ({path.parent.name if path.stem == 'checkpoint' else path.stem})"


def _table(rows: list[dict], by: tuple[str, ...], fields: tuple[str, ...]) -> list[list[str]]:
    """Means over seeds, with half the interval where there are several."""
    table = [[*by, *(NAMES[field] for field in fields)]]
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in by) == key]
        table.append([*map(str, key), *(_cell([row[field] for row in own]) for field in fields)])
    return table


def _cell(values: list[float]) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {half:.1f}"


def _line(row: dict) -> str:
    main = [name for name in row if name in NAMES and not name.startswith(("ap50", "ap75"))]
    told = [f"{NAMES[name]} {row[name]:.1f}" for name in main]
    which = f"{row['labels']:,} labels, " if "labels" in row else ""
    return f"{row['start']}, {which}seed {row['seed']}: {', '.join(told)}"


def _finish(
    out: Path, heading: str, lead: str, table: list[list[str]], pictures: list[Picture], rows: list[dict], facts: dict
) -> dict[str, object]:
    """Print the table, write the report and the rows."""
    print(text_table(table))
    write_report(out / "report.html", heading, lead, table, pictures, facts)
    result = {**facts, "results": rows}
    write_whole(out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\nreport: {out / 'report.html'}")
    return result
