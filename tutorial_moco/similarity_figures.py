"""Pictures of a look-up: a query beside its keys, and what the temperature makes of their similarities."""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from tutorial_moco.figures import COLOURS, bare, denormalise, figure

OWN, OTHER = "#D55E00", COLOURS["moco"]
HARDEST = 5  # negatives whose share of the push is told


def look_up(query: Tensor, keys: Tensor, similarities: Tensor, own: Tensor) -> Figure:
    """A query and its keys with the similarity under each, the most similar first; the own key is framed.

    Args:
        query: normalised view (3, h, w). keys: (n, 3, h, w). similarities: (n,). own: bool (n,).
    """
    n = len(keys)
    fig = figure(0.85 * (n + 1) + 0.3, 1.5)
    grid = fig.subplots(1, n + 1, width_ratios=[1.15, *[1] * n])
    _picture(grid[0], query, "the query", None)
    for axes, key, similarity, mine in zip(grid[1:], keys, similarities.tolist(), own.tolist(), strict=True):
        _picture(axes, key, "own key" if mine else "", OWN if mine else None)
        axes.set_xlabel(f"{similarity:.2f}", fontsize=9)
    grid[1].set_ylabel("q · k", fontsize=9, rotation=0, ha="right", va="top", y=-0.06)
    return fig


def temperature(q: Tensor, k: Tensor, query: int, tau: float) -> Figure:
    """Similarities of one query to all keys, their softmax at ``tau``, and the push p / tau on each negative.

    Args:
        q, k: unit vectors (N, C), row i of both from the same image.
    """
    similarity = k @ q[query]
    order = similarity.argsort(descending=True)
    p = (similarity / tau).softmax(dim=0)
    push = p / tau
    push[query] = 0.0  # the own key is pulled
    own = (order == query).nonzero().item()
    fig = bare(7.2, 2.6)
    places = [fig.add_axes((left, 0.19, 0.255, 0.58)) for left in (0.06, 0.395, 0.735)]
    panels = zip(places, (similarity, p, push), ("similarity q · k", "softmax p", "push on a negative, p / τ"), strict=True)
    for axes, values, title in panels:
        heights = values[order].numpy()
        axes.stairs(heights, np.arange(len(order) + 1) - 0.5, fill=True, color=OTHER)  # all bars in one piece
        axes.bar(own, heights[own], width=1.0, color=OWN, linewidth=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("keys, most similar first", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylim(min(-0.1, similarity.min().item()), 1)
    fig.axes[1].set_ylim(0, 1)
    for axes in fig.axes:  # few ticks: they take longer than all the rest
        axes.xaxis.set_major_locator(FixedLocator((0, len(order) // 2, len(order) - 1)))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    hardest = push.topk(min(HARDEST, len(push))).values.sum() / push.sum().clamp(min=torch.finfo(push.dtype).tiny)
    fig.suptitle(
        f"τ = {tau:g}: own key p = {p[query]:.3f} (orange); "
        f"the {HARDEST} hardest negatives take {100 * hardest:.0f} % of the push",
        fontsize=10,
    )
    fig.axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useOffset=False)
    fig.axes[2].yaxis.get_offset_text().set(fontsize=8, x=-0.28)  # beside the title, not under it
    return fig


def _picture(axes, view: Tensor, title: str, frame: str | None) -> None:
    axes.imshow(denormalise(view).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=frame or "black")
    axes.spines[:].set(visible=frame is not None, color=frame or "black", linewidth=3)
