"""The mechanisms: laws written as plain functions, run on the real code and on every bug that real repositories had.

A law is `check_...`: it passes on the library and raises AssertionError where the law is broken. A mutant plants one bug by
monkeypatching. `BUGS` at the end maps the bugs of docs (FACTS.md, "Real bugs") to the law that catches each:

==  ==========================================================  =====================================================
1   queue begins with vectors that are not normalised           check_the_queue_begins_with_unit_vectors
2   symmetric loss enqueues between its halves                  check_no_key_is_its_own_negative
3   keys are enqueued before the logits                         check_no_key_is_its_own_negative
4   wrap-around drops keys; queue not in the checkpoint         check_the_queue_is_first_in_first_out, check_state_...
5   NCE's Z estimated once, from the first batch                check_log_z_follows_the_keys
6   shuffling BN without split statistics                       check_shuffling_changes_the_statistics
7   forgotten un-shuffle                                        check_keys_come_back_in_the_views_order
8   forgotten normalisation                                     check_queries_and_keys_have_length_one
9   EMA the wrong way round                                     check_the_key_encoder_follows_in_closed_form
10  gradient into the keys                                      check_no_gradient_reaches_the_keys
11  temperature multiplied, not divided                         check_info_nce_equals_a_double_loop
12  pointer lost on resume                                      check_state_restores_the_dictionary
13  a queue longer than the data: stale keys                    check_ages_tell_how_stale_the_keys_are
==  ==========================================================  =====================================================
"""

import math
from collections import deque
from itertools import islice
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_losses import check_info_nce_equals_a_double_loop, unit
from torch import nn

from tutorial_moco import encoders, losses, mechanisms
from tutorial_moco import pretrain as training
from tutorial_moco.checkpoint import pack, unpack
from tutorial_moco.images import ImageSet
from tutorial_moco.randomness import permutation
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")
VARIANTS = {
    "moco": {},
    "moco_symmetric": {"symmetric": True},
    "moco_shuffle": {"shuffle": True, "norm": "split:2"},
    "memory_bank": {"mechanism": "memory_bank"},
    "memory_bank_all": {"mechanism": "memory_bank", "K": 31},
    "end_to_end": {"mechanism": "end_to_end"},
    "simclr": {"mechanism": "simclr"},
    "moco_v3": {"mechanism": "moco_v3", "head": "mlp3"},
}


def random_images(n=32, size=8, seed=0):
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet("random", "train", images, torch.arange(n) % 2, ("even", "odd"), "")


def tiny_run(**changes):
    recipe = Recipe(**{"encoder": "tiny", "dim": 8, "K": 10, "m": 0.9, "batch_size": 8, "lr": 0.05, **changes})
    return training.start(recipe, random_images(), CPU, torch.float32)


def take_steps(run, count):
    images = random_images().images
    for epoch, index in islice(training.batches(run.n, run.recipe, run.step, CPU), count):
        training.train_step(run, images[index], index, epoch)


def make_encoder(norm="batch", seed=0):
    torch.manual_seed(seed)
    return encoders.build_encoder("tiny", dim=8, norm=norm)


def two_views(n=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=random), torch.randn(n, 3, 8, 8, generator=random)


def vectors_as_they_are(dim=4):
    """An encoder for tests of the dictionary alone."""
    encoder = nn.Identity()
    encoder.dim = dim
    return encoder


