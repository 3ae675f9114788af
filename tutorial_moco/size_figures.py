"""Pictures of the chapter on ImageNet and many GPUs: memory, who has which images, a network's price, what was measured."""

import json
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from tutorial_moco.errors import DataError
from tutorial_moco.figures import COLOURS, bare, figure
from tutorial_moco.results import find

# Of Okabe and Ito: told apart by the colour-blind, too.
PARTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def load_scale(name: str = "scale-cpu.json") -> dict:
    """What `benchmarks.scale` measured.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    path = find(name, "scale")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): make it with python -m benchmarks.scale") from error


def told_of(result: dict) -> str:
    """When, with which commit and where that was measured; for under a picture."""
    return f"measured {result['date'][:10]} with commit {result['commit']}, on {result['hardware']}"


def memory_bars(settings: dict[str, dict[str, float]], limit: float) -> Figure:
    """Bytes as stacked bars: for each setting its parts, in GiB; with a line at what a GPU has."""
    fig = figure(8.4, 0.9 + 0.5 * len(settings))
    axes = fig.add_subplot(xlabel="GiB of one GPU")
    names = list(next(iter(settings.values())))
    for row, parts in enumerate(settings.values()):
        left = 0.0
        for part, colour in zip(names, PARTS, strict=False):
            axes.barh(row, parts[part] / 2**30, 0.6, left=left, color=colour, label=part if row == 0 else None)
            left += parts[part] / 2**30
        axes.text(left, row, f" {left:.1f}", va="center", fontsize=8)
    axes.axvline(limit, linestyle="--", linewidth=1, color="#444444")
    axes.text(limit, -0.5, f" a GPU's {limit:g} GiB", fontsize=8, va="top", color="#444444")
    axes.set_yticks(range(len(settings)), list(settings))
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return fig


def who_has_what(index: Tensor, order: Tensor, W: int) -> Figure:
    """A batch in its order above, and as its keys are made below: a colour for each process that makes queries of an image."""
    fig = figure(8.4, 2.0)
    axes, B = fig.add_subplot(), len(index)
    owner = {int(number): place * W // B for place, number in enumerate(index)}
    for row, (numbers, word) in enumerate(((index, "queries"), (index[order], "keys"))):
        for place, number in enumerate(numbers.tolist()):
            axes.barh(row, 0.9, 0.8, left=place + 0.05 + 0.6 * (place * W // B), color=PARTS[owner[number] % len(PARTS)])
            at = place + 0.5 + 0.6 * (place * W // B)
            axes.text(at, row, number, ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "pad": 1.5, "lw": 0})
        axes.text(-0.4, row, word, ha="right", va="center", fontsize=9)
    for process in range(W):
        at = (process + 0.5) * B / W + 0.6 * process
        axes.text(at, -0.75, f"process {process}", ha="center", fontsize=9)
    axes.set_ylim(1.5, -1.0)
    axes.set_xlim(-1.5, B + 0.6 * W)
    axes.set_axis_off()
    return fig


def speed_ups(speed_up: Callable[[int], float], gigabits: float, most: int = 256) -> Figure:
    """How many times as fast as one GPU so many are, beside what they would be if nothing had to be sent.

    Args:
        speed_up: of a number of GPUs, over a network of so many ``gigabits`` a second. most: GPUs.
    """
    fig = bare(6.4, 3.4)
    axes = fig.add_axes((0.12, 0.16, 0.83, 0.76))
    gpus = [2**power for power in range(most.bit_length())]
    axes.plot(gpus, gpus, "--", color="#777777", linewidth=1, label="if nothing were sent")
    axes.plot(gpus, [speed_up(W) for W in gpus], "o-", color=COLOURS["moco"], label=f"over {gigabits:g} Gbit/s")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="times as fast as one", ylim=(0.3, most * 1.3))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(gpus, [str(W) for W in gpus], minor=False)
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64, 128, 256])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return fig


def measured(result: dict) -> Figure:
    """What `benchmarks.scale` found: pictures to views, a step against K, and against processes."""
    fig = figure(9.4, 3.2)
    pictures, keys, processes = fig.subplots(1, 3)
    rates = result["pictures"]["pictures_per_second_and_core"]
    names = ["torch-\nvision", "Pillow's\nblur", "ours", "crops\nalone"]
    pictures.bar(names, list(rates.values()), color=["#777777", "#999999", COLOURS["moco"], PARTS[4]])
    pictures.tick_params("x", labelsize=7)
    for place, rate in enumerate(rates.values()):
        pictures.text(place, rate, f"{rate:.0f}", ha="center", va="bottom", fontsize=8)
    pictures.set(title="Pictures to two views", ylabel="pictures/s of one core")
    _against([row["K"] for row in result["keys"]], [1000 * row["seconds_per_step"] for row in result["keys"]], keys, "K")
    keys.set(title="A step against K", ylabel="ms", xscale="log")
    shown = [row for row in result["processes"] if row["threads"] == 1]
    words, speeds = [str(row["processes"]) for row in shown], [row["images_per_second"] for row in shown]
    processes.bar(words, speeds, color=COLOURS["moco"])
    for place, speed in enumerate(speeds):
        processes.text(place, speed, f"{speed:,.0f}", ha="center", va="bottom", fontsize=8)
    processes.set(title="Processes, a thread each, on two cores", ylabel="images/s", xlabel="processes")
    for axes in (pictures, keys, processes):
        axes.title.set_fontsize(8.5)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def _against(x: Sequence[float], y: Sequence[float], axes, label: str) -> None:
    axes.plot(x, y, "o-", color=COLOURS["moco"])
    for place, value in zip(x, y, strict=True):
        at_the_end = {"ha": "right" if place == x[-1] else "center", "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"{value:,.0f}", (place, value), (0, 6), **at_the_end)
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.15 * max(y))
