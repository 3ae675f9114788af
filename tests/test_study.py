"""The study: its plan holds what was promised, it can be stopped anywhere, and its rows say what happened."""

import json
import math
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import measures, study
from benchmarks.measures import MEASURED, drift_by_age, measure, thinned
from benchmarks.plan import BASES, END_TO_END_UP_TO, EXPERIMENTS, Job, draw, plan
from tutorial_moco import pretrain as training
from tutorial_moco.claims import FEW, FEWEST, MANY, SECTIONS
from tutorial_moco.errors import DataError
from tutorial_moco.images import ImageSet, load_images
from tutorial_moco.recipes import Recipe
from tutorial_moco.results import by, load_rows, mean_and_bar, mean_and_interval, provenance_line

LABELS = torch.arange(50_000) % 10
SMALL = Recipe(encoder="tiny", dim=8, K=64, batch_size=32, lr=0.05)
ANYWHERE = [name for name in EXPERIMENTS if name != "reference"]  # that is of ResNet-18 alone
TOLERANCE = 3.0  # percent of accuracy by which another machine's `check` may differ: its rounding does, step by step


# ---- the plan


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return BASES[request.param]


@pytest.fixture(scope="module")
def planned(base):
    """The jobs of seed 0, by experiment."""
    return {name: plan(base, LABELS, 1, [name]) for name in EXPERIMENTS}


def images_seen(job):
    return job.recipe.epochs * (job.n // job.recipe.batch_size) * job.recipe.batch_size


def values(jobs, *fields):
    return [tuple(getattr(job.recipe, field) for field in fields) for job in jobs]


def test_every_job_can_be_run(planned):
    for job in (job for jobs in planned.values() for job in jobs):
        training.check(job.recipe, job.n, None)
        assert job.kind in measures.MEASURES


def test_k_has_six_values_and_end_to_end_takes_its_from_the_batch(planned, base):
    Ks = {16, 64, 256, 1024, 4096, 16384}
    for mechanism in ("moco", "memory_bank"):
        jobs = [job for job in planned["K"] if job.recipe.mechanism == mechanism]
        assert {job.recipe.K for job in jobs} == Ks
        assert {job.recipe.batch_size for job in jobs} == {base.batch_size}
    jobs = [job for job in planned["K"] if job.recipe.mechanism == "end_to_end"]
    assert {job.recipe.K for job in jobs} == {16, 64, 256, 1024}
    assert {FEWEST, FEW, MANY, END_TO_END_UP_TO} <= Ks  # those that the claims compare
    assert any(f"ends at K = {END_TO_END_UP_TO:,}" in section.question for section in SECTIONS)
    for job in jobs:
        assert job.recipe.batch_size == job.recipe.K + 1
        assert job.recipe.lr / job.recipe.batch_size == pytest.approx(base.lr / base.batch_size)
        assert "scaled" in job.note


def test_the_other_experiments_have_the_values_of_the_issue(planned, base):
    assert values(planned["m"], "m") == [(m,) for m in (0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1)]
    taus = (0.05, 0.07, 0.1, 0.2, 0.3, 0.5)
    assert set(values(planned["temperature"], "temperature", "head")) == {(t, h) for t in taus for h in ("linear", "mlp")}
    norms = [("batch", False), ("split:32", False), ("split:32", True), ("group", False)]
    assert values(planned["shuffling_bn"], "norm", "shuffle") == norms
    E = base.epochs
    assert values(planned["symmetric"], "symmetric", "epochs") == [(False, E), (True, E), (False, 2 * E)]
    losses = {(mechanism, loss) for mechanism in ("moco", "memory_bank") for loss in ("info_nce", "nce")}
    assert set(values(planned["loss"], "mechanism", "loss")) == losses
    assert values(planned["drift"], "mechanism", "m")[:3] == [("moco", 0.9), ("moco", 0.99), ("moco", 0.999)]
    assert planned["drift"][3].recipe.mechanism == "memory_bank"
    assert [job.kind for job in planned["ceilings"]] == ["supervised", "untrained", "pixels"]
    cost = set(values(planned["cost"], "mechanism", "batch_size", "K"))
    for batch in (64, 256, 1024):
        assert ("end_to_end", batch, batch - 1) in cost
        for K in (256, 4096, 65536):
            assert {("moco", batch, K), ("memory_bank", batch, min(K, 49_999))} <= cost


@pytest.mark.parametrize("epochs", [3, 20])
def test_equal_images_are_seen_where_promised(base, epochs):
    equal = ["K", "m", "temperature", "shuffling_bn", "loss", "data_size"]
    for job in plan(base.replace(epochs=epochs), LABELS, 1, equal):
        assert images_seen(job) == pytest.approx(50_000 * epochs, rel=0.025)


def test_a_part_of_the_images_is_a_draw_that_the_seed_decides():
    for changes in ({"share": 0.1}, {"long_tail": True}):
        job, again, other = (Job(SMALL.replace(seed=seed), **changes) for seed in (0, 0, 1))
        index = draw(LABELS, job)
        assert len(index.unique()) == len(index)
        assert torch.equal(index, draw(LABELS, again))
        assert set(index.tolist()) != set(draw(LABELS, other).tolist())
    counts = LABELS[draw(LABELS, Job(SMALL, long_tail=True))].bincount()
    ratios = (counts[1:] / counts[:-1]).tolist()
    assert (counts[0], counts[-1]) == (5000, 50)
    assert ratios == pytest.approx([0.01 ** (1 / 9)] * 9, rel=0.01)  # exponential
    assert len(draw(LABELS, Job(SMALL, share=0.1))) == 5000


def test_each_seed_is_a_whole_picture_before_the_next_begins():
    jobs = plan(SMALL, LABELS, 3)
    assert [job.recipe.seed for job in jobs] == sorted(job.recipe.seed for job in jobs)
    assert {job.experiment for job in jobs if job.recipe.seed == 0} == set(ANYWHERE)
    assert {job.experiment for job in jobs if job.recipe.seed == 2} == set(ANYWHERE) - {"check"}
    assert len(set(jobs)) == len(jobs)


def test_the_reference_is_the_official_notebooks_recipe_asymmetric_and_symmetric():
    assert plan(SMALL, LABELS, 1, ["reference"]) == []
    one, other = plan(BASES["resnet18"], LABELS, 1, ["reference"])
    assert (one.recipe, other.recipe) == (BASES["resnet18"], BASES["resnet18"].replace(symmetric=True))
    # Trained once for both experiments.
    twins = plan(BASES["resnet18"], LABELS, 1, ["symmetric"])[:2]
    assert [job.identity("") for job in twins] == [one.identity(""), other.identity("")]


# ---- running it


def random_images(n, seed, split="train"):
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet("random", split, pixels, torch.arange(n) % 4, tuple("abcd"), f"hash {seed}")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command on 256 random images, which ``run.images`` holds; returns its exit status and rows."""

    def run(*flags, out="rows"):
        default = ["--encoder", "tiny", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["study", *default, *flags])
        path = tmp_path / out / "study-cpu.jsonl"
        return study.main(), load_rows(path=path) if path.exists() else None

    run.images = random_images(256, 0), random_images(64, 1, "test")
    monkeypatch.setattr(study, "load", lambda data: run.images)
    monkeypatch.setitem(BASES, "tiny", SMALL)
    monkeypatch.setattr(training, "choose_precision", lambda *_: torch.float32)
    return run


def without_times(row):
    """A row without what differs when the same is run again."""
    times = {"train_seconds", "images_per_second", "peak_memory_bytes", "wall_seconds", "date", "command", "seconds"}
    if isinstance(row, list):
        return [without_times(part) for part in row]
    return {k: without_times(v) if isinstance(v, list) else v for k, v in row.items() if k not in times}


def after_steps(monkeypatch, steps, act):
    """Do something in place of the training step after this many, counted over all runs."""
    count, train_step = iter(range(10**6)), training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args: act() if next(count) == steps else train_step(*args))


def interrupt():
    raise KeyboardInterrupt


def test_a_study_that_was_interrupted_goes_on_to_the_same_rows(run, monkeypatch, capsys):
    status, whole = run("--only", "loss", out="whole")
    assert status == 0
    assert len(whole) == 4
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 rows in ")
    with monkeypatch.context() as patch:
        after_steps(patch, 13, interrupt)  # in the second run: one has 8
        status, rows = run("--only", "loss")
        assert status == 130
        assert without_times(rows) == without_times(whole[:1])
        assert "the same command goes on" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        after_steps(patch, 24, interrupt)  # the three that are left have no more
        assert run("--only", "loss")[0] == 0
    assert without_times(run("--only", "loss")[1]) == without_times(whole)


def test_a_torn_last_line_is_dropped_with_a_word_and_run_again(run, tmp_path, capsys):
    _, rows = run("--only", "loss")
    path = tmp_path / "rows/study-cpu.jsonl"
    os.truncate(path, path.stat().st_size - 100)
    assert len(load_rows(path=path)) == 3
    capsys.readouterr()
    assert without_times(run("--only", "loss")[1]) == without_times(rows)
    assert "the last line was cut off" in capsys.readouterr().err
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == ["info_nce", "nce"] * 2


def test_a_run_of_two_experiments_is_trained_once_and_has_a_row_in_each(run, monkeypatch):
    run("--only", "loss")
    after_steps(monkeypatch, 0, interrupt)  # not one more step
    monkeypatch.setitem(EXPERIMENTS, "m", lambda base, labels: [Job(base, note="why")])
    status, rows = run("--only", "m,loss")
    assert status == 0
    assert len(rows) == 5
    assert rows[-1] == rows[0] | {"experiment": "m", "note": "why"}


def test_other_images_are_another_run(run):
    run("--only", "data_size")
    run.images = random_images(256, 2), run.images[1]
    _, rows = run("--only", "data_size")
    assert [row["data_hash"] for row in rows] == ["hash 0"] * 3 + ["hash 2"] * 3
    assert [row["n"] for row in rows[:3]] == [256, 26, len(draw(run.images[0].labels, Job(SMALL, long_tail=True)))]


def test_a_run_whose_loss_is_not_finite_is_a_row_and_the_study_goes_on(run, monkeypatch):
    loss_of = training.loss_of
    poisoned = lambda run, c: loss_of(run, c) * (math.nan if run.recipe.loss == "nce" else 1)  # noqa: E731
    monkeypatch.setattr(training, "loss_of", poisoned)
    status, rows = run("--only", "loss")
    assert status == 0
    assert [row["failed"] is not None for row in rows] == [False, True, False, True]
    assert "nan at step 1" in rows[1]["failed"]
    assert rows[1]["knn_top1"] is rows[1]["linear_top1"] is None
    assert run("--only", "loss")[1] == rows  # and is not run again


def test_a_run_that_does_not_fit_the_gpu_is_a_row(run, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(measures, "pretrain", too_large)
    assert [row["failed"] for row in run("--only", "loss")[1]] == ["CUDA out of memory."] * 4


def test_a_row_from_before_a_setting_came_up_had_its_default(run):
    row = measure(Job(SMALL, n=256, experiment="K"), *run.images)
    del row["bank_momentum"]
    assert study.find([row], Job(SMALL, n=256), "", "K") is row
    assert study.find([row], Job(SMALL.replace(bank_momentum=0.9), n=256), "", "K") is None
    assert study.find([row], Job(SMALL, n=256), "", "m") is None


def test_the_plan_is_listed_with_the_minutes_that_rows_suggest(run, tmp_path, capsys):
    assert run("--list") == (0, None)
    assert not (tmp_path / "rows").exists()
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[2:-1]] == ANYWHERE
    assert next(line for line in listed if line.startswith("loss")).split() == ["loss", "4", "0", "4", "?"]
    run("--only", "loss")
    path = tmp_path / "rows/study-cpu.jsonl"
    rows = [json.loads(line) | {"wall_seconds": 600} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    run("--only", "loss,m", "--list")
    listed = capsys.readouterr().out.splitlines()
    # Ten minutes for each m but the recipe's own, which loss has trained.
    assert [line.split() for line in listed[2:4]] == [["loss", "4", "4", "0", "0"], ["m", "7", "0", "7", "60"]]


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (["--only", "loss,k"], 2, "--only k is not known: choose of check, reference, K, m"),
        (["--only", "reference"], 2, "--only reference has no runs for --encoder tiny"),
        (["--seeds", "0"], 2, "--seeds must be at least 1"),
        (["--encoder", "huge"], 2, "--encoder"),
        (["--epochs", "0"], 2, "--epochs must be at least 1"),
        (["--out", "/dev/null/rows"], 2, "--out /dev/null/rows/study-cpu.jsonl could not be written"),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "",
)
def test_a_mistake_ends_in_one_line_and_its_status(run, capsys, flags, status, told):
    assert run(*flags)[0] == status
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_missing_data_ends_in_one_line_and_status_3(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "rows")])
    assert study.main() == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "rows").exists()


# ---- a row


def coloured_images(n, seed, split="train"):
    """Two classes that brightness tells apart."""
    images = random_images(n, seed, split)
    labels = torch.arange(n) % 2
    pixels = (images.images // 2 + 127 * labels[:, None, None, None]).to(torch.uint8)
    return ImageSet("coloured", split, pixels, labels, ("a", "b"), f"{seed}")


def test_every_kind_of_run_has_a_row_with_the_same_fields(monkeypatch):
    monkeypatch.setattr(training, "choose_precision", lambda *_: torch.float32)
    train, test = coloured_images(256, 0), coloured_images(100, 1, "test")
    recipe = SMALL.replace(epochs=4, augmentation="none")
    rows = {kind: measure(Job(recipe, kind, n=256), train, test) for kind in measures.MEASURES if kind != "masked"}
    large = [replace(images, images=images.images.repeat(1, 1, 4, 4)) for images in (train, test)]  # 32 pixels, its size
    rows["masked"] = measure(Job(recipe.replace(encoder="vit-learned", epochs=1), "masked", n=256), *large)
    for kind, row in rows.items():
        assert set(row) == set(rows["pretrain"]), kind
        assert row["failed"] is None, kind
        assert {*MEASURED, "experiment", "kind", "mechanism", "seed", "K", "m", "data_hash", "commit", "hardware"} <= set(row)
        json.dumps(row, allow_nan=False)
    assert [rows[kind]["mechanism"] for kind in ("pretrain", "supervised", "untrained")] == ["moco", "supervised", "untrained"]
    assert rows["supervised"]["supervised_top1"] == 100
    assert rows["supervised"]["steps"] == 32
    assert rows["pixels"]["linear_top1"] is None

    trained = rows["pretrain"]
    assert trained["final_loss"] == pytest.approx(trained["losses"][-1]["loss"], rel=1e-4)
    assert trained["images_seen"] == 4 * 256

    half = rows["drift"]
    assert half["steps"] == 16
    assert [(point["age"], point["count"]) for point in half["drift"]] == [(1, 32), (2, 32)]  # all of K
    assert half["drift"][1]["cosine"] < half["drift"][0]["cosine"] < 1

    few_steps = rows["cost"]
    assert few_steps["dictionary_bytes"] == few_steps["dictionary_bytes_formula"] == 64 * 8 * 4
    assert few_steps["peak_memory_bytes"] >= few_steps["memory_before_bytes"] > 0
    assert few_steps["seconds_per_step"] > 0


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_is_killed_for_its_memory_is_a_row(monkeypatch):
    monkeypatch.setattr(measures, "cost_of_steps", killed)
    row = measure(Job(SMALL, "cost", n=256), random_images(256, 0), random_images(64, 1))
    assert "want of memory" in row["failed"]


def test_curves_are_thinned_to_a_hundred_points_with_both_ends():
    curve = [{"step": step, "loss": 1 / 3} for step in range(1, 1235)]
    steps = [point["step"] for point in thinned(curve)]
    assert (steps[0], steps[-1]) == (1, 1234)
    assert len(steps) <= 101
    assert thinned(curve[:7]) == [{"step": step, "loss": 0.33333} for step in range(1, 8)]


def test_drift_is_binned_by_age(monkeypatch):
    ages, cosines = torch.arange(1, 101), torch.linspace(1, 0.01, 100)
    monkeypatch.setattr(measures, "key_drift", lambda *_: (ages, cosines))
    bins = drift_by_age(None, None)
    assert bins[0] == pytest.approx({"age": 2.0, "cosine": 0.99, "sd": 0.01 * math.sqrt(2 / 3), "count": 3}, rel=1e-3)
    assert len(bins) == 34
    assert sum(point["count"] for point in bins) == 100


# ---- reading rows


def test_rows_are_found_upward_from_the_working_directory(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"data/study-none.jsonl does not exist: make it") as missing:
        load_rows(scale="none")
    assert "\n" not in str(missing.value)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "study-none.jsonl").write_text('{"experiment": "K"}\n{"experiment": "m"}\n{"exper')
    (tmp_path / "notebooks/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks/deep")
    assert load_rows(scale="none") == [{"experiment": "K"}, {"experiment": "m"}]
    assert load_rows("m", scale="none") == [{"experiment": "m"}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"experiment": "K"}\nnonsense\n{"experiment": "m"}\n')
    with pytest.raises(DataError, match="line 2 is no row"):
        load_rows(path=path)


def test_the_interval_is_students():
    assert mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))  # t of 2 degrees of freedom
    assert mean_and_bar([1.0, 2.0, 3.0]) == mean_and_interval([1.0, 2.0, 3.0])
    assert mean_and_bar([7.0, 3.0]) == (5.0, 2.0)  # from one to the other
    one = mean_and_interval([5])
    assert one[0] == 5
    assert math.isnan(one[1])


def test_rows_are_grouped_in_order():
    rows = [{"K": 64, "seed": 0}, {"K": 16, "seed": 0}, {"K": 64, "seed": 1}]
    assert by(rows, "K") == {(64,): [rows[0], rows[2]], (16,): [rows[1]]}
    assert list(by(rows, "seed", "K")) == [(0, 64), (0, 16), (1, 64)]


def test_the_line_under_a_picture_says_where_its_rows_come_from():
    row = {
        "date": "2026-11-26T01:00:00+00:00",
        "commit": "abc",
        "hardware": "a laptop",
        "data": "cifar10-jpeg.tar.xz",
        "seed": 0,
    }
    later = row | {"date": "2026-11-27T01:00:00+00:00", "seed": 1}
    assert provenance_line([row]) == "measured 2026-11-26 with commit abc, on a laptop, CIFAR-10 (JPEG), 1 seed"
    expected = "measured 2026-11-26 and 2026-11-27 with commit abc, on a laptop, CIFAR-10 (JPEG), 2 seeds"
    assert provenance_line([row, later]) == expected
    both = [row | {"precision": "float32"}, later | {"precision": "bfloat16"}]
    assert provenance_line(both) == f"{expected}, in bfloat16 and float32"
    assert provenance_line(both[:1]).endswith("1 seed")
    assert provenance_line([]) == "nothing measured yet"


def test_a_shipped_row_is_measured_again_within_the_tolerance():
    """The row of ``check``: two epochs of drawn images, the tiny encoder, float32, one thread; on any processor."""
    train, test = load_images("shapes", "train"), load_images("shapes", "test")
    job = plan(SMALL, train.labels, 1, ["check"])[0]
    shipped = study.find(load_rows(), job, "shapes", "check")
    assert shipped, "data/study-cpu.jsonl has no row of check: python -m benchmarks.study --only check"
    again = measure(job, train, test)
    assert again["knn_top1"] == pytest.approx(shipped["knn_top1"], abs=TOLERANCE)
    assert again["linear_top1"] == pytest.approx(shipped["linear_top1"], abs=TOLERANCE)
    assert again["final_loss"] == pytest.approx(shipped["final_loss"], rel=0.05)
