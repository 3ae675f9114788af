"""Pictures of the mechanisms themselves: Figure 2 drawn from the objects, the leak through BatchNorm, age, memory, cost.

Each function returns a matplotlib Figure and changes nothing. What a mechanism does is not typed in here but tried on a copy of
it: one step is taken, and what has got a gradient, what has followed and what has been written is what is drawn.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from tutorial_moco.figures import COLOURS, TITLES, bare, figure
from tutorial_moco.losses import info_nce
from tutorial_moco.mechanisms import Mechanism

GREY, GRADIENT, FOLLOWS = "#555555", "#D55E00", "#0072B2"
NAMES = {"EndToEnd": "end_to_end", "MemoryBank": "memory_bank", "MoCo": "moco", "SimCLR": "simclr"}

# Figure 2 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """What one step of a mechanism was seen to do."""

    name: str  # of its class
    encoders: dict[str, int]  # module: number of parameters
    trained: tuple[str, ...]  # modules that got a gradient from the loss
    follows: tuple[str, ...]  # modules that `update_key_encoder` moved
    dictionary: str | None  # the buffer of keys that stays from step to step
    shape: tuple[int, ...]  # its shape, or that of the negatives if nothing stays
    writer: str | None  # the module whose vectors `update_dictionary` wrote into it
    keys_from: str  # where the positive key came from: a module or the dictionary
    negatives: int  # K, of one query
    bytes: int  # of the dictionary


def anatomy(mechanism: Mechanism, view_q: Tensor, view_k: Tensor, index: Tensor) -> Anatomy:
    """Take one step with a copy of a mechanism and see what it did.

    Args:
        view_q, view_k: two views (N, 3, H, W) of the images whose numbers are index (N,).
    """
    mechanism = deepcopy(mechanism).train()
    calls: list[tuple[str, Tensor]] = []
    modules = dict(mechanism.named_children())
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: calls.append((name, out.detach().clone())))
    keys = {name: b for name, b in mechanism.named_buffers(recurse=False) if b.ndim == 2}
    before = {name: buffer.clone() for name, buffer in keys.items()}

    contrast = mechanism.contrast(view_q, view_k, index)
    info_nce(contrast.q, contrast.k, contrast.negatives, 0.1, contrast.exclude).backward()
    trained = tuple(name for name, module in modules.items() if _moved(module, "grad"))
    with torch.no_grad():
        for parameter in mechanism.encoder.parameters():
            parameter.sub_(0.1 * parameter.grad)
    weights = {name: _flat(module) for name, module in modules.items()}
    mechanism.update_key_encoder()
    follows = tuple(name for name, module in modules.items() if not torch.equal(_flat(module), weights[name]))
    mechanism.update_dictionary(contrast, index)
    written = [name for name, buffer in keys.items() if not torch.equal(buffer, before[name])]

    excluded = 0 if contrast.exclude is None else contrast.exclude.sum(dim=1).float().mean().item()
    return Anatomy(
        name=type(mechanism).__name__,
        encoders={name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        trained=trained,
        follows=follows,
        dictionary=written[0] if written else None,
        shape=tuple(keys[written[0]].shape) if written else tuple(contrast.negatives.shape),
        writer=_writer(keys[written[0]], before[written[0]], calls) if written else None,
        keys_from=next((name for name, out in reversed(calls) if _same_rows(out, contrast.k)), written[0] if written else "?"),
        negatives=len(contrast.negatives) - round(excluded),
        bytes=mechanism.dictionary_bytes,
    )


def _flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _moved(module: torch.nn.Module, field: str) -> bool:
    return any(getattr(p, field) is not None and bool(getattr(p, field).any()) for p in module.parameters())


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether every row of b occurs in a; both hold unit vectors."""
    return bool(((b.detach() @ a.T).amax(dim=1) > 1 - 1e-5).all())


def _writer(now: Tensor, before: Tensor, calls: list[tuple[str, Tensor]]) -> str:
    """The module whose output is nearest to what changed: a bank's key is a mixture of the old one and the new."""
    rows = now[(now != before).any(dim=1)]
    return max(calls, key=lambda call: (rows @ call[1].T).amax(dim=1).mean().item())[0]


