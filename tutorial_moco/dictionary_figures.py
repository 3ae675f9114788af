"""Pictures of a dictionary of keys: who is in it, how old the keys are, what they cost, and how far they have drifted.

Each function returns a matplotlib Figure and changes nothing. Those behind sliders place their axes by hand: a layout that is
worked out anew at every move would cost more than the drawing.
"""

import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from tutorial_moco.evidence import apart
from tutorial_moco.figures import COLOURS, TITLES, VEILED, bare, figure

M_COLOURS = {0.0: "#D55E00", 0.5: "#CC79A7", 0.9: "#6DB6E8", 0.99: "#0072B2", 0.999: "#00304D", 1.0: "#777777"}
NEW, RANDOM, GREY = "#D55E00", "#BBBBBB", "#555555"
DATA = {"CIFAR-10": 50_000, "ImageNet": 1_281_167}  # images to train on
C = 128  # numbers in a key
AGE_BIN = 8  # steps
FEW_KEYS = 30  # of a bank's age: with fewer their mean is noise
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

# Loss of the official notebook's run on CIFAR-10 (facebookresearch/moco, moco_cifar10_demo): ResNet-18, batch 512, K 4,096.
OFFICIAL_K, OFFICIAL_LOSS = 4096, {
    1: 6.96, 2: 7.25, 3: 7.29, 5: 6.86, 10: 5.99, 20: 4.34, 30: 3.69, 50: 3.20, 100: 2.73, 150: 2.43, 200: 2.27,
}  # fmt: skip


# The queue -----------------------------------------------------------------------------------------------------------


def ring(ages: Tensor, pointer: int, title: str = "") -> Figure:
    """The queue as a ring: the age of the key at each place, and the pointer at the oldest.

    Args:
        ages: int64 (K,), steps since each key was written, -1 where none has been, as from `MoCo.ages`; K of at most 64 is
            readable.
        pointer: the place to be written next.
    """
    ages, K = ages.numpy(), len(ages)
    fig = bare(7.0, 3.3)
    circle, bars = fig.add_axes((0.01, 0.02, 0.43, 0.86)), fig.add_axes((0.53, 0.16, 0.45, 0.70))
    angle = np.pi / 2 - 2 * np.pi * np.arange(K) / K
    x, y = np.cos(angle), np.sin(angle)
    size = min(420.0, 6500.0 / K)
    colours = _age_colours(ages)
    circle.scatter(
        x, y, s=size, c=colours, edgecolors=np.where(ages == 1, NEW, "#888888"), linewidths=np.where(ages == 1, 2.2, 0.6)
    )
    if K <= 40:
        for place in range(K):
            ink = "white" if ages[place] > 0.55 * ages.max() else "black"
            circle.text(
                x[place],
                y[place],
                "" if ages[place] < 0 else str(ages[place]),
                ha="center",
                va="center",
                fontsize=7.5,
                color=ink,
            )
    circle.annotate(
        "", (0.83 * x[pointer], 0.83 * y[pointer]), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.6}
    )
    circle.text(
        0,
        -0.3 if y[pointer] > 0 else 0.22,  # on the side that the arrow leaves free
        f"pointer: place {pointer}",
        ha="center",
        fontsize=8.5,
    )
    circle.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    circle.set_axis_off()
    bars.bar(range(K), np.maximum(ages, 0), width=0.9, color=colours, edgecolor=np.where(ages == 1, NEW, "none"), linewidth=1.4)
    bars.plot(
        np.flatnonzero(ages < 0), [0] * int((ages < 0).sum()), "x", color=GREY, markersize=4, label="random, never written"
    )
    bars.axvline(pointer - 0.5, color="black", linewidth=1.2, linestyle=":")
    right = pointer > K / 2
    bars.text(
        pointer - 0.5,
        1.0,
        "pointer " if right else " pointer",
        fontsize=8,
        ha="right" if right else "left",
        va="bottom",
        transform=bars.get_xaxis_transform(),
    )
    bars.set(xlim=(-0.6, K - 0.4), ylim=(-0.3, max(4, ages.max()) * 1.18))
    _label(bars, "place in the queue", "age of its key (steps)")
    if (ages < 0).any():
        bars.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="upper right")
    fig.text(0.5, 0.94, title, ha="center", fontsize=10)
    return fig