def pushed(encoder, seed=5):
    """Move an encoder's parameters somewhere else, in place."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return encoder


def oldest_first(moco):
    return (moco.pointer + torch.arange(moco.K)) % moco.K


def shared_rows(a, b):
    """Number of pairs of a row of a and a row of b that are the same vector."""
    return int((a[:, None] == b[None]).all(dim=2).sum())


# ---- laws of the queue


def check_the_queue_is_first_in_first_out(K=10, sizes=(4, 4, 4, 7)):
    moco = mechanisms.MoCo(vectors_as_they_are(), K)
    model = deque(((key, -1) for key in moco.queue.clone()), maxlen=K)
    total = 0
    for step, size in enumerate(sizes):
        keys = unit(size, 4, seed=100 + step)
        moco.enqueue(keys)
        model.extend((key, step) for key in keys)
        total += size
        order = oldest_first(moco)
        assert torch.equal(moco.queue[order], torch.stack([key for key, _ in model]))
        assert int(moco.pointer) == total % K
        assert int(moco.filled) == min(total, K)
        assert int(moco.steps) == step + 1
        assert moco.ages()[order].tolist() == [-1 if born < 0 else step + 1 - born for _, born in model]


def check_the_queue_begins_with_unit_vectors():
    for K in (1, 50):
        queue = mechanisms.MoCo(vectors_as_they_are(16), K).queue
        assert queue.shape == (K, 16)
        assert queue.dtype == torch.float32
        torch.testing.assert_close(queue.norm(dim=1), torch.ones(K))
    bank = mechanisms.MemoryBank(vectors_as_they_are(16), 50, 10).bank
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(50))


def check_ages_tell_how_stale_the_keys_are():
    """K of 40 for 16 images in batches of 8: keys up to 5 steps old, though an epoch has 2, and each image is there again."""
    moco, epoch, batch = mechanisms.MoCo(vectors_as_they_are(), 40), 2, 8
    assert moco.ages().tolist() == [-1] * 40
    for step in range(6):
        moco.enqueue(unit(batch, 4, seed=step))
    ages = moco.ages()
    assert ages.max() == math.ceil(40 / batch)
    assert ages.min() == 1
    assert int((ages > epoch).sum()) == 40 - epoch * batch


# ---- laws of a step


def check_no_key_is_its_own_negative(**changes):
    """At the loss, the queue is as the steps before left it, and none of this step's keys is in it."""
    for symmetric in (False, True):
        run, seen, loss_of = tiny_run(symmetric=symmetric, **changes), [], training.loss_of

        def spy(run, contrast, seen=seen, loss_of=loss_of):
            seen.append((contrast.k.clone(), contrast.negatives.clone()))
            return loss_of(run, contrast)

        with mock.patch.object(training, "loss_of", spy):
            for _ in range(3):
                before = run.mechanism.queue.clone()
                take_steps(run, 1)
                k, negatives = seen[-1]
                assert shared_rows(k, negatives) == 0
                assert torch.equal(negatives, before)
                newest = k[-run.mechanism.K :]
                assert torch.equal(run.mechanism.queue[oldest_first(run.mechanism)][-len(newest) :], newest)


def check_state_restores_the_dictionary():
    """Pack, unpack into a fresh run, one more step of both: all that either holds is equal, bit by bit."""
    run, fresh = tiny_run(), tiny_run()
    take_steps(run, 3)
    assert int(run.mechanism.pointer) == 4  # 24 keys into 10 places
    unpack({name: tensor.clone() for name, tensor in pack(mechanism=run.mechanism, optimizer=run.optimizer).items()},
           mechanism=fresh.mechanism, optimizer=fresh.optimizer)  # fmt: skip
    fresh.step = run.step
    take_steps(run, 1)
    take_steps(fresh, 1)
    for kind in ("named_buffers", "named_parameters"):
        there = dict(getattr(fresh.mechanism, kind)())
        for name, tensor in getattr(run.mechanism, kind)():
            assert torch.equal(tensor, there[name]), name
    names = run.mechanism.state_dict().keys()
    assert {"queue", "pointer", "filled", "steps", "born"} <= names


def check_log_z_follows_the_keys():
    run = tiny_run(loss="nce", temperature=0.5)
    contrasts = [mechanisms.Contrast(q, q, negatives) for q, negatives in ((unit(4, 8, 0), unit(9, 8, 1)),
                 (unit(1, 8, 2).expand(4, 8), unit(1, 8, 2).expand(9, 8)), (unit(4, 8, 3), unit(9, 8, 4)))]  # fmt: skip
    for contrast in contrasts:
        q, k, negatives, _ = contrast
        log_z = math.log(run.n * float(torch.exp((q @ negatives.T).double() / 0.5).mean()))
        expected = losses.nce(q, k, negatives, 0.5, run.n, log_z)
        assert abs(float(training.loss_of(run, contrast)) - float(expected)) < 1e-5


