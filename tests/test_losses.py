"""The losses: against independent NumPy loops, against each other where they must agree, and by what they ignore."""

import doctest
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_moco import losses, mechanisms, randomness

temperatures = st.floats(0.03, 2.0)
few = settings(max_examples=40, deadline=None, derandomize=True)


def unit(n, dim, seed):
    """Unit vectors (n, dim) in random directions."""
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def info_nce_by_loops(q, k, negatives, temperature, exclude=None):
    """Equation 1 of the paper, query by query and key by key, in float64."""
    q, k, negatives = (x.double().numpy() for x in (q, k, negatives))
    total = 0.0
    for i in range(len(q)):
        positive = float(np.sum(q[i] * k[i])) / temperature
        others = [
            float(np.sum(q[i] * negatives[j])) / temperature
            for j in range(len(negatives))
            if exclude is None or not exclude[i, j]
        ]
        total += log_sum_exp([positive, *others]) - positive
    return total / len(q)


def check_info_nce_equals_a_double_loop(N=5, C=8, K=7, temperature=0.1, seed=0):
    q, k, negatives = unit(N, C, seed), unit(N, C, seed + 1), unit(K, C, seed + 2)
    found = losses.info_nce(q, k, negatives, temperature)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert abs(found.item() - info_nce_by_loops(q, k, negatives, temperature)) < 1e-4


@few
@given(st.integers(1, 6), st.integers(2, 16), st.integers(1, 20), temperatures, st.integers(0, 1000))
def test_info_nce_is_the_equation_computed_by_loops(N, C, K, temperature, seed):
    check_info_nce_equals_a_double_loop(N, C, K, temperature, seed)


@few
@given(st.integers(1, 6), st.integers(1, 12), temperatures, st.integers(0, 1000))
def test_excluded_negatives_take_no_part(N, K, temperature, seed):
    q, k, negatives = unit(N, 8, seed), unit(N, 8, seed + 1), unit(K, 8, seed + 2)
    exclude = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = losses.info_nce(q, k, negatives, temperature, exclude).item()
    assert abs(found - info_nce_by_loops(q, k, negatives, temperature, exclude.numpy())) < 1e-4


def test_info_nce_is_cross_entropy_with_zero_labels():
    q, k, negatives = unit(6, 16, 0), unit(6, 16, 1), unit(30, 16, 2)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / 0.2
    torch.testing.assert_close(losses.contrastive_logits(q, k, negatives, 0.2), logits)
    torch.testing.assert_close(losses.info_nce(q, k, negatives, 0.2), F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)))


@pytest.mark.parametrize("K", [15, 255, 4096])
def test_guessing_costs_log_of_K_plus_1(K):
    loss = losses.info_nce(unit(256, 128, 0), unit(256, 128, 1), unit(K, 128, 2), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(K + 1), abs=0.03)


