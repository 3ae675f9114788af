"""Several processes train as one: equal to each other bit by bit, and to one process up to rounding."""

import contextlib
import json
import os
import signal
import time
from unittest import mock

import pytest
import torch
from drawn import as_pictures, write_two_classes
from ranks import hash_of, random_images, some_steps, together

from tutorial_moco import cli, compare, distributed
from tutorial_moco import pretrain as training
from tutorial_moco.augment import two_views
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.images import load_images
from tutorial_moco.recipes import Recipe

CPU = torch.device("cpu")
BASE = Recipe(encoder="tiny", dim=8, K=20, m=0.9, batch_size=16, epochs=3, lr=0.02)
# By BatchNorm the parts of a batch know of each other: one process has to split it as the others do.
TRAINED = {
    "moco": {},
    "moco_shuffled": {"shuffle": True},
    "moco_symmetric": {"symmetric": True},
    "moco_in_parts": {"accumulate": 2},
    "moco_nce": {"loss": "nce", "temperature": 0.5},
    "memory_bank": {"mechanism": "memory_bank"},
    "end_to_end": {"mechanism": "end_to_end"},
}
HELD = {  # simclr normalises both views together, v3's head and predictor have a BatchNorm that no setting splits
    "simclr": {"mechanism": "simclr", "augmentation": "v3"},
    "moco_v3": {"mechanism": "moco_v3", "head": "mlp3", "augmentation": "v3"},
}
STEPS = 8  # two epochs


