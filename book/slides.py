"""Slides of chapters 01 to 05: ``make slides``, then build/slides/01_dictionary_lookup.slides.html.

nbconvert's slides, from the notebooks' committed outputs. A slide shows a heading, what is asked, formulas, short code,
pictures and sliders; the rest of the prose is in the speaker's notes (press S). They open from the disk, without network.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import sphinx_revealjs
from latex2mathml.converter import convert
from nbconvert import SlidesExporter
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

from build import HERE, ROOT, page

OUT = ROOT / "build" / "slides"
CHAPTERS = ("01", "02", "03", "04", "05")
SKIPPED = ("Exercises", "Check yourself", "More to try")  # sections
ROOM, PICTURE, WIDTH = 15, 11, 78  # lines of text on a slide, that a picture takes, characters in one
LONGEST_CODE, LONGEST_TEXT = 14, 45  # lines of a cell, words of a paragraph that still go on a slide


def slides(path: Path) -> nbformat.NotebookNode:
    """A chapter whose cells say where they go: a slide, one below it, the notes, or nowhere."""
    book, cells = page(path), []
    skipping, used = False, 0
    for cell in sections(book.cells):
        heading = re.match(r"#+ (.*)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            skipping = heading[1].startswith(SKIPPED)
        if skipping or (cell.cell_type == "code" and not shown(cell)):
            continue
        for piece in pieces(cell):
            kind = piece.metadata.pop("goes", None)
            size = height(piece)
            if kind == "slide":
                used = size
            elif kind is None and used + size > ROOM and used > 2:
                kind, used = "subslide", size
            elif kind is None:
                used += size
            piece.metadata.slideshow = {"slide_type": kind or "-"}
            cells.append(piece)
    book.cells = cells
    return book


def sections(cells):
    """The cells, those of text cut where a heading begins."""
    for cell in cells:
        if cell.cell_type == "code":
            yield cell
            continue
        for part in re.split(r"(?m)^(?=#+ )", cell.source):
            if part.strip():
                yield new_markdown_cell(part.strip())


def shown(cell: nbformat.NotebookNode) -> bool:
    """Whether a code cell goes on a slide: not imports, not what a reader fills in."""
    return not re.match(r"(# Where the package|# your work|import |from )", cell.source) and "TRAIN =" not in cell.source


def pieces(cell: nbformat.NotebookNode):
    """A markdown cell as what is shown and what is said; a code cell as it is, without code that is long."""
    if cell.cell_type == "code":
        cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if len(cell.source.splitlines()) > LONGEST_CODE or any(
            "text/html" in output.get("data", {}) for output in cell.outputs
        ):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "no-input"]
        yield cell
        return
    text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.S)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    show = [part for part in paragraphs if goes_up(part)]
    said = [part for part in paragraphs if not goes_up(part)]
    if show:
        kind = {"goes": "slide"} if show[0].startswith("#") else {}
        yield new_markdown_cell(with_mathml("\n\n".join(show)), metadata=kind)
    if said:
        yield new_markdown_cell(with_mathml("\n\n".join(said)), metadata={"goes": "notes"})


def goes_up(paragraph: str) -> bool:
    """Headings, questions, formulas, lists, tables and cards go on the slide, and paragraphs that are short."""
    return bool(re.match(r"(#|\*\*Predict|\$\$|- |\d\. |\||>)", paragraph)) or len(paragraph.split()) <= LONGEST_TEXT


def height(cell: nbformat.NotebookNode) -> int:
    """About how many lines it takes."""
    text = (
        sum(1 + len(line) // WIDTH for line in cell.source.splitlines())
        if "no-input" not in cell.metadata.get("tags", [])
        else 0
    )
    if cell.cell_type == "markdown":
        return len(re.sub(r"<math.*?</math>", "xxxxxxxx", cell.source, flags=re.S)) // WIDTH + cell.source.count("\n") + 1
    for output in cell.outputs:
        told = output.get("text", "")
        text += PICTURE if "text/html" in output.get("data", {}) else len(told.splitlines())
    return text


def with_mathml(text: str) -> str:
    """Formulas as MathML, which browsers draw themselves; code stays."""

    def formula(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        block = found["block"]
        made = convert(block or found["inline"], display="block" if block else "inline")
        return f'<div class="formula">{made}</div>' if block else made

    pattern = r"(?P<code>```.*?```|`[^`]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?(?:\n[^$\n]+?)?)\$"
    return re.sub(pattern, formula, text, flags=re.S)


def main() -> int:
    """Make all; returns 0."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    shutil.copytree(Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs", OUT / "reveal.js")
    for name in ("slides.css", "frames.js", "book.css"):
        shutil.copy(HERE / "static" / name, OUT)
    exporter = SlidesExporter(
        config=Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"no-input"}}}),
        template_name="slides", extra_template_basedirs=[str(HERE)], reveal_url_prefix="reveal.js", reveal_theme="white",
    )  # fmt: skip
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.name[:2] in CHAPTERS:
            html, _ = exporter.from_notebook_node(slides(path), resources={"metadata": {"name": path.stem}})
            (OUT / f"{path.stem}.slides.html").write_text(html, encoding="utf-8")
            print(f"open {os.path.relpath(OUT / f'{path.stem}.slides.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
