"""Chapters 06 and 07: what they build by hand agrees with the package, solutions run, sliders are quick, faults are true."""

import dataclasses
import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import in_time

from notebooks import functions_of
from tutorial_moco import breakages, evaluate, feature_figures, losses
from tutorial_moco.breakages import BREAKAGES, HEALTHY, SYMPTOMS, train
from tutorial_moco.checks import CheckFailed
from tutorial_moco.encoders import build_encoder, build_head
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.feature_checks import check_alignment, check_knn_top1, check_push, check_uniformity
from tutorial_moco.images import ImageSet
from tutorial_moco.mechanisms import MoCo
from tutorial_moco.recipes import Recipe
from tutorial_moco.report import png
from tutorial_moco.shapes import SHAPE_CLASSES, draw_shapes
from tutorial_moco.widgets import DPI

LEARNED, LABORATORY = "06_what_was_learned.ipynb", "07_laboratory.ipynb"
TAUS = feature_figures.TAUS


def shapes(n, seed):
    images, labels, factors = draw_shapes(n, seed, 32)
    return ImageSet("shapes", "train", images, labels, SHAPE_CLASSES, f"drawn {n} {seed}", factors)


@pytest.fixture(scope="module")
def few():
    return shapes(640, 0)


@pytest.fixture(scope="module")
def few_test():
    return shapes(200, 1)


@pytest.fixture(scope="module")
def learned():
    """Chapter 06's functions, and features of three easy classes in place of those it reads."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2600,), generator=random)
    features = torch.randn(2600, 16, generator=random) + 2.0 * F.one_hot(labels, 16)
    features[2600 - 40 :] += 4.0 * F.one_hot((labels[2600 - 40 :] + 1) % 3, 16)  # confident and wrong
    book = functions_of(LEARNED)
    book |= {"train_features": features[:2000], "train_labels": labels[:2000]}
    book |= {"test_features": features[2000:], "test_labels": labels[2000:]}
    both = [features[:2000], features[2000:]]
    book |= {"read": {"pixels": both, "moco": both}, "evaluate": evaluate}
    return book


@pytest.fixture(scope="module")
def laboratory(few, few_test):
    """Chapter 07's functions, with drawn images and random similarities in place of those it reads."""
    random = torch.Generator().manual_seed(0)
    similarity = {head: torch.randn(64, 512, generator=random).mul(0.15).clamp(-1, 1) for head in ("linear", "mlp")}
    similarity["mlp"] *= 1.6
    counts = {
        head: [
            feature_figures.effective_negatives(feature_figures.push_on_negatives(values, tau)).mean().item() for tau in TAUS
        ]
        for head, values in similarity.items()
    }
    more = {"few": few, "few_test": few_test, "recipe": breakages.bench_recipe(few), "STEPS": 20}
    more |= {"similarity": similarity, "counts": counts}
    book = functions_of(LABORATORY)
    book |= more  # in place: the functions look their names up in it
    return book


# Built by hand -------------------------------------------------------------------------------------------------------


def test_what_chapter_06_builds_agrees_with_the_package(learned):
    data = [learned[name] for name in ("train_features", "train_labels", "test_features", "test_labels")]
    for k, temperature in ((1, 0.07), (20, 0.07), (200, 0.1)):
        expected = evaluate.knn_top1(*data, k=k, temperature=temperature)
        assert learned["knn_top1"](*data, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-4)
    assert learned["linear_top1"](*data) == pytest.approx(evaluate.linear_top1(*data), abs=1e-4)
    q, k = (F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)), dim=1) for seed in (0, 1))
    assert learned["alignment"](q, k) == pytest.approx(evaluate.alignment(q, k), abs=1e-6)
    assert learned["uniformity"](q) == pytest.approx(evaluate.uniformity(q), abs=1e-6)
    backbone, images = build_encoder("tiny").backbone, shapes(20, 3).images
    found = learned["extract_features"](backbone, images)
    assert torch.allclose(found, evaluate.extract_features(backbone, images), atol=1e-5)


