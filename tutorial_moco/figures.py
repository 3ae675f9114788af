"""Pictures of a training and of what was learned. Each function returns a matplotlib Figure and changes nothing.

Colours are Okabe and Ito's, told apart by colour-blind readers; backgrounds are white, so that a picture reads the same in
a dark theme.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tutorial_moco.augment import MEAN, STD

COLOURS = {
    "moco": "#0072B2",
    "memory_bank": "#E69F00",
    "end_to_end": "#009E73",
    "simclr": "#CC79A7",
    "moco_v3": "#56B4E9",
    "untrained": "#666666",
    "pixels": "#999999",
}
TITLES = {
    "moco": "MoCo",
    "memory_bank": "memory bank",
    "end_to_end": "end-to-end",
    "simclr": "SimCLR",
    "moco_v3": "MoCo v3",
    "untrained": "untrained encoder",
    "pixels": "raw pixels",
}
CLASS_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A900", "#000000", "#8C564B", "#7F7F7F",
)  # fmt: skip
MARKERS = "os^Dv<>pPX"
BACKED = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a label that a line may run under
VEILED = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}  # the same, and one may see what is below


def figure(width: float = 6.0, height: float = 3.4) -> Figure:
    """An empty figure in inches, white, with a layout that keeps labels inside."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def bare(width: float, height: float) -> Figure:
    """A figure whose axes are placed by hand, for a slider: to work out a layout takes longer than to draw.

    It has no layout engine at all; with "none" matplotlib would keep one that does nothing, and draw everything twice.
    """
    return Figure(figsize=(width, height), facecolor="white")


def loss_curves(runs: list[dict]) -> Figure:
    """Loss over images seen; a dashed line where guessing would stand, log(K + 1), and a mark where the queue is full.

    Args:
        runs: results of runs, each with ``mechanism`` and ``losses`` as in `pretrain.Run`.
    """
    fig = figure()
    axes = fig.add_subplot(xlabel="images seen", ylabel="loss (nats)", title="Loss, and what guessing costs")
    guesses = {}
    for run in runs:
        colour, points = COLOURS[run["mechanism"]], run["losses"]
        seen = [p["images_seen"] for p in points]
        axes.plot(seen, [p["loss"] for p in points], color=colour, label=TITLES[run["mechanism"]], linewidth=1.4)
        guesses.setdefault(points[-1]["K"], []).append(colour)
        full = next((p for p in points if p["filled"] == p["K"]), None)
        if full:
            axes.plot(full["images_seen"], full["loss"], "o", color=colour, markeredgecolor="black", zorder=5)
            axes.annotate(
                "queue full", (full["images_seen"], full["loss"]), (8, -9), textcoords="offset points", fontsize=8, bbox=BACKED
            )
    for K, colours in sorted(guesses.items()):
        axes.axhline(math.log(K + 1), linestyle="--", linewidth=1, color=colours[0] if len(colours) == 1 else "#444444")
        axes.text(1.01, math.log(K + 1), f"log({K} + 1)", fontsize=8, va="center", transform=axes.get_yaxis_transform())
    axes.set_ylim(bottom=0, top=1.12 * max(axes.get_ylim()[1] / 1.05, math.log(max(guesses) + 1)))
    return _dressed(axes)


def accuracy_curves(runs: list[dict]) -> Figure:
    """Two panels over images seen: the pretext accuracy (which key is mine?) and the kNN accuracy (which class is it?)."""
    fig = figure(8, 3.2)
    pretext, knn = fig.subplots(1, 2)
    for run in runs:
        style = {"color": COLOURS[run["mechanism"]], "label": TITLES[run["mechanism"]], "linewidth": 1.4}
        smooth = running_mean([p["pretext_accuracy"] for p in run["losses"]], 5)
        pretext.plot([p["images_seen"] for p in run["losses"]], smooth, **style)
        knn.plot([p["images_seen"] for p in run["monitor"]], [p["knn_top1"] for p in run["monitor"]], marker="o", **style)
    pretext.set(xlabel="images seen", ylabel="pretext accuracy (%)", title="Which key is mine?", ylim=(0, 100))
    knn.set(xlabel="images seen", ylabel="kNN accuracy (%)", title="Which class is it? (never trained for)")
    _dressed(pretext)
    return _dressed(knn)


def accuracy_bars(results: dict[str, dict], chance: float) -> Figure:
    """kNN and linear accuracy of baselines and mechanisms as bars, with the line of chance.

    Args:
        results: from a name in ``TITLES`` to a result with ``knn_top1`` and perhaps ``linear_top1``, in percent.
    """
    fig = figure(7, 0.5 + 0.52 * len(results))
    axes = fig.add_subplot(xlabel="test accuracy (%)", xlim=(0, 100))
    for row, (name, result) in enumerate(results.items()):
        for field, offset, alpha in (("knn_top1", -0.2, 1.0), ("linear_top1", 0.2, 0.5)):
            if result.get(field) is not None:
                axes.barh(row + offset, result[field], 0.38, color=COLOURS[name], alpha=alpha)
                label = f"{result[field]:.1f} {'kNN' if field == 'knn_top1' else 'linear'}"
                axes.text(result[field] + 0.8, row + offset, label, va="center", fontsize=8, zorder=3, bbox=BACKED)
    axes.axvline(chance, linestyle="--", linewidth=1, color="#444444")
    axes.text(chance + 0.5, len(results) - 0.42, "chance", fontsize=8, va="center")
    axes.set_yticks(range(len(results)), [TITLES[name] for name in results])
    axes.set_ylim(len(results) - 0.3, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return fig


def tsne_maps(maps: dict[str, np.ndarray], labels: Tensor, classes: tuple[str, ...], knn: dict[str, float]) -> Figure:
    """t-SNE maps side by side, a colour and marker for each class, the kNN accuracy of the features above each.

    Args:
        maps: from a name in ``TITLES`` to points (n, 2); labels (n,).
    """
    fig = figure(max(6.0, 3.6 * len(maps)), 4.3)  # the legend needs six inches
    for axes, (name, points) in zip(fig.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        for number, label in enumerate(classes):
            mine = points[(labels == number).numpy()]
            axes.scatter(
                mine[:, 0], mine[:, 1], s=9, linewidths=0, alpha=0.85, label=label,
                color=CLASS_COLOURS[number % len(CLASS_COLOURS)], marker=MARKERS[number % len(MARKERS)],
            )  # fmt: skip
        axes.set(xticks=[], yticks=[], title=f"{TITLES[name]}: kNN {knn[name]:.1f} %")
    handles, names = fig.axes[0].get_legend_handles_labels()
    if len(classes) <= 20:
        fig.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, markerscale=2, frameon=False)
    return fig


def retrieval(
    queries: Tensor, query_labels: Tensor, neighbours: Tensor, neighbour_labels: Tensor, classes: tuple[str, ...]
) -> Figure:
    """Each query image and its nearest training images, framed green where the class agrees and orange, dashed, where not.

    Args:
        queries: uint8 (n, 3, H, W). neighbours: uint8 (n, k, 3, H, W). Labels (n,) and (n, k).
    """
    n, k = neighbours.shape[:2]
    fig = figure(0.72 * (k + 1) + 0.6, 0.78 * n + 0.2)
    grid = fig.subplots(n, k + 1, squeeze=False)
    for row in range(n):
        _show(grid[row][0], queries[row])
        grid[row][0].set_ylabel(classes[query_labels[row]], rotation=0, ha="right", va="center", fontsize=8, labelpad=4)
        for column in range(k):
            right = neighbour_labels[row, column] == query_labels[row]
            _show(grid[row][column + 1], neighbours[row, column], "#009E73" if right else "#D55E00")
            grid[row][column + 1].spines[:].set_linestyle("-" if right else "--")
    grid[0][0].set_title("query", fontsize=8)
    grid[0][1].set_title("nearest first", fontsize=8, loc="left")
    return fig


def views(images: Tensor, view_q: Tensor, view_k: Tensor, names: Sequence[str] = ("image", "query", "key")) -> Figure:
    """Images above their two random views: uint8 (n, 3, H, W) and normalised views (n, 3, h, w); names of the three rows."""
    n = len(images)
    fig = figure(0.8 * n + 0.5, 2.6)
    grid = fig.subplots(3, n, squeeze=False)
    for column in range(n):
        _show(grid[0][column], images[column])
        _show(grid[1][column], denormalise(view_q[column]))
        _show(grid[2][column], denormalise(view_k[column]))
    for row, name in enumerate(names):
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=4)
    return fig


def denormalise(view: Tensor) -> Tensor:
    """A normalised view (3, h, w) back to values in [0, 1]."""
    return (view * view.new_tensor(STD)[:, None, None] + view.new_tensor(MEAN)[:, None, None]).clamp(0, 1)


def _show(axes, image: Tensor, frame: str | None = None) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=frame is not None, color=frame or "black", linewidth=2.5)


def running_mean(values: list[float], width: int) -> list[float]:
    """Of each value and those before it, ``width`` of them where there are so many."""
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def _dressed(axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1000:g} k" if x else "0")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(framealpha=0.85, edgecolor="none", fontsize=8)  # a line may run under it
    return axes.figure


def contact_sheet(images, per_class: int = 10) -> Figure:
    """The first images of each class of an `ImageSet`, a row for each of at most 20 classes."""
    classes = images.classes[:20]
    fig = figure(0.6 * per_class + 1.4, 0.62 * len(classes) + 0.2)
    grid = fig.subplots(len(classes), per_class, squeeze=False)
    for row, name in enumerate(classes):
        mine = (images.labels == row).nonzero()[:per_class, 0]
        for axes in grid[row]:
            axes.set_axis_off()
        for axes, index in zip(grid[row], mine, strict=False):
            _show(axes, images.images[index])
        grid[row][0].text(-0.15, 0.5, name, ha="right", va="center", fontsize=9, transform=grid[row][0].transAxes)
    return fig
