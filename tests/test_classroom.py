"""The classroom: student versions from one source, a grader that finds every wrong answer, and messy notebooks rescued."""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install 'tutorial_moco[classroom]'")

from scoring import answers, score

from tutorial_moco import cli, feature_checks, size_checks, version_checks
from tutorial_moco.checks import CheckFailed, TimeLimit, time_limit
from tutorial_moco.classroom import check, exam, kernel, momentum_checks, queue_checks, statistics_checks, step_checks
from tutorial_moco.classroom.exam import Exam
from tutorial_moco.classroom.grade import submissions_of
from tutorial_moco.classroom.release import (
    COURSE,
    LEVELS,
    NAMES,
    points_of,
    read_source,
    solution,
    source_of,
    student_version,
    text_of,
)
from tutorial_moco.classroom.rescue import is_answer, is_test, rescue

ROOT = Path(__file__).parent.parent
COLUMNS = 112  # of a code line: as in the chapters
SLOW = {"A4": "train-hidden"}  # tests that train for half a minute; `make classroom` runs them


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


ANSWERS = [(name, *answer) for name in NAMES for answer in answers(name)]
WRONG = [part for part in ANSWERS if part[1] == "wrong"]
RIGHT = [part for part in ANSWERS if part[1] == "right"]


def label(part):
    return f"{part[0]}-{part[3][:60]}"


# One source ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_the_student_versions_are_what_the_source_makes(name, level):
    path = COURSE / "release" / (name + level) / source_of(name).name
    assert path.read_text() == text_of(student_version(read_source(name), level)), "python -m tutorial_moco.classroom.release"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_student_version_tells_no_secrets(name, level):
    source, release = read_source(name), student_version(read_source(name), level)
    text = "\n".join(cell.source for cell in release.cells)
    assert not re.search("BEGIN|END (SOLUTION|HIDDEN)|exam\\.|For the lecturer|#~", text)
    assert points_of(release) == points_of(source)
    assert max(len(line) for cell in release.cells if cell.cell_type == "code" for line in cell.source.splitlines()) <= COLUMNS
    answers = [cell.source for cell in release.cells if is_answer(cell, "code")]
    solutions = [cell.source for cell in solution(source).cells if is_answer(cell, "code")]
    assert all(answer != right for answer, right in zip(answers, solutions, strict=True))