def check_queries_and_keys_have_length_one():
    for changes in VARIANTS.values():
        run = tiny_run(**changes)
        contrast = run.mechanism.contrast(*two_views(8), torch.arange(8))
        for vectors in contrast[:3]:
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def check_no_gradient_reaches_the_keys():
    for symmetric in (False, True):
        run = tiny_run(symmetric=symmetric)
        contrast = run.mechanism.contrast(*two_views(8), torch.arange(8))
        assert contrast.q.requires_grad
        assert not contrast.k.requires_grad
        assert not contrast.negatives.requires_grad
        training.loss_of(run, contrast).backward()
        assert all(p.grad is None for p in run.mechanism.key_encoder.parameters())
        assert all(p.grad is not None for p in run.mechanism.encoder.parameters())
        optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert optimised == {id(p) for p in run.mechanism.encoder.parameters()}


# ---- laws of the key encoder


def check_the_key_encoder_follows_in_closed_form():
    """With the query's weights held still: k_t = q + m^t (k_0 - q)."""
    for m, steps in ((0.9, 1), (0.9, 7), (0.99, 30), (0.0, 1), (1.0, 5)):
        moco = mechanisms.MoCo(make_encoder(), 4, m)
        pushed(moco.encoder)
        q = [p.clone() for p in moco.encoder.parameters()]
        k = [p.clone() for p in moco.key_encoder.parameters()]
        for _ in range(steps):
            moco.update_key_encoder()
        for now, held, first, query in zip(moco.key_encoder.parameters(), q, k, moco.encoder.parameters(), strict=True):
            assert torch.equal(query, held)
            torch.testing.assert_close(now, held + m**steps * (first - held), rtol=1e-5, atol=1e-5)
            if m in (0, 1):
                assert torch.equal(now, held if m == 0 else first)


def check_the_key_encoder_begins_as_a_copy():
    for make in (lambda e: mechanisms.MoCo(e, 4), mechanisms.EndToEnd):
        mechanism = make(pushed(make_encoder()))
        there = mechanism.key_encoder.state_dict()
        for name, tensor in mechanism.encoder.state_dict().items():
            assert torch.equal(tensor, there[name]), name
            assert tensor.data_ptr() != there[name].data_ptr(), name


def check_keys_come_back_in_the_views_order():
    """With statistics held still (eval), shuffling must not be seen in the keys, yet the encoder saw another order."""
    view, seen = two_views()[1], []
    plain = mechanisms.MoCo(make_encoder(), 4).eval()
    shuffled = mechanisms.MoCo(make_encoder(), 4, shuffle=True).eval()
    shuffled.key_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(shuffled.encode_keys(view), plain.encode_keys(view), rtol=0, atol=1e-6)
    assert not torch.equal(seen[0], view)
    assert torch.equal(seen[0].flatten(1).sum(1).sort().values, view.flatten(1).sum(1).sort().values)


def check_shuffling_changes_the_statistics():
    """With statistics taken over two parts, another order is another partition, so the keys differ."""
    view = two_views()[1]
    plain, shuffled = (tiny_mechanism_in_training(shuffle, "split:2").encode_keys(view) for shuffle in (False, True))
    assert (plain - shuffled).abs().max() > 1e-3


def tiny_mechanism_in_training(shuffle, norm):
    return mechanisms.MoCo(make_encoder(norm), 4, shuffle=shuffle).train()


# ---- the laws hold


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.lists(st.integers(1, 90), max_size=8))
@example(1, [1, 1, 3])
@example(40, [40, 40])
@example(7, [90, 1, 6, 7])
def test_the_queue_equals_a_deque_for_any_length_and_any_batches(K, sizes):
    check_the_queue_is_first_in_first_out(K, sizes)


