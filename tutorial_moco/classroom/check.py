"""``tutorial-moco check A2 my_notebook.ipynb``: the visible feedback of an assignment, without nbgrader.

The student's functions go into a clean copy of the assignment, which is run in a kernel of its own, within limits.
"""

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbformat import NotebookNode

from tutorial_moco.classroom import kernel
from tutorial_moco.classroom.release import LEVELS
from tutorial_moco.classroom.rescue import is_test, read_notebook, rescue
from tutorial_moco.errors import DataError, UsageError

CELL_SECONDS = 300
PACKAGE = Path(__file__).parents[1]
RELEASES = (PACKAGE / "assignments", PACKAGE.parent / "notebooks" / "assignments" / "release")  # in a wheel, in a checkout


def check(assignment: str, path: Path) -> dict[str, object]:
    """Run the visible checks of an assignment on a notebook, and print what came of each.

    Raises:
        UsageError: no such assignment. DataError: the file is missing or no notebook.
    """
    release, *levels = released(assignment)
    try:
        submitted = read_notebook(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{error}: save it in Jupyter as .ipynb") from error
    book, remarks = rescue(submitted, release, *levels)
    for remark in remarks:
        print(f"[! ] {remark}")
    run(book)
    results = [result for cell in book.cells if is_test(cell) if (result := outcome(cell))]
    for result in results:
        mark = "[OK]" if result["points"] else "[  ]"
        print(f"{mark} {result['points']:g} of {result['of']:g} points: {result['says']}")
    later = sum(float(cell.metadata.nbgrader.points) for cell in book.cells if cell.metadata.get("nbgrader", {}).get("grade"))
    seen, of = (sum(result[name] for result in results) for name in ("points", "of"))
    print(f"{seen:g} of {of:g} points of the visible checks; {later - of:g} more are given by hidden tests and by hand")
    return {"assignment": assignment, "points": seen, "of": of, "checks": results, "remarks": remarks}


def released(assignment: str) -> list[NotebookNode]:
    """The students' versions of an assignment, as they come with the package: blank, then with gaps.

    Raises:
        UsageError: there is no such assignment.
    """
    folder = next(place for place in RELEASES if place.is_dir())
    known = sorted(place.name for place in folder.iterdir() if "-" not in place.name and any(place.glob("*.ipynb")))
    if assignment not in known:
        raise UsageError(f"{assignment} is no assignment: choose one of {', '.join(known)}")
    paths = [path for level in LEVELS for path in (folder / (assignment + level)).glob("*.ipynb")]
    return [nbformat.read(path, as_version=4) for path in paths]


def outcome(cell: NotebookNode) -> dict[str, object] | None:
    """Points and message of a visible check that has run; None of one whose tests are hidden."""
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return None
    errors = [output for output in cell.outputs if output.output_type == "error"]
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
    says = printed.strip().removeprefix("[OK] ")
    if errors:
        kind, value = errors[0].ename, errors[0].evalue
        says = (
            value
            if kind == "CheckFailed"
            else "stopped: it took too long"
            if "Timeout" in kind or kind == "KeyboardInterrupt"
            else f"{kind}: {value}"
        )
    of = float(cell.metadata.nbgrader.points)
    return {"id": cell.metadata.nbgrader.grade_id, "points": 0.0 if errors else of, "of": of, "says": says}


def run(book: NotebookNode) -> None:
    """Execute a notebook in the limited kernel; a cell that fails doesn't stop the others.

    Raises:
        DataError: the code ended the kernel itself.
    """
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    with (
        tempfile.TemporaryDirectory(prefix="moco") as folder,
        patch.dict(os.environ, kernel.install(Path(folder))),
    ):
        manager = AsyncKernelManager(
            kernel_name=kernel.NAME, transport=kernel.TRANSPORT, connection_file=os.environ[kernel.CONNECTION]
        )
        client = NotebookClient(book, km=manager, timeout=CELL_SECONDS, allow_errors=True, interrupt_on_timeout=True)
        try:
            client.execute()
        except (DeadKernelError, RuntimeError) as error:
            raise DataError(
                "the code ended Python itself, by os._exit or by asking for too much memory or time: run it cell by cell"
            ) from error
