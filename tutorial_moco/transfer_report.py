"""The command ``transfer``: another task from one or several starts, a table, and a report with what was drawn."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import center_crop

from tutorial_moco import transfer_figures
from tutorial_moco.annotated import Annotated
from tutorial_moco.augment import plain_view
from tutorial_moco.dense import answers, trunk
from tutorial_moco.detection import SMALL
from tutorial_moco.figures import CLASS_COLOURS
from tutorial_moco.files import write_whole
from tutorial_moco.images import ImageSet
from tutorial_moco.provenance import provenance
from tutorial_moco.randomness import permutation
from tutorial_moco.report import Picture, text_table, write_report
from tutorial_moco.results import mean_and_bar
from tutorial_moco.speed import default_device
from tutorial_moco.transfer import Start, Trained, classify, dense, save_trained

SHOWN = 5  # images of the picture
NAMES = {
    "ap_boxes": "box AP", "ap50_boxes": "box AP50", "ap75_boxes": "box AP75", "ap_masks": "mask AP", "ap50_masks": "mask AP50",
    "ap75_masks": "mask AP75", "ap_keypoints": "keypoint AP", "ap50_keypoints": "keypoint AP50",
    "ap75_keypoints": "keypoint AP75", "miou": "mIoU", "linear_top1": "linear %", "fine_tuned_top1": "fine-tuned %",
}  # fmt: skip


Load = Callable[[str, int], Start]  # the start of a name; the weights of a fresh one are drawn by the seed


def transfer_classify(
    names: list[str], load: Load, train: ImageSet, test: ImageSet, shares: tuple[float, ...], seeds: int, out: Path, **how
) -> dict[str, object]:
    """Each start with each share of the labels, linear and fine-tuned; writes ``out/report.html`` and ``out/result.json``.

    Args:
        names: of the starts. how: ``epochs`` and ``lr`` of fine-tuning, as for `transfer.classify`.
    """
    rows, facts, starts = [], provenance(train, default_device()), [load(name, 0) for name in names]
    for start in starts:  # one that cannot take these images is told before any is trained
        start.backbone.eval()(plain_view(train.images[:1]))
    for name, share, seed in itertools.product(names, shares, range(seeds)):
        start, row = load(name, seed), {"start": name, "share": share, "seed": seed}
        for kind in ("linear", "fine_tuned"):
            row |= classify(start, train, test, share=share, how=kind, seed=seed, **how)
        _add(rows, row, facts, out)
    table = _table(rows, ("start", "labels"), ("linear_top1", "fine_tuned_top1"))
    looks = _looks(starts)
    pictures = [
        Picture(
            heading,
            transfer_figures.label_curves(rows, field, *looks, 100 / len(train.classes)),
            f"{heading}: accuracy against the number of labels, a line for each start.",
            "Each start had the same recipe. Bars and ±: of two seeds from one to the other, of more the 95 % interval.",
        )
        for heading, field in (("A linear classifier", "linear_top1"), ("Fine-tuned", "fine_tuned_top1"))
    ]
    lead = f"Images of {train.name}, classified with some of the labels; all {len(test):,} {test.split} images are judged."
    return _finish(out, f"Few labels on {train.name}", lead, table, pictures, rows, facts)


def transfer_dense(
    names: list[str], load: Load, task: str, train: Annotated, test: Annotated, seeds: int, out: Path, **how
) -> dict[str, object]:
    """Each start trained on the task; writes ``out/report.html``, ``out/result.json`` and the models.

    Args:
        names: of the starts. task: ``detect``, ``keypoints`` or ``segment``. how: as for `transfer.dense`.
    """
    rows, drawn, facts, starts = [], {}, provenance(train, default_device()), [load(name, 0) for name in names]
    for start in starts:  # one that has no maps is told before any is trained
        trunk(start.backbone)
    images, targets = zip(*(test[i] for i in range(min(SHOWN, len(test)))), strict=True)
    for name, seed in itertools.product(names, range(seeds)):
        model, row = out / f"model-{len(rows) + 1}.safetensors", {"start": name, "task": task, "seed": seed}
        keep = partial(save_trained, model, facts=facts | row)
        trained = dense(load(name, seed), task, train, test, seed=seed, keep=keep, **how)
        row |= {**trained.result, "seconds": trained.seconds}
        save_trained(model, trained, facts | row)
        drawn.setdefault(name, first_answers(trained, test))
        _add(rows, row, facts, out)
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
    return _finish(out, f"{task} on {train.name}", lead, table, pictures, rows, facts)


def first_answers(trained: Trained, test: Annotated) -> list[dict[str, Tensor]]:
    """What the model says of the first images."""
    few = torch.utils.data.Subset(test, range(min(SHOWN, len(test))))
    few.in_memory = test.in_memory
    pairs = answers(trained.model, few, device=default_device(), dtype=trained.dtype, progress=False)
    return [answer for _, answer in pairs]


def sample(data: ImageSet | Annotated, image_size: int | None = None) -> Tensor:
    """Training images for a fresh encoder to see: float32 (n, 3, H, W), normalised.

    Of annotated images the middles, after the shorter side was brought to ``image_size`` (96 if None), as a detector does.
    """
    order = permutation(len(data), 0)
    if isinstance(data, ImageSet):
        return plain_view(data.images[order[:2000]])
    side, pixels = image_size or SMALL.image[0], []
    for i in order[:200].tolist():
        image = data[i][0][None].float()
        scale = side / min(image.shape[-2:])
        size = [max(side, round(scale * length)) for length in image.shape[-2:]]
        pixels.append(center_crop(F.interpolate(image, size=size, mode="bilinear", antialias=True), [side, side]))
    return plain_view(torch.cat(pixels).round().clamp(0, 255).to(torch.uint8))


def _looks(starts: list[Start]) -> tuple[dict[str, str], dict[str, str]]:
    """A colour and a title for each start; starts whose titles are the same go by their whole names."""
    colours = {start.name: colour for start, colour in zip(starts, itertools.cycle(CLASS_COLOURS))}
    titles = [title(start) for start in starts]
    return colours, {s.name: t if titles.count(t) == 1 else s.name for s, t in zip(starts, titles, strict=True)}


def title(start: Start) -> str:
    """A checkpoint by its folder and the mechanism that made it; or that it is fresh."""
    if not start.steps:
        return "fresh weights"
    path = Path(start.name)
    return f"{start.recipe.mechanism.replace('_', ' ')} ({path.parent.name if path.stem == 'checkpoint' else path.stem})"


def _table(rows: list[dict], by: tuple[str, ...], fields: tuple[str, ...]) -> list[list[str]]:
    """Means over seeds, with half the error bar where there are several."""
    table = [[*by, *(NAMES[field] for field in fields)]]
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in by) == key]
        table.append([*map(str, key), *(_cell([row[field] for row in own]) for field in fields)])
    return table


def _cell(values: list[float]) -> str:
    mean, half = mean_and_bar(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {half:.1f}"


def _line(row: dict) -> str:
    main = [name for name in row if name in NAMES and not name.startswith(("ap50", "ap75"))]
    told = [f"{NAMES[name]} {row[name]:.1f}" for name in main]
    which = f"{row['labels']:,} labels, " if "labels" in row else ""
    return f"{row['start']}, {which}seed {row['seed']}: {', '.join(told)}"


def _add(rows: list[dict], row: dict, facts: dict, out: Path) -> None:
    """A row is printed, and written at once: what comes after may take hours, and fail."""
    rows.append(row)
    print(_line(row), flush=True)
    write_whole(out / "result.json", (json.dumps({**facts, "results": rows}, indent=1) + "\n").encode())


def _finish(
    out: Path, heading: str, lead: str, table: list[list[str]], pictures: list[Picture], rows: list[dict], facts: dict
) -> dict[str, object]:
    """Print the table and write the report."""
    print(text_table(table))
    write_report(out / "report.html", heading, lead, table, pictures, facts)
    print(f"\nreport: {out / 'report.html'}")
    return {**facts, "results": rows}
