"""The chapters as a book that opens from the disk: ``make book``, then build/book/html/index.html.

The outputs are those in the notebooks; nothing is run. Each picture becomes HTML with its alt text, and each slider
moves through the pictures that `make notebooks` has drawn of it.
"""

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

from tutorial_moco.widgets import FRAMES

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = ROOT / "build" / "book"


def page(path: Path) -> nbformat.NotebookNode:
    """A chapter, with its pictures and sliders as HTML."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = {"text/html": picture(output)}
    return book


def picture(output: nbformat.NotebookNode) -> str:
    """A picture with its alt text; under a slider, if it has frames."""
    alt = html.escape(output.metadata.get("image/png", {}).get("alt", ""), quote=True)
    image = f'<img alt="{alt}" src="data:image/png;base64,{output.data["image/png"].strip()}">'
    frames = output.data.get(FRAMES)
    if not frames:
        return f'<figure class="picture">{image}</figure>'
    name, values, start = html.escape(frames["control"]), frames["values"], frames["start"]
    others = "".join(f", with {html.escape(other)} = {html.escape(value)}" for other, value in frames["others"].items())
    slider = f'<input type="range" name="{name}" aria-label="{name}" min="0" max="{len(values) - 1}" value="{start}">'
    pictures = json.dumps({"values": values, "pictures": frames["pictures"]}).replace("<", "\\u003c")
    return (
        f'<figure class="frames"><p class="slider" hidden>{name} {slider}<output aria-live="off"></output></p>{image}'
        f"<p hidden>Moves without a kernel{others}. In Jupyter every control is live.</p>"
        f'<script type="application/json">{pictures}</script></figure>'
    )


def prepare(source: Path) -> None:
    """Everything that Sphinx reads, in one folder."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.write(page(path), source / path.name)
    shutil.copy(HERE / "index.md", source)
    shutil.copytree(ROOT / "docs" / "pictures", source / "pictures")
    results = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    results = re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", results)  # what lies outside the book cannot be linked to
    results = re.sub(r'^(#+ )<a id="([^"]*)"></a>', r"(\2)=\n\1", results, flags=re.M)  # MyST's way to write an anchor
    (source / "RESULTS.md").write_text(results, encoding="utf-8")


def main() -> int:
    """Build; returns Sphinx's exit status. A warning is an error."""
    prepare(OUT / "source")
    status = sphinx(["-q", "-W", "--keep-going", "-E", "-b", "html", "-d", str(OUT / "doctrees"), "-c", str(HERE),
                     str(OUT / "source"), str(OUT / "html")])  # fmt: skip
    if not status:
        print(f"open {os.path.relpath(OUT / 'html' / 'index.html')}")
    return status


if __name__ == "__main__":
    sys.exit(main())