def similarities(groups: dict[str, Tensor], own: float | None = None) -> Figure:
    """Histograms, one above the other, of similarities of queries to keys; a line where the own key stands, on average."""
    fig = figure(6.6, 0.4 + 1.1 * len(groups))
    for axes, (name, found), colour in zip(
        np.atleast_1d(fig.subplots(len(groups), 1, sharex=True)),
        groups.items(),
        (COLOURS["moco"], NEW, GREY, "#009E73"),
        strict=False,
    ):
        found = found.flatten().numpy()
        axes.hist(found, bins=60, color=colour)
        axes.set_title(f"{name}: mean {found.mean():.2f}, spread {found.std():.2f}", fontsize=9, loc="left")
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        if own is not None:
            axes.axvline(own, color="black", linestyle="--", linewidth=1)
            axes.text(own, axes.get_ylim()[1] * 0.97, " own key", fontsize=8, va="top")
    axes.set_xlabel("similarity q · k", fontsize=9)
    return fig


def loss_rises_first(losses: Sequence[float], filled: Sequence[int], K: int) -> Figure:
    """Loss of each step of a short run, and beside it the curve of the official notebook, with their lines of guessing.

    Args:
        losses: of each step. filled: real keys in the queue after each step. K: keys it holds.
    """
    fig = figure(7.4, 3.1)
    here, there = fig.subplots(1, 2)
    steps = range(1, len(losses) + 1)
    here.plot(steps, losses, color=COLOURS["moco"], linewidth=1.4)
    _guessing(here, K)
    _full(here, filled, K)
    _label(here, "step", "loss (nats)", "Here: every step of the run above")
    there.plot(OFFICIAL_LOSS.keys(), OFFICIAL_LOSS.values(), "o-", color=COLOURS["moco"], markersize=4, markerfacecolor="white")
    _guessing(there, OFFICIAL_K)
    _label(there, "epoch (log scale)", None, "Official notebook: mean of an epoch")
    there.set_xscale("log")
    _ticks(there.xaxis, (1, 2, 3, 5, 10, 20, 50, 100, 200))
    there.text(
        0.03, 0.04, "facebookresearch/moco, CIFAR-10,\nResNet-18, K = 4,096, batch 512", transform=there.transAxes, fontsize=7.5
    )
    for axes in (here, there):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.02)
    return fig


def two_starts(runs: dict[str, Sequence[float]], filled: Sequence[int], K: int) -> Figure:
    """Loss of runs that differ in what the queue began with, with the line of guessing and the step at which it is full."""
    fig = figure(6.6, 3.2)
    axes = fig.add_subplot()
    for (name, losses), style in zip(
        runs.items(), ({"color": COLOURS["moco"]}, {"color": NEW, "linestyle": "-."}), strict=False
    ):
        axes.plot(range(1, len(losses) + 1), losses, linewidth=1.6, label=name, **style)
    axes.set_yscale("log")
    _guessing(axes, K)
    _full(axes, filled, K)
    _ticks(axes.yaxis, [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]])
    _label(axes, "step", "loss (nats, log scale)")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return fig


