"""`make classroom`: student versions, the grader's own test, and twelve submissions graded, four of them hostile.

Prints a table of n of n, and leaves the graded class in build/classroom: grades.csv, points.csv, class.html, feedback/.
"""

import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell
from scoring import answers, score
from tqdm.auto import tqdm

from tutorial_moco.classroom import release
from tutorial_moco.classroom.grade import NOT_ISOLATED, grade
from tutorial_moco.classroom.kernel import isolated
from tutorial_moco.classroom.rescue import is_answer, is_test
from tutorial_moco.report import text_table

BUILD = Path("build/classroom")
ASSIGNMENT = "A2"
MARKER, CANARY = Path("/tmp/moco-was-here"), (BUILD / "canary").absolute()  # to be written, to be deleted by who may not


def tried(quick: bool) -> list[list[str]]:
    """For each assignment: solution and untouched version, then wrong and right answers, n of n."""
    table = [["assignment", "solution", "untouched", "wrong answers found", "right answers in full"]]
    for name in tqdm(release.NAMES, desc="wrong and right answers", unit="assignment"):
        expected = release.points_of(release.read_source(name))
        last = "train-check" if quick and name == "A4" else None
        full = {test: points for test, (points, _) in score(name, upto=last).items()}
        stubs = [
            "\n\n".join(
                cell.source
                for cell in release.student_version(release.read_source(name), level).cells
                if is_answer(cell, "code")
            )
            for level in release.LEVELS
        ]
        blank = [sum(points for points, _ in score(name, stub, upto=last).values()) for stub in stubs]
        wrong = [
            score(name, code, upto=test)[test][0] < expected[test] for kind, test, _, code in answers(name) if kind == "wrong"
        ]
        right = [
            all(points == expected[test] for test, (points, _) in score(name, code, upto=last).items())
            for kind, _, _, code in answers(name)
            if kind == "right"
        ]
        possible = sum(expected[test] for test in full)
        table.append(
            [
                name, f"{sum(full.values()):g} of {possible:g}", f"{max(blank):g} of {possible:g}",
                f"{sum(wrong)} of {len(wrong)}", f"{sum(right)} of {len(right)}",
            ]
        )  # fmt: skip
    return table


# A class of twelve ----------------------------------------------------------------------------------------------------


def hand_in(folder: Path) -> dict[str, float | None]:
    """Write twelve submissions; returns the points each should get by tests, None where it is not all or nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    expected: dict[str, float | None] = {}

    def submit(student: str, book, points: float | None, name: str = "A2_the_queue.ipynb") -> None:
        place = folder / student / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(book if isinstance(book, bytes) else nbformat.writes(book).encode())
        expected[student.split("_assignsubmission_")[0].replace(" ", "-")] = points

    full = sum(points for test, points in release.points_of(release.read_source(ASSIGNMENT)).items() if test != "in-words")
    submit("ada", solved()[0], full)
    submit("ben", release.student_version(release.read_source(ASSIGNMENT)), 0)
    submit("Cleo Moodle_4711_assignsubmission_file_", moved(), full)
    submit("dora", overwritten(), full - 9)  # her enqueue always writes at place 0; her own tests say it is fine
    submit("emil", with_syntax_error(), full - 2)
    submit("fay", with_deleted_tests(), full)
    submit("gus", wrong_wrap(), None)
    submit("hana", b"%PDF-1.7 not a notebook", 0, "A2.pdf")
    submit(
        "mal-loop",
        changed("enqueue", "def enqueue(queue, pointer, keys):\n    while True:\n        pass", "while True: pass"),
        None,
    )
    submit("mal-shell", shell(), full)
    submit("mal-flood", flood(), full)
    submit(
        "mal-exit",
        changed("enqueue", "import os\n\n\ndef enqueue(queue, pointer, keys):\n    os._exit(0)", "import os; os._exit(0)"),
        0,
    )
    return expected


def solved():
    """The student version with the solution in it, and its answer cells by name."""
    book = release.student_version(release.read_source(ASSIGNMENT))
    right = [cell.source for cell in release.solution(release.read_source(ASSIGNMENT)).cells if is_answer(cell, "code")]
    cells = [cell for cell in book.cells if is_answer(cell, "code")]
    for cell, source in zip(cells, right, strict=True):
        cell.source = source
    return book, {cell.metadata.nbgrader.grade_id: cell for cell in cells}


def changed(cell: str, source: str, *actions: str):
    """One answer replaced, and cells that do something at their top level."""
    book, cells = solved()
    cells[cell].source = source
    book.cells[3:3] = [new_code_cell(action) for action in actions]
    return book


def moved():
    """Every answer in a new cell, in the wrong order, the untouched cells below as they were."""
    _book, cells = solved()
    sources = [cell.source for cell in cells.values()]
    untouched = release.student_version(release.read_source(ASSIGNMENT))
    untouched.cells[3:3] = [new_code_cell(f"{source}\n\nprint('tried')") for source in reversed(sources)]
    return untouched


def overwritten():
    """The check is replaced by one that is always content, and its cells by ones that pass."""
    code = """
def check_enqueue(yours):
    print('[OK]')


def enqueue(queue, pointer, keys):
    queue[: len(keys)] = keys[: len(queue)]
    return 0
"""
    book, cells = solved()
    cells["enqueue"].source = code
    cells["queue"].source = cells["queue"].source.replace(
        "self.pointer = enqueue(self.keys, self.pointer, keys)",
        "for key in keys:\n            self.keys[self.pointer], self.pointer = key, (self.pointer + 1) % len(self.keys)",
    )
    for cell in book.cells:
        if is_test(cell):
            cell.source = "print('[OK] all right')"
    return book


def with_syntax_error():
    """One answer that does not even parse."""
    return changed("oldest", "def oldest(K, batch)\n    return K / / batch")


def with_deleted_tests():
    """All tests and texts deleted, duplicated ids, only code left."""
    book, _cells = solved()
    book.cells = [cell for cell in book.cells if is_answer(cell, "code")] * 2
    return book


def wrong_wrap():
    """Keys that do not fit at the end are dropped."""
    return changed(
        "enqueue", next(code for kind, _, what, code in answers(ASSIGNMENT) if kind == "wrong" and "are dropped" in what)
    )


def shell():
    """Runs shell commands, writes and deletes files, reads the solution, asks the network; and answers rightly.

    What it would destroy is one file made for it: where there is no sandbox, it gets to it.
    """
    book, cells = solved()
    theft = f"""
import os
import urllib.request


def steal():
    if os.path.exists("/tmp/tried"):
        return
    open("/tmp/tried", "w").close()
    os.system("touch {MARKER}; rm -f {CANARY}; cat {Path.cwd()}/notebooks/assignments/source/A2/*")
    try:
        urllib.request.urlopen("http://example.com", timeout=1)
    except OSError:
        pass
"""
    cells["enqueue"].source = theft + cells["enqueue"].source.replace("    K, N =", "    steal()\n    K, N =", 1)
    book.cells.insert(3, new_code_cell(f"os.system('touch {MARKER}')"))
    return book


def flood():
    """Prints without end, at the top level and in a function."""
    book, cells = solved()
    cells["oldest"].source = cells["oldest"].source.replace("    return", "    print('x' * 10_000_000)\n    return", 1)
    book.cells.insert(3, new_code_cell("for _ in range(10**9):\n    print('x' * 10**6)"))
    book.cells.append(new_markdown_cell("x" * 10**6))
    return book


def main() -> int:
    """All of it; returns 1 if something is not as it should be."""
    quick = "--quick" in sys.argv
    release.main()
    with contextlib.redirect_stdout(io.StringIO()):  # what the answers themselves print
        table = tried(quick)
    print(text_table(table))
    began = time.perf_counter()
    expected = hand_in(BUILD / "submitted")
    MARKER.unlink(missing_ok=True)
    CANARY.write_text("a file that no submission may delete")
    result = grade(ASSIGNMENT, BUILD / "submitted", BUILD / "graded", release.COURSE, "a secret of this test")
    found = {student: row["points"] for student, row in result["students"].items()}
    print(
        text_table(
            [["student", "points", "expected"]]
            + [[name, f"{found[name]:g}", "" if of is None else f"{of:g}"] for name, of in sorted(expected.items())]
        )
    )
    wrong = {name: found.get(name) for name, of in expected.items() if of is not None and found.get(name) != of}
    bad = [
        row
        for row in table[1:]
        if any(cell.split(" of ")[0] != cell.split(" of ")[1] for cell in (row[1], *row[3:])) or not row[2].startswith("0 ")
    ]
    print(f"{len(expected) - len(wrong)} of {len(expected)} graded as expected, in {time.perf_counter() - began:.0f} s")
    escaped = MARKER.exists() or not CANARY.exists()
    if escaped:
        told = "a submission has written or deleted outside its sandbox" if isolated() else f"not tested: {NOT_ISOLATED}"
        print(told)
    return int(bool(wrong or bad or (escaped and isolated())))


if __name__ == "__main__":
    sys.exit(main())
