"""Pictures of features and of small experiments: t-SNE as a film, kNN otherwise read, the laboratory's sliders, small runs.

Each function returns a matplotlib Figure and changes nothing. Those behind a slider lay their axes out by hand, because a
layout that measures its texts takes longer than the drawing, and keep their axes' limits, so that only what is shown moves.
Rows are those of `results.load_rows`. Shapes: n images, D features, N queries, K negatives.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sklearn.manifold import TSNE
from torch import Tensor

from tutorial_moco.evidence import line, log_ticks
from tutorial_moco.figures import BACKED, CLASS_COLOURS, COLOURS, MARKERS, TITLES, bare, figure, running_mean
from tutorial_moco.pretrain import Run
from tutorial_moco.results import along, field, mean_and_bar, mean_and_interval, of_experiment, step_memory, step_ms, values

QUIET, LOUD, GREY = "#B0B0B0", "#D55E00", "#555555"
RUN_COLOURS = ("#8C8C8C", LOUD, COLOURS["moco"], COLOURS["end_to_end"])  # the first is the healthy run
HEADS = {"linear": (COLOURS["moco"], "linear head (v1)"), "mlp": (LOUD, "MLP head (v2)")}
TAUS = (0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


# How features are read -----------------------------------------------------------------------------------------------


def knn_readings(accuracies: dict[float, dict[int, float]], marked: Sequence[tuple[int, float]] = ()) -> Figure:
    """kNN accuracy against k, a line for each temperature of the vote; ``marked`` readings (k, temperature) are named.

    Args:
        accuracies: percent, by temperature and k.
    """
    fig = figure(6.4, 3.5)
    axes = fig.add_subplot(
        xlabel="k, neighbours that vote", ylabel="kNN accuracy (%)", title="The same features, read in other ways"
    )
    shades = np.linspace(0.25, 1.0, len(accuracies))
    for (temperature, points), shade, marker in zip(accuracies.items(), shades, "osD^v<>pP"[: len(accuracies)], strict=True):
        colour = tuple(1 - shade * (1 - c) for c in (0.0, 0.447, 0.698))
        axes.plot(
            points.keys(), points.values(), marker=marker, markersize=4, color=colour, label=f"temperature {temperature:g}"
        )
    for k, temperature in marked:
        place = (k, accuracies[temperature][k])
        axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor=LOUD, markeredgewidth=1.8)
        style = {
            "fontsize": 8.5,
            "color": LOUD,
            "ha": "center",
            "bbox": BACKED,
        }
        above = place[1] == max(points[k] for points in accuracies.values())  # where no line runs
        axes.annotate(f"k = {k}, T = {temperature:g}", place, (0, 15 if above else -20), textcoords="offset points", **style)
    ks = sorted(set(chain.from_iterable(accuracies.values())))
    log_ticks(axes, ks, [f"{k}" for k in ks], base=2)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8.5)
    return fig


def alignment_uniformity(points: dict[str, tuple[float, float, float | None]]) -> Figure:
    """Encoders by alignment and uniformity (arXiv 2005.10242), lower left is best; the kNN accuracy is in the legend.

    Args:
        points: from a name (of ``TITLES`` or any other) to (alignment, uniformity, kNN accuracy or None).
    """
    fig = figure(7.4, 3.8)
    axes = fig.add_subplot(
        xlabel="alignment: mean squared distance of two views (0 is best)", ylabel="uniformity (lower is more even)"
    )
    for (name, (x, y, knn)), marker in zip(points.items(), "sD^ovPX*", strict=False):
        colour = LOUD if name == "moco-mlp" else COLOURS.get(name, GREY)
        title = "MoCo, MLP head" if name == "moco-mlp" else TITLES.get(name, name)
        text = title + ("" if knn is None else f": kNN {knn:.1f} %")
        axes.plot(x, y, marker, color=colour, markersize=9, markeredgecolor="white", linestyle="none", label=text)
    axes.set(xlim=(-0.06, None), ylim=(-4.3, 0.35))
    fig.legend(loc="outside right center", fontsize=8.5, frameon=False)
    return _dressed(axes).figure


# t-SNE ---------------------------------------------------------------------------------------------------------------


def tsne_film(features: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> Iterator[np.ndarray]:
    """t-SNE maps (n, 2) of the same images at several moments, each begun from the one before, so that points move little.

    Args:
        features: (moments, n, D).
    """
    start, rounds, pull = "pca", 750, 12.0
    for moment in features:
        tsne = TSNE(perplexity=perplexity, init=start, random_state=seed, early_exaggeration=pull, max_iter=rounds)
        start = tsne.fit_transform(F.normalize(moment.float(), dim=1).numpy())
        rounds, pull = 350, 1.0  # from the last map on: not torn apart, and soon at rest
        yield _scaled(start)


def film(
    maps: Sequence[np.ndarray],
    labels: Tensor,
    classes: tuple[str, ...],
    epochs: Sequence[float],
    knn: Sequence[float],
    moment: int,
) -> Figure:
    """One moment of a training: the t-SNE map, and beside it where on the curve of the kNN accuracy it is."""
    fig, plane, curve = _laid_out((7.2, 4.0), (0.01, 0.03, 0.54, 0.87), (0.655, 0.55, 0.33, 0.35))
    handles = _scatter(plane, maps[moment], labels, classes, 13)
    edge = 1.05 * max(float(np.abs(points).max()) for points in maps)
    plane.set(xlim=(-edge, edge), ylim=(-edge, edge), title=f"t-SNE after {epochs[moment]:g} epochs")
    curve.plot(epochs, knn, color=QUIET, linewidth=1.6)
    curve.plot(epochs[moment], knn[moment], "o", color=COLOURS["moco"], markersize=9)
    curve.set(xlabel="epochs", ylabel="kNN (%)", title=f"kNN {knn[moment]:.1f} %", ylim=(min(knn) - 4, max(knn) + 4))
    _dressed(curve)
    fig.legend(
        handles,
        classes[:20],
        loc="lower left",
        bbox_to_anchor=(0.57, 0.0),
        ncols=2,
        fontsize=8.5,
        markerscale=1.5,
        frameon=False,
    )
    return fig


def blind_maps(
    maps: Sequence[np.ndarray], labels: Tensor, classes: tuple[str, ...], names: Sequence[str] | None = None
) -> Figure:
    """Maps in a row, called A, B, C, ..., and by their names once the guess is made."""
    fig = figure(2.4 * len(maps), 3.2)
    for number, (axes, points) in enumerate(zip(fig.subplots(1, len(maps), squeeze=False)[0], maps, strict=True)):
        handles = _scatter(axes, points, labels, classes, 7)
        axes.set_title("ABCDEFGH"[number] + (f": {names[number]}" if names else ""), fontsize=10)
    fig.legend(handles, classes[:20], loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return fig


def tsne_gallery(
    maps: dict[tuple[str, str], np.ndarray], labels: Tensor, classes: tuple[str, ...], unlabelled: Sequence[str] = ()
) -> Figure:
    """A table of maps: from (row, column) to points (n, 2); rows and columns are named by what was set.

    Args:
        unlabelled: rows whose points have no class, drawn in grey.
    """
    rows, columns = (list(dict.fromkeys(key[side] for key in maps)) for side in (0, 1))
    fig = figure(1.9 * len(columns) + 0.5, 1.9 * len(rows) + 0.8)
    grid = fig.subplots(len(rows), len(columns), squeeze=False)
    for (row, column), points in maps.items():
        axes = grid[rows.index(row)][columns.index(column)]
        if row in unlabelled:
            _scatter(axes, points, torch.zeros(len(points)), ("",), 6)[0].set_color(QUIET)
        else:
            handles = _scatter(axes, points, labels, classes, 6)
        if row == rows[0]:
            axes.set_title(column, fontsize=9.5)
        if column == columns[0]:
            axes.set_ylabel(row, fontsize=9.5)
    fig.legend(handles, classes[:20], loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return fig


def _scatter(axes: Axes, points: np.ndarray, labels: Tensor, classes: tuple[str, ...], size: float) -> list:
    handles = []
    for number in range(len(classes)):
        mine = points[(labels == number).numpy()]
        style = {"color": CLASS_COLOURS[number % len(CLASS_COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        handles.append(axes.scatter(mine[:, 0], mine[:, 1], s=size, linewidths=0, alpha=0.85, **style))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#CCCCCC")
    return handles


def _scaled(points: np.ndarray) -> np.ndarray:
    return (points - points.mean(axis=0)) / points.std()


# The temperature -----------------------------------------------------------------------------------------------------


def push_on_negatives(similarity: Tensor, temperature: float) -> Tensor:
    """The gradient of InfoNCE on the similarity of each negative, p_i / tau: how hard it is pushed away.

    Args:
        similarity: (N, 1 + K), each query with its own key in column 0 and with the negatives.

    Returns:
        float (N, K), above 0.
    """
    return (similarity / temperature).softmax(dim=1)[:, 1:] / temperature


def effective_negatives(push: Tensor) -> Tensor:
    """How many negatives the push is really on: exp of its entropy, from 1 (one gets all) to K (all alike), (N,)."""
    share = push / push.sum(dim=1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(dim=1))


def temperature_lab(similarity: dict[str, Tensor], counts: dict[str, list[float]], head: str, tau: float, query: int) -> Figure:
    """One query: its negatives by rank, the push on each, and how many negatives count, for both heads, against tau.

    Args:
        similarity: from ``linear`` and perhaps ``mlp`` to (N, 1 + K), the own key in column 0.
        counts: for each head `effective_negatives`, mean over queries, at each of ``TAUS``. head, tau: of these.
    """
    boxes = (0.065, 0.19, 0.23, 0.66), (0.385, 0.19, 0.23, 0.66), (0.71, 0.19, 0.28, 0.66)
    fig, left, middle, right = _laid_out((8.2, 3.1), *boxes)
    colour, _ = HEADS[head]
    own, negatives = similarity[head][query, 0], similarity[head][query, 1:].sort(descending=True).values
    rank = np.arange(1, len(negatives) + 1)
    left.plot(rank, negatives, ".", markersize=3, color=colour)
    left.axhline(own, color="black", linewidth=1)
    left.text(len(rank), own, "own key", ha="right", va="bottom", fontsize=8.5)
    left.set(title="similarity to the query", ylim=(-0.7, 1.12))
    push = push_on_negatives(torch.cat([own[None], negatives])[None], tau)[0]
    middle.plot(rank, push, ".-", color=colour, linewidth=1, markersize=3)
    middle.set(
        title=f"push p / τ, on {effective_negatives(push[None]).item():.0f} negatives",
        ylim=(0, 1.08 * float(push.max()) + 1e-6),
    )
    for axes in (left, middle):
        axes.set_xlabel("negatives, most similar first")
        _log(axes.xaxis, (1, 10, 100, 1000)[: len(str(len(rank)))])
    for name, points in counts.items():
        shade, label = HEADS[name]
        right.plot(TAUS, points, "-" if name == "linear" else "--", color=shade, linewidth=1.4, label=label)
        right.plot(tau, points[TAUS.index(tau)], "o", color=shade, markersize=9 if name == head else 5)
    right.set(xlabel="τ", title=f"negatives that count: mean {counts[head][TAUS.index(tau)]:.0f}", ylim=(1, 1.6 * len(rank)))
    _log(right.xaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0))
    _log(right.yaxis, (1, 10, 100, 1000)[: len(str(len(rank)))])
    right.axvline(tau, color=QUIET, linewidth=1, zorder=0)
    right.legend(frameon=False, fontsize=8.5, loc="lower right")
    for axes in (left, middle, right):
        _dressed(axes).title.set_fontsize(10)
    return fig


# Measured runs behind sliders ----------------------------------------------------------------------------------------


def momentum_lab(rows: list[dict], m: float) -> Figure:
    """The measured runs of experiment m: the chosen momentum's loss and kNN before all others, and where all of them ended."""
    rows = of_experiment(rows, "m")
    groups = along(rows, "m")
    fig, loss, knn, end = _laid_out((8.2, 3.0), (0.065, 0.2, 0.25, 0.66), (0.4, 0.2, 0.25, 0.66), (0.735, 0.2, 0.255, 0.66))
    for row in sorted(rows, key=lambda row: row["m"] == m):  # the chosen on top
        style = {"color": COLOURS["moco"], "linewidth": 1.8} if row["m"] == m else {"color": QUIET, "linewidth": 0.7}
        for axes, points, name in ((loss, row["losses"], "loss"), (knn, row["monitor"], "knn_top1")):
            axes.plot([p["images_seen"] / 1000 for p in points or ()], [p[name] for p in points or ()], **style)
    guess = math.log(rows[0]["K"] + 1)
    _level(loss, guess, "guessing")
    loss.set(title="loss", xlabel="images seen (thousands)", ylim=(0, max(1.12 * guess, loss.get_ylim()[1])))
    knn.set(title="quick kNN in training (%)", xlabel="images seen (thousands)")
    for place, (value, runs) in enumerate(groups.items()):
        found = values(runs, field("knn_top1"))
        if found:
            mean, half = mean_and_bar(found)
            colour = COLOURS["moco"] if value == m else QUIET
            end.errorbar(place, mean, half, fmt="o", color=colour, capsize=2.5, markersize=9 if value == m else 6)
        else:
            end.text(
                place, 0.02, "failed", rotation=90, ha="center", fontsize=8.5, color=LOUD, transform=end.get_xaxis_transform()
            )
    end.set_xticks(range(len(groups)), [f"{value:g}".replace("0.", ".") for value in groups], fontsize=8, rotation=45)
    end.set(title="kNN at the end (%)", xlabel=f"m; chosen: {m:g}", xlim=(-0.5, len(groups) - 0.5))
    for axes in (loss, knn, end):
        _dressed(axes).title.set_fontsize(10)
    return fig


