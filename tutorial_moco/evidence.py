"""Pictures of the study: the paper's claims, measured. Each function takes rows, returns a matplotlib Figure, changes nothing.

Rows are those of `results.load_rows`; a picture picks its own experiment. A dot is a mean over seeds, its bar that of
`results.mean_and_bar`; the line under the picture says what the bars are. Rows that differ in
something the picture does not show are refused, so that no curve mixes two recipes, two data sets or two machines' encoders.
What comes from a paper is drawn in a panel of its own, hollow, with its citation; only the reference curve, whose recipe is the
official notebook's own, shares its panels with it.

Every function raises `DataError`, one line that says what is missing, if there is nothing to draw.
"""

import math
from collections.abc import Callable, Iterable
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tutorial_moco.errors import DataError
from tutorial_moco.figures import COLOURS, TITLES, figure
from tutorial_moco.results import (
    Measure,
    along,
    by,
    chance_top1,
    field,
    load_rows,
    mean_and_bar,
    mean_and_interval,
    of_experiment,
    pretext_accuracy,
    provenance_line,
    step_memory,
    step_ms,
    values,
)

ACCURACIES = {"knn_top1": "kNN", "linear_top1": "linear classifier"}
PRETEXT, MLP, SUPERVISED, FAILED, GREY = "#D55E00", "#D55E00", "#000000", "#B03000", "#555555"
DRIFT_COLOURS = ("#6DB6E8", "#0072B2", "#00304D")  # from a fast key encoder to a slow one
REFERENCE_COLOURS = {False: "#0072B2", True: "#CC5F9E"}  # asymmetric, symmetric
MARKERS = {"moco": "o", "memory_bank": "s", "end_to_end": "^"}
V1, V2 = "arXiv 1911.05722", "arXiv 2003.04297"
LETTERS_OF_AN_INCH = 15.5  # in the small line under a picture

# Linear top-1 on ImageNet, ResNet-50, percent. In Figure 3 the values at 65,536 and MoCo's at 4,096 are also in the text.
PAPER_K = {
    "moco": {256: 54.7, 512: 56.4, 1024: 57.3, 4096: 59.0, 16384: 60.4, 65536: 60.6},
    "memory_bank": {256: 50.0, 512: 52.0, 1024: 54.1, 4096: 56.5, 16384: 57.8, 65536: 58.0},
}
PAPER_M = {0.0: None, 0.9: 55.2, 0.99: 57.8, 0.999: 59.0, 0.9999: 58.9}  # None: does not converge
PAPER_TAU = {
    "linear": {0.07: 60.6, 0.1: 60.7, 0.2: 59.0, 0.3: 58.2, 0.4: 57.2, 0.5: 56.4},
    "mlp": {0.07: 62.9, 0.1: 64.9, 0.2: 66.2, 0.3: 65.7, 0.4: 65.0, 0.5: 64.3},
}
# The authors' notebook moco_cifar10_demo, asymmetric: after so many epochs the mean loss of the epoch, and kNN in percent.
NOTEBOOK_CURVE = {
    1: (6.96, 32.0), 2: (7.25, 33.5), 3: (7.29, 34.7), 5: (6.86, 38.0), 10: (5.99, 48.0), 20: (4.34, 61.4), 30: (3.69, 67.1),
    50: (3.20, 73.3), 100: (2.73, 78.1), 150: (2.43, 81.2), 200: (2.27, 82.6),
}  # fmt: skip
NOTEBOOK_SYMMETRIC = {200: 85.3}

# For the chapters ----------------------------------------------------------------------------------------------------