@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_processes_hold_the_same_bits_and_train_as_one_does(name, W, held):
    recipe = BASE.replace(**TRAINED[name])
    (alone,) = together(1, some_steps, recipe.replace(norm=f"split:{W}"), STEPS)
    ranks = together(W, some_steps, recipe, STEPS)
    for other in ranks[1:]:
        assert other["hash"] == ranks[0]["hash"]
        assert other["loss"] == ranks[0]["loss"]
    assert ranks[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    for epoch in (slice(0, 4), slice(4, 8)):
        queries = [number for found in ranks for step in found["queries"][epoch] for number in step]
        assert sorted(queries) == list(range(64))
    told = f"{W} processes, {len(TRAINED)} settings: the same bits in each, one process's losses to 1e-5"
    held("the number of processes may change", told, 1, 1)


@pytest.mark.parametrize("changes", [{}, {"shuffle": True}, {"accumulate": 2}])
def test_processes_train_as_one_does_on_pictures_that_stay_encoded(changes, tmp_path):
    images = load_images(write_two_classes(tmp_path, as_pictures(random_images().images)), "train", view_size=16)
    recipe, steps = BASE.replace(view_size=16, batch_size=8, **changes), 2 * (len(images) // 8)
    (alone,) = together(1, some_steps, recipe.replace(norm="split:2"), steps, False, images)
    ranks = together(2, some_steps, recipe, steps, False, images)
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert ranks[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_parts_of_a_batch_may_be_shuffled_between_processes():
    ranks = together(2, some_steps, BASE.replace(accumulate=2, shuffle=True), STEPS)
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert ranks[0]["seen"] != ranks[0]["queries"]
    for found in ranks:
        for seen, queries in zip(found["seen"], found["queries"], strict=True):
            assert [*seen[:4], *seen[8:12]] == queries  # of each part the queries' images, and then the keys'


@pytest.mark.parametrize("name", HELD)
def test_the_later_kin_train_as_one_process_does_where_batchnorm_is_held_still(name):
    recipe = BASE.replace(**HELD[name])
    (alone,) = together(1, some_steps, recipe, STEPS, True)
    ranks = together(2, some_steps, recipe, STEPS, True)
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert ranks[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def shuffled_both_ways(recipe):
    """Keys of one step: shuffled by the loader, and by sending the images to each other as the published code does."""
    images = random_images()
    run = training.start(recipe, images, CPU, torch.float32)
    epoch, index = next(training.batches(len(images), recipe, 0, CPU))
    *_, order = training.views_of(run, images.images[training.part(run, index)], index, epoch)
    _, view_k, *_ = training.views_of(run, images.images[training.part(run, index)], index, epoch)
    by_the_loader = run.mechanism.encode_keys(view_k, order)
    own = distributed.mine(index)
    _, view_k = two_views(images.images[own], own, recipe.augmentation, seed=recipe.seed, epoch=epoch)
    with torch.no_grad():
        sent = distributed.mine(distributed.gather(view_k)[order])
        by_gathering = distributed.mine(distributed.gather(run.mechanism.key_encoder(sent))[torch.argsort(order)])
    return by_the_loader, by_gathering, len(set(order[: len(own)].tolist()) - set(range(len(own))))


@pytest.mark.parametrize("W", [2, 4])
def test_shuffling_by_the_loader_is_shuffling_by_sending_images(W):
    for by_the_loader, by_gathering, _ in (found := together(W, shuffled_both_ways, BASE.replace(shuffle=True))):
        torch.testing.assert_close(by_the_loader, by_gathering, rtol=0, atol=1e-6)
    assert found[0][2] > 0  # images did change places


def gradient_of_gathered_rows():
    rows = torch.full((2, 3), 1.0 + distributed.rank(), requires_grad=True)
    weight = torch.arange(1.0, 5.0)[:, None] * (1 + distributed.rank())  # rank 1 uses each row twice as much
    (distributed.gather(rows) * weight).sum().backward()
    return rows.grad


def test_a_gathered_row_gets_the_gradient_of_all_who_used_it():
    first, second = together(2, gradient_of_gathered_rows)
    assert torch.equal(first, torch.tensor([[3.0] * 3, [6.0] * 3]))
    assert torch.equal(second, torch.tensor([[9.0] * 3, [12.0] * 3]))


def exchanged():
    r, rows = distributed.rank(), torch.arange(8).view(8, 1)
    mean, high = distributed.mean(float(r), r * 1.0, device=CPU), distributed.highest(float(r), -r, device=CPU)
    tensors = [torch.full((2, 2), float(r)), torch.full((3,), 2.0 * r)]
    distributed.average_(tensors)
    gathered = distributed.gather_views(distributed.my_views(rows, 2), 2)
    return (
        distributed.mine(rows).flatten().tolist(),
        mean,
        high,
        tensors,
        distributed.every(r),
        gathered.flatten().tolist(),
    )


def test_what_is_exchanged_is_what_it_is_called():
    first, second = together(2, exchanged)
    assert (first[0], second[0]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    for _, mean, high, (square, line), of_every, gathered in (first, second):
        assert mean == [0.5, 0.5]
        assert high == [1, 0]
        assert torch.equal(square, torch.full((2, 2), 0.5))
        assert torch.equal(line, torch.ones(3))
        assert of_every == [0, 1]
        assert gathered == list(range(8))


def test_alone_each_exchange_is_an_identity():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(distributed.mine(rows), rows)
    assert distributed.gather(rows) is rows
    assert distributed.mean(1.5, device=CPU) == distributed.highest(1.5, device=CPU) == [1.5]


def trained(recipe, out):
    """The hash of a whole training, and the kNN on the way; the checkpoint is in out."""
    run = training.pretrain(
        recipe, random_images(), random_images(21), monitor=3, out=out, device=CPU, dtype=torch.float32, progress=False
    )
    return hash_of(run.mechanism), run.step, [point["knn_top1"] for point in run.monitor], [p["loss"] for p in run.losses]


def test_a_whole_training_reads_the_same_knn_and_a_finished_one_stays_with_any_number_of_processes(tmp_path):
    (alone,) = together(1, trained, BASE.replace(norm="group"), tmp_path / "1")
    first, second = together(2, trained, BASE.replace(norm="group"), tmp_path / "2")
    assert first == second
    assert first[2] == pytest.approx(alone[2], abs=5)  # rounding may turn one of 21 votes
    assert first[3] == pytest.approx(alone[3], abs=1e-4)
    for W in (1, 4):
        assert together(W, trained, BASE.replace(norm="group"), tmp_path / "2")[0] == first


def visited(recipe, out, stop_after=None):
    """Which images this process saw in which step, until the end or until a SIGTERM after so many steps."""
    seen, train_step = [], training.train_step

    def told(run, images, index, epoch):
        seen.append((epoch, distributed.mine(index).tolist()))
        if run.step + 1 == stop_after and distributed.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, images, index, epoch)

    with mock.patch.object(training, "train_step", told), contextlib.suppress(SystemExit):
        training.pretrain(recipe, random_images(), out=out, device=CPU, dtype=torch.float32, progress=False)
    return seen


@pytest.mark.parametrize("then", [1, 4])
def test_saved_by_two_processes_in_an_epoch_a_run_goes_on_with_another_number_and_no_image_is_missed(then, tmp_path, held):
    recipe = BASE.replace(norm="group")
    before = together(2, visited, recipe, tmp_path, 6)  # in the middle of the second of three epochs
    after = together(then, visited, recipe, tmp_path)
    assert [len(seen) for seen in before] == [6, 6]
    assert [len(seen) for seen in after] == [6] * then
    for epoch in range(3):
        images = [number for seen in (*before, *after) for at, part in seen if at == epoch for number in part]
        assert sorted(images) == list(range(64))
    told = f"saved by 2 processes within an epoch, gone on with by {then}: each image once an epoch"
    held("the number of processes may change", told, 1, 1)


@pytest.mark.parametrize("mechanism", ["moco", "memory_bank", "end_to_end"])
def test_a_budget_of_minutes_ends_for_all_after_the_same_step(mechanism):
    first, second = together(2, by_minutes, BASE.replace(mechanism=mechanism))
    assert first == second
    assert first[1] > 0


def by_minutes(recipe):
    run = training.pretrain(recipe, random_images(), minutes=0.01, device=CPU, dtype=torch.float32, progress=False)
    return hash_of(run.mechanism), run.step, run.seconds


def own_folder(recipe, out):
    own = out / str(distributed.rank())
    with pytest.raises(DataError) as error:
        training.pretrain(recipe, random_images(), out=own, device=CPU, dtype=torch.float32, progress=False)
    return str(error.value)


def test_machines_that_share_no_folder_are_told(tmp_path):
    """The first finds its checkpoint, the other nothing."""
    together(1, trained, BASE, tmp_path / "0")
    for said in together(2, own_folder, BASE, tmp_path):
        assert "process 1 has other steps in --out" in said
        assert "name a folder that all machines share" in said


def other_images(recipe):
    with pytest.raises(DataError) as error:
        training.pretrain(recipe, random_images(64 - 16 * distributed.rank()), device=CPU, dtype=torch.float32, progress=False)
    return str(error.value)


def test_other_images_on_another_machine_are_told():
    assert "process 1 has other images than the first" in together(2, other_images, BASE)[0]


def by_command(words):
    """The command line's status, where the first process takes its time to judge."""
    os.environ |= {"TUTORIAL_MOCO_SILENCE": "3", "TORCHELASTIC_RUN_ID": "as if by torchrun"}

    def slow(*rest, evaluate=compare.evaluate_features):
        time.sleep(6)
        return evaluate(*rest)

    with mock.patch.object(compare, "evaluate_features", slow):
        return cli.main(words)


def test_nobody_is_taken_for_lost_while_the_first_process_judges(tmp_path):
    words = ["pretrain", "--data", "digits", "--epochs", "1", "--encoder", "tiny", "--precision", "float32", "--monitor", "1"]
    out, result = tmp_path / "out", tmp_path / "result.json"
    assert together(2, by_command, [*words, "--out", str(out), "--json", str(result)], joined=False) == [0, 0]
    assert (out / "report.html").exists()
    assert json.loads(result.read_text())["results"][0]["steps"] == 11


def poisoned(recipe):
    """A step whose view of image ``bad`` is nan, on whichever process has it; what is said, and what has changed."""
    images = random_images()
    run = training.start(recipe, images, CPU, torch.float32)
    run.mechanism.eval()
    epoch, index = next(training.batches(len(images), recipe, 0, CPU))
    bad, views = index[-1], run.views

    def poison(images, index, *rest, **how):
        view_q, view_k = views(images, index, *rest, **how)
        view_q[index == bad] = torch.nan
        return view_q, view_k

    run.views, before = poison, hash_of(run.mechanism)
    with pytest.raises(UsageError) as error:
        training.train_step(run, images.images[training.part(run, index)], index, epoch)
    return str(error.value), int(bad), hash_of(run.mechanism) == before


@pytest.mark.parametrize("mechanism", ["moco", "memory_bank", "end_to_end"])
def test_an_image_that_is_not_finite_on_one_process_stops_all_and_is_named_by_all(mechanism, held):
    for said, bad, unchanged in together(2, poisoned, BASE.replace(mechanism=mechanism)):
        assert f"in the training images {bad}" in said
        assert unchanged
    held("what is not finite changes nothing", "a nan in one image of one of two processes; the image is named by both", 1, 1)


def bent(recipe):
    """A step in which the loss of the second process alone has no finite gradient."""
    images = random_images()
    run = training.start(recipe, images, CPU, torch.float32)
    epoch, index = next(training.batches(len(images), recipe, 0, CPU))
    loss_of, before = training.loss_of, hash_of(run.mechanism)

    def poison(run, contrast):
        loss = loss_of(run, contrast)
        return loss + (loss - loss.detach()).sqrt() if distributed.rank() else loss

    with mock.patch.object(training, "loss_of", poison), pytest.raises(UsageError) as error:
        training.train_step(run, images.images[training.part(run, index)], index, epoch)
    return str(error.value), hash_of(run.mechanism) == before


def test_a_gradient_that_is_not_finite_on_one_process_stops_all(held):
    for said, unchanged in together(2, bent, BASE):
        assert "the gradient's length is" in said
        assert "at step 1" in said
        assert unchanged
    held("what is not finite changes nothing", "a gradient that is not finite on one of two processes", 1, 1)


def refused(recipe):
    with pytest.raises(UsageError) as error:
        training.check(recipe, 64, None)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"batch_size": 15}, "--batch-size 15 is not to be shared by 2 processes"), ({"batch_size": 2}, "4 or more"),
     ({"shuffle": True, "symmetric": True}, "--shuffle with --symmetric is for one process, not 2")],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(changes, said):
    assert said in together(2, refused, BASE.replace(**changes))[0]
