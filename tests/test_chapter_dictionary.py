"""Chapters 02 and 03: what they build by hand is the package's, solutions run, every slider is quick and never blank."""

import ast
import math
from copy import deepcopy
from itertools import combinations, islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import in_time
from scipy.signal import lfilter

from notebooks import cells, functions_of
from tutorial_moco import dictionary_figures
from tutorial_moco.checks import check_enqueue, check_momentum_update
from tutorial_moco.diagnose import key_drift
from tutorial_moco.encoders import build_encoder
from tutorial_moco.images import ImageSet
from tutorial_moco.losses import info_nce
from tutorial_moco.mechanisms import MoCo
from tutorial_moco.pretrain import batches, start, train_step
from tutorial_moco.recipes import Recipe
from tutorial_moco.report import png
from tutorial_moco.widgets import DPI

QUEUE, MOMENTUM = "02_the_queue.ipynb", "03_the_momentum_encoder.ipynb"
CPU = torch.device("cpu")
MS = (0.0, 0.9, 0.99, 0.999, 1.0)
RECIPE = Recipe(encoder="tiny", K=64, batch_size=16, augmentation="shapes")


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(0, 256, (96, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "train", pixels, torch.arange(96) % 2, ("even", "odd"), "hash")


def filled(name: str, **values) -> dict:
    """A notebook's functions, and in their world the values that its cells would have made."""
    book = functions_of(name)
    book.update(values)
    return book


@pytest.fixture
def queue_book(images):
    return filled(QUEUE, recipe=RECIPE, part=images, tiny=build_encoder("tiny"))


@pytest.fixture
def momentum_book(images):
    points = {m: [{"age": age, "cosine": 1 - age * (1 - m) / 40, "sd": 0.02, "count": 64} for age in range(1, 65)] for m in MS}
    curves = {m: [{"step": step, "loss": 4.0 + m, "pretext": 10.0 * m} for step in range(1, 31)] for m in MS}
    return filled(
        MOMENTUM, recipe=RECIPE, part=images, path=torch.linspace(0, 1, 400), curves=curves, STEPS=30,
        drift=points, measured=points, bank=None, batch_size=64,
    )  # fmt: skip


# Built by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 5, 7, 12])
@pytest.mark.parametrize("batch", [1, 3, 4, 12, 30])
def test_the_ring_by_hand_is_that_of_moco(K, batch, queue_book):
    moco, pointer = MoCo(build_encoder("tiny"), K), 0
    queue = moco.queue.clone()
    for keys in F.normalize(torch.randn(batch * 6, 128), dim=1).split(batch):
        moco.enqueue(keys)
        pointer = queue_book["enqueue"](queue, pointer, keys)
    assert torch.equal(queue, moco.queue)
    assert pointer == int(moco.pointer)


def test_the_checks_accept_what_the_chapters_build(queue_book, momentum_book):
    check_enqueue(queue_book["enqueue"])
    check_momentum_update(momentum_book["momentum_update"])


def test_bytes_for_backward_are_those_of_the_activations(queue_book):
    count, layer = queue_book["bytes_for_backward"], torch.nn.Linear(8, 4)
    net = torch.nn.Sequential(layer, torch.nn.Tanh())  # keeps its input, the weight (or a view of it) and tanh's output
    few, more = (count(net, torch.rand(N, 8)) for N in (3, 5))
    assert more - few == 2 * (8 + 4) * 4
    with torch.no_grad():
        assert count(net, torch.rand(3, 8)) == 0


@pytest.mark.parametrize(("n", "K", "batch"), [(40, 8, 8), (40, 60, 8), (30, 12, 7)])
def test_own_keys_are_counted_as_with_a_list(n, K, batch, queue_book):
    from tutorial_moco.randomness import permutation

    fifo, found = [], 0
    for epoch in range(4):
        for index in permutation(n, 0, epoch).split(batch):
            found += sum(i in fifo for i in index.tolist())
            fifo = (fifo + index.tolist())[-K:]
    assert queue_book["share_with_own_key"](n, K, batch) == pytest.approx(found / (3 * n))


def test_the_short_run_is_the_packages(queue_book, images):
    losses, full, _ = queue_book["short_run"](5)
    run = start(RECIPE, images, CPU, torch.float32)
    assert losses == [train_step(run, images.images[i], i, e)[0] for e, i in islice(batches(96, RECIPE, 0, CPU), 5)]
    assert full == [16, 32, 48, 64, 64]
    spoilt, _, _ = queue_book["short_run"](1, begin=torch.randn(64, 128))
    assert spoilt[0] > losses[0]


@pytest.mark.parametrize("m", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_the_filter_by_hand_is_scipys(m, momentum_book):
    signal = torch.randn(50, generator=torch.Generator().manual_seed(0))
    expected, _ = lfilter([1 - m], [1, -m], signal.double().numpy(), zi=[m * signal[0].item()])
    np.testing.assert_allclose(momentum_book["ema"](signal, m).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("m", [0.0, 0.9, 0.99, 1.0])
def test_the_momentum_update_by_hand_is_that_of_moco(m, momentum_book):
    moco = MoCo(build_encoder("tiny"), K=8, m=m)
    with torch.no_grad():
        for parameter in moco.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    mine = deepcopy(moco.key_encoder)
    momentum_book["momentum_update"](moco.encoder, mine, m)
    moco.update_key_encoder()
    for by_hand, packages in zip(mine.parameters(), moco.key_encoder.parameters(), strict=True):
        assert torch.allclose(by_hand, packages, atol=1e-5)


def test_drift_by_hand_is_that_of_key_drift(momentum_book, images):
    for run, point in momentum_book["training"](0.9, 9):
        assert point["step"] == run.step
    ages, cosines = key_drift(run, images.images)
    for age in (1, 2, 4):
        mine = momentum_book["drift_of_age"](run, images.images, age)
        assert torch.allclose(mine.sort().values, cosines[ages == age].sort().values, atol=1e-5)


def test_the_runs_of_chapter_03_are_the_packages(momentum_book, images):
    points = [point for _, point in momentum_book["training"](0.5, 4)]
    run = start(RECIPE.replace(m=0.5), images, CPU, torch.float32)
    direct = [train_step(run, images.images[i], i, e)[0] for e, i in islice(batches(96, RECIPE, 0, CPU), 4)]
    assert [point["loss"] for point in points] == direct
    assert points[0]["pretext"] > 90  # against random vectors, the own key not among them


# Sliders -------------------------------------------------------------------------------------------------------------


def sliders_of(name: str, book: dict) -> dict[str, tuple[dict, dict]]:
    """For each draw function that a notebook hands to explore or live: its controls and where they start."""
    found = {}
    for call in (
        node for cell in cells(name) for node in ast.walk(ast.parse(without_magic(cell))) if isinstance(node, ast.Call)
    ):
        if getattr(call.func, "id", "") in ("explore", "live"):
            values = {k.arg: eval(compile(ast.Expression(k.value), name, "eval"), book) for k in call.keywords}
            begin = values.pop("start", {})
            state = {key: begin.get(key, options[len(options) // 2]) for key, options in values.items()}
            found[call.args[0].id] = values, state
    return found


def without_magic(cell: str) -> str:
    return "\n".join("" if line.startswith(("%", "!")) else line.replace("%pip", "pass #") for line in cell.splitlines())


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        (QUEUE, "draw_ring"),
        (QUEUE, "draw_room"),
        (MOMENTUM, "draw_filter"),
        (MOMENTUM, "draw_drift"),
        (MOMENTUM, "draw_measured"),
    ],
)
def test_a_slider_is_drawn_in_time_over_its_whole_range(name, draw, queue_book, momentum_book):
    book = {QUEUE: queue_book, MOMENTUM: momentum_book}[name]
    controls, state = sliders_of(name, book)[draw]
    moves = [(control, value) for control, values in controls.items() for value in values]
    drawn = in_time([lambda c=c, value=value: png(book[draw](**{**state, c: value}), DPI) for c, value in moves])
    pictures = dict(zip(moves, drawn, strict=True))
    for control, values in controls.items():
        assert len({pictures[control, value] for value in values}) == len(values)  # each move shows


def test_the_live_run_shows_a_picture_at_once_and_then_moves(momentum_book):
    frames = [(share, png(figure, 50)) for share, figure in momentum_book["steps"](0.9)]
    assert [share for share, _ in frames] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len({picture for _, picture in frames}) == 4


# Figures -------------------------------------------------------------------------------------------------------------


def test_the_ring_shows_the_ages_it_is_given():
    moco = MoCo(build_encoder("tiny"), K=7)
    for _ in range(2):
        moco.enqueue(torch.zeros(3, 128))
    circle, bars = dictionary_figures.ring(moco.ages(), int(moco.pointer), "title").axes
    assert [bar.get_height() for bar in bars.patches] == [2, 2, 2, 1, 1, 1, 0]
    assert "pointer: place 6" in {text.get_text() for text in circle.texts}
    assert bars.lines[0].get_xdata().tolist() == [6]  # the cross at the place that no key has reached


def test_room_is_the_formula():
    memory, age = dictionary_figures.room(65536, 256, "ImageNet").axes
    K, mebibytes = memory.lines[0].get_data()
    assert mebibytes.tolist() == [k * 128 * 4 / 2**20 for k in K]
    assert mebibytes[-1] == 32  # MiB, the paper's queue
    assert memory.lines[1].get_ydata()[0] * 2**20 == 1_281_167 * 128 * 4  # 656 MB
    assert [bar.get_x() + bar.get_width() for bar in age.patches] == pytest.approx(
        [0.55, 256, 2 * 5004]
    )  # a bank: first in one epoch, last in the next


def test_the_filter_marks_half_of_the_way():
    answer, walk = dictionary_figures.filter_response(torch.zeros(9).cumsum(0), torch.ones(9), 0.99).axes
    half = next(line for line in answer.lines if line.get_marker() == "o")
    assert half.get_xdata()[0] == pytest.approx(math.log(0.5) / math.log(0.99))
    assert walk.lines[1].get_ydata().tolist() == [1] * 9


def test_the_laboratory_averages_what_a_queue_of_k_would_hold():
    points = [{"age": age, "cosine": 1 - age / 10, "sd": 0.01, "count": 4} for age in range(1, 6)]
    bank = [point | {"count": 100 if point["age"] < 5 else 2} for point in points]  # the mean of two keys says nothing
    fig = dictionary_figures.drift_laboratory({0.9: points, 0.99: points}, 0.9, K=12, batch=4, bank=bank)
    assert "up to 3 steps" in fig.texts[0].get_text()
    assert "cosine 0.800 on average, 0.700 for the oldest" in fig.texts[0].get_text()
    assert [len(line.get_xdata()) for line in fig.axes[0].lines] == [5, 5, 4]


def test_names_of_lines_that_end_together_stay_apart_and_below_the_title():
    points = [{"age": age, "cosine": 1.0, "sd": 0.01, "count": 4} for age in range(1, 6)]
    fig = dictionary_figures.drift_laboratory(dict.fromkeys((0.0, 0.9, 0.99, 0.999, 1.0), points), 0.9, K=12, batch=4)
    boxes = [text.get_window_extent() for text in (*fig.axes[0].texts, *fig.texts)]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_by_age_keeps_every_key():
    points = dictionary_figures.by_age(torch.tensor([1, 1, 3]), torch.tensor([1.0, 0.5, 0.25]))
    assert points == [{"age": 1, "cosine": 0.75, "sd": 0.25, "count": 2}, {"age": 3, "cosine": 0.25, "sd": 0.0, "count": 1}]


def test_loss_figures_show_every_loss_and_the_line_of_guessing():
    losses, filled = [0.1, 2.0, 5.0, 4.9], [16, 32, 64, 64]
    here, there = dictionary_figures.loss_rises_first(losses, filled, 64).axes
    assert here.lines[0].get_ydata().tolist() == losses
    assert here.lines[1].get_ydata()[0] == pytest.approx(math.log(65))
    assert here.lines[2].get_xdata()[0] == 3  # full
    assert there.lines[0].get_ydata()[:3].tolist() == [6.96, 7.25, 7.29]  # FACTS: the official notebook
    (axes,) = dictionary_figures.two_starts({"a": losses, "b": losses[::-1]}, filled, 64).axes
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [losses, losses[::-1]]


def test_the_other_figures_hold_their_data():
    fig = dictionary_figures.similarities({"a": torch.randn(50), "b": torch.randn(60)}, own=0.5)
    assert [sum(bar.get_height() for bar in axes.patches) for axes in fig.axes] == [50, 60]
    (axes,) = dictionary_figures.own_keys({10: 0.5, 20: 1.0}, 20).axes
    assert axes.lines[0].get_ydata().tolist() == [50, 100]
    (axes,) = dictionary_figures.age_histograms({"moco": torch.arange(1, 5), "memory_bank": torch.arange(1, 100)}).axes
    assert sum(stairs.get_data().values.sum() for stairs in axes.patches) == pytest.approx(200)


def test_the_first_loss_is_small_with_unit_vectors_and_large_without(images):
    """The claim of chapter 02's start, whatever the images."""
    run = start(RECIPE.replace(K=1024), images, CPU, torch.float32)
    index = torch.arange(64)
    from tutorial_moco.augment import two_views

    with torch.no_grad():
        q, k, queue, _ = run.mechanism.contrast(*two_views(images.images[index], index, "small"), index)
    guessing = math.log(1025)
    assert info_nce(q, k, queue, 0.1) < 0.5 * guessing
    assert info_nce(q, k, torch.randn(1024, 128), 0.1) > 1.5 * guessing
