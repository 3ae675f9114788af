"""Run the notebooks in order and write their outputs, such that they read well where nothing can be run.

`make notebooks` runs them on the images of $TUTORIAL_MOCO_DATA, on CIFAR-10 if it is not set. Live widgets are left out of
what is saved, since without their kernel they show an error; each has its first picture beside it. Progress bars go too.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT = 2 * 2**20  # bytes of a chapter with its outputs


def execute(path: Path) -> None:
    """Run a notebook from the top in a fresh kernel and write it back; it stays as it was if a cell fails."""
    book = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    strip(book)
    text = nbformat.writes(book)
    complain(path, text)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {time.perf_counter() - began:.0f} s, {len(text) / 1024:,.0f} kB")


def strip(book: nbformat.NotebookNode) -> None:
    """Take out what is of no use without the kernel, and what differs from run to run for no reason."""
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                     "language_info": {"name": "python"}}  # fmt: skip
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number:03}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and not is_bar(output)]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)


def is_bar(output: nbformat.NotebookNode) -> bool:
    """A widget without a picture beside it: a progress bar, which would stand at 0 % for ever."""
    return WIDGET in output.get("data", {}) and "image/png" not in output.data


def complain(path: Path, text: str) -> None:
    """What must not be in a chapter that others read."""
    for here in {str(Path.home()), str(NOTEBOOKS.parent.resolve()), str(Path(sys.prefix).resolve())}:
        if len(here) > 1 and re.search(re.escape(here) + r"\b", text):
            raise SystemExit(f"{path.name}: an output holds the path {here} of this machine")
    if len(text) > LIMIT:
        raise SystemExit(f"{path.name}: {len(text) / 2**20:.1f} MiB with its outputs, more than {LIMIT / 2**20:.0f}")


def main() -> int:
    """Run all notebooks, or those whose names begin as given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 01; all if left out")
    names = parser.parse_args().names
    os.environ["TUTORIAL_MOCO_FRAMES"] = "1"  # the book's sliders need every picture
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.name.startswith(tuple(names)):
            try:
                execute(path)
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
