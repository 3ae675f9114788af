"""Drift of stored keys: which image and view made each one is worked out from seed and step, and must be right."""

from collections import deque
from copy import deepcopy
from itertools import islice

import pytest
import torch

from tutorial_moco import pretrain as training
from tutorial_moco.augment import two_views
from tutorial_moco.checkpoint import pack
from tutorial_moco.diagnose import key_drift
from tutorial_moco.errors import UsageError
from tutorial_moco.images import ImageSet
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")
N = 70  # images: 4 batches of 16, and a rest that an epoch leaves out
BASE = Recipe(encoder="tiny", dim=8, K=40, m=0.9, batch_size=16, lr=0.05)
BANK = BASE.replace(mechanism="memory_bank")
STILL = {"lr": 1e-30, "weight_decay": 0.0}  # nothing moves


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(0, 256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet("random", "train", pixels, torch.arange(N) % 2, ("even", "odd"), "hash")


def trained(recipe, images, steps, dtype=torch.float32):
    """A run after some steps at full learning rate, and the mechanism's keys and images of each step."""
    run, seen = training.start(recipe, images, CPU, dtype), []
    for epoch, index in islice(training.batches(N, recipe, 0, CPU), steps):
        _, contrast = training.train_step(run, images.images[index], index, epoch)
        seen.append((epoch, index, contrast.k.detach().clone()))
    return run, seen


@pytest.mark.parametrize("K", [1, 7, 16, 40, 64, 100, 1000])
@pytest.mark.parametrize("changes", [{}, {"symmetric": True}, {"symmetric": True, "shuffle": True, "norm": "split:3"}], ids=str)
def test_keys_of_an_encoder_that_never_moves_have_not_drifted(K, changes, images):
    run, _ = trained(BASE.replace(K=K, m=1.0, **changes), images, steps=11)
    ages, cosines = key_drift(run, images.images)
    keys = 32 if run.recipe.symmetric else 16
    expected = [1 + place // keys for place in range(min(K, 11 * keys))]  # the newest first
    assert sorted(ages.tolist()) == expected
    assert cosines.min() > 1 - 1e-4


def test_nor_have_they_in_bfloat16(images):
    run, _ = trained(BASE.replace(m=1.0), images, steps=5, dtype=torch.bfloat16)
    assert key_drift(run, images.images)[1].min() > 1 - 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_drift_is_that_of_a_fifo_of_recorded_views(symmetric, images):
    recipe = BASE.replace(symmetric=symmetric, K=50)
    run, seen = trained(recipe, images, steps=9)
    encoder, fifo = deepcopy(run.mechanism.key_encoder), deque(maxlen=recipe.K)
    for step, (epoch, index, stored) in enumerate(seen):
        view_q, view_k = two_views(images.images[index], index, recipe.augmentation, seed=recipe.seed, epoch=epoch)
        with torch.no_grad():
            now = torch.cat([encoder(view) for view in ([view_k, view_q] if symmetric else [view_k])])
        fifo.extend((9 - step, cosine) for cosine in torch.cosine_similarity(now, stored).tolist())
    ages, cosines = key_drift(run, images.images)
    found = sorted(zip(ages.tolist(), cosines.tolist(), strict=True))
    assert [age for age, _ in found] == [age for age, _ in sorted(fifo)]
    assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in sorted(fifo)], abs=1e-5)
    assert min(cosines) < 0.999


def test_the_newest_keys_are_one_step_old(images):
    run, _ = trained(BASE, images, steps=1)
    ages, cosines = key_drift(run, images.images)
    assert ages.tolist() == [1] * 16
    assert ages.dtype == torch.int64
    assert cosines.dtype == torch.float32


def test_without_momentum_older_keys_have_drifted_further(images):
    run, _ = trained(BASE.replace(m=0.0, K=128), images, steps=20)
    ages, cosines = key_drift(run, images.images)
    means = [cosines[ages == age].mean().item() for age in range(1, 9)]
    assert means[0] > means[3] > means[7]


@pytest.mark.parametrize("steps", [3, 4, 11])
def test_a_banks_keys_are_compared_with_the_view_of_their_last_visit(steps, images):
    run, seen = trained(BANK.replace(bank_momentum=0.0, **STILL), images, steps)
    ages, cosines = key_drift(run, images.images)
    last = {image: step for step, (_, index, _) in enumerate(seen) for image in index.tolist()}
    assert ages.tolist() == [steps - last[image] for image in sorted(last)]  # in the images' order, unvisited left out
    assert cosines.min() > 1 - 1e-4


def test_a_bank_of_a_moving_encoder_drifts(images):
    run, _ = trained(BANK.replace(bank_momentum=0.0), images, steps=12)
    ages, cosines = key_drift(run, images.images)
    assert cosines[ages == 1].mean() > cosines[ages >= 4].mean()


@pytest.mark.parametrize("recipe", [BASE.replace(symmetric=True, shuffle=True, norm="split:2"), BANK], ids=["moco", "bank"])
def test_the_run_stays_as_it_is(recipe, images):
    run, _ = trained(recipe, images, steps=6)
    before = {name: tensor.clone() for name, tensor in pack(mechanism=run.mechanism, optimizer=run.optimizer).items()}
    random = torch.get_rng_state()
    run.mechanism.eval()
    key_drift(run, images.images)
    assert not run.mechanism.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in pack(mechanism=run.mechanism, optimizer=run.optimizer).items():
        assert torch.equal(tensor, before[name]), name


def test_a_run_that_has_not_begun_has_no_keys(images):
    for recipe in (BASE, BANK):
        ages, cosines = key_drift(training.start(recipe, images, CPU, torch.float32), images.images)
        assert len(ages) == len(cosines) == 0


@pytest.mark.parametrize("mechanism", ["end_to_end", "simclr"])
def test_a_mechanism_without_a_dictionary_is_refused(mechanism, images):
    run = training.start(BASE.replace(mechanism=mechanism), images, CPU, torch.float32)
    with pytest.raises(UsageError, match=f"--mechanism {mechanism} keeps no keys"):
        key_drift(run, images.images)


def test_other_images_are_refused(images):
    run = training.start(BASE, images, CPU, torch.float32)
    with pytest.raises(UsageError, match="the 70 that the run was trained on, not 69"):
        key_drift(run, images.images[1:])