LAWS = [
    check_the_queue_begins_with_unit_vectors,
    check_ages_tell_how_stale_the_keys_are,
    check_no_key_is_its_own_negative,
    check_state_restores_the_dictionary,
    check_log_z_follows_the_keys,
    check_queries_and_keys_have_length_one,
    check_no_gradient_reaches_the_keys,
    check_the_key_encoder_follows_in_closed_form,
    check_the_key_encoder_begins_as_a_copy,
    check_keys_come_back_in_the_views_order,
    check_shuffling_changes_the_statistics,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_holds(law):
    law()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_reading_the_dictionary_changes_nothing_but_running_statistics(changes):
    mechanism = tiny_run(**changes).mechanism
    before = {name: tensor.clone() for name, tensor in mechanism.state_dict().items()}
    mechanism.contrast(*two_views(8), torch.arange(8))
    changed = {name for name, tensor in mechanism.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)


def test_running_statistics_are_not_averaged():
    moco = mechanisms.MoCo(make_encoder(), 4, m=0.5)
    for buffer in moco.encoder.buffers():
        buffer.fill_(7)
    before = [buffer.clone() for buffer in moco.key_encoder.buffers()]
    moco.update_key_encoder()
    assert all(torch.equal(now, old) for now, old in zip(moco.key_encoder.buffers(), before, strict=True))


def test_without_split_statistics_shuffling_changes_nothing():
    view = two_views()[1]
    plain, shuffled = (tiny_mechanism_in_training(shuffle, "batch").encode_keys(view) for shuffle in (False, True))
    torch.testing.assert_close(plain, shuffled, rtol=0, atol=1e-5)


def test_shuffling_draws_another_order_at_each_step():
    moco, view, seen = mechanisms.MoCo(make_encoder(), 4, shuffle=True).eval(), two_views()[1], []
    moco.key_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moco.enqueue(moco.encode_keys(view))
    moco.encode_keys(view)
    assert not torch.equal(seen[0], seen[1])


def test_symmetric_moco_asks_both_ways_and_enqueues_both_views():
    moco = mechanisms.MoCo(make_encoder(), 40, symmetric=True)
    pushed(moco.encoder)
    view_q, view_k = two_views(8)
    queue = moco.queue.clone()
    contrast = moco.contrast(view_q, view_k, torch.arange(8))
    torch.testing.assert_close(contrast.q, torch.cat([moco.encoder(view_q), moco.encoder(view_k)]))
    torch.testing.assert_close(contrast.k, torch.cat([moco.key_encoder(view_k), moco.key_encoder(view_q)]))
    assert torch.equal(contrast.negatives, queue)
    moco.update_dictionary(contrast, torch.arange(8))
    assert torch.equal(moco.queue[:16], contrast.k)
    assert torch.equal(moco.queue[16:], queue[16:])
    assert (int(moco.pointer), int(moco.filled), int(moco.steps)) == (16, 16, 1)


def test_end_to_end_trains_both_encoders_and_uses_the_batchs_other_keys():
    run = tiny_run(mechanism="end_to_end")
    contrast = run.mechanism.contrast(*two_views(8), torch.arange(8))
    assert torch.equal(contrast.negatives, contrast.k)
    assert torch.equal(contrast.exclude, torch.eye(8, dtype=torch.bool))
    training.loss_of(run, contrast).backward()
    for encoder in (run.mechanism.encoder, run.mechanism.key_encoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.head.parameters())
        assert all(p.grad is not None for p in encoder.parameters())
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in run.mechanism.parameters()}


def test_simclr_makes_every_view_a_query_and_leaves_out_itself_and_its_partner():
    z1, z2 = unit(5, 4, 0), unit(5, 4, 1)
    contrast = mechanisms.SimCLR(vectors_as_they_are()).contrast(z1, z2, torch.arange(5))
    assert torch.equal(contrast.q, torch.cat([z1, z2]))
    assert torch.equal(contrast.k, torch.cat([z2, z1]))
    expected = torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool)[(torch.arange(10) + 5) % 10]
    assert torch.equal(contrast.exclude, expected)