def measured(draw: Callable[[list[dict]], Figure], *experiments: str, only: Iterable[str] = ()) -> Figure:
    """``draw`` of the shipped rows of these experiments, with a line on their provenance; without rows a picture says so.

    Args:
        only: the mechanisms to show, ``pixels``, ``untrained`` and ``supervised`` among them; all if empty.
    """
    rows = [row for row in rows_of(*experiments) if not only or row["mechanism"] in only]
    try:
        fig = draw(rows)
    except (DataError, IndexError, ValueError) as error:  # too few rows for this picture, or rows that do not go together
        fig = figure(6.4, 0.8)
        words = "not measured yet: python -m benchmarks.study --only " + ",".join(experiments)
        refused = rows and isinstance(error, DataError)
        fig.text(0.5, 0.5, fill(str(error), 90) if refused else words, ha="center", va="center", fontsize=9)
        return fig
    print(provenance_line(rows))
    return fig


def rows_of(*experiments: str) -> list[dict]:
    """The shipped rows of these experiments; none where nothing has been measured yet."""
    try:
        return [row for name in experiments for row in load_rows(name)]
    except DataError:
        return []


# Pictures ------------------------------------------------------------------------------------------------------------


def accuracy_against_K(rows: list[dict]) -> Figure:
    """Figure 3 at our scale: kNN and linear accuracy of the three mechanisms against K."""
    rows = of_experiment(rows, "K")
    lines = {name: along(alike, "K") for (name,), alike in by(rows, "mechanism").items()}
    fig, Ks = figure(7.4, 3.5), sorted({row["K"] for row in rows})
    for axes, (name, label) in zip(fig.subplots(1, 2, sharey=True), ACCURACIES.items(), strict=True):
        for mechanism in (mechanism for mechanism in MARKERS if mechanism in lines):
            style = {"color": COLOURS[mechanism], "marker": MARKERS[mechanism], "label": TITLES[mechanism]}
            line(axes, lines[mechanism], field(name), **style)
            for K, runs in lines[mechanism].items():
                mark_failed(axes, K, runs, COLOURS[mechanism])
        axes.set(xlabel="K, negatives of a query")
        title(axes, label)
        log_ticks(axes, Ks, [f"{K:,}" for K in Ks], base=2)
    fig.axes[0].set_ylabel("test accuracy (%)")
    legend_above(fig, fig.axes[0])
    absent = [TITLES[name] for name in MARKERS if name not in lines]
    more = [f"not measured yet: {', '.join(absent)}"] if absent else []
    runs = [group for groups in lines.values() for group in groups.values()]
    note(fig, runs, "end-to-end: batch of K + 1, learning rate scaled with it", *more)
    return fig


def paper_K() -> Figure:
    """The paper's Figure 3, as far as its values are known: hollow dots are read off the plot, filled ones are in the text."""
    fig = figure(4.6, 3.3)
    axes = fig.add_subplot(xlabel="K, negatives of a query", ylabel="linear accuracy (%)")
    title(axes, "The paper: ImageNet, ResNet-50")
    for mechanism, points in PAPER_K.items():
        told = [K for K in points if K == 65536 or (mechanism, K) == ("moco", 4096)]
        style = {"color": COLOURS[mechanism], "marker": MARKERS[mechanism]}
        axes.plot(*zip(*points.items(), strict=True), markerfacecolor="white", linewidth=1.2, **style)
        axes.plot(told, [points[K] for K in told], linestyle="none", **style)
        name_line(axes, TITLES[mechanism], 16384, points[16384] - 0.5, COLOURS[mechanism], ha="left", va="top")
    text = "end-to-end: close to MoCo,\nends at K = 1,024 for want of memory"
    axes.text(0.03, 0.96, text, color=COLOURS["end_to_end"], fontsize=8.5, va="top", transform=axes.transAxes)
    axes.set_ylim(top=62.5)
    log_ticks(axes, PAPER_K["moco"], [f"{K:,}" for K in PAPER_K["moco"]], base=2)
    under(fig, f"{V1}, Figure 3\nfilled: also stated in its text, hollow: read off the plot")
    return fig


