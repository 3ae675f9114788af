"""Pictures of MoCo's versions: every run of the experiment has its place, and what is painted lies where it was hidden."""

import numpy as np
import torch

from benchmarks.plan import BASES, EXPERIMENTS
from tutorial_moco.augment import plain_view
from tutorial_moco.encoders import build_encoder
from tutorial_moco.masked import MaskedAutoencoder, mask_order
from tutorial_moco.report import png
from tutorial_moco.shapes import draw_shapes
from tutorial_moco.version_figures import (
    KIN,
    TRADE,
    V2_TABLE,
    filters,
    kin,
    painted,
    schedules,
    trade_off,
    v2_setting,
    v2_table,
)


def rows(seeds=2):
    """The experiment's jobs with made-up accuracies."""
    base, found = BASES["small"].replace(epochs=5), []
    for seed in range(seeds):
        for place, job in enumerate(EXPERIMENTS["versions"](base.replace(seed=seed), torch.arange(2000) % 10)):
            made_up = {"kind": job.kind, "linear_top1": 40.0 + place + seed, "knn_top1": 38.0 + place, "failed": None}
            found.append(job.identity("") | made_up)
    return found


def test_every_run_of_the_experiment_is_in_one_of_the_pictures_and_each_line_has_its_runs():
    named = [(v2_setting(row, 5), [name for name, keep in KIN.items() if row["epochs"] == 5 and keep(row)]) for row in rows(1)]
    assert all(setting or kinds for setting, kinds in named)
    assert all(len(kinds) <= 1 for _, kinds in named)
    assert {setting for setting, _ in named if setting} == set(V2_TABLE)
    assert {kind for _, kinds in named for kind in kinds} == set(KIN)


def test_pictures_are_drawn_of_rows_of_one_seed_and_of_several():
    for seeds in (1, 2):
        for draw in (v2_table, kin):
            assert len(png(draw(rows(seeds)), dpi=50)) > 5000
    axes = v2_table(rows()).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(V2_TABLE)
    assert [line.get_xdata()[0] for line in axes[1].lines if line.get_marker() == "D"] == [40.5 + i for i in range(6)]
    assert len(schedules({"cosine": [1, 0.5, 0], "steps": [1, 0.1, 0.01]}).axes[0].lines) == 2
    assert len(filters(build_encoder("vit").backbone.conv_proj.weight).axes) == 96


def test_the_trade_off_has_a_hollow_and_a_filled_dot_for_each_start():
    made_up = [
        {"start": start, "share": share, field: 40.0 + place + 10 * share + 5 * seed}
        for place, start in enumerate(TRADE) for share in (0.1, 1.0) for seed in (0, 1)
        for field in ("linear_top1", "fine_tuned_top1")
    ]  # fmt: skip
    left, right = trade_off(made_up).axes
    assert (left.get_title(), right.get_title()) == ("10 % of the labels", "100 % of the labels")
    dots = [line for line in left.lines if line.get_marker() in "Ds"]
    assert [list(line.get_xdata()) for line in dots[::2]] == [[41.0 + i, 46.0 + i] for i in range(3)]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [True, False] * 3


def test_a_painted_picture_keeps_what_was_seen_and_blanks_what_was_not():
    torch.manual_seed(0)
    net = MaskedAutoencoder(build_encoder("vit-learned").backbone)
    views = plain_view(draw_shapes(2, seed=0)[0])
    order = mask_order(torch.arange(2), 64, seed=0, epoch=0)
    sheet = np.asarray(painted(net, views, order).axes[0].images[0].get_array())
    starts = [2 + 34 * number for number in range(4)]  # two white pixels before each image of 32
    shown = [np.stack([sheet[top : top + 32, left : left + 32] for left in starts[:2]]) for top in starts]
    assert sheet.shape == (4 * 34 + 2, 2 * 34 + 2, 3)
    whole, seen, means, guessed = shown
    for i in range(2):
        for place, number in enumerate(order[i].tolist()):
            row, column = (4 * at for at in divmod(number, 8))
            patch = np.s_[i, row : row + 4, column : column + 4]
            assert np.allclose(guessed[patch], whole[patch], atol=1e-5) == (place < net.seen)
            assert np.allclose(seen[patch], whole[patch], atol=1e-5) == (place < net.seen)
            if place >= net.seen:
                assert np.ptp(means[patch], axis=(0, 1)).max() < 1e-5  # one mean for all 48 numbers
                assert abs(means[patch].mean() - whole[patch].mean()) < 0.02
