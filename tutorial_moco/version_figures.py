"""Pictures of the chapter on MoCo's versions and its kin: the v2 table, schedules, patch filters, and what a painter paints."""

from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torchvision.utils import make_grid

from tutorial_moco.figures import COLOURS, bare, denormalise, figure
from tutorial_moco.masked import MaskedAutoencoder
from tutorial_moco.results import mean_and_bar, values

GAP = 2  # white pixels between the images of a sheet
LINEAR, KNN, TUNED = ("D", False), ("o", True), ("s", True)  # the mark of an accuracy, and whether it is filled
# The v2 paper's Table 1 (arXiv 2003.04297): ImageNet, ResNet-50, linear accuracy after 200 epochs, the last after 800.
V2_TABLE = {
    "v1": 60.6, "+ MLP head, τ = 0.2": 66.2, "+ augmentation": 63.4, "+ both": 67.3, "+ cosine (v2)": 67.5,
    "v2, 4 times as long": 71.1,
}  # fmt: skip


def v2_setting(row: dict, epochs: int) -> str | None:
    """Which line of the v2 paper's table a row of ``versions`` is, of which all but one trained so long; None if none."""
    if row["kind"] != "pretrain" or row["mechanism"] != "moco":
        return None
    head, views, cosine = row["head"] == "mlp", row["augmentation"] == "v2", row.get("schedule", "cosine") == "cosine"
    if cosine:
        return "+ cosine (v2)" if row["epochs"] == epochs else "v2, 4 times as long"
    if head:
        return "+ both" if views else "+ MLP head, τ = 0.2"
    return "+ augmentation" if views else "v1"