def test_nbgrader_makes_the_same_from_the_source(tmp_path):
    shutil.copy(COURSE / "nbgrader_config.py", tmp_path)
    (tmp_path / "source").symlink_to(ROOT / COURSE / "source", target_is_directory=True)
    command = [str(Path(sys.executable).with_name("nbgrader")), "generate_assignment", "A2"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    theirs = nbformat.read(tmp_path / "release" / "A2" / source_of("A2").name, as_version=4)
    ours = student_version(read_source("A2"))
    assert [(cell.source, cell.metadata) for cell in theirs.cells] == [(cell.source, cell.metadata) for cell in ours.cells]


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_says_what_it_takes_and_gives(name):
    book = read_source(name)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    said = float(re.search(r"\*\*Points:\*\* (\d+)", text)[1])
    assert said == sum(points_of(book).values())
    low, high = map(int, re.search(r"\*\*Time:\*\* (\d+) to (\d+) minutes", text).groups())
    assert 45 <= low < high <= 90
    tasks = re.findall(r"(?m)^## .*\((\d+) points", text)
    assert sum(map(int, tasks)) == said
    assert text.count("<details><summary>Hint") >= 2
    assert "| points |" in text or "four points" in text  # a rubric for what a person grades


# The grader is itself tested -----------------------------------------------------------------------------------------


def test_there_are_enough_answers_to_try_it_with():
    assert len(WRONG) >= 60
    assert len(RIGHT) >= 12
    assert all(sum(part[0] == name for part in WRONG) >= 10 and sum(part[0] == name for part in RIGHT) >= 2 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_has_full_points(name):
    expected = points_of(read_source(name))
    last = "train-check" if name in SLOW else None
    assert {test: points for test, (points, _) in score(name, upto=last).items()} == {
        test: expected[test] for test in score(name, upto=last)
    }


@pytest.mark.parametrize("part", RIGHT, ids=label)
def test_a_right_answer_in_other_words_has_full_points(part):
    name, _, _, _, code = part
    expected = points_of(read_source(name))
    found = score(name, code, upto="train-check" if name in SLOW else None)
    assert {test: told for test, (points, told) in found.items() if points < expected[test]} == {}


@pytest.mark.parametrize("part", WRONG, ids=label)
def test_a_wrong_answer_loses_points_on_the_test_meant_for_it(part):
    name, _, test, _, code = part
    expected = points_of(read_source(name))
    points, told = score(name, code, upto=test)[test]
    assert points < expected[test]
    assert told.strip()  # and a reason is given


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_student_version_has_no_points(name, level):
    release = student_version(read_source(name), level)
    stubs = "\n\n".join(cell.source for cell in release.cells if is_answer(cell, "code"))
    found = score(name, stubs, upto="train-check" if name in SLOW else None)
    assert {test: told for test, (points, told) in found.items() if points} == {}


# What hidden tests are written with ----------------------------------------------------------------------------------


def test_a_test_that_fails_costs_its_own_points_and_says_why(capsys):
    exam = Exam("anything", seconds=0.2)
    with exam.test(1, "right"):
        exam.equal(1.0, 1.0)
    with exam.test(2, "wrong"):
        exam.equal(1.0, 2.0, "Half of it.")
    with exam.test(2, "endless"):
        while True:
            pass
    with exam.test(2, "stops"):
        raise SystemExit(0)
    with exam.test(2, "gaps"):
        assert 1.0 - ...
    with exam.test(3, "loud"):
        print("x" * 10**6)
    with exam.test(1, "tells"):
        raise ValueError(f"they are {[0.123, -4e-5]} and 7x12")
    assert (exam.points, exam.possible) == (4, 13)
    told = capsys.readouterr().out
    assert "[1 of 1] right\n[0 of 2] wrong: the answer is not right. Half of it.\n[0 of 2] endless: still running" in told
    assert "SystemExit" in told
    assert "still dots" in told
    assert "xx" not in told
    assert "tells: it stopped with ValueError: they are […, …] and …x…" in told


def catches_everything():
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


@time_limit(0.2)
def stopped():
    catches_everything()


def test_code_that_catches_everything_is_stopped_all_the_same():
    with pytest.raises(TimeLimit):
        stopped()


def test_the_file_of_the_secret_is_hidden_from_graded_code(monkeypatch, tmp_path):
    monkeypatch.setattr("tutorial_moco.classroom.grade.grade", lambda *given, hide: {"hidden": [str(path) for path in hide]})
    secret = tmp_path / "secret.txt"
    secret.write_text("of this course")
    words = ["grade", "A2", str(tmp_path), "--secret", str(secret), "--json", str(tmp_path / "told.json")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "told.json").read_text()) == {"hidden": [str(secret)]}


def test_the_secret_decides_the_inputs(monkeypatch):
    first = Exam("A").unit(3, 4)
    assert first.equal(Exam("A").unit(3, 4))
    assert not first.equal(Exam("B").unit(3, 4))
    monkeypatch.setattr(exam, "SECRET", "another")
    assert not first.equal(Exam("A").unit(3, 4))


@pytest.mark.parametrize(
    ("found", "expected", "says"),
    [
        (None, [1.0], "NoneType, not a tensor"),
        ([[1.0]], [1.0], "the shape is (1, 1), not (1,)"),
        ([float("nan")], [1.0], "not finite"),
        ([1.1], [1.0], "not right"),
    ],
)
def test_what_is_not_equal_is_told(found, expected, says):
    import torch

    with pytest.raises(AssertionError, match=re.escape(says)):
        Exam("A").equal(None if found is None else torch.tensor(found), torch.tensor(expected))


# Messy notebooks -----------------------------------------------------------------------------------------------------


def answered(name="A2"):
    """The student version with the solution in it, and its cells by the function they define."""
    book, right = student_version(read_source(name)), solution(read_source(name))
    solutions = [cell.source for cell in right.cells if is_answer(cell, "code")]
    cells = [cell for cell in book.cells if is_answer(cell, "code")]
    for cell, source in zip(cells, solutions, strict=True):
        cell.source = source
    return book, cells


def rescued(book, name="A2"):
    clean, remarks = rescue(book, *(student_version(read_source(name), level) for level in LEVELS))
    return "\n".join(cell.source for cell in clean.cells if cell.cell_type == "code" and not is_test(cell)), remarks


def test_a_tidy_notebook_comes_through_as_it_is():
    book, cells = answered()
    text, remarks = rescued(book)
    assert remarks == []
    assert all(cell.source in text for cell in cells)


def test_cells_that_were_moved_split_and_copied_are_found_by_name():
    book, cells = answered()
    other = [nbformat.v4.new_code_cell(f"{cell.source}\n\nprint('done')") for cell in cells[::-1]]
    stubs = [cell for cell in student_version(read_source("A2")).cells if is_answer(cell, "code")]
    book.cells = [*other, *stubs]  # the answers in new cells and the wrong order, untouched copies after them
    text, remarks = rescued(book)
    assert remarks == []
    assert all(cell.source in text for cell in cells)
    assert "print('done')" not in text


def test_helpers_imports_and_constants_come_along_and_actions_stay_behind():
    book, _cells = answered()
    book.cells.insert(2, nbformat.v4.new_code_cell("import itertools\nSIZE = 3\n%matplotlib inline\n!ls\nwhile True: pass"))
    book.cells.insert(
        3, nbformat.v4.new_code_cell("def rows_of(K):\n    return SIZE * K  # mine\n\nx = open('/etc/passwd').read()")
    )
    text, remarks = rescued(book)
    assert remarks == []
    assert "import itertools" in text
    assert "SIZE = 3" in text
    assert "return SIZE * K  # mine" in text
    assert "while True" not in text
    assert "passwd" not in text
    assert "matplotlib inline" not in text


def test_what_belongs_to_the_assignment_cannot_be_replaced():
    book, cells = answered()
    cells[0].source = "def check_enqueue(yours):\n    print('[OK]')\n\ndef enqueue(queue, pointer, keys):\n    return 0"
    book.cells.append(nbformat.v4.new_code_cell("from tutorial_moco.mechanisms import MoCo\nimport math as torch\nimport os"))
    text, remarks = rescued(book)
    assert "print('[OK]')" not in text
    assert "MoCo" not in text
    assert "as torch" not in text
    assert "import os" in text
    assert len(remarks) == 3
    assert any("check_enqueue" in remark for remark in remarks)


def test_the_images_that_the_assignment_loads_cannot_be_replaced_either():
    """They are made by a call, and the hidden test of a training scores what it learned on them."""
    book, _ = answered("A4")
    book.cells.append(nbformat.v4.new_code_cell("test_set = train_set\nheight = 3"))
    text, remarks = rescued(book, "A4")
    assert "test_set = train_set" not in text
    assert "height = 3" in text
    assert any("your own test_set is left out" in remark for remark in remarks)


def test_what_a_call_makes_outside_of_all_functions_is_told_where_it_is_used():
    book, cells = answered()
    cells[0].source = "helper, unused = torch.arange(9), print(1)\n" + cells[0].source.replace("return", "helper\n    return")
    _, remarks = rescued(book)
    assert len(remarks) == 1
    assert remarks[0].startswith("helper, made by a call outside of all functions, is left out: such are not run. Write it out")
    book, cells = answered("A5")
    (cell,) = [cell for cell in cells if "diagnosis" in cell.source]
    cell.source = 'diagnosis = dict(zip(range(1, 9), "ABCDEFGH"))\ndiagnosis[1] = "B"'
    _, remarks = rescued(book, "A5")
    assert any(remark.startswith("diagnosis, made by a call") for remark in remarks)


def test_a_syntax_error_costs_its_own_cell():
    book, cells = answered()
    cells[1].source = "def oldest(K, batch):\n    return K //"
    text, remarks = rescued(book)
    assert "raise NotImplementedError" in text
    assert cells[0].source in text
    assert any("is left out: invalid syntax in its line 2" in remark for remark in remarks)
    assert any("oldest" in remark for remark in remarks)


def test_written_answers_are_found_in_their_cells_and_elsewhere():
    book, _ = answered()
    written = next(cell for cell in book.cells if is_answer(cell, "markdown"))
    written.source = "(a) 656 MB"
    book.cells.append(nbformat.v4.new_markdown_cell("(b) 256 steps"))
    clean, remarks = rescue(book, student_version(read_source("A2")))
    answer = next(cell for cell in clean.cells if is_answer(cell, "markdown")).source
    assert answer.startswith("(a) 656 MB")
    assert "(b) 256 steps" in answer
    assert len(remarks) == 1


def test_untouched_gaps_are_no_work_and_a_split_answer_is_whole():
    book, cells = answered()
    gaps = student_version(read_source("A2"), "-with-gaps")
    untouched = [cell for cell in gaps.cells if is_answer(cell, "code")]
    written = next(cell for cell in book.cells if is_answer(cell, "markdown"))
    written.source, rest = "(a) 656 MB", nbformat.v4.new_markdown_cell("(b) 256 steps", metadata=written.metadata)
    book.cells += [*untouched, rest]
    text, remarks = rescued(book)
    assert remarks == []
    assert all(cell.source in text for cell in cells)
    clean, _ = rescue(book, student_version(read_source("A2")), gaps)
    assert next(cell for cell in clean.cells if is_answer(cell, "markdown")).source == "(a) 656 MB\n\n(b) 256 steps"


@pytest.mark.parametrize(
    "cell",
    [
        "range = lambda *a: ()",
        "from os import *",
        "def oldest(K, batch):\n    from tutorial_moco.classroom.queue_checks import ring_ages\n    return 1",
    ],
)
def test_ways_around_the_work_are_left_out(cell):
    book, cells = answered()
    cells[1].source = "oldest = None"
    book.cells.append(nbformat.v4.new_code_cell(cell))
    text, remarks = rescued(book)
    assert cell.splitlines()[0] not in text or "ring_ages" not in text
    assert remarks


def test_a_helper_stands_where_its_names_are_known():
    book, _cells = answered()
    book.cells.insert(
        2, nbformat.v4.new_code_cell("class Longer(Queue):\n    pass\n\nSIZE = 2 * 8\n\nif SIZE:\n    import itertools")
    )
    clean, remarks = rescue(book, student_version(read_source("A2")))
    sources = [cell.source for cell in clean.cells]
    assert remarks == []
    assert sources.index("class Longer(Queue):\n    pass") == 1 + next(
        i for i, x in enumerate(sources) if x.startswith("class Queue")
    )
    assert sources.index("SIZE = 2 * 8") < next(i for i, x in enumerate(sources) if x.startswith("def enqueue"))
    assert "import itertools" in sources


@pytest.mark.parametrize(
    ("names", "students"),
    [
        (["ada.ipynb", "ben.ipynb"], ["ada", "ben"]),
        (["class/ada_A2.ipynb", "class/ben_A2.ipynb", "class/.DS_Store", ".DS_Store"], ["ada", "ben"]),
        (["top/ada/A2.ipynb", "top/ben/A2/A2.ipynb"], ["ada", "ben"]),
        (["Ana Li_12_assignsubmission_file_/x.ipynb", "Ben_13_assignsubmission_file_/x.ipynb"], ["Ana-Li_12", "Ben_13"]),
        (["liana_77_5001_A2.ipynb", "liana_77_5002_scan.png", "mo_LATE_78_5003_A2.ipynb"], ["liana_77", "mo_78"]),
        (["MARIA1_A1.ipynb", "MARIA12_A1.ipynb"], ["MARIA12_A1", "MARIA1_A1"]),
        (["Ana Li/a.ipynb", "Ana-Li/a.ipynb"], ["Ana-Li", "Ana-Li_"]),
        (["anna/A2.ipynb", "anna/notes.txt"], ["anna"]),
        (["anna/A2/A2_the_queue.ipynb", "anna/A2/plot.png"], ["anna"]),
        (["top/anna/A2.ipynb", "top/anna/notes.txt"], ["anna"]),
        (["Anna Li_12_assignsubmission_file_/A2.ipynb", "Anna Li_12_assignsubmission_file_/b.png"], ["Anna-Li_12"]),
        (["all/liana_77_5001_A2.ipynb", "all/liana_77_5002_scan.png"], ["liana_77"]),
        (["class/ada_A2.ipynb", "class/readme.txt"], ["ada", "readme"]),
        (["José/a.ipynb", "Jose\u0301/b.ipynb", "x/a.ipynb"], ["José", "x"]),
    ],
)
def test_students_are_told_apart_in_a_zip(names, students, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    assert list(submissions_of(tmp_path / "all.zip", "A2")) == students


# Visible checks ------------------------------------------------------------------------------------------------------


def trained(losses, calls=True):
    """A train that calls what it should as often as it is asked, and returns these losses."""

    def train(images, steps, seed=0):
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
        return encoder, losses

    return train


CHECKED = [  # a check, what a reader may have written, and what it says: never a traceback
    (step_checks.check_train, trained([0.0] * 12), "by these names; yours called them 0 and 0 times"),
    (step_checks.check_train, trained([]), "each a float; yours has 0: none"),
    (step_checks.check_train, trained(None), "a list of 12 losses, not NoneType"),
    (
        step_checks.check_step,
        lambda *given: 0.5,
        r"^moco_step: return \(loss, pointer\), not float\. Read: chapter 04, Rung [^:]*: [^:]*$",
    ),
    (queue_checks.check_ages, lambda K, batch, steps: None, "ages: it returns NoneType"),
    (momentum_checks.check_ema, lambda signal, m: [], "ema: it returns list"),
    (statistics_checks.check_difference, lambda a, b: (3.0, 2.4841) if 7 not in a else 1 / 0, "one side has is to be left out"),
    (feature_checks.check_push, lambda s, t: (s / t).softmax(dim=1), r"the shape is \(5, 12\), not \(5, 11\)"),
    (size_checks.check_hours, lambda *given: torch.ones(3), r"hours: it returns a tensor of shape \(3,\), not one number"),
    (version_checks.check_rate, lambda done, schedule: torch.ones(3), "for steps: it returns a tensor of shape"),
]


@pytest.mark.parametrize(
    ("checked", "yours", "said"), CHECKED, ids=[f"{one.__name__}-{n}" for n, (one, *_) in enumerate(CHECKED)]
)
def test_an_ordinary_mistake_is_a_line_of_the_check(checked, yours, said):
    with pytest.raises(CheckFailed, match=said):
        checked(yours)


def test_numpys_numbers_are_numbers(capsys):
    at_the_ends = {0.0: 0.0, 1.0: math.inf}
    momentum_checks.check_half_life(lambda m: np.float32(at_the_ends[m] if m in at_the_ends else math.log(0.5) / math.log(m)))
    assert "[OK]" in capsys.readouterr().out


# The student's own check ---------------------------------------------------------------------------------------------


def test_check_tells_a_student_what_is_right_and_what_is_not_yet(tmp_path, capsys):
    book, cells = answered()
    cells[1].source = "def oldest(K, batch):\n    return K // batch"
    nbformat.write(book, tmp_path / "mine.ipynb")
    result = check.check("A2", tmp_path / "mine.ipynb")
    told = capsys.readouterr().out
    assert "[OK] 4 of 4 points: enqueue" in told
    assert "[  ] 0 of 1 points: oldest: for K=10 and batches of 4 it is 3, not 2: round up" in told
    assert told.endswith("10 of 11 points of the visible checks; 18 more are given by hidden tests and by hand\n")
    assert (result["points"], result["of"]) == (10, 11)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["A9", "x.ipynb"], "A9 is no assignment: choose one of A1, A2, A3, A4, A5, A6"),
        (["A2", "nowhere.ipynb"], "nowhere.ipynb cannot be read"),
        (["A2", "README.md"], "README.md is not a notebook"),
    ],
)
def test_check_explains_a_mistake_in_one_line(words, says, capsys):
    from tutorial_moco.cli import main

    assert main(["check", *words]) in (2, 3)
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