def room(K: int, batch: int, data: str) -> Figure:
    """What a dictionary of K keys takes and how far back it reaches: queue, memory bank and end-to-end.

    Args:
        K: keys. batch: images of a step. data: a name in ``DATA``, for the size of the bank and the length of an epoch.
    """
    n, Ks = DATA[data], np.array([256, 1024, 4096, 16384, 65536])
    fig = bare(7.4, 3.5)
    memory, age = fig.add_axes((0.115, 0.21, 0.36, 0.64)), fig.add_axes((0.61, 0.21, 0.37, 0.64))
    memory.plot(Ks, Ks * C * 4 / 2**20, color=COLOURS["moco"], linewidth=1.6)
    memory.plot(Ks[[0, -1]], [n * C * 4 / 2**20] * 2, color=COLOURS["memory_bank"], linewidth=1.6)
    memory.plot(K, K * C * 4 / 2**20, "o", color=COLOURS["moco"], markeredgecolor="black", markersize=8)
    memory.set(xscale="log", yscale="log", xlim=(200, 1.5e5), ylim=(0.08, 3e5))
    _ticks(memory.xaxis, Ks)
    _ticks(memory.yaxis, (0.1, 1, 10, 100, 1000, 10_000, 100_000))
    memory.text(260, n * C * 4 / 2**20 * 1.25, f"bank: all {n:,} images", fontsize=8, color="#8A5F00")
    memory.text(1400, 0.3, "queue: 4 bytes · C · K", fontsize=8, color=COLOURS["moco"])
    if data == "ImageNet":
        memory.plot([256, 4096], [7.4e3, 93e3], "^--", color=COLOURS["end_to_end"], markerfacecolor="white", linewidth=1)
        memory.text(4900, 5.5e4, "end-to-end, whole\ntraining, per GPU*", fontsize=7.5, color="#00664A", va="center")
        fig.text(
            0.02, 0.015, "* arXiv 2003.04297, Table 3: batch 256 and, estimated there, 4,096, on 8 GPUs", fontsize=7, color=GREY
        )
    _label(memory, "K, keys in the dictionary", "memory (MiB)")
    oldest, epoch = math.ceil(K / batch), n // batch
    rows = (
        ("end_to_end", 0.55, "now"),
        ("moco", oldest, f"1 to {oldest:,}" if oldest > 1 else "1"),
        ("memory_bank", 2 * epoch, f"up to about {2 * epoch:,}"),  # and more where an epoch leaves an image out
    )
    for row, (name, end, text) in enumerate(rows):
        age.barh(row, end - 0.5, left=0.5, height=0.5, color=COLOURS[name])
        if end < 2000:
            age.text(max(end, 0.6) * 1.15, row, text, va="center", fontsize=8.5)
        else:  # no room at its right
            age.text(0.85 * end, row, text, va="center", ha="right", fontsize=8.5, color="white" if name == "moco" else "black")
    age.axvline(epoch, color="black", linestyle=":", linewidth=1)
    age.text(epoch * 0.92, 2.62, "one epoch", fontsize=8, ha="right", va="center")
    age.set(xscale="log", xlim=(0.5, 4e5), ylim=(-0.6, 2.9))
    age.set_yticks(range(3), [TITLES[name] for name, _, _ in rows])
    _ticks(age.xaxis, (1, 10, 100, 1000, 10_000, 100_000))
    _label(age, "age of the keys (steps)", None)
    steps = f"{oldest:,} step{'s' * (oldest > 1)}"
    text = f"{data}: a queue of {K:,} keys takes {K * C * 4 / 2**20:g} MiB, its oldest key is {steps} old"
    more = f"; each image is in it {K / n:.1f} times" if n < K else ""
    fig.text(0.5, 0.93, text + more, ha="center", fontsize=9.5)
    return fig


def own_keys(shares: dict[int, float], n: int) -> Figure:
    """Share of queries, in percent, whose own image has a key in the queue, against K; a line at K = n."""
    fig = figure(5.6, 3.0)
    axes = fig.add_subplot()
    axes.plot(shares.keys(), [100 * share for share in shares.values()], "o-", color=COLOURS["moco"], markersize=5)
    axes.axvline(n, color="black", linestyle=":", linewidth=1)
    axes.text(n * 0.96, 60, "K = n", ha="right", fontsize=8.5)
    for K, share in shares.items():
        if share < 0.5:
            axes.annotate(f"{100 * share:.1f}", (K, 100 * share), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xscale="log", ylim=(-4, 104))
    _ticks(axes.xaxis, list(shares))
    _label(axes, "K, keys in the queue", "queries with their own\nimage in the queue (%)")
    return fig


