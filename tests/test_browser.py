"""In a real browser: a chapter in JupyterLab and the book; the m and the tau slider are dragged, and the picture follows.

Screenshots of what was seen go to build/screenshots/, to be looked at. Latencies are printed (pytest -s shows them).
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install -e '.[notebooks]'")
CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = [
    pytest.mark.skipif(CHROME is None, reason="no Chromium or Chrome on this machine: apt-get install chromium"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
SLIDERS = [("01_dictionary_lookup", "tau"), ("03_the_momentum_encoder", "m")]
BAR = 150  # ms from the move of a slider to the new picture
SETTINGS = {  # of JupyterLab: no questions about news, every cell in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
# Counts the pictures that are shown in an <img>, with the time since the slider's text last changed.
WATCH = """([image, text]) => {
  const seen = (image.seen = []);
  let moved = null;
  const observer = new MutationObserver(() => { moved = performance.now(); });
  observer.observe(text, {childList: true, characterData: true, subtree: true});
  image.addEventListener("load", () => { if (moved !== null) seen.push(performance.now() - moved); });
}"""

RUN_ALL = """async () => {
  const notebook = window.jupyterapp.shell.currentWidget;
  await notebook.context.ready;
  await notebook.sessionContext.ready;
  await notebook.sessionContext.session.kernel.info;
  await window.jupyterapp.commands.execute("notebook:run-all-cells");
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-background-networking"])
        yield chrome
        chrome.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(20_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab with a copy of the chapters and no network."""
    notebooks, settings = tmp_path / "notebooks", tmp_path / "settings"
    shutil.copytree(ROOT / "notebooks", notebooks)
    for name, content in SETTINGS.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces",
              "JUPYTER_CONFIG_DIR": tmp_path / "config", "JUPYTER_RUNTIME_DIR": tmp_path / "runtime"}  # fmt: skip
    offline = os.pathsep.join([str(ROOT / "tests" / "offline"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {name: str(place) for name, place in places.items()} | {"PYTHONPATH": offline}
    token = secrets.token_hex()
    flags = ["--no-browser", "--allow-root", f"--port={port}", "--port-retries=0", f"--ServerApp.root_dir={notebooks}",
             f"--IdentityProvider.token={token}", "--expose-app-in-browser"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *flags], env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server, tmp_path / "log")
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url, server, log):
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer within a minute: {log.read_text()}")


def drag(page, handle, track, image, text):
    """Drag a handle along its track from end to end; returns the milliseconds from each change of the text to its picture."""
    image.evaluate("image => image.scrollIntoView({block: 'center', behavior: 'instant'})")
    page.wait_for_timeout(1000)  # until the page has come to rest
    page.evaluate(WATCH, [image.element_handle(), text.element_handle()])
    before, box, grip = image.get_attribute("src"), track.bounding_box(), handle.bounding_box()
    y = grip["y"] + grip["height"] / 2
    page.mouse.move(grip["x"] + grip["width"] / 2, y)
    page.mouse.down()
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 0.0):
        page.mouse.move(box["x"] + share * box["width"], y)
        page.wait_for_timeout(400)
    page.mouse.up()
    assert image.get_attribute("src") != before
    return image.evaluate("image => image.seen")


def tell(name, latencies):
    """Print what was measured. The bar is for a quiet machine, and tests run on busy ones: four times as much is a fault."""
    told = f"{median(latencies):.0f} ms in the median, {max(latencies):.0f} at most; the bar is {BAR}"
    print(f"\n{name}: {len(latencies)} pictures, {told}")
    assert len(latencies) >= 4
    assert median(latencies) < 4 * BAR


@pytest.mark.parametrize(("chapter", "name"), SLIDERS)
def test_a_slider_in_jupyterlab(page, lab, chapter, name):
    address, token = lab
    page.goto(f"{address}/lab/tree/{chapter}.ipynb?token={token}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
    page.evaluate(RUN_ALL)
    errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()
    named = page.locator(".widget-hslider", has=page.locator(".widget-label", has_text=re.compile(f"^{name}$")))
    box = page.locator(".widget-vbox", has=named).last
    slider, picture = box.locator(named).first, box.locator("img")
    latencies = drag(
        page, slider.locator(".noUi-handle"), slider.locator(".noUi-base"), picture, slider.locator(".widget-readout")
    )
    page.screenshot(path=SCREENSHOTS / f"lab-{name}.png")
    tell(f"JupyterLab, slider {name}", latencies)
    dark = "'apputils:change-theme', {theme: 'JupyterLab Dark'}"
    page.evaluate(f"async () => {{ await window.jupyterapp.commands.execute({dark}); }}")
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / f"lab-{name}-dark.png")


@pytest.mark.parametrize(("chapter", "name"), SLIDERS)
def test_a_slider_in_the_book(page, html, chapter, name):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((html / f"{chapter}.html").as_uri())
    figure = page.locator("figure.frames", has=page.locator(f"input[name={name}]")).first
    slider, image = figure.locator("input"), figure.locator("img")
    latencies = drag(page, slider, slider, image, figure.locator("output"))
    page.screenshot(path=SCREENSHOTS / f"book-{name}.png")
    tell(f"the book, slider {name}", latencies)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_book_can_be_searched_and_is_readable_in_the_dark(browser, html):
    context = browser.new_context(color_scheme="dark", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto((html / "index.html").as_uri())
    page.fill("input.sidebar-search", "staleness")
    page.press("input.sidebar-search", "Enter")
    page.wait_for_selector("#search-results li a")
    assert "03 The momentum encoder" in page.inner_text("#search-results")
    ink, ground = (page.evaluate(f"() => getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 400 > 150 > sum(map(int, re.findall(r"\d+", ground)[:3]))
    page.goto((html / "01_dictionary_lookup.html").as_uri())
    page.locator(".formula").first.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "book-dark.png")
    context.close()