def test_v3_is_two_plain_softmaxes_over_the_other_views_keys():
    """Algorithm 1 of the v3 paper: ctr(q1, k2) + ctr(q2, k1), each an N-way classification with the answers 0 .. N - 1."""
    mechanism, (view_q, view_k) = mechanisms.MoCoV3(make_encoder()), two_views(6)
    contrast = mechanism.contrast(view_q, view_k, torch.arange(6))
    found = losses.info_nce(contrast.q, contrast.k, contrast.negatives, 0.2, contrast.exclude)
    (q1, q2), (k2, k1) = contrast.q.chunk(2), contrast.k.chunk(2)
    torch.testing.assert_close(torch.cat([k2, k1]), torch.cat([mechanism.key_encoder(v) for v in (view_k, view_q)]).detach())
    one, other = (F.cross_entropy(q @ k.T / 0.2, torch.arange(6)) for q, k in ((q1, k2), (q2, k1)))
    torch.testing.assert_close(found, (one + other) / 2)
    assert (~contrast.exclude).sum(dim=1).tolist() == [5] * 12


def test_v3_trains_the_predictor_and_only_follows_with_the_key_encoder():
    run = tiny_run(mechanism="moco_v3", head="mlp3", m=0.75)
    before = {name: p.detach().clone() for name, p in run.mechanism.named_parameters()}
    take_steps(run, 1)
    after = dict(run.mechanism.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("predictor."))
    for name in before:
        if name.startswith("key_encoder."):
            trained = after[name.removeprefix("key_")].detach()
            torch.testing.assert_close(after[name].detach(), 0.75 * before[name] + 0.25 * trained)
            assert after[name].grad is None


@pytest.mark.parametrize("K", [1, 7, 18])
def test_the_memory_bank_samples_K_distinct_keys_and_excludes_a_querys_own(K):
    bank = mechanisms.MemoryBank(vectors_as_they_are(), n=20, K=K)
    index, samples = torch.arange(20), []
    for _ in range(2):
        q, k, negatives, exclude = bank.contrast(unit(20, 4, 9), unit(20, 4, 9), index)
        assert torch.equal(q, unit(20, 4, 9))
        assert torch.equal(k, bank.bank[index])
        assert negatives.shape == (K, 4)
        assert shared_rows(negatives, negatives) == K
        assert shared_rows(negatives, bank.bank) == K
        assert torch.equal(exclude, (k[:, None] == negatives[None]).all(dim=2))
        samples.append(negatives.clone())
        bank.update_dictionary(mechanisms.Contrast(bank.bank.clone(), k, negatives), index)  # rewrites what is there
    if K > 1:
        assert not torch.allclose(samples[0], samples[1])


@pytest.mark.parametrize("step", range(4))
def test_the_banks_sample_has_nothing_to_do_with_the_order_of_an_epoch(step):
    bank = mechanisms.MemoryBank(vectors_as_they_are(), n=200, K=100)
    bank.steps.fill_(step)
    batch = permutation(200, 0, step)[:50]
    own = bank.contrast(unit(50, 4, 9), unit(50, 4, 9), batch).exclude.sum()
    assert 15 <= own <= 35  # of 50, half of them by chance


