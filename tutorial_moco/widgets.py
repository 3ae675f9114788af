"""Pictures and sliders in a notebook. What is drawn is decided elsewhere: a slider is a pure function and a thin widget.

Everything shown is a PNG with alt text, so that a notebook reads the same on GitHub, in a book and where no widget can be
shown; where there is a kernel the same cell is live.
"""

import asyncio
import base64
import gc
import os
from collections.abc import Callable, Iterator, Sequence

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from tutorial_moco.report import png

FRAMES = "application/vnd.tutorial-moco.frames+json"  # a slider's pictures, for the book, which has no kernel
DPI = 100
COLOURS = 64  # of a slider's saved pictures: a chapter holds dozens


def show(figure: Figure, alt: str) -> None:
    """Display a figure with a text for those who cannot see it."""
    display({"image/png": _base64(figure), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def explore(draw: Callable[..., Figure], alt: str, start: dict[str, object] | None = None, **controls: Sequence) -> None:
    """Show ``draw(**state)`` with a control for each argument: a slider over numbers, buttons for words.

    A move redraws at once. The front end sends one value at a time and keeps only the last of those that come meanwhile,
    so that drags do not queue up. Objects that live now are left out of Python's garbage collections until the next call:
    a collection during a drag would be felt.

    Args:
        draw: pure; under 100 ms, or the picture lags behind the hand.
        alt: what the picture shows, for those who cannot see it.
        start: values to begin with; the middle ones if left out.
        controls: for each argument of draw the values it can take, in order.
    """
    state = {name: (start or {}).get(name, values[len(values) // 2]) for name, values in controls.items()}
    first = draw(**state)
    picture = widgets.Image(value=png(first, DPI), format="png")
    picture.layout = {"max_width": "100%", "align_self": "flex-start"}  # not stretched to the width of the box

    def moved(change: dict) -> None:
        state[change["owner"].description] = change["new"]
        picture.value = png(draw(**state), DPI)

    knobs = [_control(name, values, state[name]) for name, values in controls.items()]
    for knob in knobs:
        knob.observe(moved, "value")
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # else a collection in the middle of a drag walks through all of torch, which takes longer than the drawing
    _display(widgets.VBox([*knobs, picture]), _base64(first, COLOURS), alt, lambda: _frames(draw, state, controls))


def live(
    steps: Callable[..., Iterator[Figure]], alt: str, start: dict[str, object] | None = None, **controls: Sequence
) -> None:
    """Controls, a button that starts ``steps(**state)``, a bar, and a button that stops it: for what takes seconds.

    Args:
        steps: a generator of (share done, figure); it gives way to the notebook after each.
    """
    state = {name: (start or {}).get(name, values[len(values) // 2]) for name, values in controls.items()}
    knobs = [_control(name, values, state[name]) for name, values in controls.items()]
    run, stop = widgets.Button(description="Run"), widgets.Button(description="Stop", disabled=True)
    bar = widgets.FloatProgress(max=1.0)
    first = next(steps(**state))[1]
    picture = widgets.Image(value=png(first, DPI), format="png")
    picture.layout = {"max_width": "100%", "align_self": "flex-start"}  # not stretched to the width of the box
    task: list[asyncio.Task] = []

    async def go() -> None:
        run.disabled, stop.disabled = True, False
        try:
            for share, figure in steps(**{knob.description: knob.value for knob in knobs}):
                bar.value, picture.value = share, png(figure, DPI)
                await asyncio.sleep(0.01)  # here the notebook gets its turn, and a press of Stop arrives
        finally:
            run.disabled, stop.disabled = False, True

    run.on_click(lambda _: task.append(asyncio.get_running_loop().create_task(go())))
    stop.on_click(lambda _: task and task.pop().cancel())
    _display(widgets.VBox([*knobs, widgets.HBox([run, stop, bar]), picture]), _base64(first, COLOURS), alt)


def _control(name: str, values: Sequence, value) -> widgets.Widget:
    """A slider over numbers, buttons for words."""
    style = {"description_width": "initial"}
    if all(isinstance(v, str) for v in values):
        return widgets.ToggleButtons(options=values, value=value, description=name, style=style)
    options = [(_told(v), v) for v in values]
    return widgets.SelectionSlider(options=options, value=value, description=name, style=style, layout={"width": "26rem"})


def _display(box: widgets.Widget, first: str, alt: str, frames: Callable[[], dict] | None = None) -> None:
    """The live widget where it can be shown, its first picture elsewhere, and all its pictures while the book is made."""
    bundle = box._repr_mimebundle_() | {"image/png": first, "text/plain": alt}
    if frames and os.environ.get("TUTORIAL_MOCO_FRAMES"):
        bundle[FRAMES] = frames()
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)


def _frames(draw: Callable[..., Figure], state: dict, controls: dict[str, Sequence]) -> dict:
    """A picture for each value of the first control, the others as they stand."""
    name, values = next(iter(controls.items()))
    return {
        "control": name,
        "values": [_told(value) for value in values],
        "start": list(values).index(state[name]),
        "others": {other: _told(value) for other, value in state.items() if other != name},
        "pictures": [_base64(draw(**{**state, name: value}), COLOURS) for value in values],
    }


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _base64(figure: Figure, colours: int | None = None) -> str:
    return base64.b64encode(png(figure, DPI, colours)).decode()