def figure_2(anatomies: Sequence[Anatomy]) -> Figure:
    """The paper's Figure 2 as the code does it: a panel for each mechanism."""
    fig = figure(2.55 * len(anatomies), 4.0)
    for axes, found in zip(fig.subplots(1, len(anatomies), squeeze=False)[0], anatomies, strict=True):
        axes.set(xlim=(0, 10), ylim=(1.4, 15.6), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(TITLES[NAMES[found.name]], color=COLOURS[NAMES[found.name]], fontweight="bold", fontsize=11)
        _draw_anatomy(axes, found)
    lines = [("forward", GREY, "-"), ("gradient", GRADIENT, "--")]
    if any(found.dictionary or found.follows for found in anatomies):
        lines.append(("kept from step to step", FOLLOWS, ":"))
    handles = [Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=label) for label, colour, style in lines]
    ncols = 3 if len(anatomies) > 1 else 1
    fig.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=8.5)
    return fig


def _draw_anatomy(axes: Axes, found: Anatomy) -> None:
    """Bottom up: views, encoders, vectors, loss; a column for the query and one for the keys."""
    second = next((name for name in found.encoders if name != "encoder"), None)
    alone = second is None and found.dictionary is None  # one encoder for both views
    left, right = 2.4, 7.6
    _box(axes, 5, 14.6, "contrastive loss", width=9.3, height=1.5)
    for x, name in ((left, "encoder"), (right, second)):
        if name:
            _box(axes, x, 6.2, _encoder_text(name, found), colour=COLOURS[NAMES[found.name]])
            _label(axes, x, 2.0, "both views" if alone else "view q" if x == left else "view k")
            _arrow(axes, (x, 2.7), (x, 4.7))
        if name in found.trained:
            _arrow(axes, (x + 0.5, 13.8), (x + 0.5, 7.7), color=GRADIENT, linestyle="--")
    _arrow(axes, (left - 0.2, 7.7), (left - 0.2, 13.8))
    _label(axes, left - 0.4, 10.9, "q", ha="right")
    if second in found.follows:
        _arrow(axes, (left + 2.05, 6.2), (right - 2.05, 6.2), color=FOLLOWS, linestyle=":")
        _label(axes, 5, 6.9, "m", color=FOLLOWS)
    if found.dictionary:
        _draw_dictionary(axes, found, left, right, second)
    elif alone:
        axes.plot([left + 1.2, left + 1.2, right, right], [7.7, 8.3, 8.3, 13.0], color=GREY, linewidth=1.4)
        _arrow(axes, (right, 13.0), (right, 13.8))
        _label(axes, right - 0.2, 10.9, f"k, and K = {found.negatives:,}\nof the batch", ha="right")
    else:
        _arrow(axes, (right - 0.2, 7.7), (right - 0.2, 13.8))
        _label(axes, right - 0.4, 10.9, f"k, and K = {found.negatives:,}\nof the batch", ha="right")


def _draw_dictionary(axes: Axes, found: Anatomy, left: float, right: float, second: str | None) -> None:
    """The box of keys, who writes it, and what the loss reads of it."""
    rows, width = found.shape
    level = 10.4 if second else 6.2
    _box(axes, right, level, f"{found.dictionary}\n{rows:,} x {width}\n{_bytes(found.bytes)}", dashed=True)
    _arrow(axes, (right, level + 1.5), (right, 13.8))
    own = "k, and " if found.keys_from == found.dictionary else ""
    _label(axes, right - 0.2, (level + 1.5 + 13.8) / 2, f"{own}K = {found.negatives:,}", ha="right")
    if found.writer == second and second:
        _arrow(axes, (right + 0.6, 7.7), (right + 0.6, level - 1.5), color=FOLLOWS, linestyle=":")
    else:
        _arrow(axes, (left + 2.05, 6.2), (right - 2.05, 6.2), color=FOLLOWS, linestyle=":")
    if found.keys_from == second and second:
        axes.plot([right - 0.6, right - 0.6, 4.9, 4.9], [7.7, 8.3, 8.3, 13.0], color=GREY, linewidth=1.4)
        _arrow(axes, (4.9, 13.0), (4.9, 13.8))
        _label(axes, 4.7, 10.9, "k", ha="right")


def _encoder_text(name: str, found: Anatomy) -> str:
    how = "gradient" if name in found.trained else "follows" if name in found.follows else "still"
    return f"{name.replace('_', ' ')}\n{found.encoders[name]:,}\n{how}"


def _box(axes: Axes, x: float, y: float, text: str, *, width=4.1, height=3.0, colour=GREY, dashed=False) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.3", "facecolor": "white", "linestyle": "--" if dashed else "-"}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, edgecolor=colour, linewidth=1.5, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0} | style
    axes.annotate("", end, start, arrowprops=style)


def _label(axes: Axes, x: float, y: float, text: str, *, ha="center", size=8.0, color="black") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=color)


