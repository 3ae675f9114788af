"""Pictures of other tasks: what a detector and a segmenter drew, and accuracy against the number of labels."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy import ndimage
from torch import Tensor

from tutorial_moco.evidence import SUPERVISED, bars_of
from tutorial_moco.figures import CLASS_COLOURS, MARKERS, VEILED, figure
from tutorial_moco.figures import COLOURS as MECHANISMS
from tutorial_moco.figures import TITLES as NAMES
from tutorial_moco.results import NAMES as NAMES_OF_DATA
from tutorial_moco.results import mean_and_bar
from tutorial_moco.segmentation import IGNORED

SURE = 0.5  # answers below this score are not drawn
LEAST_AREA = 30  # pixels of a class in one place, below which it is not named
COLOURS = MECHANISMS | {"supervised": SUPERVISED}
TITLES = NAMES | {"supervised": "with labels", "untrained": "fresh weights"}
STARTS = ("untrained", "memory_bank", "end_to_end", "moco", "supervised")
_POINT = {"linestyle": "none", "markeredgecolor": "black", "markersize": 4.5, "zorder": 4}  # above the names


def detections(
    images: Sequence[Tensor],
    targets: Sequence[dict],
    answers: dict[str, Sequence[dict]],
    classes: tuple[str, ...],
    points: Sequence[str] = (),
) -> Figure:
    """A column for each image: above what is there, below what each detector says, surer than a half.

    Args:
        images: uint8 (3, H, W). targets: what is there. answers: by the name of the start. classes: without the ground.
        points: names of the keypoints, for a legend; then only the part of an image with objects is shown, for they lie close.
    """
    rows = {"what is there": targets, **answers}
    fig = figure(1.5 * len(images) + 0.3, 1.6 * len(rows) + 0.4 * bool(points))
    grid = fig.subplots(len(rows), len(images), squeeze=False)
    for line, (name, found) in zip(grid, rows.items(), strict=True):
        for axes, image, objects, target in zip(line, images, found, targets, strict=True):
            _show(axes, image)
            _draw_objects(axes, objects, classes)
            if points:
                _look_at(axes, target["boxes"])
        line[0].set_ylabel(name, fontsize=9)
    if points:
        marks = [Line2D([], [], **_corner(number)) for number in range(1, len(points) + 1)]
        fig.legend(marks, points, loc="outside lower center", ncols=3, fontsize=8)
    return fig


def segmentations(
    images: Sequence[Tensor], targets: Sequence[dict], answers: dict[str, Sequence[dict]], classes: tuple[str, ...]
) -> Figure:
    """A column for each image: the image, the class of each pixel, and what each segmenter says. Arguments as above."""
    rows = {"image": None, "what is there": targets, **answers}
    fig = figure(1.5 * len(images) + 0.3, 1.6 * len(rows))
    grid = fig.subplots(len(rows), len(images), squeeze=False)
    seen: set[int] = set()
    for line, (name, found) in zip(grid, rows.items(), strict=True):
        for axes, image, answer in zip(line, images, found or [None] * len(images), strict=True):
            _show(axes, image)
            if answer is not None:
                axes.imshow(_painted(answer["semantic"]))
                _name_areas(axes, answer["semantic"], classes)
                seen |= set(answer["semantic"].unique().tolist()) - {0, 255}
        line[0].set_ylabel(name, fontsize=9)
    marks = [Rectangle((0, 0), 1, 1, color=_colour(label)) for label in sorted(seen)]
    names = [classes[label - 1] for label in sorted(seen)]
    fig.legend(marks, names, loc="outside lower center", ncols=len(images) + 1, fontsize=8)
    return fig


def label_curves(rows: Sequence[dict], field: str, colours: dict[str, str], titles: dict[str, str], level: float) -> Figure:
    """Accuracy in percent against the number of labels, a line for each start, with error bars over seeds.

    Args:
        rows: with ``start``, ``labels`` and the field. colours, titles: of each start. level: accuracy of guessing.
    """
    fig = figure(6.4, 3.6)
    axes = fig.add_subplot(xlabel="images with a label", ylabel="test accuracy (%)")
    for start, marker in zip(dict.fromkeys(row["start"] for row in rows), MARKERS, strict=False):
        own = [row for row in rows if row["start"] == start and row.get(field) is not None]
        numbers = sorted({row["labels"] for row in own})
        points = [mean_and_bar([row[field] for row in own if row["labels"] == number]) for number in numbers]
        style = {"marker": marker, "capsize": 3, "color": colours[start], "alpha": 0.85}
        axes.errorbar(numbers, *zip(*points, strict=True), label=titles[start], **style)
    axes.set(xscale="log", xlim=(0.7 * min(row["labels"] for row in rows), 1.4 * max(row["labels"] for row in rows)))
    axes.axhline(level, linestyle="--", linewidth=1, color="#444444")
    axes.text(0.99, level, "chance", fontsize=8, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return fig


def worth(rows: Sequence[dict]) -> Figure:
    """What each start was worth, a panel for each task: means over seeds with their error bars.

    Args:
        rows: of one source, as ``python -m benchmarks.transfer`` writes them.
    """
    panels = [(title, keep, field) for title, keep, field in PANELS if any(keep(row) and field in row for row in rows)]
    starts = [name for name in STARTS if any(row["start"] == name for row in rows)]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    fig = figure(2.1 * columns + 1.3, (0.36 * len(starts) + 0.95) * lines + 0.3)
    grid = fig.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, keep, field) in zip(grid.flat, panels, strict=False):
        for place, name in enumerate(starts):
            values = [row[field] for row in rows if keep(row) and row["start"] == name and field in row]
            if values:
                mean, bar = mean_and_bar(values)
                axes.errorbar(mean, place, xerr=bar, fmt="o", capsize=3, color=COLOURS[name])
                axes.annotate(f"{mean:.1f}", (mean, place), (0, 6), textcoords="offset points", fontsize=7.5, ha="center")
        shown = [row for row in rows if keep(row) and field in row]
        data, once = shown[0]["data"], len({row["seed"] for row in shown}) == 1
        axes.set_title(f"{NAMES_OF_DATA.get(data, data)}{', 1 seed' * once}\n{title}", fontsize=9)
        axes.margins(x=0.25)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_yticks(range(len(starts)), [TITLES[name] for name in starts])
    grid[0, 0].set_ylim(len(starts) - 0.5, -0.7)
    runs = [[row for row in rows if keep(row) and row["start"] == name] for _, keep, _ in panels for name in starts]
    fig.supxlabel(f"percent of the test images, AP or mIoU; {bars_of([own for own in runs if own])}", fontsize=8.5)
    return fig


def _classified(how: str, share: float, task: str = "classify") -> Callable[[dict], bool]:
    return lambda row: (row["task"], row.get("how"), row.get("share")) == (task, how, share)


def _task(name: str) -> Callable[[dict], bool]:
    return lambda row: row["task"] == name


# A panel's title, the rows it is about, and their measure.
PANELS = (
    ("linear, 1 % of labels", _classified("linear", 0.01), "linear_top1"),
    ("linear, all labels", _classified("linear", 1.0), "linear_top1"),
    ("fine-tuned, 1 %", _classified("fine_tuned", 0.01), "fine_tuned_top1"),
    ("fine-tuned, all", _classified("fine_tuned", 1.0), "fine_tuned_top1"),
    ("linear, 10 % of labels", _classified("linear", 0.1, "digits"), "linear_top1"),
    ("fine-tuned, 10 %", _classified("fine_tuned", 0.1, "digits"), "fine_tuned_top1"),
    ("detection, box AP", _task("detect"), "ap_boxes"),
    ("instance masks, AP", _task("detect"), "ap_masks"),
    ("keypoint AP", _task("keypoints"), "ap_keypoints"),
    ("semantic, mIoU", _task("segment"), "miou"),
)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def _draw_objects(axes: Axes, objects: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    """Box, name, mask and corners of each object; those of low score are left out."""
    scores = objects.get("scores")
    for i, (box, label) in enumerate(zip(objects["boxes"].tolist(), objects["labels"].tolist(), strict=True)):
        if scores is not None and scores[i] < SURE:
            continue
        x0, y0, x1, y1 = box
        colour = _colour(label)
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4))
        words = classes[label - 1] + ("" if scores is None else f" {100 * scores[i]:.0f}")
        axes.text(x0, max(y0 - 2, 4), words, fontsize=6, bbox=VEILED, clip_on=True)
        if "masks" in objects:
            mask = objects["masks"][i].reshape(objects["masks"].shape[-2:]).numpy() >= 0.5
            axes.imshow(np.dstack([np.broadcast_to(to_rgb(colour), (*mask.shape, 3)), 0.45 * mask]))
        if "keypoints" in objects:
            for number, (x, y, seen) in enumerate(objects["keypoints"][i].tolist(), 1):
                if seen > 0:
                    axes.plot(x - 0.5, y - 0.5, **_corner(number))


def _look_at(axes: Axes, boxes: Tensor) -> None:
    """The square around these boxes."""
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    (x, y), half = ((low + high) / 2).tolist(), (high - low).max().item() / 2 + 6
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def _name_areas(axes: Axes, semantic: Tensor, classes: tuple[str, ...]) -> None:
    """The class beside each connected area that is large enough to be an object."""
    for label in set(semantic.unique().tolist()) - {0, IGNORED}:
        areas, _ = ndimage.label((semantic == label).numpy())
        for rows, columns in ndimage.find_objects(areas):
            if (areas[rows, columns] > 0).sum() >= LEAST_AREA:
                place = {"ha": "center", "va": "bottom", "fontsize": 6, "bbox": VEILED, "clip_on": True}
                axes.text((columns.start + columns.stop) / 2, max(rows.start - 2, 6), classes[label - 1], **place)


def _painted(semantic: Tensor) -> np.ndarray:
    """Class of each pixel (H, W) as colours over the image: (H, W, 4), the ground clear."""
    labels = semantic.numpy()
    table = np.array([(0, 0, 0, 0), *((*to_rgb(c), 0.75) for c in CLASS_COLOURS)])
    painted = table[np.where(labels == 0, 0, (labels - 1) % len(CLASS_COLOURS) + 1)]
    painted[labels == 255] = (1, 1, 1, 0.9)
    return painted


def _corner(number: int) -> dict:
    """How a keypoint is drawn; colour and shape tell it."""
    return {"color": _colour(number), "marker": MARKERS[(number - 1) % len(MARKERS)], **_POINT}


def _colour(label: int) -> str:
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]
