"""Run every chapter with its solutions in place, and keep the outputs: ``python tests/solved.py FOLDER``.

The first half of "Restart and Run All, twice": `pytest --nbval FOLDER` then runs all again and compares every text. A cell
marked NBVAL_CHECK_OUTPUT must print what it prints in the repository, whatever the images and the machine.
"""

import re
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
    """Run a solved chapter and write it to the folder."""
    book, began = solved(name), time.perf_counter()
    told = {id(cell): text_of(cell) for cell in book.cells if cell.cell_type == "code" and EXACT in cell.source}
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code" and EXACT in cell.source and text_of(cell) != told[id(cell)]:
            raise SystemExit(f"{name} prints\n{text_of(cell)}\nand in the repository it is\n{told[id(cell)]}")
    book.metadata.pop("widgets", None)
    nbformat.write(book, folder / name)
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        try:
            run(name, folder)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