def _bytes(count: float) -> str:
    """Bytes in the unit that suits: 512 KiB, 24.4 MiB, 0.61 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size / 2 or unit == "KiB":
            return f"{count / size:,.3g} {unit}" if count / size < 1000 else f"{count / size:,.0f} {unit}"
    return ""


# The leak through BatchNorm -------------------------------------------------------------------------------------------


def leak_curves(found: dict[str, Sequence[float]], chance: float, over: int = 20) -> Figure:
    """Share of keys found, in percent, by step, each a mean over some steps; the line is what honest guessing finds.

    Args:
        found: from a name such as ``split:16, shuffled`` to a value for each step.
    """
    fig = figure(6.8, 3.3)
    axes = fig.add_subplot(xlabel="step", ylabel="own key found (%)")
    styles = {"batch": (GREY, "-"), "group": (COLOURS["end_to_end"], "-")}
    for name, values in found.items():
        colour, line = styles.get(name, (GRADIENT, "--" if "shuffled" in name else "-"))
        mean = np.convolve(values, np.ones(over) / over, mode="valid")
        axes.plot(np.arange(over, len(values) + 1), mean, color=colour, linestyle=line, linewidth=1.6, label=name)
    axes.axhline(chance, color="black", linestyle=":", linewidth=1)
    axes.text(1.01, chance, f"guessing:\n{chance:.1f} %", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_ylim(bottom=0)
    _plain(axes)
    axes.legend(frameon=False, fontsize=9)
    return fig


SHOWN = 16  # rows and columns: with more one does not see a part of two


def leak(similarity: Tensor, parts: int, shuffled: bool) -> Figure:
    """Cosines of the queries (down) with the keys (across) of one batch; images of one part stand side by side.

    Args:
        similarity: (N, N) in [-1, 1]; row i and column i are the same image.
        parts: into how many parts the batch was split for its statistics.
    """
    own = torch.eye(len(similarity), dtype=torch.bool)
    part = torch.cat([torch.full((len(p),), number) for number, p in enumerate(torch.arange(len(own)).tensor_split(parts))])
    mates = (part[:, None] == part) & ~own
    groups = {
        "own key": (own, COLOURS["end_to_end"]),
        "another image,\nsame part": (mates, GRADIENT),
        "another image,\nother part": (~mates & ~own, GREY),
    }
    fig = bare(7.2, 3.5)
    axes, bars = fig.add_axes((0.04, 0.08, 0.40, 0.82)), fig.add_axes((0.63, 0.17, 0.34, 0.73))
    shown = min(SHOWN, len(own))
    axes.imshow(similarity[:shown, :shown].numpy(), cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"keys of the batch, the first {shown} of {len(own)}", fontsize=9)
    axes.set_ylabel("queries, in the same order", fontsize=9)
    axes.set_title("cosine, from -1 (dark) to 1 (bright)", fontsize=9.5)
    for row, (where, colour) in enumerate(groups.values()):
        if where.any():
            mean = similarity[where].mean().item()
            bars.barh(row, mean, 0.6, color=colour)
            bars.text(max(mean, 0) + 0.03, row, f"{mean:.2f}", va="center", fontsize=9)
        else:
            bars.text(0.03, row, "none: there is one part", va="center", fontsize=8.5, color=GREY)
    bars.axvline(0, color=GREY, linewidth=0.8)
    bars.set(xlim=(-1.05, 1.3), ylim=(2.6, -0.6))
    bars.yaxis.set_major_locator(FixedLocator(range(3)))
    bars.set_yticklabels(groups, fontsize=9)
    _ticks(bars.xaxis, (-1, -0.5, 0, 0.5, 1))
    bars.set_xlabel("mean cosine of queries and keys", fontsize=9)
    bars.set_title(f"{parts} part{'s' * (parts > 1)}, keys {'' if shuffled else 'not '}shuffled", fontsize=9.5)
    bars.spines[["top", "right", "left"]].set_visible(False)
    return fig


# What is kept --------------------------------------------------------------------------------------------------------


def consistency(found: dict[str, tuple[Tensor, Tensor]], epochs_began: Iterable[int]) -> Figure:
    """How far the stored keys are from what the encoder would say now, against their age; end-to-end has only keys of now.

    Args:
        found: from a mechanism's name to ages in steps (n,) and cosines (n,), as `diagnose.key_drift` gives them.
        epochs_began: so many steps ago.
    """
    fig = figure(6.4, 3.3)
    axes = fig.add_subplot(xlabel="age of a key (steps)", ylabel="cosine with its view encoded now")
    oldest = max(int(ages.max()) for ages, _ in found.values())
    edges = np.linspace(0.5, oldest + 0.5, min(oldest, 40) + 1)
    for name, (ages, cosines) in found.items():
        place = np.digitize(ages.numpy(), edges) - 1
        filled = np.unique(place)
        middle = (edges[filled] + edges[filled + 1]) / 2
        mean, sd = ([getattr(cosines.numpy()[place == b], kind)() for b in filled] for kind in ("mean", "std"))
        axes.plot(middle, mean, color=COLOURS[name], marker="o", markersize=3.5, linewidth=1.4, label=TITLES[name])
        low, high = np.subtract(mean, sd), np.add(mean, sd)
        axes.fill_between(middle, low, np.minimum(high, 1), color=COLOURS[name], alpha=0.2, linewidth=0)
    axes.plot(0, 1, "^", color=COLOURS["end_to_end"], markersize=8, label=f"{TITLES['end_to_end']}: encoded now", clip_on=False)
    for age in epochs_began:
        axes.axvline(age, color=GREY, linewidth=1, linestyle=":")
        axes.text(age, 0.02, "an epoch began ", ha="right", fontsize=8.5, color=GREY, transform=axes.get_xaxis_transform())
    axes.set_ylim(top=1.02)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8.5)
    return fig


KS = 2 ** np.arange(4, 18)  # 16 .. 131,072


def memory_of(kept: float, batch: int, images: int, dim: int, K: np.ndarray = KS) -> dict[str, np.ndarray]:
    """Bytes that grow with K: what back-propagation keeps, and the stored keys (the weights and the images come on top).

    Args:
        kept: bytes that back-propagation keeps of one view's way through the encoder.
        batch: images of a step, for MoCo and the bank; end-to-end needs K + 1.
        images: in the data set. dim: C.
    """
    return {
        "end_to_end": 2 * kept * (K + 1.0),
        "memory_bank": kept * batch + 4.0 * dim * images + 0.0 * K,
        "moco": kept * batch + 4.0 * dim * K,
    }


def memory_against_K(kept: float, batch: int, images: int, dim: int = 128, budget: float = 8 * 2**30) -> Figure:
    """`memory_of` over K, the line of a budget in bytes, and a dot at the largest K of end-to-end that fits into it."""
    fig = bare(7.2, 3.5)
    axes = fig.add_axes((0.115, 0.15, 0.725, 0.74), xscale="log", yscale="log")
    ends = {}
    for name, found in memory_of(kept, batch, images, dim).items():
        shown = slice(None) if name != "memory_bank" else images > KS  # a bank has no more keys than images
        style = {"color": COLOURS[name], "linewidth": 1.8}
        if name == "memory_bank":  # often on top of MoCo's: both are to be seen
            style |= {"linestyle": (0, (4, 4)), "zorder": 3}
        axes.plot(KS[shown], found[shown] / 2**30, **style)
        ends[name] = found[-1] / 2**30
    axes.axhline(budget / 2**30, color=GREY, linestyle=":", linewidth=1.2)
    axes.text(20, budget / 2**30 * 1.15, f"{budget / 2**30:g} GiB", fontsize=8.5, color=GREY)
    most = int(budget / (2 * kept)) - 1
    if KS[0] <= most <= KS[-1]:
        axes.plot(most, budget / 2**30, "o", color=COLOURS["end_to_end"], markeredgecolor="black", markersize=7)
        axes.text(most * 1.25, budget / 2**30 * 0.55, f"K = {most:,}", fontsize=9, color="#00664A")
    axes.set(xlim=(KS[0], KS[-1]), ylim=(1e-2, 3e4))
    _ticks(axes.xaxis, KS[::3])
    _ticks(axes.yaxis, (0.01, 0.1, 1, 10, 100, 1000, 10_000))
    low = min(ends.values())
    for row, name in enumerate(sorted(ends, key=ends.get)):
        height = max(ends[name], low * 2.9**row)  # names must not touch
        axes.text(KS[-1] * 1.15, height, TITLES[name], color=COLOURS[name], fontsize=9, va="center")
    axes.set_xlabel("K, negatives of a query", fontsize=9)
    axes.set_ylabel("GiB for activations and keys", fontsize=9)
    title = f"batch {batch:,}, {images:,} images; a view keeps {kept / 2**20:,.2f} MiB"
    axes.set_title(title, fontsize=9.5)
    _plain(axes)
    return fig


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _ticks(axis: Axis, places: Sequence[float]) -> None:
    """These ticks and no others: on a logarithmic axis matplotlib's own take half the time of a drawing."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_tick_params(labelsize=8.5)