def test_a_lower_temperature_sharpens_in_the_right_direction():
    q, negatives = unit(8, 32, 0), unit(50, 32, 1)
    found = [losses.info_nce(q, q, negatives, temperature).item() for temperature in (1.0, 0.3, 0.1, 0.03)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-3


def test_an_excluded_negative_gets_no_gradient_and_an_included_one_does():
    q, k, negatives = unit(2, 8, 0), unit(2, 8, 1), unit(3, 8, 2).requires_grad_()
    exclude = torch.tensor([[True, False, False], [True, False, False]])
    losses.info_nce(q, k, negatives, 0.1, exclude).backward()
    assert (negatives.grad[0] == 0).all()
    assert (negatives.grad[1:].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("at_once", [1, 12, 30, 35])
def test_info_nce_in_parts_is_info_nce_in_loss_and_gradient(at_once, monkeypatch):
    found = []
    for limit in (losses.LOGITS_AT_ONCE, 6 * at_once):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", limit)
        tensors = [unit(n, 16, seed).requires_grad_() for n, seed in ((6, 0), (6, 1), (36, 2))]
        exclude = torch.arange(6)[:, None] == torch.arange(36) % 7
        plain, some = losses.info_nce(*tensors, 0.2), losses.info_nce(*tensors, 0.2, exclude)
        found.append((plain, some, *torch.autograd.grad(plain + some, tensors)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_info_nce_in_parts_leaves_out_a_part_that_is_wholly_excluded(monkeypatch):
    q, k, negatives = unit(4, 8, 0).requires_grad_(), unit(4, 8, 1), unit(10, 8, 2)
    exclude = (torch.arange(10) < 5).expand(4, -1)
    expected = losses.info_nce(q, k, negatives[5:], 0.1)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 5)
    found = losses.info_nce(q, k, negatives, 0.1, exclude)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, q)
    assert gradient.isfinite().all()


def test_the_memory_of_info_nce_does_not_grow_with_K(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 8 * 64)
    largest = []
    for K in (128, 4096):
        kept, q, negatives = [], unit(8, 16, 0).requires_grad_(), unit(K, 16, 1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            losses.info_nce(q, unit(8, 16, 2), negatives, 0.1)
        largest.append(max(kept))
    assert largest == [64 * 16] * 2  # a part of the negatives themselves; all logits would be 8 x 4096


def test_the_full_softmax_is_info_nce_with_all_other_images_as_negatives():
    n, N = 12, 5
    bank, q, index = unit(n, 8, 0), unit(N, 8, 1), torch.tensor([3, 0, 11, 7, 4])
    expected = losses.full_softmax(q, bank, index, 0.1)
    exclude = index[:, None] == torch.arange(n)
    torch.testing.assert_close(losses.info_nce(q, bank[index], bank, 0.1, exclude), expected)
    one_by_one = [
        info_nce_by_loops(q[i : i + 1], bank[index[i], None], bank[torch.arange(n) != index[i]], 0.1) for i in range(N)
    ]
    assert abs(expected.item() - sum(one_by_one) / N) < 1e-5


@few
@given(st.integers(1, 5), st.integers(1, 10), temperatures, st.integers(12, 500), st.floats(-2.0, 20.0), st.booleans())
def test_nce_is_its_binary_questions_asked_one_by_one(N, K, temperature, n, log_z, masked):
    q, k, negatives = unit(N, 8, n), unit(N, 8, n + 1), unit(K, 8, n + 2)
    exclude = torch.rand(N, K, generator=torch.Generator().manual_seed(n)) < 0.3 if masked else None
    total = 0.0
    for i in range(N):
        for j in range(-1, K):
            if j >= 0 and masked and exclude[i, j]:
                continue
            key = k[i] if j < 0 else negatives[j]
            log_p = float(q[i].double() @ key.double()) / temperature - log_z
            log_noise = math.log(K / n)
            own = log_p - log_sum_exp([log_p, log_noise])  # log( p / (p + K / n) )
            noise = log_noise - log_sum_exp([log_p, log_noise])
            total -= own if j < 0 else noise
    assert losses.nce(q, k, negatives, temperature, n, log_z, exclude).item() == pytest.approx(total / N, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_Z_estimated_over_all_images_is_the_true_normaliser(temperature):
    n, bank, q = 40, unit(40, 8, 0), unit(1, 8, 1)
    true = log_sum_exp([float(q[0].double() @ key.double()) / temperature for key in bank])
    assert losses.estimate_log_z(q, bank, temperature, n).item() == pytest.approx(true, abs=1e-5)
    p = torch.exp(q @ bank.T / temperature - losses.estimate_log_z(q, bank, temperature, n))
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


def test_Z_of_several_queries_is_the_mean_of_theirs_and_carries_no_gradient():
    bank, q = unit(40, 8, 0), unit(6, 8, 1).requires_grad_()
    found = losses.estimate_log_z(q, bank[:20], 0.2, 40)
    expected = math.log(40 * float(np.mean(np.exp((q.detach() @ bank[:20].T).double().numpy() / 0.2))))
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert not found.requires_grad


@few
@given(st.integers(1, 6), temperatures, st.integers(0, 1000))
def test_nt_xent_is_info_nce_over_simclrs_contrast_and_the_loop(N, temperature, seed):
    z1, z2 = unit(N, 8, seed), unit(N, 8, seed + 1)
    q, k, negatives, exclude = mechanisms.SimCLR(torch.nn.Identity()).contrast(z1, z2, torch.arange(N))
    found = losses.nt_xent(z1, z2, temperature).item()
    assert losses.info_nce(q, k, negatives, temperature, exclude).item() == pytest.approx(found, abs=1e-4)
    z, total = torch.cat([z1, z2]).double(), 0.0
    for i in range(2 * N):
        logits = {j: float(z[i] @ z[j]) / temperature for j in range(2 * N) if j != i}
        total += log_sum_exp(list(logits.values())) - logits[(i + N) % (2 * N)]
    assert found == pytest.approx(total / (2 * N), abs=1e-4)


def test_pretext_accuracy_counts_the_queries_that_find_their_own_key():
    axes = torch.eye(3)
    q, k, negatives = axes[:2], axes[[0, 2]], axes[1:2]  # the first finds its key, the second prefers the negative
    assert losses.pretext_accuracy(q, q, axes[2:]) == 100
    assert losses.pretext_accuracy(q, k, negatives) == 50
    assert losses.pretext_accuracy(q, k, negatives, exclude=torch.tensor([[False], [True]])) == 100
    assert losses.pretext_accuracy(q, axes[[2, 2]], q) == 0


def test_pretext_accuracy_of_a_collapsed_encoder_is_not_perfect():
    """All keys alike: no query's own key is *the* most similar. FACTS: "100 % accuracy at the start"."""
    same = unit(1, 8, 0)
    assert losses.pretext_accuracy(same.expand(4, 8), same.expand(4, 8), same.expand(10, 8)) < 100


@pytest.mark.parametrize("module", [losses, randomness], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