def test_a_bank_with_K_of_n_minus_1_uses_every_other_image():
    bank, index = mechanisms.MemoryBank(vectors_as_they_are(), n=20, K=19), torch.tensor([4, 17, 0])
    _, _, negatives, exclude = bank.contrast(unit(3, 4, 0), unit(3, 4, 0), index)
    assert torch.equal(negatives, bank.bank)
    assert torch.equal(exclude, F.one_hot(index, 20).bool())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_memory_bank_writes_a_running_mean_at_the_batchs_rows_only(momentum):
    bank, index, q = mechanisms.MemoryBank(vectors_as_they_are(), 20, 5, momentum), torch.tensor([4, 17, 0]), unit(3, 4, 8)
    before = bank.bank.clone()
    bank.update_dictionary(bank.contrast(q.clone().requires_grad_(), q, index), index)
    mixed = momentum * before[index].double() + (1 - momentum) * q.double()
    expected = (mixed / mixed.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(bank.bank[index], expected, rtol=0, atol=1e-6)
    others = torch.ones(20, dtype=torch.bool)
    others[index] = False
    assert torch.equal(bank.bank[others], before[others])
    assert not bank.bank.requires_grad
    assert int(bank.steps) == 1


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("moco", 10 * 8 * 4), ("memory_bank", 32 * 8 * 4), ("end_to_end", 0), ("simclr", 0), ("moco_v3", 0)],
)
def test_dictionary_bytes_are_those_of_the_keys_kept(variant, expected):
    assert tiny_run(**VARIANTS[variant]).mechanism.dictionary_bytes == expected


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_views_and_images_are_not_changed_by_a_step(changes):
    run, images, index = tiny_run(**changes), random_images().images, torch.arange(8)
    training.train_step(run, images[:8], index, 0)
    assert torch.equal(images, random_images().images)
    view_q, view_k = two_views(8)
    run.mechanism.contrast(view_q, view_k, index)
    assert torch.equal(view_q, two_views(8)[0])
    assert torch.equal(view_k, two_views(8)[1])


# ---- the bugs, planted


def random_keys_of_any_length(patch):
    def broken(n, dim, seed):
        return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))

    patch.setattr(mechanisms, "_random_keys", broken)


def enqueue_between_the_halves(patch):
    def broken(self, view_q, view_k, index):
        q, k = self.encoder(view_q), self.encode_keys(view_k)
        if self.symmetric:
            self.enqueue(k)
            q, k = torch.cat([q, self.encoder(view_k)]), torch.cat([k, self.encode_keys(view_q)])
        return mechanisms.Contrast(q, k, self.queue)

    patch.setattr(mechanisms.MoCo, "contrast", broken)


def enqueue_before_the_logits(patch):
    contrast_of = mechanisms.MoCo.contrast

    def broken(self, view_q, view_k, index):
        contrast = contrast_of(self, view_q, view_k, index)
        self.enqueue(contrast.k)
        return contrast

    patch.setattr(mechanisms.MoCo, "contrast", broken)
    patch.setattr(mechanisms.MoCo, "update_dictionary", lambda self, contrast, index: None)


def drop_at_the_wrap_around(patch):
    def broken(self, keys):
        room = min(len(keys), self.K - int(self.pointer))
        places = slice(int(self.pointer), int(self.pointer) + room)
        self.queue[places], self.born[places] = keys[:room], self.steps
        self.pointer.copy_((self.pointer + room) % self.K)
        self.filled.copy_((self.filled + len(keys)).clamp(max=self.K))
        self.steps.add_(1)

    patch.setattr(mechanisms.MoCo, "enqueue", torch.no_grad()(broken))


def after_building_moco(patch, change):
    build = mechanisms.MoCo.__init__

    def broken(self, *args, **options):
        build(self, *args, **options)
        change(self)

    patch.setattr(mechanisms.MoCo, "__init__", broken)


def leave_out_of_the_checkpoint(name):
    def mutant(patch):
        after_building_moco(patch, lambda moco: moco._non_persistent_buffers_set.add(name))

    mutant.__name__ = f"leave_{name}_out_of_the_checkpoint"
    return mutant


def estimate_z_once(patch):
    first = []

    def broken(run, contrast):
        q, k, negatives, exclude = contrast
        first.append(losses.estimate_log_z(q, negatives, run.recipe.temperature, run.n))
        return losses.nce(q, k, negatives, run.recipe.temperature, run.n, first[0], exclude)

    patch.setattr(training, "loss_of", broken)


def statistics_over_the_whole_batch(patch):
    patch.setattr(encoders.SplitBatchNorm2d, "forward", nn.BatchNorm2d.forward)


