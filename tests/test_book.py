"""The book, built once from the notebooks: no warning, nothing from the network, alt text, sliders with all their pictures."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from notebooks import FOLDER, NAMES, cells
from tutorial_moco.widgets import FRAMES

LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}  # what a browser fetches by itself


class Page(HTMLParser):
    """What a page loads, its pictures, its formulas, and where its links lead."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded, self.pictures, self.links, self.titles, self.formulas = [], [], [], 0, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get(LOADED.get(tag)):
            self.loaded.append(attrs[LOADED[tag]])
        if tag == "img":
            self.pictures.append(attrs)
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        self.titles += tag == "h1"
        self.formulas += tag == "math"


@pytest.fixture(scope="module")
def pages(html):
    return {path.stem: Page(path) for path in html.glob("*.html")}


def test_every_chapter_is_a_page_with_one_title(pages):
    assert {Path(name).stem for name in NAMES} <= set(pages)
    written = [*(Path(name).stem for name in NAMES), "index", "RESULTS"]
    assert {name: pages[name].titles for name in written} == dict.fromkeys(written, 1)


def test_nothing_is_loaded_from_the_network(pages, html):
    loaded = [address for page in pages.values() for address in page.loaded if not address.startswith(("data:", "#"))]
    assert loaded
    for address in loaded:
        assert "://" not in address
        assert not address.startswith("//")
        assert (html / address.partition("?")[0]).exists(), address
    styles = "".join(path.read_text(encoding="utf-8") for path in html.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//", styles) == []


def test_links_within_the_book_lead_somewhere(pages, html):
    for name, page in pages.items():
        for link in page.links:
            target = link.partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:"):
                assert (html / target).exists(), f"{name}: {link}"


def test_every_picture_has_a_text(pages):
    chapters = [pages[Path(name).stem] for name in NAMES]
    assert sum(len(page.pictures) for page in chapters) > 60
    for page in chapters:
        assert [picture for picture in page.pictures if not picture.get("alt")] == []


def test_every_formula_was_turned(pages, html):
    for name in NAMES:
        written = sum(len(re.findall(r"\$[^$]+\$", cell)) for cell in cells(name, "markdown"))
        assert (pages[Path(name).stem].formulas > 0) == (written > 0)
        assert "$$" not in (html / f"{Path(name).stem}.html").read_text(encoding="utf-8")


def test_every_slider_has_its_pictures(html):
    sliders = 0
    for name in NAMES:
        outputs = [output for cell in nbformat.read(FOLDER / name, 4).cells for output in cell.get("outputs", ())]
        drawn = [output.data[FRAMES] for output in outputs if FRAMES in output.get("data", {})]
        text = (html / f"{Path(name).stem}.html").read_text(encoding="utf-8")
        found = [json.loads(part) for part in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        assert [frames["values"] for frames in found] == [frames["values"] for frames in drawn]
        for frames in found:
            assert len(frames["pictures"]) == len(frames["values"]) >= 2
            assert len(set(frames["pictures"])) == len(frames["pictures"])  # each value has a picture of its own
        sliders += len(found)
    assert sliders >= 10


def test_it_can_be_searched(html):
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    assert '"queue"' in index or "queue:" in index
    assert '"momentum"' in index or "momentum:" in index
