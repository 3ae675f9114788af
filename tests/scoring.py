"""Points of answers to an assignment, in this process: its source is run cell by cell, with these answers in their places."""

import ast
import contextlib
import io
import re
from pathlib import Path

import matplotlib

from tutorial_moco.checks import CheckFailed
from tutorial_moco.classroom.release import read_source, solution
from tutorial_moco.classroom.rescue import is_answer, is_test, parts_of

matplotlib.use("Agg")


def answers(name: str) -> list[tuple[str, str, str, str]]:
    """(wrong or right, test, what, code) of each answer to an assignment in tests/answers."""
    text = (Path(__file__).parent / "answers" / f"{name}.py").read_text()
    found = re.findall(r"^# (wrong|right)(?: \[(.*?)\])?: ([^\n]*)\n(.*?)(?=^# (?:wrong|right)|\Z)", text, re.S | re.M)
    return [(*head, edited(name, code) if code.startswith("# - ") else code) for *head, code in found]


def edited(name: str, edits: str) -> str:
    """The solution's cell with some lines out (``# -``, which each occur once) and others in their place (``# +``)."""
    changes = re.findall(r"^# - (.*)\n((?:# \+ .*\n?)*)", edits, re.M)
    cells = [cell.source for cell in solution(read_source(name)).cells if is_answer(cell, "code")]
    [cell] = [f"{cell}\n" for cell in cells if changes[0][0] in cell]
    for old, new in changes:
        [line] = [line for line in cell.splitlines() if line.strip() == old]
        indent = line[: len(line) - len(old)]
        cell = cell.replace(line + "\n", "".join(f"{indent}{put[4:]}\n" for put in new.splitlines()))
    return cell


def score(name: str, answers: str = "", *, upto: str | None = None, figures: bool = False) -> dict[str, tuple[float, str]]:
    """Points and printed text of each test cell, by its id, up to one of them.

    Args:
        answers: code whose definitions take the place of the solution's of the same name.
        figures: also run the cells that only draw.
    """
    own = dict(parts_of(answers))
    names: dict[str, object] = {"__name__": "assignment"}
    found = {}
    for cell in solution(read_source(name)).cells:
        if cell.cell_type != "code":
            continue
        if is_answer(cell, "code"):
            mine = [part.text for defined, part in parts_of(cell.source) if defined in own]
            exec(answers if mine else cell.source, names)
        elif is_test(cell):
            mark = cell.metadata.nbgrader
            found[mark.grade_id] = run_test(cell.source, names, mark.points)
            if mark.grade_id == upto:
                break
        elif figures or not found:  # the first is the imports
            exec(cell.source, names)
    return found


def run_test(code: str, names: dict, points: float) -> tuple[float, str]:
    """A test cell's points as nbgrader counts them, and what it printed or why it failed."""
    tree, printed, last = ast.parse(code), io.StringIO(), None
    value = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, "test", "exec"), names)
            last = eval(compile(value, "test", "eval"), names) if value else None
    except CheckFailed as error:
        return 0.0, str(error)
    return (float(last) if isinstance(last, int | float) else float(points)), printed.getvalue()