# The sandbox ---------------------------------------------------------------------------------------------------------


def in_kernel(code):
    """What a cell prints, or its error's name, in the limited kernel."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    check.run(book)
    return "".join(output.get("text", "") or output.get("ename", "") for output in book.cells[0].outputs)


@pytest.mark.skipif(not kernel.isolated(), reason="bubblewrap is not installed")
def test_graded_code_reaches_no_network_no_files_and_no_other_process(tmp_path, monkeypatch):
    # The marker lies where Python does, which is read-only wherever that is; a checkout below /tmp or a home is not even seen.
    secret, marker = ROOT / "build" / "hidden-test", Path(sys.prefix) / "marker-of-a-test"
    secret.mkdir(parents=True, exist_ok=True)
    (secret / "solution.txt").write_text("the solution")
    monkeypatch.setenv(kernel.HIDE, str(secret))
    server = socket.create_server(("127.0.0.1", 0))
    code = f"""
import os, socket
def tried(what):
    try:
        return what()
    except Exception as error:
        return type(error).__name__
print(tried(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)))
print(tried(lambda: open({str(marker)!r}, "w")))
print(os.system("touch {marker}") != 0)
print(os.listdir({str(secret)!r}))
print(len([name for name in os.listdir("/proc") if name.isdigit()]) < 6)
print(os.listdir(os.path.expanduser("~")))
"""
    found = in_kernel(code).split("\n")
    assert found[0] in ("ConnectionRefusedError", "OSError", "TimeoutError")
    assert found[1:5] == ["OSError", "True", "[]", "True"]
    assert not marker.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_graded_code_gets_no_more_memory_than_allowed():
    assert "MemoryError" in in_kernel("x = bytearray(6 * 2**30)")


def test_the_wheel_would_hold_the_assignments():
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-dir"]["tutorial_moco.assignments"] == str(COURSE / "release")
    assert {"tutorial_moco.classroom", "tutorial_moco.assignments"} <= set(setup["packages"])
    assert json.loads((COURSE / "release" / "A1" / source_of("A1").name).read_text())["nbformat"] == 4
