"""Run a chapter with its solutions in place, twice, and compare every text: ``python tests/solved.py FOLDER 04_moco.ipynb``.

"Restart and Run All, twice": the first run is kept in the folder, the second is nbval's. A cell marked NBVAL_CHECK_OUTPUT
must print what it prints in the repository, whatever the images and the machine.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from notebooks import FOLDER, NAMES

WORK, EXACT = "# your work", "# NBVAL_CHECK_OUTPUT"
OFFLINE = "import socket\nassert socket.socket.connect.__module__ == 'sitecustomize', 'set PYTHONPATH to tests/offline'"


def solved(name: str) -> nbformat.NotebookNode:
    """A chapter in which the code of each folded solution stands in the cell for the reader's work, or follows the text."""
    book = nbformat.read(FOLDER / name, as_version=4)
    cells, todo = [], ""
    for cell in book.cells:
        if todo and cell.cell_type == "code" and WORK in cell.source:
            cell.source, todo = f"{cell.source}\n{todo}", ""
        elif todo:
            cells.append(nbformat.v4.new_code_cell(todo))
            todo = ""
        cells.append(cell)
        if cell.cell_type == "markdown":
            assert not todo, f"{name}: a solution was lost before {cell.source[:60]}"
            folded = re.findall(r"<details><summary>Solution.*?</details>", cell.source, re.S)
            todo = "\n".join(code for part in folded for code in re.findall(r"```python\n(.*?)```", part, re.S))
    assert not todo, f"{name}: the last solution has no cell after it"
    book.cells = [nbformat.v4.new_code_cell(OFFLINE), *cells]
    return book


def text_of(cell: nbformat.NotebookNode) -> str:
    """All that a cell has printed, streams that were cut in pieces joined."""
    return "".join(output.get("text", "") for output in cell.outputs)


def run(name: str, folder: Path) -> None:
    """Run a solved chapter and write it to the folder. Raises AssertionError or nbclient's error of the cell that fails."""
    book = solved(name)
    told = {id(cell): text_of(cell) for cell in book.cells if cell.cell_type == "code" and EXACT in cell.source}
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code" and EXACT in cell.source:
            before = told[id(cell)]
            assert text_of(cell) == before, f"it prints\n{text_of(cell)}\nand in the repository it is\n{before}"
    book.metadata.pop("widgets", None)
    nbformat.write(book, folder / name)


def run_again(path: Path) -> str:
    """Run a chapter under nbval, which compares the texts; returns its last line. Raises AssertionError with all it said."""
    words = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1].strip("= ")


def twice(name: str, folder: Path) -> bool:
    """Both runs of a chapter; prints what came of them, and says whether all is well."""
    began = time.perf_counter()
    try:
        run(name, folder)
        first = time.perf_counter() - began
        print(f"{name}: {first:.0f} s, again under nbval: {run_again(folder / name)}", flush=True)
    except (AssertionError, CellExecutionError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def main() -> int:
    """Returns the exit status: 0, or 1 if a chapter failed; the others run all the same. All of them if none is named."""
    folder, names = Path(sys.argv[1]), sys.argv[2:] or NAMES
    folder.mkdir(parents=True, exist_ok=True)
    well = [twice(name, folder) for name in names]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
