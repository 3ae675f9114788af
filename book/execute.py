"""Run the notebooks in order and write their outputs, such that they read well where nothing can be run.

`make notebooks` runs them on the images of $TUTORIAL_MOCO_DATA, on CIFAR-10 if it is not set. Live widgets are left out of
what is saved, since without their kernel they show an error; each has its first picture beside it. Progress bars go too.

``python book/execute.py --train`` tries the other way through the chapters, TRAIN = True in each; it writes what comes of it
to build/trained/ and leaves the chapters as they are.
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
TRAINED = NOTEBOOKS.parent / "build" / "trained"


def execute(path: Path, train: bool = False) -> None:
    """Run a notebook from the top in a fresh kernel and write it back; nothing is written if a cell fails."""
    book = nbformat.read(path, as_version=4)
    into = path
    if train:
        switch_on(book)
        TRAINED.mkdir(parents=True, exist_ok=True)
        into = TRAINED / path.name
    began = time.perf_counter()
    NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    strip(book)
    text = nbformat.writes(book)
    complain(path, text)
    into.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {time.perf_counter() - began:.0f} s, {len(text) / 1024:,.0f} kB", flush=True)


def switch_on(book: nbformat.NotebookNode) -> None:
    """Set the one switch of a chapter, where it has one, as a reader would."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^TRAIN = False\b", "TRAIN = True", cell.source, flags=re.M)


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
    parser.add_argument("--train", action="store_true", help="with TRAIN = True, to build/trained/ instead (an hour for all)")
    asked = parser.parse_args()
    os.environ["TUTORIAL_MOCO_FRAMES"] = "1"  # the book's sliders need every picture
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not asked.names or path.name.startswith(tuple(asked.names)):
            try:
                execute(path, asked.train)
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