# The momentum encoder ------------------------------------------------------------------------------------------------


def filter_response(path: Tensor, followed: Tensor, m: float) -> Figure:
    """What momentum does: its answer to a step on a logarithmic axis of time, and how it follows a path.

    Args:
        path: (T,), a weight of the query encoder over T steps. followed: (T,), the same after the filter.
    """
    fig = bare(7.4, 3.1)
    answer, walk = fig.add_axes((0.08, 0.17, 0.39, 0.66)), fig.add_axes((0.57, 0.17, 0.41, 0.66))
    t = np.geomspace(1, 1e5, 160)
    answer.plot(t, 1 - m**t, color=COLOURS["moco"], linewidth=2)
    answer.set(xscale="log", xlim=(1, 1e5), ylim=(-0.03, 1.05))
    _ticks(answer.xaxis, (1, 10, 100, 1000, 10_000, 100_000))
    for steps, name in ((196, "CIFAR-10"), (5004, "ImageNet")):
        answer.axvline(steps, color=RANDOM, linewidth=1)
        answer.text(steps * 0.92, 0.02, f"epoch, {name}", rotation=90, fontsize=7, color=GREY, ha="right", va="bottom")
    half = {0.0: "at once", 1.0: "never"}.get(m)
    if half is None:
        steps = math.log(0.5) / math.log(m)
        half = f"after {steps:,.0f} steps" if steps >= 1.5 else f"after {steps:.1g} step"
        answer.plot([max(steps, 1)], [0.5 if steps >= 1 else 1 - m], "o", color=NEW, markersize=7, zorder=3)
    answer.axhline(0.5, color=RANDOM, linewidth=0.8, linestyle=":")
    _label(answer, "steps since f_q jumped from 0 to 1", "where f_k stands")
    walk.plot(path.numpy(), color=RANDOM, linewidth=1.2, label="a weight of f_q")
    walk.plot(followed.numpy(), color=COLOURS["moco"], linewidth=2, label="the same weight of f_k")
    spread = float(path.max() - path.min()) or 1.0
    walk.set_ylim(float(path.min()) - 0.05 * spread, float(path.max()) + 0.25 * spread)
    walk.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    _label(walk, "step", "value of the weight")
    fig.text(0.5, 0.92, f"m = {m:g}: half of the way {half}", ha="center", fontsize=10.5)
    return fig