def accuracy_against_m(rows: list[dict]) -> Figure:
    """Accuracy against the key encoder's momentum, a place for each m; the paper's table beside it."""
    groups = along(of_experiment(rows, "m"), "m")
    fig = figure(7.4, 3.6)
    ours, paper = fig.subplots(1, 2, width_ratios=(7, 5))
    for name, aside, style in (
        ("linear_top1", 0.07, {"marker": "D", "markerfacecolor": "white", "label": "linear"}),
        ("knn_top1", -0.07, {"marker": "o", "label": "kNN"}),
    ):
        places = {place + aside: runs for place, runs in enumerate(groups.values())}
        line(ours, places, field(name), color=COLOURS["moco"], **style)
    for place, runs in enumerate(groups.values()):
        mark_failed(ours, place, runs)
    ours.set_xticks(range(len(groups)), [f"{m:g}\n{averaged_over(m)}" for m in groups], fontsize=8)
    ours.set(ylabel="test accuracy (%)", xlabel="m, and below it the steps it averages over, 1 / (1 - m)")
    ours.set_xlim(-0.4, len(groups) - 0.6)
    legend_above(fig, ours)
    shown = [(place, accuracy) for place, accuracy in enumerate(PAPER_M.values()) if accuracy]
    paper.plot(*zip(*shown, strict=True), color=COLOURS["moco"], marker="D", markerfacecolor="white", linewidth=1.2)
    paper.text(0, 0.04, "does not converge", rotation=90, ha="center", color=FAILED, transform=paper.get_xaxis_transform())
    paper.set_xticks(range(len(PAPER_M)), [f"{m:g}\n{averaged_over(m)}" for m in PAPER_M], fontsize=8)
    paper.set(ylabel="linear accuracy (%)", xlabel="m, and 1 / (1 - m)", xlim=(-0.4, len(PAPER_M) - 0.6))
    for axes, name in ((ours, "Here"), (paper, "The paper: ImageNet, K = 4,096")):
        title(axes, name)
        dress(axes)
    note(fig, groups.values(), f"right: {V1}, section 4.1")
    return fig


def accuracy_against_temperature(rows: list[dict]) -> Figure:
    """Accuracy against tau with the linear head of v1 and the MLP of v2; the table of the v2 paper beside it."""
    rows = of_experiment(rows, "temperature")
    lines = {head: along(alike, "temperature") for (head,), alike in by(rows, "head").items()}
    fig = figure(8.2, 3.4)
    styles = {
        "linear": {"color": COLOURS["moco"], "marker": "o", "label": "linear head (v1)"},
        "mlp": {"color": MLP, "marker": "s", "label": "MLP head (v2)"},
    }
    *ours, paper = fig.subplots(1, 3)
    ours[1].sharey(ours[0])
    for axes, (name, label) in zip(ours, ACCURACIES.items(), strict=True):
        for head, groups in lines.items():
            aside = 0.985 if head == "linear" else 1.015
            line(axes, {tau * aside: runs for tau, runs in groups.items()}, field(name), **styles[head])
            for tau, runs in groups.items():
                mark_failed(axes, tau * aside, runs, styles[head]["color"])
        axes.set(xlabel=r"temperature $\tau$")
        title(axes, f"Here: {label}")
        tau_ticks(axes, {row["temperature"] for row in rows})
    ours[0].set_ylabel("test accuracy (%)")
    for head, points in PAPER_TAU.items():
        paper.plot(*zip(*points.items(), strict=True), markerfacecolor="white", linewidth=1.2, **styles[head])
    paper.set(xlabel=r"temperature $\tau$")
    title(paper, "The paper: linear classifier")
    tau_ticks(paper, PAPER_TAU["mlp"])
    legend_above(fig, ours[0])
    note(fig, [runs for groups in lines.values() for runs in groups.values()], f'right: ImageNet, {V2}, "MLP head"')
    return fig