def negatives_lab(rows: list[dict], K: int) -> Figure:
    """The measured runs of experiment K: accuracy of the three mechanisms, read off at one K, and what that K means there."""
    rows = of_experiment(rows, "K")
    fig, curves, facts = _laid_out((8.2, 3.1), (0.075, 0.17, 0.53, 0.75), (0.63, 0.1, 0.36, 0.8))
    curves.axvline(K, color=QUIET, linewidth=1, zorder=0)
    told = [(f"K = {K:,}: guessing costs log(K + 1) = {math.log(K + 1):.2f}", "black")]
    for mechanism, marker in (("moco", "o"), ("memory_bank", "s"), ("end_to_end", "^")):
        groups, colour = along([row for row in rows if row["mechanism"] == mechanism], "K"), COLOURS[mechanism]
        line(curves, groups, field("knn_top1"), color=colour, marker=marker)
        here = groups.get(K, [])
        found = values(here, field("knn_top1"))
        if not found:
            told.append((f"{TITLES[mechanism]}: not measured at this K", colour))
            continue
        mean, half = mean_and_interval(found)
        curves.plot(K, mean, marker, markersize=12, markerfacecolor="none", markeredgecolor=colour)
        told.append((f"{TITLES[mechanism]}: kNN {mean:.1f} %" + ("" if math.isnan(half) else f" ± {half:.1f}"), colour))
        told.append((f"    batch {here[0]['batch_size']:,}, keeps {here[0]['dictionary_bytes'] / 2**20:,.2f} MiB", "black"))
        if mechanism == "moco":
            told.append((f"    oldest key: {math.ceil(K / here[0]['batch_size']):,} steps", "black"))
    facts.set_axis_off()
    for number, (text, colour) in enumerate(told):
        facts.text(0, 0.98 - 0.115 * number, text, va="top", fontsize=9.5, color=colour)
    curves.set(xlabel="K, negatives of a query", ylabel="kNN accuracy (%)")
    Ks = sorted({row["K"] for row in rows})
    log_ticks(curves, Ks, [f"{value:,}" for value in Ks], base=2)
    return fig


