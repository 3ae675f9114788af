"""The chapters as they are committed: what every one of them has, and that they read well where nothing can be run."""

import base64
import io
import re
from statistics import median

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks import FOLDER, NAMES, cells
from tutorial_moco.widgets import FRAMES

CHAPTERS = [name for name in NAMES if not name.startswith("00")]  # 00 is the way in, and has no exercises
LINES, COLUMNS = 20, 112  # of a code cell, at most: wider ones scroll sideways in JupyterLab on a small screen
BYTES = 2 * 2**20  # of a chapter


@pytest.fixture(scope="module", params=NAMES)
def book(request):
    return nbformat.read(FOLDER / request.param, as_version=4)


def outputs(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def text(name):
    return "\n".join(cells(name, "markdown"))


# As GitHub and JupyterLab read them ----------------------------------------------------------------------------------


def test_it_was_run_from_the_top_in_order_and_nothing_failed(book):
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output.output_type for output in outputs(book)} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(book) if output.output_type == "stream"} <= {"stdout"}


def test_no_widget_is_left_without_its_kernel(book):
    assert "widgets" not in book.metadata
    for output in outputs(book):
        data = output.get("data", {"text/plain": ""})
        assert not any("widget" in kind for kind in data)
        assert "| 0/" not in data["text/plain"]  # a progress bar that stands still


def test_every_picture_has_a_text_and_is_not_blank(book):
    for output in outputs(book):
        if "image/png" in output.get("data", {}):
            assert len(output.metadata["image/png"]["alt"]) > 20
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("L"), dtype=float)
            assert (np.abs(pixels - np.median(pixels)) > 40).mean() > 0.003, output.metadata["image/png"]["alt"]


def test_every_slider_has_a_picture_for_each_value(book):
    for output in outputs(book):
        frames = output.get("data", {}).get(FRAMES)
        if frames:
            assert len(frames["pictures"]) == len(frames["values"])
            assert frames["pictures"][frames["start"]] == output.data["image/png"].strip()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_holds_no_path_of_a_machine(name):
    raw = (FOLDER / name).read_text(encoding="utf-8")
    assert len(raw) <= BYTES
    shown = re.sub(r'"[A-Za-z0-9+/=\\n]{400,}"', '""', raw)  # without the pictures
    assert re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users)/\S*|[A-Z]:\\\\Users", shown) == []


# What a chapter has --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_narrow(name):
    lengths = [len(cell.splitlines()) for cell in cells(name)]
    assert max(lengths) <= LINES
    assert median(lengths) <= 8
    assert [line for cell in cells(name) for line in cell.splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text(name)) if "://" not in target]
    assert [target for target in targets if not (FOLDER / target).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_what_one_will_be_able_to_do_the_time_and_the_needs(name):
    opening = cells(name, "markdown")[0]
    assert opening.startswith(f"# {name[:2]} ")
    for promise in ("**After this chapter you can**", "**Time:**", "**Needs:**"):
        assert promise in opening
    if name in CHAPTERS:
        assert "Before: [" in opening and "Next: " in opening  # noqa: PT018
        assert "Before: [" in cells(name, "markdown")[-1]


@pytest.mark.parametrize("name", CHAPTERS)
def test_it_asks_before_it_answers(name):
    assert len(re.findall(r"\*\*Predict", text(name))) >= 4
    guesses = [number for number, cell in enumerate(cells(name)) if cell.startswith("my_guess =")]
    following = cells(name)
    for number, until in zip(guesses, [*guesses[1:], None], strict=True):  # each guess is compared before the next is asked
        assert any("my_guess" in cell for cell in following[number + 1 : until]), following[number]


@pytest.mark.parametrize("name", CHAPTERS)
def test_exercises_have_minutes_a_hint_and_a_solution(name):
    parts = [cell for cell in cells(name, "markdown") if re.search(r"\*\*\d\. \(\d+ minutes\)", cell)]
    assert 2 <= len(parts) <= 4
    for cell in parts:
        below = text(name)[text(name).index(cell) :]
        hinted = below.partition("<summary>Solution")[0]  # what stands before its own solution
        assert '<summary>Hint: "' in hinted, cell[:80]
    assert text(name).count("<summary>Solution") >= len(parts)


@pytest.mark.parametrize("name", CHAPTERS)
def test_it_ends_with_questions_and_a_summary(name):
    whole = text(name)
    for part in ("## Check yourself", "## Summary", "> **"):  # the last: a card
        assert part in whole
    questions = whole.partition("## Check yourself")[2].partition("\n## ")[0]
    choices = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", questions)
    assert len(choices) >= 6
    assert all(len(said) > 20 for _, said in choices)  # every choice is explained