def short_runs(runs: dict[float, list[dict]], K: int, steps: int, now: float | None = None) -> Figure:
    """Loss and pretext accuracy of short runs that differ in m; the run ``now`` in front, the others pale.

    Args:
        runs: from m to the points of a run, each with ``step``, ``loss`` and ``pretext`` (percent).
        K: keys in the queue. steps: where the axis ends.
    """
    fig = bare(7.4, 3.2)
    loss, pretext = fig.add_axes((0.06, 0.16, 0.36, 0.70)), fig.add_axes((0.49, 0.16, 0.36, 0.70))
    for (m, points), dashes in zip(runs.items(), cycle(DASHES)):
        front = now in (None, m)
        style = {
            "color": _m_colour(m),
            "linewidth": 1.7 if front else 1.0,
            "alpha": 1.0 if front else 0.35,
            "linestyle": dashes,
        }
        for axes, name in ((loss, "loss"), (pretext, "pretext")):
            axes.plot([p["step"] for p in points], [p[name] for p in points], label=f"m = {m:g}", **style)
    loss.set(xlim=(0, steps), ylim=(0, 1.25 * math.log(K + 1)))
    _guessing(loss, K)
    pretext.set(xlim=(0, steps), ylim=(0, 100))
    _label(loss, "step", None, "loss (nats)")
    _label(pretext, "step", None, "own key found (% of a batch)")
    pretext.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def drift_laboratory(
    curves: dict[float, list[dict]], m: float, K: int, batch: int, bank: list[dict] | None = None, title: str = ""
) -> Figure:
    """Cosine of stored keys with their views encoded now, by age: one m in front, and the part a queue of K keys would hold.

    Args:
        curves: from m to points with ``age`` (steps), ``cosine``, ``sd`` and ``count``, as in the rows ``drift``.
        m: the curve in front. K: keys; ages up to K / batch are shaded. bank: points of a memory bank.
    """
    fig = bare(7.2, 3.7)
    axes = fig.add_axes((0.09, 0.14, 0.74, 0.72))
    reach = math.ceil(K / batch)
    bank = [point for point in bank or () if point["count"] >= FEW_KEYS]
    last = max(point["age"] for points in (*curves.values(), bank) for point in points)
    axes.axvspan(1, max(reach, 1.06), color="#EAF3FA", linewidth=0)
    for other, points in curves.items():
        ages, cosines, sds = (np.array([point[name] for point in points]) for name in ("age", "cosine", "sd"))
        front = other == m
        axes.plot(ages, cosines, color=_m_colour(other), linewidth=2.2 if front else 1.0, alpha=1.0 if front else 0.45)
        if front:
            axes.fill_between(
                ages, cosines - sds, np.minimum(cosines + sds, 1), color=_m_colour(other), alpha=0.18, linewidth=0
            )
    ends = [(f"m = {other:g}", points[-1]["age"], points[-1]["cosine"], _m_colour(other)) for other, points in curves.items()]
    if bank:
        axes.plot([p["age"] for p in bank], [p["cosine"] for p in bank], color=COLOURS["memory_bank"], linewidth=1.2)
        ends.append(("memory bank", bank[-1]["age"], bank[-1]["cosine"], "#8A5F00"))
    lowest = min(point["cosine"] for points in (*curves.values(), bank) for point in points)
    axes.set(xscale="log", xlim=(1, last * 1.05), ylim=(min(0.0, lowest - 0.05), 1.02))
    for name, age, height, colour in apart(axes, ends, gap=0.062):
        axes.text(1.06 * age, height, name, color=colour, fontsize=8.5, va="center", bbox=VEILED)
    _ticks(axes.xaxis, [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= last * 1.05])
    _label(axes, "age of a key (steps)", "cosine with its view encoded now")
    held = [point for point in curves[m] if point["age"] <= reach] or curves[m][:1]
    mean = np.average([point["cosine"] for point in held], weights=[point["count"] for point in held])
    text = f"{title}m = {m:g}, K = {K:,}: keys up to {reach:,} step{'s' * (reach > 1)} old"
    more = f", cosine {mean:.3f} on average, {held[-1]['cosine']:.3f} for the oldest"
    fig.text(0.46, 0.92, text + more, ha="center", fontsize=9.5)
    return fig


def by_age(ages: Tensor, cosines: Tensor) -> list[dict]:
    """Points for `drift_laboratory` from single keys (n,): mean, standard deviation and number of the keys of each age."""
    points = []
    for age in ages.unique().tolist():
        here = cosines[ages == age]
        points.append({"age": age, "cosine": here.mean().item(), "sd": here.std(correction=0).item(), "count": len(here)})
    return points


