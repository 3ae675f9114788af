"""Chapters 04 and 05: what the reader builds by hand equals the package's; the ladder judges as running does; pictures and
sliders show what they are given."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from drawn import in_time
from test_mechanisms import CPU, random_images, tiny_run
from test_mechanisms import two_views as random_views

from notebooks import functions_of
from tutorial_moco import algorithm, mechanism_figures
from tutorial_moco import pretrain as training
from tutorial_moco.augment import two_views
from tutorial_moco.checks import CheckFailed
from tutorial_moco.encoders import SplitBatchNorm2d, build_encoder
from tutorial_moco.losses import contrastive_logits, info_nce
from tutorial_moco.mechanisms import Contrast, EndToEnd, MemoryBank, MoCo, SimCLR
from tutorial_moco.report import png

FOUR, FIVE = "04_moco.ipynb", "05_three_mechanisms.ipynb"


@pytest.fixture(scope="module")
def four():
    return functions_of(FOUR)


@pytest.fixture(scope="module")
def five():
    return functions_of(FIVE)


# ---- built by hand, and the package's


@pytest.mark.parametrize("K", [8, 10, 24])
def test_the_step_by_hand_is_the_packages_step(four, K):
    run, mine = tiny_run(K=K), tiny_run(K=K)
    f_q, f_k, queue, pointer = mine.mechanism.encoder, mine.mechanism.key_encoder, mine.mechanism.queue, 0
    images = random_images().images
    for epoch, index in itertools.islice(training.batches(run.n, run.recipe, 0, CPU), 4):
        view_q, view_k = two_views(images[index], index, run.recipe.augmentation, epoch=epoch)
        negatives = run.mechanism.queue.clone()
        pointer, made = four["train_step"](
            f_q, f_k, mine.optimizer, queue, pointer, view_q, view_k, run.recipe.m, run.recipe.temperature
        )
        loss, contrast = training.train_step(run, images[index], index, epoch)
        assert made["loss"].item() == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(made["q"], contrast.q, atol=1e-5, rtol=0)
        torch.testing.assert_close(made["k"], contrast.k, atol=1e-5, rtol=0)
        logits = contrastive_logits(contrast.q, contrast.k, negatives, run.recipe.temperature)
        torch.testing.assert_close(made["logits"], logits, atol=1e-4, rtol=0)
    for key, tensor in run.mechanism.state_dict().items():
        if key.startswith(("encoder", "key_encoder", "queue")):
            torch.testing.assert_close(mine.mechanism.state_dict()[key], tensor, atol=1e-4, rtol=1e-4)
    assert pointer == int(run.mechanism.pointer)


def test_split_batch_norm_by_hand(four):
    x = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(four["split_batch_norm"](x, 1), torch.nn.BatchNorm2d(4)(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(four["split_batch_norm"](x, 3), SplitBatchNorm2d(4, 3)(x), atol=1e-5, rtol=1e-5)


def test_shuffled_keys_by_hand(four):
    moco, view = MoCo(build_encoder("tiny", dim=8, norm="split:4"), 16, shuffle=True, seed=3), random_views()[1]
    order = training.permutation(len(view), moco.seed, int(moco.steps))
    torch.testing.assert_close(four["encode_keys"](moco.key_encoder, view, order), moco.encode_keys(view))


def test_end_to_end_by_hand(five):
    mechanism = EndToEnd(build_encoder("tiny", dim=8))
    contrast = mechanism.contrast(*random_views(), torch.arange(16))
    mine = five["end_to_end_loss"](contrast.q, contrast.k, 0.2)
    assert mine.item() == pytest.approx(info_nce(*contrast[:3], 0.2, contrast.exclude).item(), abs=1e-5)


def test_the_bank_by_hand(five):
    package, index = MemoryBank(build_encoder("tiny", dim=8), n=20, K=5, momentum=0.3), torch.tensor([7, 0, 19])
    bank, q = package.bank.clone(), F.normalize(torch.randn(3, 8), dim=1)
    five["update_bank"](bank, index, q, 0.3)
    package.update_dictionary(Contrast(q, q, q), index)
    torch.testing.assert_close(bank, package.bank)


def test_kept_bytes_counts_activations_and_no_weights(five):
    linear, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    assert five["kept_bytes"](lambda: linear(x)) == x.nbytes
    with torch.no_grad():
        assert five["kept_bytes"](lambda: linear(x)) == 0


def test_what_a_view_keeps_is_the_same_on_the_meta_device(five):
    counted = five["kept_of_a_view"]("tiny", 16)
    encoder, views = build_encoder("tiny").train(), torch.randn(8, 3, 16, 16)
    assert counted == pytest.approx(five["kept_bytes"](lambda: encoder(views)) / 8, rel=0.02)


def test_end_to_end_keeps_twice_what_moco_keeps(five):
    views, index = random_views(), torch.arange(16)
    encoder = build_encoder("tiny", dim=8)
    both, one = (five["kept_bytes"](lambda m=m: m.contrast(*views, index)) for m in (EndToEnd(encoder), MoCo(encoder, 16)))
    assert both / one == pytest.approx(2, abs=0.1)


# ---- rung one


DEFINITIONS = [rule for rule in algorithm.RULES if "A" not in rule[:2]]


def orders(count, seed=0):
    """Orders in which every name exists when it is needed; what is left to judge is where A and F stand."""
    chance, found = random.Random(seed), []
    while len(found) < count:
        left, order = [line for line in algorithm.LINES if line not in "AF"], []
        while left:
            ready = [x for x in left if not any(then == x and first in left for first, then, _ in DEFINITIONS)]
            order.append(chance.choice(ready))
            left.remove(order[-1])
        order.insert(chance.randrange(len(order) + 1), "F")
        order.insert(chance.randrange(order.index("I") + 1, len(order) + 1), "A")  # before I there is no k
        found.append("".join(order))
    return found


def accepted(order):
    try:
        algorithm.check_order(order)
    except CheckFailed:
        return False
    return True


def test_an_order_is_accepted_exactly_if_running_it_gives_what_algorithm_1_gives():
    images = random_images(64, 8)
    expected, seen = algorithm.run_order("ECIGJBHDFA", images, steps=3), {True: 0, False: 0}
    for order in orders(40):
        try:
            found = algorithm.run_order(order, images, steps=3)
            same = all(torch.allclose(a[name], b[name], atol=1e-4) for a, b in zip(found, expected, strict=True) for name in a)
        except RuntimeError:
            same = False
        assert accepted(order) == same, order
        seen[same] += 1
    assert min(seen.values()) >= 5  # both kinds were met


def test_the_orders_judgement_names_what_is_broken(capsys):
    for order, word in (
        ("ECIAGJBHDF", "log 2"), ("ECIGAJBHDF", "RuntimeError"), ("ECIGJBDHFA", "gradient"), ("CEIGJBHDFA", "view_q"),
        ("ECIGJBHFDA", "one step ago"), ("ECIGJBHDF", "A"), ("ECIGJBHDFAA", "A"),
    ):  # fmt: skip
        with pytest.raises(CheckFailed, match=word):
            algorithm.check_order(order)
    algorithm.check_order("e i c g j b h a d f")
    algorithm.check_order("ECFIGJBHDA")  # the official code's place for F
    algorithm.check_order("")
    said = capsys.readouterr().out
    assert said.count("[OK]") == 2
    assert "official code" in said
    assert "no order yet" in said


def test_a_key_among_the_negatives_holds_p_at_one_half():
    for step in algorithm.run_order("ECIAGJBHDF", random_images(64, 8)):
        assert step["p"].max() <= 0.5 + 1e-4


# ---- rung two


def test_the_solution_fills_the_gaps(capsys):
    algorithm.check_gaps(algorithm.SOLUTION)
    algorithm.check_gaps(algorithm.SOLUTION | {4: "torch.zeros(len(q)).long()", 5: "theta_q + m * (theta_k - theta_q)"})
    algorithm.check_gaps(dict.fromkeys(algorithm.SOLUTION, ""))
    said = capsys.readouterr().out
    assert said.count("[OK]") == 2
    assert "[1], [2]" in said


@pytest.mark.parametrize("mistake", algorithm.MISTAKES, ids=lambda mistake: f"{mistake[0]}-{mistake[1]}")
def test_each_mistake_in_a_gap_is_named(mistake):
    gap, wrong, does = mistake
    with pytest.raises(CheckFailed) as failed:
        algorithm.check_gaps(algorithm.SOLUTION | {gap: wrong})
    assert str(failed.value) == f"gap {gap}: {does}"


@pytest.mark.parametrize(
    ("gap", "wrong", "word"), [(2, "(queue * 2)", "gap 2"), (5, "theta_k * 0", "gap 5"), (1, "f_x", "NameError")]
)
def test_an_unknown_mistake_is_placed(gap, wrong, word):
    with pytest.raises(CheckFailed, match=word):
        algorithm.check_gaps(algorithm.SOLUTION | {gap: wrong})


def test_the_faded_step_shows_each_gap_once():
    text = algorithm.faded()
    assert all(text.count(f"[{gap}]") == 1 for gap in algorithm.SOLUTION)


def test_side_by_side_shows_the_code_itself():
    text = algorithm.side_by_side("update_key_encoder", EndToEnd, MemoryBank, MoCo)
    assert "    torch._foreach_lerp_(keys, queries, 1 - self.m)" in text
    assert text.count("pass") == 2
    for kind in (EndToEnd, MemoryBank, MoCo):
        assert f"{kind.__name__}.contrast" in algorithm.side_by_side("contrast", EndToEnd, MemoryBank, MoCo)


# ---- Figure 2


def three(n=40, K=24):
    encoder = build_encoder("tiny", dim=8)
    return EndToEnd(encoder), MemoryBank(encoder, n, K), MoCo(encoder, K), SimCLR(encoder)


def test_the_anatomy_is_what_the_classes_do():
    views, index = random_views(16), torch.arange(16)
    a, b, c, d = (mechanism_figures.anatomy(mechanism, *views, index) for mechanism in three())
    assert [x.trained for x in (a, b, c, d)] == [("encoder", "key_encoder"), ("encoder",), ("encoder",), ("encoder",)]
    assert [x.follows for x in (a, b, c, d)] == [(), (), ("key_encoder",), ()]
    assert [x.dictionary for x in (a, b, c, d)] == [None, "bank", "queue", None]
    assert [x.writer for x in (a, b, c, d)] == [None, "encoder", "key_encoder", None]
    assert [x.keys_from for x in (a, b, c, d)] == ["key_encoder", "bank", "key_encoder", "encoder"]
    assert [x.negatives for x in (a, d)] == [15, 30]
    assert c.negatives == 24
    assert b.shape == (40, 8)


def test_the_anatomy_leaves_the_mechanism_as_it_was():
    for mechanism in three():
        before = {name: tensor.clone() for name, tensor in mechanism.state_dict().items()}
        mechanism_figures.anatomy(mechanism, *random_views(16), torch.arange(16))
        assert all(torch.equal(tensor, before[name]) for name, tensor in mechanism.state_dict().items())
        assert all(p.grad is None for p in mechanism.parameters())


def test_a_changed_class_gives_another_anatomy():
    class Leaky(MoCo):
        def encode_keys(self, view):
            return self.key_encoder(view)

    leaky = Leaky(build_encoder("tiny", dim=8), 24)
    leaky.key_encoder.requires_grad_(True)
    found = mechanism_figures.anatomy(leaky, *random_views(16), torch.arange(16))
    assert found.trained == ("encoder", "key_encoder")


def test_figure_2_shows_what_was_found():
    views, index = random_views(16), torch.arange(16)
    fig = mechanism_figures.figure_2([mechanism_figures.anatomy(m, *views, index) for m in three()[:3]])
    texts = [[text.get_text() for text in axes.texts] for axes in fig.axes]
    assert len(fig.axes) == 3
    assert any("queue\n24 x 8" in text for text in texts[2])
    assert any("bank\n40 x 8" in text for text in texts[1])
    assert "m" in texts[2]
    assert "m" not in texts[0] + texts[1]
    assert any("follows" in text for text in texts[2])
    dashed = [
        sum(a.arrow_patch.get_linestyle() == "--" for a in axes.texts if getattr(a, "arrow_patch", None)) for axes in fig.axes
    ]
    assert dashed == [2, 1, 1]  # arrows of the gradient
    assert len(png(fig)) > 10_000


# ---- the other pictures


def test_the_leaks_means_are_those_of_the_map():
    similarity = torch.full((8, 8), 0.1)
    similarity[:4, :4] = similarity[4:, 4:] = 0.5
    similarity.fill_diagonal_(0.9)
    fig = mechanism_figures.leak(similarity, parts=2, shuffled=False)
    assert [bar.get_width() for bar in fig.axes[1].patches] == pytest.approx([0.9, 0.5, 0.1])
    assert torch.equal(torch.as_tensor(fig.axes[0].images[0].get_array().data), similarity)


def test_memory_follows_its_formulas():
    found = mechanism_figures.memory_of(kept=1000.0, batch=32, images=500, dim=128)
    K = mechanism_figures.KS
    assert found["end_to_end"].tolist() == [2000.0 * (k + 1) for k in K]
    assert found["moco"].tolist() == [32_000.0 + 512 * k for k in K]
    assert set(found["memory_bank"]) == {32_000.0 + 512 * 500}


def test_consistency_draws_the_means_of_the_ages():
    ages, cosines = torch.tensor([1, 1, 2, 2]), torch.tensor([0.9, 0.7, 0.5, 0.3])
    fig = mechanism_figures.consistency({"moco": (ages, cosines)}, epochs_began=[2])
    assert fig.axes[0].lines[0].get_ydata() == pytest.approx([0.8, 0.4])


# ---- sliders


def test_the_sliders_answer_in_time():
    torch.manual_seed(0)
    similarity = torch.randn(64, 64).clamp(-1, 1)
    states = [lambda p=p, s=s: mechanism_figures.leak(similarity, p, s) for p in (1, 2, 4, 8, 16, 32) for s in (False, True)]
    states += [
        lambda b=b, k=k, n=n: mechanism_figures.memory_against_K(k, b, n)
        for b in (32, 64, 128, 256, 512, 1024) for k in (1e6, 1e8) for n in (50_000, 1_281_167)
    ]  # fmt: skip
    assert all(len(drawn) > 5_000 for drawn in in_time([lambda draw=draw: png(draw(), 100) for draw in states]))