def cost_lab(rows: list[dict], batch_size: int, K: int) -> Figure:
    """The measured cost of a step at one batch size and K: memory and time of the three mechanisms, as bars."""
    rows = of_experiment(rows, "cost")
    fig, memory, time = _laid_out((8.2, 2.5), (0.135, 0.23, 0.33, 0.62), (0.6, 0.23, 0.38, 0.62))
    panels = (
        (memory, step_memory, "memory of the steps (MiB)", "{:,.0f} MiB"),
        (time, step_ms, "time of a step (ms)", "{:,.0f} ms"),
    )
    for axes, measure, title, text in panels:
        largest = max(values(rows, measure))
        for place, mechanism in enumerate(("moco", "memory_bank", "end_to_end")):
            # End-to-end has its K from the batch; a bank has at most all other images.
            alike = [row for row in rows if row["mechanism"] == mechanism and row["batch_size"] == batch_size]
            here = [row for row in alike if mechanism == "end_to_end" or row["K"] == K]
            if not here and mechanism == "memory_bank":
                here = [row for row in alike if row["K"] == row["n"] - 1 < K]
            if found := values(here, measure):
                mean, _ = mean_and_interval(found)
                axes.barh(place, mean, 0.62, color=COLOURS[mechanism])
                axes.text(mean + 0.015 * largest, place, text.format(mean), va="center", fontsize=9)
            else:
                axes.text(0, place, " not measured", va="center", fontsize=9, color=GREY)
        axes.set(xlabel=title, xlim=(0, 1.28 * largest), ylim=(2.6, -0.6))
        _dressed(axes)
    memory.set_yticks(range(3), ["MoCo", "memory bank", "end-to-end"])
    time.set_yticks(range(3), [f"K = {K:,}", f"K = {K:,}", f"K = {batch_size - 1:,}"])
    fig.suptitle(f"Batch of {batch_size:,}", fontsize=10.5)
    return fig


