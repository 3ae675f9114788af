"""What tests need of a notebook: its cells, and its functions without its runs."""

import ast
import json
from pathlib import Path

import pytest

from tutorial_moco.checks import CheckFailed

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name: str, kind: str = "code") -> list[str]:
    """The sources of a notebook's cells of a kind (code or markdown), in order."""
    book = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def functions_of(name: str) -> dict[str, object]:
    """All functions and classes that a notebook's cells define, with its imports, and nothing of it run.

    Of a name that is defined twice the first stays: what the reader builds by hand, before the package's takes its place.
    """
    tree = ast.parse("\n".join(line for cell in cells(name) for line in cell.splitlines() if not line.startswith(("%", "!"))))
    kept, built = [], set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in built:
            built.add(node.name)
            kept.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) not in built]
            kept += [node] if node.names else []
    namespace: dict[str, object] = {"__name__": name}
    exec(compile(ast.Module(kept, []), name, "exec"), namespace)
    return namespace


def checks_as_tests(checks: dict[str, tuple], chapter: str) -> tuple:
    """Two tests for a chapter's checks: what is right passes, and each known mistake is named.

    Args:
        checks: from a name to the check, wrong answers by the words that name their mistake, and a right answer.
    """

    @pytest.mark.parametrize("name", checks)
    def passes(name, capsys):
        check, _, right = checks[name]
        check(right)
        assert capsys.readouterr().out.startswith("[OK]")

    @pytest.mark.parametrize(
        ("name", "mistake"), [(name, wrong) for name, (_, wrongs, _) in checks.items() for wrong in wrongs]
    )
    def names(name, mistake):
        check, wrong, _ = checks[name]
        with pytest.raises(CheckFailed, match=mistake) as caught:
            check(wrong[mistake])
        assert f"Read: chapter {chapter}" in str(caught.value)

    return passes, names