def shuffle_nothing(patch):
    patch.setattr(mechanisms.MoCo, "encode_keys", torch.no_grad()(lambda self, view: self.key_encoder(view)))


def forget_to_unshuffle(patch):
    def broken(self, view):
        return self.key_encoder(view[mechanisms.permutation(len(view), self.seed, int(self.steps))] if self.shuffle else view)

    patch.setattr(mechanisms.MoCo, "encode_keys", torch.no_grad()(broken))


def forget_to_normalise(patch):
    patch.setattr(encoders.Encoder, "forward", lambda self, x: self.head(self.backbone(x)).float())


def query_follows_key(patch):
    @torch.no_grad()
    def broken(self):
        torch._foreach_lerp_(list(self.encoder.parameters()), list(self.key_encoder.parameters()), 1 - self.m)

    patch.setattr(mechanisms.MoCo, "update_key_encoder", broken)


def swap_m_and_one_minus_m(patch):
    @torch.no_grad()
    def broken(self):
        torch._foreach_lerp_(list(self.key_encoder.parameters()), list(self.encoder.parameters()), self.m)

    patch.setattr(mechanisms.MoCo, "update_key_encoder", broken)


def let_gradient_into_the_keys(patch):
    after_building_moco(patch, lambda moco: moco.key_encoder.requires_grad_(True))
    patch.setattr(mechanisms.MoCo, "encode_keys", lambda self, view: self.key_encoder(view))


def multiply_by_the_temperature(patch):
    logits_of = losses.contrastive_logits

    def broken(q, k, negatives, temperature, exclude=None):
        return logits_of(q, k, negatives, 1 / temperature, exclude)

    patch.setattr(losses, "contrastive_logits", broken)


def tell_no_ages(patch):
    enqueue = mechanisms.MoCo.enqueue

    def broken(self, keys):
        enqueue(self, keys)
        self.born.fill_(self.steps - 1)  # every key passes for new

    patch.setattr(mechanisms.MoCo, "enqueue", broken)


def begin_with_another_key_head(patch):
    after_building_moco(patch, lambda moco: moco.key_encoder.head.reset_parameters())


BUGS = [
    (1, check_the_queue_begins_with_unit_vectors, random_keys_of_any_length),
    (2, check_no_key_is_its_own_negative, enqueue_between_the_halves),
    (3, check_no_key_is_its_own_negative, enqueue_before_the_logits),
    (4, check_the_queue_is_first_in_first_out, drop_at_the_wrap_around),
    (4, check_state_restores_the_dictionary, leave_out_of_the_checkpoint("queue")),
    (5, check_log_z_follows_the_keys, estimate_z_once),
    (6, check_shuffling_changes_the_statistics, statistics_over_the_whole_batch),
    (6, check_shuffling_changes_the_statistics, shuffle_nothing),
    (7, check_keys_come_back_in_the_views_order, forget_to_unshuffle),
    (8, check_queries_and_keys_have_length_one, forget_to_normalise),
    (9, check_the_key_encoder_follows_in_closed_form, query_follows_key),
    (9, check_the_key_encoder_follows_in_closed_form, swap_m_and_one_minus_m),
    (10, check_no_gradient_reaches_the_keys, let_gradient_into_the_keys),
    (11, check_info_nce_equals_a_double_loop, multiply_by_the_temperature),
    (12, check_state_restores_the_dictionary, leave_out_of_the_checkpoint("pointer")),
    (13, check_ages_tell_how_stale_the_keys_are, tell_no_ages),
    ("lightly's benchmark", check_the_key_encoder_begins_as_a_copy, begin_with_another_key_head),
]


@pytest.mark.parametrize(("number", "law", "mutant"), BUGS, ids=[f"{number}-{mutant.__name__}" for number, _, mutant in BUGS])
def test_a_planted_bug_breaks_its_law(number, law, mutant, monkeypatch):
    law()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law()


def test_every_bug_of_the_clinic_has_a_mutant():
    assert set(range(1, 14)) <= {number for number, _, _ in BUGS}