# Small runs ----------------------------------------------------------------------------------------------------------


def run_curves(runs: dict[str, Run], levels: dict[str, float] | None = None) -> Figure:
    """Loss, pretext accuracy and kNN accuracy of small runs; the first is the healthy one and stays pale.

    Args:
        runs: from a name to a run. levels: heights in the panel of the loss to draw and name, such as log 2.
    """
    fig = figure(8.2, 3.0)
    loss, pretext, knn = fig.subplots(1, 3)
    panels = ((loss, "losses", "loss"), (pretext, "losses", "pretext_accuracy"), (knn, "monitor", "knn_top1"))
    for number, ((name, run), colour) in enumerate(zip(runs.items(), RUN_COLOURS, strict=False)):
        style = {"color": colour, "linewidth": 1.8 if number else 1.3, "label": name}
        for axes, record, value in panels:
            points = getattr(run, record)
            marker, values = "osD^"[number] if axes is knn else None, [point[value] for point in points]
            if axes is pretext:  # of one batch each
                values = running_mean(values, 3)
            axes.plot([point["step"] for point in points], values, marker=marker, markersize=4, **style)
    for K in sorted({run.losses[-1]["K"] for run in runs.values() if run.losses}):
        _level(loss, math.log(K + 1), f"log({K:,} + 1)")
    for text, height in (levels or {}).items():
        _level(loss, height, text, left=True)
    loss.set(title="loss", xlabel="steps", ylim=(0, 1.06 * loss.get_ylim()[1]))
    pretext.set(title="pretext accuracy (%): which key?", xlabel="steps (mean of three readings)", ylim=(-2, 102))
    low, high = knn.get_ylim()
    knn.set(title="kNN (%): which class?", xlabel="steps", ylim=(low - 3, high + 3))  # a point or two is noise
    for axes in (loss, pretext, knn):
        _dressed(axes).title.set_fontsize(10)
    handles, names = loss.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    return fig


