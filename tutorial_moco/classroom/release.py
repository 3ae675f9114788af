"""What students get, and the lecturer's solutions, from one source: ``python -m tutorial_moco.classroom.release``.

An assignment's source is a notebook of nbgrader's kind: solutions are between ``### BEGIN SOLUTION`` and ``### END SOLUTION``,
hidden tests between ``### BEGIN HIDDEN TESTS`` and ``### END HIDDEN TESTS``, cells tagged ``lecturer`` are notes. A line of
a solution that ends in ``#~ code`` is ``code`` in the version with gaps, and in a cell tagged ``given`` (code to mend) in
both versions. nbgrader's own preprocessors do the rest; what is
made here is what ``nbgrader generate_assignment`` makes, and a test compares the two.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

COURSE = Path("notebooks/assignments")
NAMES = ("A1", "A2", "A3", "A4", "A5", "A6")
LEVELS = {"": "blank", "-with-gaps": "with gaps"}  # suffix of the folder, what it holds
STUB = "raise NotImplementedError  # your code"
GIVEN = "given"
BEGIN, END, GAP = "### BEGIN SOLUTION", "### END SOLUTION", re.compile(r"\s*#~ ?(.*)$")


def student_version(source: NotebookNode, level: str = "") -> NotebookNode:
    """The notebook that students get: solutions are stubs, or have gaps; hidden tests and lecturer's notes are out."""
    from nbconvert.preprocessors import TagRemovePreprocessor
    from nbgrader.preprocessors import ClearHiddenTests, ClearMarkScheme, ClearOutput, ComputeChecksums, LockCells
    from traitlets.config import Config

    from tutorial_moco.classroom.preprocess import Stubs

    config = Config({"TagRemovePreprocessor": {"remove_cell_tags": {"lecturer"}}, "Stubs": {"gaps": bool(level)}})
    book = nbformat.from_dict(source)
    for step in (TagRemovePreprocessor, LockCells, Stubs, ClearOutput, ClearHiddenTests, ClearMarkScheme, ComputeChecksums):
        book, _ = step(config=config, enabled=True).preprocess(book, {})
    return book


def solution(source: NotebookNode) -> NotebookNode:
    """The source as a person reads it: solutions and hidden tests in place, without the marks of the gaps."""
    book = nbformat.from_dict(source)
    for cell in book.cells:
        if cell.cell_type == "code":
            lines = [GAP.sub("", line) for line in cell.source.splitlines() if line.strip() not in (BEGIN, END)]
            cell.source = "\n".join(lines)
    return book


def with_gaps(code: str) -> str:
    """A cell in which the lines of its solution that have gaps show them, and the others are given."""
    lines, inside = [], False
    for line in code.splitlines():
        if line.strip() in (BEGIN, END):
            inside = line.strip() == BEGIN
        elif inside and (gap := GAP.search(line)):
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + gap.group(1)] if gap.group(1) else []
        else:
            lines.append(line)
    return "\n".join(lines)


def source_of(name: str, course: Path = COURSE) -> Path:
    """The one notebook of an assignment's source.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted((course / "source" / name).glob("*.ipynb"))
    if len(found) != 1:
        raise FileNotFoundError(f"{course / 'source' / name} should hold one notebook, and holds {len(found)}")
    return found[0]


def read_source(name: str, course: Path = COURSE) -> NotebookNode:
    """An assignment's source."""
    return nbformat.read(source_of(name, course), as_version=4)


def points_of(book: NotebookNode) -> dict[str, float]:
    """Points of each cell that gives some, by its id, in order."""
    marks = [cell.metadata.get("nbgrader", {}) for cell in book.cells]
    return {mark["grade_id"]: float(mark["points"]) for mark in marks if mark.get("grade")}


def text_of(book: NotebookNode) -> str:
    """The notebook as a file."""
    return nbformat.writes(book) + "\n"


def main(course: Path = COURSE) -> None:
    """Write all student versions."""
    for name in NAMES:
        if not (course / "source" / name).exists():
            continue
        source = read_source(name, course)
        for suffix, level in LEVELS.items():
            path = course / "release" / (name + suffix) / source_of(name, course).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text_of(student_version(source, suffix)), encoding="utf-8")
            print(f"{path}  ({level})")


if __name__ == "__main__":
    sys.exit(main())