def test_the_notebooks_knn_reads_keys_as_they_are_used_and_changes_nothing():
    """A head with BatchNorm would else normalise by what is read, and go on with other statistics."""
    head = build_head("mlp3", 16, 8).train()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    features, labels = torch.randn(30, 16), torch.arange(30) % 3
    evaluate.notebooks_knn_top1(head, features, labels, features[:6], labels[:6])
    assert head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_tsne_of_one_image_or_two_is_drawn():
    assert evaluate.tsne(torch.ones(1, 4)).tolist() == [[0, 0]]
    assert np.isfinite(evaluate.tsne(torch.randn(2, 4))).all()


def test_what_chapter_07_builds_agrees_with_the_package(laboratory):
    similarity = laboratory["similarity"]["linear"]
    for tau in TAUS:
        mine, theirs = (f(similarity, tau) for f in (laboratory["push_on_negatives"], feature_figures.push_on_negatives))
        assert torch.allclose(mine, theirs)
        counts = laboratory["effective_negatives"](mine)
        assert torch.allclose(counts, feature_figures.effective_negatives(theirs))
        assert ((counts >= 1 - 1e-4) & (counts <= 511 + 1e-2)).all()


def test_negatives_that_count_grow_with_tau_from_one_to_all(laboratory):
    similarity = laboratory["similarity"]["linear"]
    counts = [
        feature_figures.effective_negatives(feature_figures.push_on_negatives(similarity, tau)).mean().item()
        for tau in (1e-3, 0.01, 0.1, 1.0, 100.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < 2
    assert counts[-1] > 510


# Checks: the right one passes, each mistake is named ------------------------------------------------------------------


def test_checks_pass_what_is_right(learned, laboratory, capsys):
    check_knn_top1(learned["knn_top1"])
    check_alignment(learned["alignment"])
    check_uniformity(learned["uniformity"])
    check_push(laboratory["push_on_negatives"])
    assert capsys.readouterr().out.count("[OK]") == 4


def knn_mutant(*, normalise=True, weight=torch.exp, divide=True, largest=True, share=100.0, most=20):
    def knn_top1(train, train_labels, test, test_labels, k=20, temperature=0.07):
        if normalise:
            train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
        similarity, near = (test @ train.T).topk(min(k, most), dim=1, largest=largest)
        votes = torch.zeros(len(test), int(train_labels.max()) + 1)
        votes.scatter_add_(1, train_labels[near], weight(similarity / temperature if divide else similarity * temperature))
        return share * (votes.argmax(dim=1) == test_labels).float().mean().item()

    return knn_top1


@pytest.mark.parametrize(
    ("check", "mutant", "named"),
    [
        (check_knn_top1, knn_mutant(normalise=False), "not normalised"),
        (check_knn_top1, knn_mutant(weight=torch.ones_like), "one vote"),
        (check_knn_top1, knn_mutant(divide=False), "has to divide"),
        (check_knn_top1, knn_mutant(largest=False, weight=torch.ones_like), "least similar"),
        (check_knn_top1, knn_mutant(share=1.0), "in percent"),
        (check_knn_top1, knn_mutant(most=1), "only the nearest"),
        (check_knn_top1, lambda *_: None, "return"),
        (check_knn_top1, lambda *_: ..., "not written yet"),
        (check_alignment, lambda q, k: (q - k).square().mean(), "dim=1"),
        (check_alignment, lambda q, k: (q - k).norm(dim=1).mean(), "squared"),
        (check_alignment, lambda q, k: (q * k).sum(dim=1).mean(), "cosine"),
        (check_alignment, lambda q, k: (q - k).square().sum(dim=1), "not one number"),
        (check_uniformity, lambda q: torch.cdist(q, q).square().mul(-2).exp().mean().log(), "with itself"),
        (check_uniformity, lambda q: torch.pdist(q).mul(-2).exp().mean().log(), "not squared"),
        (check_uniformity, lambda q: torch.pdist(q).square().mul(-2).mean(), "before the mean"),
        (check_uniformity, lambda q: torch.pdist(q).square().mul(-2).exp().mean(), "logarithm is missing"),
        (check_push, lambda s, t: (s / t).softmax(dim=1) / t, "column 0"),
        (check_push, lambda s, t: (s / t).softmax(dim=1)[:, 1:], "divided by the temperature"),
        (check_push, lambda s, t: (s[:, 1:] / t).softmax(dim=1) / t, "negatives alone"),
        (check_push, lambda s, t: (s * t).softmax(dim=1)[:, 1:] / t, "has to divide"),
    ],
)
def test_each_mistake_is_named(check, mutant, named):
    with pytest.raises(CheckFailed, match=named):
        check(mutant)


# Breakages -----------------------------------------------------------------------------------------------------------


def curve(breakage, few, few_test):
    return [point["loss"] for point in train(breakage, few, few_test, progress=False).losses]


def test_enqueued_first_has_the_floor_log_2(few, few_test):
    mechanism = breakages.EnqueuesFirst(build_encoder("tiny", dim=8), K=40)
    view = torch.randn(16, 3, 32, 32)
    contrast = mechanism.contrast(view, view, torch.arange(16))  # perfect: query and key are the same
    assert losses.info_nce(*contrast[:3], temperature=0.01) > math.log(2) - 1e-3
    assert int(mechanism.filled) == 16
    assert all(loss > math.log(2) for loss in curve(SYMPTOMS["never below 0.69"], few, few_test))


def test_tau_multiplied_is_flat_below_a_guess(few, few_test):
    guess = math.log(257)
    assert all(guess - 0.2 - 1e-3 < loss < guess + 1e-3 for loss in curve(BREAKAGES["tau multiplied"], few, few_test))


def test_pointer_that_stays_leaves_the_rest_of_the_queue_random(few, few_test):
    run = train(BREAKAGES["pointer stays at 0"], few, few_test, progress=False)
    fresh = MoCo(build_encoder("tiny"), K=256, seed=0)
    assert int(run.mechanism.pointer) == 0
    assert torch.equal(run.mechanism.queue[64:], fresh.queue[64:])
    assert not torch.equal(run.mechanism.queue[:64], fresh.queue[:64])


def test_keys_that_stay_shuffled_are_those_of_others():
    images = torch.randn(16, 3, 32, 32)
    right, wrong = (kind(build_encoder("tiny", dim=8).eval(), K=8) for kind in (MoCo, breakages.KeysStayShuffled))
    wrong.load_state_dict(right.state_dict())
    keys, shuffled = right.eval().encode_keys(images), wrong.eval().encode_keys(images)
    assert not torch.allclose(keys, shuffled)
    assert torch.allclose(keys.sort(dim=0).values, shuffled.sort(dim=0).values, atol=1e-5)


def test_a_first_queue_without_length_has_its_directions_only():
    right, wrong = (kind(build_encoder("tiny", dim=64), K=8) for kind in (MoCo, breakages.QueueWithoutLength))
    assert torch.allclose(wrong.queue.norm(dim=1), torch.full((8,), 8.0), atol=1e-4)
    assert torch.allclose(F.normalize(wrong.queue, dim=1), right.queue, atol=1e-5)


def test_nan_stops_the_loop(few, few_test):
    with pytest.raises(UsageError, match="nan"):
        train(SYMPTOMS["the loss is nan"], few, few_test, progress=False)


def test_a_long_queue_rises_first(few, few_test):
    points = train(SYMPTOMS["the loss rises first"], few, few_test, progress=False).losses
    assert points[-1]["loss"] > points[0]["loss"]
    assert points[0]["pretext_accuracy"] > 90 > points[-1]["pretext_accuracy"]


def test_a_run_is_trained_once_and_the_package_is_whole_afterwards(few, few_test):
    first = train(BREAKAGES["enqueued first"], few, few_test, progress=False)
    assert train(BREAKAGES["enqueued first"], few, few_test, progress=False) is first
    assert breakages.training.MoCo is MoCo
    assert breakages.training.info_nce is losses.info_nce
    healthy = train(HEALTHY, few, few_test, progress=False)
    assert type(healthy.mechanism) is MoCo
    other = train(dataclasses.replace(HEALTHY, changes={"m": 0.5}), few, few_test, progress=False)
    assert other.recipe.m == 0.5


def test_every_breakage_can_be_the_secret_and_a_verdict_is_plain():
    assert {breakages.secret(number).title for number in range(100)} == set(BREAKAGES)
    assert breakages.secret(7) is breakages.secret(7)
    right = breakages.secret(7).title
    assert breakages.verdict(7, right).startswith("Right")
    wrong = next(title for title in BREAKAGES if title != right)
    assert right in breakages.verdict(7, wrong)
    assert "choose one of" in breakages.verdict(7, "my cat")
    assert all(title == breakage.title for title, breakage in BREAKAGES.items())


# Pictures ------------------------------------------------------------------------------------------------------------


def swept(draw, states):
    """Draw every state, assert that it is in time and that none is blank, and return the figures."""

    def redraw(state):
        fig = draw(**state)
        assert len(png(fig, DPI)) > 5000
        return fig

    drawn = in_time([functools.partial(redraw, state) for state in states])
    for fig in drawn:
        assert any(axes.lines or axes.collections or axes.patches or axes.texts for axes in fig.axes)
    return drawn


def row(experiment, seed=0, **changes):
    recipe = dataclasses.asdict(Recipe(seed=seed)) | changes
    curve = {
        "losses": [{"images_seen": 1000 * i, "loss": 5 - 0.02 * i, "pretext_accuracy": 0.5 * i} for i in range(1, 101)],
        "monitor": [{"images_seen": 20000 * i, "knn_top1": 40 + i} for i in range(1, 6)],
    }
    more = {"experiment": experiment, "failed": None, "n": 50_000, "data_hash": "h", "dictionary_bytes": 4 * 128 * recipe["K"]}
    cost = {"peak_memory_bytes": 2**30, "memory_before_bytes": 2**29, "seconds_per_step": 0.1 + 1e-4 * recipe["batch_size"]}
    return recipe | curve | more | cost | {"knn_top1": 50.0 + seed, "linear_top1": 60.0 + seed}


def test_tau_slider(laboratory):
    states = [{"tau": tau, "head": head, "query": "1"} for tau in TAUS for head in ("linear", "mlp")]
    for state, fig in zip(states, swept(laboratory["draw_tau"], states), strict=True):
        left, middle, right = fig.axes
        expected = feature_figures.push_on_negatives(laboratory["similarity"][state["head"]], state["tau"])[1]
        shown = torch.tensor(middle.lines[0].get_ydata()).float()
        assert torch.allclose(shown, expected.sort(descending=True).values, atol=1e-4)
        assert len(left.lines[0].get_ydata()) == 511
        assert any(line.get_xdata()[0] == state["tau"] for line in right.lines)


def test_m_slider():
    momenta = (0.0, 0.5, 0.9, 0.99, 1.0)
    rows = [row("m", seed, m=m) for m in momenta for seed in (0, 1, 2)]
    rows[0] |= {"failed": "the loss is nan", "knn_top1": None, "losses": None, "monitor": None}
    swept(lambda m: feature_figures.momentum_lab(rows, m), [{"m": m} for m in momenta])


def test_a_momentum_of_which_every_run_failed_is_said_to_have_failed():
    broken = {"failed": "the loss is nan", "knn_top1": None, "linear_top1": None, "losses": None, "monitor": None}
    fig = feature_figures.momentum_lab([row("m", m=0.0) | broken, row("m", m=0.99)], 0.0)
    assert "failed" in [text.get_text() for text in fig.axes[2].texts]


def test_K_slider_tells_the_mean_of_its_rows():
    rows = [row("K", seed, mechanism=name, K=K) for name in ("moco", "memory_bank") for K in (64, 256, 1024) for seed in (0, 1)]
    rows += [row("K", seed, mechanism="end_to_end", K=K, batch_size=K + 1) for K in (64, 256) for seed in (0, 1)]
    states = [{"K": K} for K in (64, 256, 1024)]
    for K, fig in zip((64, 256, 1024), swept(lambda K: feature_figures.negatives_lab(rows, K), states), strict=True):
        told = "\n".join(text.get_text() for text in fig.axes[1].texts)
        assert "MoCo: kNN 50.5 %" in told
        assert f"{math.log(K + 1):.2f}" in told
        assert ("end-to-end: not measured" in told) == (K == 1024)


def test_cost_slider_shows_each_mechanism_at_its_batch():
    rows = [
        row("cost", mechanism=name, K=K, batch_size=B)
        for name in ("moco", "memory_bank")
        for K in (256, 4096)
        for B in (64, 256)
    ]
    rows += [row("cost", mechanism="memory_bank", K=49_999, batch_size=B) for B in (64, 256)]
    rows += [row("cost", mechanism="moco", K=65_536, batch_size=B) for B in (64, 256)]
    rows += [row("cost", mechanism="end_to_end", K=B - 1, batch_size=B) for B in (64, 256)]
    states = [{"batch_size": B, "K": K} for B in (64, 256) for K in (256, 4096, 65_536)]
    for state, fig in zip(states, swept(lambda **at: feature_figures.cost_lab(rows, **at), states), strict=True):
        memory, seconds = fig.axes
        assert [bar.get_width() for bar in memory.patches] == [512.0] * 3
        assert seconds.patches[0].get_width() == pytest.approx(100 + 0.1 * state["batch_size"])


@pytest.mark.parametrize("draw", [feature_figures.momentum_lab, feature_figures.negatives_lab])
def test_without_rows_a_slider_says_what_is_missing(draw):
    with pytest.raises(DataError, match="nothing measured yet"):
        draw([], 0)


def test_film_slider_and_its_maps():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    start = torch.randn(60, 8, generator=random)
    features = torch.stack([start + shift * F.one_hot(labels, 8) for shift in (0.0, 1.0, 3.0, 3.0)])
    maps = list(feature_figures.tsne_film(features, perplexity=10))
    moved = [abs(a - b).mean() for a, b in pairwise(maps)]
    assert moved[2] < 0.1  # the same features once more: the points stay
    classes, knn = ("a", "b", "c"), [33.0, 60.0, 99.0, 99.0]
    figs = swept(
        lambda moment: feature_figures.film(maps, labels, classes, [0, 1, 2, 4], knn, moment), [{"moment": i} for i in range(4)]
    )
    for fig in figs:
        assert sum(len(points.get_offsets()) for points in fig.axes[0].collections) == 60
    assert "99.0 %" in figs[3].axes[1].get_title()


def test_other_pictures_show_what_they_were_given(few, few_test):
    labels, classes = torch.arange(30) % 3, ("a", "b", "c")
    points = torch.randn(30, 2).numpy()
    blind = feature_figures.blind_maps([points] * 4, labels, classes)
    assert [axes.get_title() for axes in blind.axes] == list("ABCD")
    told = feature_figures.blind_maps([points] * 4, labels, classes, ["one", "two", "three", "four"])
    assert told.axes[2].get_title() == "C: three"
    gallery = feature_figures.tsne_gallery({(row, column): points for row in "xy" for column in "pqr"}, labels, classes)
    assert len(gallery.axes) == 6
    readings = feature_figures.knn_readings({0.07: {1: 50.0, 20: 60.0}, 1.0: {1: 50.0, 20: 55.0}}, marked=((20, 0.07),))
    assert list(readings.axes[0].lines[0].get_ydata()) == [50.0, 60.0]
    plane = feature_figures.alignment_uniformity({"moco": (0.4, -2.0, 55.0), "collapsed": (0.0, 0.0, None)})
    assert [line.get_xdata()[0] for line in plane.axes[0].lines] == [0.4, 0.0]
    runs = {
        "healthy": train(HEALTHY, few, few_test, progress=False),
        "m is 0": train(BREAKAGES["m is 0"], few, few_test, progress=False),
    }
    loss, pretext, knn = feature_figures.run_curves(runs, {"log 2": math.log(2)}).axes
    assert list(loss.lines[1].get_ydata()) == [point["loss"] for point in runs["m is 0"].losses]
    assert len(pretext.lines) == 2
    assert len(knn.lines[0].get_ydata()) == breakages.MONITOR


def test_the_live_run_draws_from_the_first_moment_to_the_last(laboratory):
    shares = []
    laboratory["curves"] = {}  # runs from before, drawn as well
    for share, fig in laboratory["watch"](0.9):
        shares.append(share)
        assert len(png(fig, DPI)) > 5000
        if share:
            assert len(fig.axes[0].lines[0].get_xdata()) == 20 * share
    assert shares == [0.0, 0.5, 1.0]