def v2_table(rows: Sequence[dict]) -> Figure:
    """The switches from v1 to v2, one at a time: the paper's linear accuracies, and linear and kNN accuracies here."""
    fig = figure(8.4, 3.5)
    there, here = fig.subplots(1, 2, sharey=True)
    names, epochs = list(V2_TABLE), min(row["epochs"] for row in rows)
    there.plot(list(V2_TABLE.values()), range(len(names)), LINEAR[0], color=COLOURS["moco"], mfc="white")
    for place, (name, accuracy) in enumerate(V2_TABLE.items()):
        there.annotate(f"{accuracy}", (accuracy, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        _dots(here, place, [row for row in rows if v2_setting(row, epochs) == name], COLOURS["moco"])
    there.set(title="ImageNet, ResNet-50, 200 epochs", xlabel="linear accuracy (%)")
    here.set(title="CIFAR-10, small encoder, minutes", xlabel="linear and kNN accuracy (%)")
    there.set_yticks(range(len(names)), names)
    there.set_ylim(len(names) - 0.5, -0.7)
    for axes in (there, here):
        _dressed(axes)
    _tell(fig, COLOURS["moco"], linear=LINEAR, kNN=KNN)
    return fig


KIN: dict[str, Callable[[dict], bool]] = {
    "untrained transformer": lambda row: row["kind"] == "untrained",
    "masked auto-encoder, transformer": lambda row: row["kind"] == "masked",
    "MoCo v3, transformer, patches learned": lambda row: (row["mechanism"], row["encoder"]) == ("moco_v3", "vit-learned"),
    "MoCo v3, transformer, patches fixed": lambda row: (row["mechanism"], row["encoder"]) == ("moco_v3", "vit"),
    "with labels, transformer": lambda row: row["kind"] == "supervised",
    "MoCo v3": lambda row: row["mechanism"] == "moco_v3" and not row["encoder"].startswith("vit"),
    "SimCLR": lambda row: row["mechanism"] == "simclr",
    "MoCo v2": lambda row: v2_setting(row, row["epochs"]) == "+ cosine (v2)",
}


def kin(rows: Sequence[dict]) -> Figure:
    """MoCo v2 beside its kin, and, in orange, the transformers: linear and kNN accuracy."""
    fig = figure(7.2, 3.7)
    axes = fig.add_subplot(xlabel="linear and kNN accuracy (%)")
    epochs = min(row["epochs"] for row in rows)
    rows = [row for row in rows if row["epochs"] == epochs]  # without v2's long training
    for place, (_, keep) in enumerate(KIN.items()):
        _dots(axes, place, [row for row in rows if keep(row)], COLOURS["moco"] if place > 4 else COLOURS["memory_bank"])
    axes.set_yticks(range(len(KIN)), list(KIN))
    axes.set_ylim(len(KIN) - 0.5, -0.7)
    _dressed(axes)
    _tell(fig, "#444444", linear=LINEAR, kNN=KNN)
    return fig


TRADE = {"masked": "masked auto-encoder", "moco_v3": "MoCo v3", "untrained": "fresh weights"}


def trade_off(rows: Sequence[dict]) -> Figure:
    """The transformer's accuracy frozen (a linear classifier on top) and fine-tuned, for each share of the labels.

    Args:
        rows: of the transfer study, ``task`` classify, ``encoder`` a transformer.
    """
    shares = sorted({row["share"] for row in rows})
    fig = figure(8.4, 2.7)
    for axes, share in zip(fig.subplots(1, len(shares), sharey=True, squeeze=False)[0], shares, strict=True):
        for place, start in enumerate(TRADE):
            own = [row for row in rows if (row["start"], row["share"]) == (start, share)]
            frozen, tuned = (values(own, lambda row, name=name: row.get(name)) for name in ("linear_top1", "fine_tuned_top1"))
            ends = [mean_and_bar(found)[0] for found in (frozen, tuned)]
            axes.plot(ends, [place, place], color="0.7", zorder=0)
            for at, (marker, filled), number in zip(ends, (LINEAR, TUNED), (frozen, tuned), strict=True):
                face = COLOURS["moco"] if filled else "white"
                axes.plot(number, [place] * len(number), marker, color=COLOURS["moco"], mfc=face)
                axes.annotate(f"{at:.1f}", (at, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.set(title=f"{share:.0%} of the labels".replace("%", " %"), xlabel="test accuracy (%)")
        axes.set_yticks(range(len(TRADE)), list(TRADE.values()))
        axes.set_ylim(len(TRADE) - 0.5, -0.7)
        _dressed(axes)
    _tell(fig, COLOURS["moco"], **{"frozen, a linear classifier on top": LINEAR, "fine-tuned": TUNED})
    return fig


def schedules(curves: dict[str, Sequence[float]]) -> Figure:
    """Learning rates over the share of the training that is done, a line for each."""
    fig = figure(5.6, 2.6)
    axes = fig.add_subplot(xlabel="share of the training", ylabel="learning rate / first rate")
    for (name, rates), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        axes.plot([i / (len(rates) - 1) for i in range(len(rates))], rates, style, label=name, color="#0072B2")
    axes.legend(frameon=False, fontsize=8)
    _dressed(axes)
    return fig


def filters(weight: Tensor, columns: int = 16) -> Figure:
    """A patch projection's filters (n, 3, p, p) as pictures, each brought to its own full range."""
    rows = -(-len(weight) // columns)
    fig = figure(0.42 * columns, 0.45 * rows)
    for axes, picture in zip(fig.subplots(rows, columns).flat, weight.detach(), strict=False):
        low, high = picture.amin(), picture.amax()
        axes.imshow(((picture - low) / (high - low)).permute(1, 2, 0).numpy())
    for axes in fig.axes:
        axes.set_axis_off()
    return fig


@torch.no_grad()
def painted(net: MaskedAutoencoder, views: Tensor, order: Tensor) -> Figure:
    """Images, what the encoder sees of them, the gaps' own means, and what is painted into the gaps. Quick enough for a slider.

    What is painted gets each gap's own mean and spread back, which the painter does not know; so the third row shows the means.

    Args:
        views: float32 (n, 3, H, W), normalised. order: int64 (n, patches); the first ``net.seen`` are seen.
    """
    n, height, patches = len(views), views.shape[2], net.patchify(views)
    mean, spread = patches.mean(dim=2, keepdim=True), patches.std(dim=2, keepdim=True)
    guess = net(views, order) * (spread + 1e-3) + mean  # what it paints has each patch's brightness and contrast taken out
    seen = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, : net.seen], True)[:, :, None]
    rows = torch.cat([patches, *(patches.where(seen, filling) for filling in (torch.zeros(()), mean, guess))])
    sheet = make_grid(denormalise(net.unpatchify(rows)), nrow=n, padding=GAP, pad_value=1.0)
    fig = bare(n + 0.9, 4.2)
    axes = fig.add_axes((0.9 / (n + 0.9), 0.0, n / (n + 0.9), 1.0))
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    names = ("image", "seen", "means only", "painted")
    middles = [GAP + height / 2 + row * (height + GAP) for row in range(len(names))]
    axes.set(xticks=[], yticks=middles, yticklabels=names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return fig


def _dots(axes: Axes, place: float, rows: Sequence[dict], colour: str) -> None:
    """Linear and kNN accuracy of runs, mean and error bar over seeds."""
    for name, (marker, filled), offset in (("linear_top1", LINEAR, -0.12), ("knn_top1", KNN, 0.12)):
        found = values(rows, lambda row, name=name: row[name])
        if found:
            mean, half = mean_and_bar(found)
            face = colour if filled else "white"
            axes.errorbar(mean, place + offset, xerr=half, fmt=marker, color=colour, mfc=face, capsize=2.5)
            if name == "linear_top1":
                axes.annotate(f"{mean:.1f}", (mean, place), (0, 8), textcoords="offset points", ha="center", fontsize=8)


def _tell(fig: Figure, colour: str, **marks: tuple[str, bool]) -> None:
    """A legend below the panels: what each mark, filled or hollow, stands for."""
    drawn = [
        Line2D([], [], marker=marker, linestyle="none", color=colour, mfc=colour if filled else "white")
        for marker, filled in marks.values()
    ]
    fig.legend(drawn, list(marks), loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)


def _dressed(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.15)