def shuffling_bn(rows: list[dict]) -> Figure:
    """What is trained for beside what is wanted, for four ways to normalise: a leak lifts the first and not the second."""
    groups = by(of_experiment(rows, "shuffling_bn"), "norm", "shuffle")
    fig = figure(7.2, 0.55 * len(groups) + 1.5)
    axes = fig.add_subplot(xlabel="accuracy (%)", xlim=(0, 105))
    both = {
        pretext_accuracy: (PRETEXT, "s", "which key is mine?"),
        field("knn_top1"): (COLOURS["moco"], "o", "which class is it? (kNN)"),
    }
    for row, runs in enumerate(groups.values()):
        ends = sorted(mean_and_interval(found)[0] for measure in both if (found := values(runs, measure)))
        axes.plot(ends, [row] * len(ends), color="#BBBBBB", linewidth=2.5, zorder=1)
        for end, side, where in zip(ends, ("right", "left"), (-9, 9), strict=False):
            style = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 8.5}
            axes.annotate(f"{end:.1f}", (end, row), (where, 0), **style)
        for measure, (colour, marker, label) in both.items():
            dot(axes, row, values(runs, measure), color=colour, marker=marker, label=label if row == 0 else None)
    axes.set_yticks(range(len(groups)), [norm_title(*key) for key in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    dress(axes, "x")
    legend_above(fig, axes)
    note(fig, groups.values(), "square: trained for, mean of the last ten logged batches; round: never trained for")
    return fig


def symmetric(rows: list[dict]) -> Figure:
    """One view as query and one as key, or each as both: at equal epochs and at equal compute."""
    groups = by(of_experiment(rows, "symmetric"), "symmetric", "epochs")
    names = [f"{'symmetric' if both else 'asymmetric'},\n{epochs} epochs" for both, epochs in groups]
    return bars(names, list(groups.values()), "a symmetric step encodes twice as much as an asymmetric one")


def reference_curve(rows: list[dict]) -> Figure:
    """Loss and kNN through the epochs with the official notebook's recipe, and the notebook's own as hollow dots."""
    groups = by(of_experiment(rows, "reference"), "symmetric")
    fig = figure(7.4, 3.7)
    (loss, knn), ends = fig.subplots(1, 2), []
    for (symmetric,), runs in groups.items():
        style = {"color": REFERENCE_COLOURS[symmetric], "linewidth": 1.4}
        for run in came_through(runs, "reference"):
            known = [point for point in run["losses"] if point["epoch"] >= 1]
            name = "symmetric" if symmetric else "asymmetric"
            loss.plot([point["epoch"] for point in known], [point["loss"] for point in known], label=name, **style)
            epochs = [point["images_seen"] / run["n"] for point in run["monitor"]]
            for reading, dashes in (("knn_top1", "-"), ("knn_top1_notebook", ":")):
                if all(reading in point for point in run["monitor"]):
                    knn.plot(epochs, [point[reading] for point in run["monitor"]], dashes, **style)
            last = run["monitor"][-1]["knn_top1"]
            ends.append((f"{last:.1f}", epochs[-1], last, style["color"]))
    dots = {"linestyle": "none", "marker": "o", "markersize": 5, "markerfacecolor": "none"}
    for axes, column, name in (loss, 0, "the notebook"), (knn, 1, None):
        values = [point[column] for point in NOTEBOOK_CURVE.values()]
        axes.plot(list(NOTEBOOK_CURVE), values, color=REFERENCE_COLOURS[False], label=name, **dots)
    knn.plot(*zip(*NOTEBOOK_SYMMETRIC.items(), strict=True), color=REFERENCE_COLOURS[True], **dots)
    for axes, name in (loss, "loss"), (knn, "kNN accuracy (%)"):
        log_ticks(axes, (1, 3, 10, 30, 100, 200), ["1", "3", "10", "30", "100", "200"])
        axes.set(xlabel="epoch")
        title(axes, name)
    knn.set_xlim(right=200 * 1.9)  # room for the figures
    for end in apart(knn, ends):
        name_line(knn, *end)
    handles = dict(zip(*reversed(loss.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    dotted = any("knn_top1_notebook" in point for runs in groups.values() for run in runs for point in run["monitor"])
    read = "kNN of features, k = 20" + "; dotted: of keys, k = 200, as the notebook reads it" * dotted
    under(fig, f"lines: {seeds_of(groups.values())}, {read}\nhollow: the authors' notebook moco_cifar10_demo")
    return fig


def losses(rows: list[dict]) -> Figure:
    """InfoNCE and NCE, each with a queue and with a bank."""
    groups = by(of_experiment(rows, "loss"), "mechanism", "loss")
    titles = {"info_nce": "InfoNCE", "nce": "NCE"}
    return bars([f"{TITLES[name]},\n{titles[loss]}" for name, loss in groups], list(groups.values()))


def data_size(rows: list[dict]) -> Figure:
    """All images, a tenth of them, and a long-tailed draw, with as many images seen."""
    groups = by(of_experiment(rows, "data_size"), "long_tail", "share")
    names = []
    for (long_tail, share), runs in groups.items():
        what = "long tail" if long_tail else "all" if share == 1 else f"{100 * share:g} %"
        names.append(f"{what}: {runs[0]['n']:,} images,\n{runs[0]['epochs']} times")
    return bars(names, list(groups.values()), "equally many images seen")


def cost(rows: list[dict]) -> Figure:
    """What the steps need: memory and time against the batch and against K, and beside them the dictionary by its formula."""
    rows = came_through(rows, "cost")
    moco = [row for row in rows if row["mechanism"] == "moco"] or rows
    middle = {name: sorted({row[name] for row in moco})[len({row[name] for row in moco}) // 2] for name in ("batch_size", "K")}
    fig = figure(7.4, 5.6)
    grid = fig.subplots(2, 2, sharex="col", sharey="row")
    for column, (x, fixed) in enumerate((("batch_size", "K"), ("K", "batch_size"))):
        for (name,), alike in by(rows, "mechanism").items():
            lines = along([row for row in alike if is_at(row, fixed, middle[fixed])], x)
            style = {"color": COLOURS[name], "marker": MARKERS[name], "label": TITLES[name]}
            line(grid[0][column], lines, step_memory, **style)
            line(grid[1][column], lines, step_ms, **style)
            if x == "K" and name != "end_to_end":
                formula = {K: runs[0]["dictionary_bytes_formula"] / 2**20 for K, runs in lines.items()}
                grid[0][1].plot(*zip(*formula.items(), strict=True), ":", color=COLOURS[name], linewidth=1.6)
                K, size = list(formula.items())[len(formula) // 2]
                which, side = ("the queue", "top") if name == "moco" else ("the bank", "bottom")
                name_line(grid[0][1], which, K, size, COLOURS[name], va=side)
        for axes in grid[:, column]:
            axes.set_yscale("log")
            log_ticks(axes, (shown := sorted({row[x] for row in moco})), [f"{value:,}" for value in shown], base=2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:,g}")
    title(grid[0][0], f"K = {middle['K']:,}; end-to-end: batch - 1")
    title(grid[0][1], f"batch of {middle['batch_size']:,}; end-to-end: K + 1")
    grid[0][0].set(ylabel="memory of the steps (MiB)")
    grid[1][0].set(ylabel="time of a step (ms)", xlabel="batch (images)")
    grid[1][1].set(xlabel="K, negatives of a query")
    legend_above(fig, grid[0][0])
    sizes = by(rows, "mechanism", "batch_size", "K").values()
    note(fig, sizes, "dotted: the dictionary, 4 bytes x C x K (bank: x n)")
    return fig


def drift(rows: list[dict]) -> Figure:
    """Cosine of stored keys with the same view encoded now, against their age: the queue for each m, and the bank."""
    rows = came_through(rows, "drift")
    momenta = sorted({row["m"] for row in rows if row["mechanism"] == "moco"})
    fig = figure(7.2, 3.9)
    axes = fig.add_subplot(xlabel="age of a key (steps)", ylabel="cosine with its view encoded now", xscale="log")
    groups = by(rows, "mechanism", "m")
    for (mechanism, m), runs in groups.items():
        queue = mechanism == "moco"
        colour = DRIFT_COLOURS[momenta.index(m) % len(DRIFT_COLOURS)] if queue else COLOURS[mechanism]
        name = f"queue, m = {m:g}" if queue else TITLES[mechanism]
        for number, run in enumerate(runs):  # seeds differ less than keys: a line and a pale band for each
            ages, cosines, sds = ([point[name] for point in run["drift"]] for name in ("age", "cosine", "sd"))
            axes.plot(ages, cosines, color=colour, linewidth=1.4, label="" if number else name)
            low, high = ([cosine + sign * sd for cosine, sd in zip(cosines, sds, strict=True)] for sign in (-1, 1))
            axes.fill_between(ages, low, high, color=colour, alpha=0.18 / len(runs), linewidth=0)
    axes.set_ylim(top=1.0)
    legend_above(fig, axes)
    axes.xaxis.set_major_formatter("{x:,g}")
    dress(axes)
    under(
        fig, f"line: mean over the keys of an age, one for each of {seeds_of(groups.values())}; band: their standard deviation"
    )
    return fig


def scoreboard(rows: list[dict]) -> Figure:
    """From guessing to labels: raw pixels, the untrained encoder, the mechanisms, and the same encoder trained with labels."""
    places = score_groups(rows)
    fig = figure(7.2, 0.5 * len(places) + 1.4)
    axes = fig.add_subplot(xlabel="test accuracy (%)", xlim=(0, 100))
    styles = {"knn_top1": ("o", None, "kNN", -0.13), "linear_top1": ("D", "white", "linear", 0.13)}
    for row, (_, colour, runs) in enumerate(places):
        told, left, right = [], 100.0, 0.0
        for name, (marker, face, label, offset) in styles.items():
            if found := values(runs, field(name)):
                style = {"color": colour, "marker": marker, "markerfacecolor": face or colour}
                end = dot(axes, row + offset, found, **style)
                left, right = min(left, 2 * mean_and_interval(found)[0] - end), max(right, end)
                told.append(f"{label} {mean_and_interval(found)[0]:.1f}")
        mark_failed(axes, row, runs, across=True)
        place = {"x": right + 1.5} if right < 75 else {"x": left - 1.5, "ha": "right"}
        axes.text(**place, y=row, s=", ".join(told), fontsize=8.5, va="center")
    if chance := chance_top1(rows):
        axes.axvline(chance, linestyle="--", linewidth=1, color=GREY)
        axes.text(chance + 0.8, -0.62, "chance", fontsize=8.5, color=GREY, va="center")
    axes.set_yticks(range(len(places)), [name for name, _, _ in places])
    axes.set_ylim(len(places) - 0.5, -0.9)
    dress(axes, "x")
    note(fig, [runs for name, _, runs in places if name != TITLES["pixels"]], "filled: kNN, hollow: linear")
    return fig


def score_groups(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """What the scoreboard compares: (name, colour, rows), from the floor to the ceiling.

    The mechanisms are those of experiment K with the recipe of the floor and the ceiling: MoCo and the bank with its K,
    end-to-end with the batch nearest to its batch.
    """
    around = by(of_experiment(rows, "ceilings"), "mechanism")
    base = next(iter(around.values()))[0]
    same = ("encoder", "epochs", "data_hash")
    runs = [row for row in rows if row["experiment"] == "K" and all(row[name] == base[name] for name in same)]
    batches = {row["batch_size"] for row in runs if row["mechanism"] == "end_to_end"}
    nearest = min(batches, key=lambda batch: abs(batch / base["batch_size"] - 1), default=None)
    found = []
    for name, title in (("pixels", TITLES["pixels"]), ("untrained", TITLES["untrained"])):
        found.append((title, COLOURS[name], around.get((name,), [])))
    for name in ("memory_bank", "end_to_end", "moco"):
        at = {"batch_size": nearest} if name == "end_to_end" else {"K": base["K"]}
        alike = [row for row in runs if row["mechanism"] == name and all(row[key] == value for key, value in at.items())]
        found.append((f"{TITLES[name]}, K = {alike[0]['K']:,}" if alike else TITLES[name], COLOURS[name], alike))
    found.append(("trained with labels", SUPERVISED, around.get(("supervised",), [])))
    return [group for group in found if group[2]]


# Parts of pictures ---------------------------------------------------------------------------------------------------


def bars(names: list[str], groups: list[list[dict]], *more: str) -> Figure:
    """Two bars for each group of rows, kNN solid and linear pale, with error bar and value."""
    fig = figure(7.2, 0.72 * len(groups) + 0.9)
    axes = fig.add_subplot(xlabel="test accuracy (%)", xlim=(0, 100))
    for row, runs in enumerate(groups):
        for name, label, offset, alpha in (("knn_top1", "kNN", -0.19, 1.0), ("linear_top1", "linear", 0.19, 0.5)):
            if found := values(runs, field(name)):
                colour = COLOURS[runs[0]["mechanism"]]
                axes.barh(row + offset, mean_and_interval(found)[0], 0.36, color=colour, alpha=alpha)
                end = dot(axes, row + offset, found, color="black", marker="none")
                axes.text(end + 1, row + offset, f"{mean_and_interval(found)[0]:.1f} {label}", va="center", fontsize=8.5)
        mark_failed(axes, row, runs, across=True)
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.spines[["top", "right"]].set_visible(False)
    note(fig, groups, *more)
    return fig


def came_through(rows: Iterable[dict], experiment: str) -> list[dict]:
    """The rows of an experiment that did not fail."""
    rows = [row for row in of_experiment(rows, experiment) if row["failed"] is None]
    if not rows:
        raise DataError(f"no run of {experiment} came through: see the field failed of its rows")
    return rows


def line(axes: Axes, groups: dict[float, list[dict]], measure: Measure, **style) -> None:
    """Means with their bars, joined; where every run failed there is none."""
    points = [(x, *mean_and_bar(found)) for x, rows in groups.items() if (found := values(rows, measure))]
    if points:
        x, means, halves = zip(*points, strict=True)
        axes.errorbar(x, means, halves, capsize=2.5, markersize=5, linewidth=1.4, **style)


def dot(axes: Axes, row: float, found: list[float], **style) -> float:
    """A mean with its bar, lying; returns where it ends on the right."""
    if not found:
        return 0.0
    mean, half = mean_and_bar(found)
    axes.errorbar(mean, row, xerr=half, capsize=2.5, markersize=6, linestyle="none", **style)
    return mean + (0.0 if math.isnan(half) else half)


def mark_failed(axes: Axes, place: float, rows: list[dict], colour: str = FAILED, across: bool = False) -> None:
    """Say at a place of the x axis, or of the y axis if ``across``, how many runs broke down there, if any did."""
    failed = sum(row["failed"] is not None for row in rows)
    if failed:
        text = "failed" if failed == len(rows) else f"{failed} of {len(rows)} failed"
        if across:
            axes.text(0.01, place, text, color=colour, fontsize=8.5, va="center", transform=axes.get_yaxis_transform())
        else:
            style = {"color": colour, "fontsize": 8.5, "rotation": 90, "ha": "center", "va": "bottom"}
            axes.text(place, 0.03, text, transform=axes.get_xaxis_transform(), **style)


def is_at(row: dict, fixed: str, value: int) -> bool:
    """Whether a row of the cost is in the panel of this K or batch. End-to-end has K from the batch, a bank at most n - 1."""
    if row["mechanism"] == "end_to_end":
        return True
    return row[fixed] == (min(value, row["n"] - 1) if (row["mechanism"], fixed) == ("memory_bank", "K") else value)


def averaged_over(m: float) -> str:
    """1 / (1 - m), in steps."""
    return "∞" if m == 1 else f"{1 / (1 - m):,.0f}"


def norm_title(norm: str, shuffle: bool) -> str:
    """What a setting of --norm and --shuffle does."""
    kind, _, parts = norm.partition(":")
    title = {"batch": "BatchNorm,\nwhole batch", "split": f"BatchNorm,\n{parts} parts", "group": "GroupNorm"}[kind]
    return title + (", shuffled" if shuffle else "")


def seeds_of(groups: Iterable[list[dict]]) -> str:
    """How many seeds the groups have, in words: ``3 seeds``, ``1 to 3 seeds``."""
    sizes = [len(rows) for rows in groups]
    few, many = min(sizes), max(sizes)
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' * (many > 1)}"


def note(fig: Figure, groups: Iterable[list[dict]], *more: str) -> None:
    """The line under a picture: what the bars are, or that there are none."""
    under(fig, "; ".join([bars_of(list(groups)), *more]))


def bars_of(groups: list[list[dict]]) -> str:
    """What the error bars of groups of runs are, in words: see `results.mean_and_bar`. Runs that failed have none."""
    groups = [sound for rows in groups if (sound := [row for row in rows if not row.get("failed")])] or [[]]
    few, many = (end(len(rows) for rows in groups) for end in (min, max))
    if many < 2:
        return "one seed, so no error bars"
    if few > 2:
        return f"error bars: 95 % intervals over {seeds_of(groups)}"
    return f"{seeds_of(groups)}; error bars: of two seeds from one to the other" + ", of more 95 % intervals" * (many > 2)


def title(axes: Axes, text: str) -> None:
    """The title of a panel."""
    axes.set_title(text, fontsize=10.5)


def under(fig: Figure, text: str) -> None:
    """Small lines under everything, broken where they would leave the picture."""
    lines = [fill(line, int(LETTERS_OF_AN_INCH * fig.get_figwidth())) for line in text.split("\n")]
    fig.supxlabel("\n".join(lines), fontsize=8, color=GREY)


def legend_above(fig: Figure, axes: Axes) -> None:
    """One legend for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False, fontsize=9)


def name_line(axes: Axes, text: str, x: float, y: float, colour: str, **place) -> None:
    """A name beside the end of a line, in its colour."""
    style = {"va": "center", "fontsize": 8.5, "color": colour} | place
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", **style)


def apart(axes: Axes, ends: list[tuple[str, float, float, str]], gap: float = 0.07) -> list[tuple[str, float, float, str]]:
    """The ends (name, x, y, colour) of lines, moved where two names would touch; ``gap`` is a share of the height.

    Upwards first; then, from the top of the axes, downwards, lest a name runs into what is written above them.
    """
    low, high = axes.get_ylim()
    ends, gap = sorted(ends, key=lambda end: end[2]), gap * (high - low)
    places, floor = [], low
    for _, _, y, _ in ends:
        places.append(max(y, floor))
        floor = places[-1] + gap
    ceiling = high
    for number in reversed(range(len(ends))):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - gap
    return [(name, x, place, colour) for (name, x, _, colour), place in zip(ends, places, strict=True)]


def log_ticks(axes: Axes, places: Iterable[float], names: list[str], base: float = 10) -> None:
    """A logarithmic x axis with ticks at these places only."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(list(places), names, fontsize=8.5)
    axes.minorticks_off()
    dress(axes)


def tau_ticks(axes: Axes, taus: Iterable[float]) -> None:
    """tau on a logarithmic axis, without the zero before the point, for which there is no room."""
    taus = sorted(taus)
    log_ticks(axes, taus, [f"{tau:g}".removeprefix("0") for tau in taus])


def dress(axes: Axes, which: str = "both") -> None:
    """No frame above and on the right; a pale grid, of both axes or of one."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=which, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