def momentum_live(curves: dict[float, list[tuple[int, float, float]]], K: int, steps: int) -> Figure:
    """Loss and pretext accuracy of short runs with different m, as far as they have come.

    Args:
        curves: from m to points (step, loss, pretext accuracy in percent). steps: of a whole run.
    """
    fig, loss, pretext = _laid_out((7.2, 2.8), (0.07, 0.18, 0.41, 0.7), (0.57, 0.18, 0.41, 0.7))
    colours = (COLOURS["moco"], LOUD, COLOURS["end_to_end"], COLOURS["simclr"], COLOURS["memory_bank"])
    for (m, points), colour, dashes in zip(curves.items(), colours, ("-", "--", "-.", ":", "-"), strict=False):
        for axes, column in ((loss, 1), (pretext, 2)):
            values = running_mean([point[column] for point in points], 5)
            axes.plot([point[0] for point in points], values, dashes, color=colour, label=f"m = {m:g}")
    if not any(curves.values()):
        fig.text(0.5, 0.5, "press Run", ha="center", fontsize=12, color=GREY)
    _level(loss, math.log(K + 1), f"log({K:,} + 1)")
    loss.set(title="loss", ylim=(0, 1.15 * math.log(K + 1)))
    pretext.set(title="pretext accuracy (%)", ylim=(-2, 102))
    if curves:
        pretext.legend(frameon=False, fontsize=8.5, loc="upper right")
    for axes in (loss, pretext):
        axes.set(xlabel="steps", xlim=(0, 1.02 * steps))
        _dressed(axes).title.set_fontsize(10)
    return fig


def _level(axes: Axes, height: float, text: str, left: bool = False) -> None:
    axes.axhline(height, linestyle="--", linewidth=1, color=GREY, zorder=0)
    place, side = (0.01, "left") if left else (0.99, "right")
    axes.text(place, height, text, ha=side, va="bottom", fontsize=8, color=GREY, transform=_across(axes))


def _log(axis, ticks: Sequence[float]) -> None:
    """A logarithmic axis with these ticks only: finding good ones would take longer than the drawing."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _across(axes: Axes):
    return axes.get_yaxis_transform()


def _laid_out(size: tuple[float, float], *boxes: tuple[float, float, float, float]) -> tuple:
    """A figure whose axes stand where they are put: (left, bottom, width, height) in shares of it."""
    fig = bare(*size)
    return fig, *(fig.add_axes(box) for box in boxes)


def _dressed(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes
