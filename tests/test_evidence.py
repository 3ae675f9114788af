"""Pictures and page hold exactly what the rows say: means, intervals, verdicts; and say so where something is missing."""

import itertools
import json
import math
import re
import sys
from contextlib import suppress
from statistics import mean

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from scipy import stats

from benchmarks import figures
from benchmarks.measures import MEASURED
from benchmarks.plan import BASES, plan
from tutorial_moco import claims, evidence
from tutorial_moco.claims import CAME_OUT, DID_NOT, MEASURES, NOT_MEASURED, SECTIONS, TOO_SMALL, Claim, Finding, findings
from tutorial_moco.errors import DataError
from tutorial_moco.report import png
from tutorial_moco.results import VARIED, along, difference_and_interval, field, of_experiment, values

LABELS = torch.arange(50_000) % 10
FACTS = {
    "version": "0.1.0", "commit": "abc", "command": "study", "date": "2026-11-26T03:00:00+00:00", "hardware": "a laptop",
    "torch": "2.14", "data": "cifar10", "failed": None,
}  # fmt: skip
PICTURES = {name: function for section in SECTIONS for name, function, _ in section.pictures}


def synthetic(job):
    """A row as the study writes it, its figures made up smoothly from the settings, the seed a little beside."""
    row = job.identity("hash") | dict.fromkeys(MEASURED) | FACTS | {"experiment": job.experiment, "note": job.note}
    recipe, bank, off = (
        job.recipe,
        job.recipe.mechanism == "memory_bank",
        (job.recipe.seed * 7919 + len(job.experiment)) % 5 / 5,
    )
    if job.kind == "cost":
        row |= {
            "memory_before_bytes": 500 << 20, "peak_memory_bytes": (500 << 20) + recipe.batch_size * (recipe.K * 12 + 900_000),
            "seconds_per_step": recipe.batch_size * (9e-4 + 4e-9 * recipe.K) * (1 + off / 50),
            "dictionary_bytes_formula": {"moco": recipe.K, "memory_bank": job.n}.get(recipe.mechanism, 0) * 512,
        }  # fmt: skip
    elif job.kind == "drift":
        last, half_life = (390, 150) if bank else (recipe.K // recipe.batch_size, 0.7 / (1 - recipe.m))
        ages = np.unique(np.linspace(1, last, 30).round())
        cosines = (0.55 if bank else 0.7) + (0.2 if bank else 0.28) * np.exp(-ages / half_life) + off / 100
        row["drift"] = [{"age": a, "cosine": c, "sd": 0.05, "count": 100} for a, c in zip(ages, cosines, strict=True)]
    elif job.kind == "pixels":
        row["knn_top1"] = 36.3
    else:
        kinds = {"supervised": 30, "untrained": -20}
        knn = 50 + kinds.get(job.kind, 0) + off + 0.8 * math.log2(recipe.K) - 9 * (recipe.loss == "nce") + 2 * recipe.symmetric
        knn -= 12 * bank + 25 * (recipe.m in (0, 1)) + 5 * (job.share < 1) + 0.3 * math.log2(recipe.batch_size)
        knn -= abs(math.log10(recipe.temperature / (0.1 if recipe.head == "linear" else 0.2))) * 6
        split = recipe.norm.startswith("split") and not recipe.shuffle
        pretext = 97 if split else 70
        curve = [{"epoch": e, "images_seen": e * job.n, "loss": 7 - e / 50, "pretext_accuracy": pretext + off} for e in (1, 9)]
        row |= {"knn_top1": knn - 4 * split, "linear_top1": knn + 1.5, "losses": curve}
        row["monitor"] = [point | {"knn_top1": knn, "knn_top1_notebook": knn + 5} for point in curve]
    return row


@pytest.fixture(scope="module")
def rows():
    jobs = plan(BASES["small"], LABELS, 3) + plan(BASES["resnet18"], LABELS, 3, ["reference"])
    return [synthetic(job) for job in jobs if job.kind != "check"]


def drawn(figure):
    """Render, as a report would: layout and fonts complain here if they do, and no line under a picture may leave it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    return figure


def text_of(figure):
    """Every word in it."""
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# ---- pictures


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("error")
def test_every_picture_is_drawn_from_a_whole_study_from_one_seed_and_from_a_part(name, rows):
    drawn(PICTURES[name](rows))
    one = drawn(PICTURES[name]([row for row in rows if row["seed"] == 0]))
    assert name == "paper-K" or "one seed" in text_of(one) or "1 seed" in text_of(one)
    parts = {row["experiment"]: [r for r in rows if r["experiment"] == row["experiment"]][:1] for row in rows}
    PICTURES[name](list(itertools.chain(*parts.values())))


@pytest.mark.parametrize("name", set(PICTURES) - {"paper-K"})
def test_what_is_missing_is_said_in_one_line(name):
    with pytest.raises(DataError, match=r"nothing measured yet for \w+: run python -m benchmarks.study --only") as missing:
        PICTURES[name]([])
    assert "\n" not in str(missing.value)


def errorbars(axes):
    """For each line of a panel: its label, x, means, and lower and upper ends of the bars."""
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            x, means = container.lines[0].get_xydata().T
            ends = np.array([path.vertices[:, 1] for path in container.lines[2][0].get_paths()])
            yield container.get_label(), x, means, ends


def test_the_picture_of_K_holds_the_means_and_students_intervals_of_the_rows(rows):
    figure = evidence.accuracy_against_K(rows)
    for axes, accuracy in zip(figure.axes, ("knn_top1", "linear_top1"), strict=True):
        lines = list(errorbars(axes))
        assert [label for label, *_ in lines] == ["MoCo", "memory bank", "end-to-end"]
        for (_, x, means, ends), mechanism in zip(lines, ("moco", "memory_bank", "end_to_end"), strict=True):
            mine = [row for row in rows if (row["experiment"], row["mechanism"]) == ("K", mechanism)]
            assert list(x) == sorted({row["K"] for row in mine})
            for K, middle, (low, high) in zip(x, means, ends, strict=True):
                found = [row[accuracy] for row in mine if row["K"] == K]
                assert len(found) == 3
                assert middle == pytest.approx(mean(found))
                assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, middle, stats.sem(found)))


def test_one_seed_has_no_bar(rows):
    figure = evidence.accuracy_against_K([row for row in rows if row["seed"] == 0])
    _, _, means, ends = next(errorbars(figure.axes[0]))
    assert np.isfinite(means).all()
    assert np.isnan(ends).all()
    assert "one seed, so no error bars" in text_of(figure)


def test_a_part_says_what_is_not_measured_yet_and_how_many_seeds_there_are(rows):
    some = [row for row in rows if row["mechanism"] != "end_to_end" and (row["seed"] == 0 or row["mechanism"] == "moco")]
    text = text_of(evidence.accuracy_against_K(some))
    assert "not measured yet: end-to-end" in text
    assert "1 to 3 seeds" in text


def test_rows_that_do_not_go_together_are_said_to_be_so_in_a_chapter(rows, monkeypatch):
    mixed = [row for row in rows if row["experiment"] == "loss"]
    mixed.append(mixed[0] | {"data_hash": "other"})
    monkeypatch.setattr(evidence, "rows_of", lambda *names: mixed)
    assert "data_hash" in text_of(evidence.measured(evidence.losses, "loss"))
    monkeypatch.setattr(evidence, "rows_of", lambda *names: [])
    assert "not measured yet" in text_of(evidence.measured(evidence.losses, "loss"))


def broken(row):
    return row | dict.fromkeys(MEASURED) | {"failed": "the loss is nan at step 7"}


@pytest.mark.parametrize(("experiment", "name"), [("m", "m"), ("temperature", "temperature"), ("loss", "loss"), ("K", "K")])
def test_runs_that_broke_down_are_marked(experiment, name, rows):
    some = [broken(row) if row["experiment"] == experiment and row["seed"] == 0 else row for row in rows]
    assert "1 of 3 failed" in text_of(PICTURES[name](some))
    assert "of two seeds from one to the other" in text_of(PICTURES[name](some))  # a run that failed is in no bar
    first = next(row for row in rows if row["experiment"] == experiment)
    same = [row for row in rows if all(row[key] == first[key] for key in ("experiment", "mechanism", *VARIED[experiment]))]
    some = [broken(row) if row in same else row for row in rows]
    assert "failed" in text_of(PICTURES[name](some)).split(" | ")


@pytest.mark.parametrize("name", PICTURES)
def test_a_study_that_broke_down_altogether_is_drawn_or_refused_in_words(name, rows):
    with suppress(DataError):
        PICTURES[name]([broken(row) for row in rows])


def test_no_mean_is_taken_over_two_recipes(rows):
    other = [row | {"lr": 0.9} for row in rows if row["experiment"] == "m"]
    with pytest.raises(DataError, match=r"rows of m \(moco\) have lr .+ and 0.9: keep those of one in the file"):
        evidence.accuracy_against_m(rows + other)
    with pytest.raises(DataError, match="data_hash"):
        evidence.losses(rows + [row | {"data_hash": "other"} for row in rows])


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_every_experiment_of_the_plan_is_of_one_recipe(base):
    jobs = plan(base, LABELS, 2)
    for name in dict.fromkeys(job.experiment for job in jobs):
        of_experiment([synthetic(job) for job in jobs if job.experiment == name], name)


def test_a_scoreboard_stands_from_the_floor_to_the_ceiling(rows):
    names = [name for name, _, _ in evidence.score_groups(rows)]
    K = BASES["small"].K
    assert names[:3] == ["raw pixels", "untrained encoder", f"memory bank, K = {K:,}"]
    assert names[3].startswith("end-to-end, K = ")
    assert names[4:] == [f"MoCo, K = {K:,}", "trained with labels"]
    assert "chance" in text_of(evidence.scoreboard(rows))
    assert "chance" not in text_of(evidence.scoreboard([row | {"data": "my.zip"} for row in rows]))


# ---- verdicts


def finding(larger, smaller, within=None):
    return Finding(Claim("", "", ("", {}), ("", {}), within=within), "kNN", larger, smaller)


@pytest.mark.parametrize(
    ("larger", "smaller", "within", "verdict"),
    [
        ([60, 60.2, 60.1], [55, 55.3, 55.1], None, CAME_OUT),
        ([55, 55.3, 55.1], [60, 60.2, 60.1], None, DID_NOT),
        ([60, 54, 57], [55, 56, 54], None, TOO_SMALL),
        ([60], [55], None, TOO_SMALL),
        ([60, 60.1, 60.2], [55], None, TOO_SMALL),
        ([], [55, 56], None, NOT_MEASURED),
        ([60, 60.2, 60.1], [60.3, 60, 60.2], 2, CAME_OUT),
        ([60, 60.2, 60.1], [55, 55.3, 55.1], 2, DID_NOT),
        ([60, 60.2, 60.1], [64, 64.3, 64.1], 2, DID_NOT),
        ([60, 64, 62], [60, 61, 63], 2, TOO_SMALL),
        ([60], [60], 2, TOO_SMALL),
        ([10.0, 10.0], [56.0, 56.0], None, DID_NOT),  # no spread at all
    ],
)
def test_the_verdict_is_that_of_the_interval(larger, smaller, within, verdict):
    assert finding(larger, smaller, within).verdict == verdict


def test_the_interval_of_a_difference_is_welchs():
    a, b = [56.1, 57.0, 56.4, 55.9], [54.0, 55.5, 53.1]
    difference, half = difference_and_interval(a, b)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (difference - half, difference + half) == pytest.approx(tuple(interval))
    assert math.isnan(difference_and_interval(a, b[:1])[1])


def test_every_claim_finds_its_rows_in_the_plan(rows):
    for section in SECTIONS:
        for found in findings(section, rows):
            assert [len(f.larger) for f in found] == [len(f.smaller) for f in found] == [3] * len(found), found[0].claim


def test_a_side_holds_the_rows_of_its_settings(rows):
    section = next(section for section in SECTIONS if section.experiment == "K")
    found = next(f for f in findings(section, rows)[1] if f.measure == "kNN")
    mine = along([row for row in rows if (row["experiment"], row["mechanism"]) == ("K", "moco")], "K")
    assert found.larger == values(mine[16384], field("knn_top1"))
    assert found.smaller == values(mine[1024], field("knn_top1"))


def test_a_training_that_broke_down_is_worth_guessing(rows):
    section = next(section for section in SECTIONS if section.experiment == "m")
    some = [broken(row) if row["m"] == 0 else row for row in rows]
    found = findings(section, some)[0][0]
    assert found.smaller == [10.0] * 3
    assert found.verdict == CAME_OUT


# ---- for the chapters


def test_a_chapter_shows_the_mechanisms_it_has_come_to(monkeypatch, rows, capsys):
    monkeypatch.setattr(evidence, "load_rows", lambda name: [row for row in rows if row["experiment"] == name])
    fig = evidence.measured(evidence.scoreboard, "ceilings", "K", only=("pixels", "untrained", "moco"))
    names = [name for name, _, _ in evidence.score_groups(rows)]
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == [*names[:2], names[4]]
    assert "measured 2026-11-26 with commit abc" in capsys.readouterr().out


def test_without_rows_a_picture_says_so(monkeypatch):
    def nothing(name):
        raise DataError("data/study-cpu.jsonl does not exist")

    monkeypatch.setattr(evidence, "load_rows", nothing)
    fig = evidence.measured(lambda rows: rows[0], "K")
    assert "not measured yet" in fig.texts[0].get_text()
    assert evidence.rows_of("K", "cost") == []


# ---- the page


@pytest.fixture
def redraw(monkeypatch, tmp_path, rows):
    """The command on these rows (by scale), pictures drawn but not rendered; returns its exit status and the page."""

    def redraw(where="docs", **scales):
        data, out = tmp_path / where / "data", tmp_path / where / "pictures"
        data.mkdir(parents=True, exist_ok=True)
        for scale, measured in scales.items():
            (data / f"study-{scale}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
        monkeypatch.setattr(sys, "argv", ["figures", "--data", str(data), "--out", str(out)])
        status, page = figures.main(), tmp_path / where / "RESULTS.md"
        return status, page.read_text() if page.exists() else None

    redraw.folder = tmp_path
    monkeypatch.setattr(figures, "png", lambda figure, _: text_of(figure).encode())  # rendering all takes seconds
    return redraw


def test_the_same_rows_give_the_same_page_and_pictures(redraw, rows, capsys):
    largest = png(evidence.cost(rows), figures.DPI)
    assert largest == png(evidence.cost(rows), figures.DPI)
    assert len(largest) < 100_000
    assert redraw("one", cpu=rows)[0] == 0
    assert f"{len(PICTURES)} pictures in" in capsys.readouterr().out.splitlines()[-1]
    redraw("two", cpu=rows)
    one, two = (sorted(path for path in (redraw.folder / name).rglob("*") if path.is_file()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_the_page_shows_every_claim_its_figures_and_its_picture(redraw, rows):
    _, page = redraw(cpu=rows)
    for section in SECTIONS:
        assert f'### <a id="cpu-{section.experiment}"></a>{section.title}' in page
        for claim in section.claims:
            assert f"**{claim.says}.** There: {claim.there}." in page
    linked = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert len(linked) == len(PICTURES)
    assert all((redraw.folder / "docs" / path).is_file() for path in linked)
    found = next(findings(section, rows)[4][0] for section in SECTIONS if section.experiment == "K")
    (difference, half), line = found.difference, re.search(r"\| linear, % .+", page.split("at the same K (16,384).**")[1])[0]
    assert f"| {difference:+.1f} ± {half:.1f} | 3 | **{found.verdict}** |" in line
    assert "measured 2026-11-26 with commit abc, on a laptop, CIFAR-10, 3 seeds" in page
    assert "nan" not in page


def test_a_processors_rows_and_a_gpus_are_kept_apart(redraw, rows):
    gpu = [row | {"encoder": "resnet18", "hardware": "some card"} for row in rows if row["experiment"] == "m"]
    _, page = redraw(cpu=rows, gpu=gpu)
    processor, card = page.split("## On a GPU")
    assert "some card" not in processor
    assert "a laptop" not in card
    assert "gpu-K" not in card  # not measured there
    assert "study-gpu-m.png" in card
    assert "study-gpu-K.png" not in page
    assert not (redraw.folder / "docs/pictures/study-gpu-K.png").exists()


def test_a_page_of_one_seed_decides_nothing(redraw, rows):
    _, page = redraw(cpu=[row for row in rows if row["seed"] == 0])
    verdicts = set(re.findall(r"\*\*([^*]+)\*\* \|", page))
    assert verdicts == {TOO_SMALL}
    assert "nan" not in page


def test_without_rows_there_is_one_line_and_status_3(redraw, capsys):
    assert redraw() == (3, None)
    error = capsys.readouterr().err
    assert "make it with python -m benchmarks.study" in error
    assert error.count("\n") == 1


def test_where_a_claim_did_not_come_out_the_page_says_why_it_may_be_so(redraw, rows):
    other = [row | {"knn_top1": 100 - row["knn_top1"]} if row["knn_top1"] else row for row in rows]
    other = [row | {"linear_top1": 100 - row["linear_top1"]} if row["linear_top1"] else row for row in other]
    _, page = redraw(cpu=other)
    base = BASES["small"]
    assert page.count("Why it may be otherwise here: ") >= 3
    assert f"a training has {base.epochs * (50_000 // base.batch_size):,} steps" in page
    assert "Why it may be otherwise here" not in redraw("before", cpu=[row for row in rows if row["seed"] == 0])[1]
    for section in SECTIONS:
        own = [row for row in rows if row["experiment"] == section.experiment]
        assert "{" not in section.otherwise.format(**figures.circumstances(own) if section.otherwise else {})


def test_every_measure_is_used():
    used = {name for section in SECTIONS for claim in section.claims for name in claim.measures}
    assert used == set(MEASURES)
    assert set(claims.ACCURACIES) <= used