def similarity_by_age(groups: dict[float, list[dict]]) -> Figure:
    """Mean similarity of fresh queries to the queue's keys of *other* images, by the keys' age, for each m.

    Args:
        groups: from m to points as of `by_age`, with similarities in the place of cosines.
    """
    fig = figure(6.4, 3.2)
    axes = fig.add_subplot()
    for (m, points), marker in zip(groups.items(), cycle("os^Dv")):
        axes.plot(
            [p["age"] for p in points],
            [p["cosine"] for p in points],
            f"{marker}-",
            markersize=3,
            linewidth=1.4,
            color=_m_colour(m),
            label=f"m = {m:g}",
        )
    axes.axhline(0, color=RANDOM, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    _label(axes, "age of a key (steps)", "mean similarity of a query\nto keys of other images")
    return fig


def agreement(found: dict[float, tuple[float, float, float]]) -> Figure:
    """Agreement of query and own key, and how often it is found among keys written now and among those of the queue.

    Args:
        found: from m to the mean of q . k, and two shares in percent.
    """
    fig = figure(7.2, 2.9)
    similar, look_up = fig.subplots(1, 2)
    places = np.arange(len(found))
    agreements, now, stored = zip(*found.values(), strict=True)
    similar.bar(places, agreements, 0.6, color=[_m_colour(m) for m in found])
    similar.set_ylim(min(0.0, *agreements), 1)
    look_up.bar(places - 0.2, now, 0.38, color="#009E73", label="others written now")
    look_up.bar(places + 0.2, stored, 0.38, color="#56B4E9", hatch="///", edgecolor="white", label="others from the queue")
    look_up.legend(frameon=False, fontsize=8)
    look_up.set_ylim(0, 1.3 * max(*now, *stored, 1))
    for axes, title in ((similar, "agreement: mean q · k of a pair"), (look_up, "own key found among 511 others (%)")):
        axes.set_xticks(places, [f"{m:g}" for m in found])
        _label(axes, "m", None, title)
    return fig


def age_histograms(ages: dict[str, Tensor]) -> Figure:
    """How old the keys of each dictionary are: share of its keys, in percent, against their age in steps.

    Args:
        ages: from a name in ``COLOURS`` to int64 (n,).
    """
    fig = figure(6.6, 2.9)
    axes = fig.add_subplot()
    oldest = max(int(found.max()) for found in ages.values())
    edges = np.arange(0, oldest + AGE_BIN, AGE_BIN) + 0.5  # whole ages in each bin, and as many in every one
    for name, found in ages.items():
        share = 100 * np.histogram(found.numpy(), edges)[0] / len(found)
        axes.stairs(
            share,
            edges,
            fill=True,
            alpha=0.75,
            color=COLOURS[name],
            label=f"{TITLES[name]}: mean {found.float().mean():.1f} steps",
        )
    axes.legend(frameon=False, fontsize=8.5)
    _label(axes, "age of a key (steps)", "share of the keys (%)")
    return fig


# Parts of pictures ---------------------------------------------------------------------------------------------------


def _label(axes: Axes, x: str | None, y: str | None, title: str | None = None) -> None:
    axes.set_xlabel(x or "", fontsize=9)
    axes.set_ylabel(y or "", fontsize=9)
    if title:
        axes.set_title(title, fontsize=9.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(axis, places: Sequence[float]) -> None:
    """These ticks and no others; on a logarithmic axis matplotlib's own take half the time of a drawing."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _guessing(axes: Axes, K: int) -> None:
    axes.axhline(math.log(K + 1), linestyle="--", linewidth=1, color=GREY)
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"guessing: log({K:,} + 1)", (0.99, math.log(K + 1)), (0, 2), fontsize=8, color=GREY, **place)


def _full(axes: Axes, filled: Sequence[int], K: int) -> None:
    """A line at the step after which no random vector is left."""
    full = next((step for step, real in enumerate(filled, 1) if real == K), None)
    if full:
        axes.axvline(full, color=GREY, linewidth=1, linestyle=":")
        axes.text(full, 0.03, " queue full", fontsize=8, color=GREY, transform=axes.get_xaxis_transform())


def _age_colours(ages: np.ndarray) -> np.ndarray:
    """Dark is old, pale is new; white where no key has been written."""
    colours = colormaps["Blues"](0.12 + 0.78 * np.clip(ages, 0, None) / max(4, ages.max()))
    colours[ages < 0] = (1, 1, 1, 1)
    return colours


def _m_colour(m: float) -> str:
    return M_COLOURS.get(m, COLOURS["moco"])
