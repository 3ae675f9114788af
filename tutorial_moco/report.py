"""A report that is one HTML file: words, a table, pictures as PNG inside it, no network and no script."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tutorial_moco.files import write_whole

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; }} h2 {{ font-size: 1.2rem; margin-top: 2.4rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }}
th, td {{ padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1rem 0; }} img {{ max-width: 100%; height: auto; background: #fff; border-radius: 6px; }}
figcaption, .quiet {{ color: #777; font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows (``alt``, for who cannot see it) and what to look for in it (``caption``)."""

    heading: str
    figure: Figure
    alt: str
    caption: str


def write_report(
    path: Path, title: str, lead: str, table: list[list[str]], pictures: list[Picture], facts: dict[str, object]
) -> None:
    """Write the report; an older one is replaced in one move.

    Args:
        table: rows of cells, the first row the head. facts: provenance, shown at the end.
    """
    body = [f"<p>{html.escape(lead)}</p>", f'<div class="scroll">{_table(table)}</div>']
    body += [_picture(picture) for picture in pictures]
    pairs = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    body.append(f"<h2>Where these numbers come from</h2><dl>{pairs}</dl>")
    write_whole(path, _PAGE.format(title=html.escape(title), body="\n".join(body)).encode())


def png(figure: Figure, dpi: int = 130, colours: int | None = None) -> bytes:
    """The figure, on a ground that is not transparent, as a PNG.

    As matplotlib's own print_figure, but drawn once where that draws what has a layout twice: a slider notices. With so many
    colours a file is a third as large, which is well for curves and poor for photographs.
    """
    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    (image.quantize(colours) if colours else image).save(buffer, format="png", optimize=bool(colours))
    figure.set_dpi(before)
    return buffer.getvalue()


def text_table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text, the first column to the left, a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(png(picture.figure)).decode()
    return (
        f"<h2>{html.escape(picture.heading)}</h2><figure>"
        f'<img alt="{html.escape(picture.alt, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
