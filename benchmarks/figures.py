"""The study's pictures and docs/RESULTS.md, drawn and written anew from the rows: ``python -m benchmarks.figures``.

The same rows give the same page, byte for byte. What is claimed and how a verdict is come to: `tutorial_moco.claims`.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from tutorial_moco.claims import CAME_OUT, DID_NOT, MEASURES, SECTIONS, TOO_SMALL, VERDICTS, Finding, Section, findings
from tutorial_moco.cli import parse, write_file
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.report import png
from tutorial_moco.results import NAMES, load_rows, mean_and_interval, provenance_line

DPI = 120
SCALES = {"cpu": "On a processor", "gpu": "On a GPU"}

INTRODUCTION = f"""# Results: the papers' claims, measured

Each claim below stands with its figure in the paper and with ours. Most of the papers' are from ImageNet, a ResNet-50 and days
on eight GPUs; ours are from small images, a smaller encoder and minutes. So compare directions, not percentages.

**How a verdict is come to.** A claim is a difference between two settings. It **{CAME_OUT}** if the 95 % confidence interval
of the difference of the means over seeds (Welch's t) lies wholly on the side the claim says, it **{DID_NOT}** if it lies wholly
on the other, and it is **{TOO_SMALL}** if the interval contains 0 or one side has fewer than two seeds. A claim that two
settings are level came out if the interval lies within the margin it names. A training that broke down counts as guessing.
Verdicts are computed, not chosen, and there are many: of twenty such intervals one is expected to miss.

*linear*: accuracy of a linear classifier on the frozen features, as in the paper. *kNN*: a vote of the most similar training
images. Both are percent of all test images.

This page and its pictures are written by `make figures` from the rows in [data/](../data/README.md), which `make study`
measures. Nothing in it is typed in but what is cited. An experiment that has no rows yet is left out;
`python -m benchmarks.study --list` names it. Transfer (data/study-transfer.jsonl) is told in
[chapter 08](../notebooks/08_transfer.ipynb), MoCo's versions in [chapter 09](../notebooks/09_versions.ipynb), both without
verdicts.
"""


@dataclass(frozen=True)
class Flags:
    """Draw every picture of the study and write RESULTS.md, from the rows that are there."""

    out: Path = Path("docs/pictures")  # folder of the pictures; RESULTS.md goes beside it
    data: Path = Path("data")  # folder of the rows


def redraw(flags: Flags) -> str:
    """Draw and write everything; returns the last line to print."""
    scales = {scale: flags.data / f"study-{scale}.jsonl" for scale in SCALES}
    rows = {scale: load_rows(path=path) for scale, path in scales.items() if path.exists()}
    if not rows:
        raise DataError(f"{flags.data} has no study-cpu.jsonl or study-gpu.jsonl: make it with python -m benchmarks.study")
    page, drawn = [INTRODUCTION], 0
    parts = {scale: measured_sections(found) for scale, found in rows.items()}
    with tqdm(total=sum(map(len, parts.values())), unit="section", desc="drawing") as bar:
        for scale, measured in rows.items():  # a processor's and a GPU's never meet
            page.append(opening(scale, measured, parts[scale]))
            for section in parts[scale]:
                pictures = [draw(picture, scale, measured, flags.out) for picture in section.pictures]
                drawn += sum(picture.startswith("!") for picture in pictures)
                page.append(chapter(scale, section, measured, pictures))
                bar.update()
    results = flags.out.parent / "RESULTS.md"
    write_file("--out", results, "\n".join(page).encode())
    return f"{drawn} pictures in {flags.out}, and {results}"


def measured_sections(rows: list[dict]) -> list[Section]:
    """The sections that rows have something to say about."""
    return [section for section in SECTIONS if any(row["experiment"] == section.experiment for row in rows)]


def draw(picture: tuple, scale: str, rows: list[dict], out: Path) -> str:
    """Draw a picture into its file; returns the line of Markdown that shows it, or says why there is none."""
    name, function, seen = picture
    try:
        figure = function(rows)
    except DataError as error:
        return f"*{error}*"
    path = out / (f"{name}.png" if name.startswith("paper") else f"study-{scale}-{name}.png")
    write_file("--out", path, png(figure, DPI))
    return f"![{seen}]({out.name}/{path.name})"


# The page ------------------------------------------------------------------------------------------------------------


def opening(scale: str, rows: list[dict], sections: list[Section]) -> str:
    """The title of a scale, what was trained, and all verdicts at a glance."""
    table = ["| claim | there | here |", "|---|---|---|"]
    counts = Counter()
    for section in sections:
        for found in findings(section, rows):
            claim = found[0].claim
            table.append(f"| [{claim.says}](#{scale}-{section.experiment}) | {claim.there} | {in_short(found)} |")
            counts[found[0].verdict] += 1
    tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    lead = f"Of {counts.total()} claims, each by its first measure, which is its source's: {tally}."
    return "\n".join([f"## {SCALES[scale]}", "", setting(rows), "", lead, "", *table, ""])


def chapter(scale: str, section: Section, rows: list[dict], pictures: list[str]) -> str:
    """A section of the page: question, pictures, where they come from, and a table for each claim."""
    own = [row for row in rows if row["experiment"] == section.experiment]
    heading = f'### <a id="{scale}-{section.experiment}"></a>{section.title}'
    parts = [heading, section.question, *pictures, f"<sub>{provenance_line(own)}</sub>"]
    all_found = findings(section, rows)
    for found in all_found:
        claim = found[0].claim
        head = f"| | {claim.larger[0]} | {claim.smaller[0]} | difference | seeds | verdict |"
        table = [head, "|---|---|---|---|---|---|", *(table_row(finding) for finding in found)]
        parts += [f"**{claim.says}.** There: {claim.there}.", "\n".join(table)]
    if section.otherwise and any(finding.verdict == DID_NOT for found in all_found for finding in found):
        parts.append(f"Why it may be otherwise here: {section.otherwise.format(**circumstances(own))}")
    return "\n\n".join(parts) + "\n"


def table_row(finding: Finding) -> str:
    """A finding as a line of a table: both means with their intervals, their difference, and the verdict."""
    title, digits, _ = MEASURES[finding.measure]
    sides = [told(*mean_and_interval(side), digits) if side else "-" for side in (finding.larger, finding.smaller)]
    difference = told(*finding.difference, digits, sign="+") if finding.seeds else "-"
    return f"| {title} | {sides[0]} | {sides[1]} | {difference} | {finding.seeds} | **{finding.verdict}** |"


def told(mean: float, half: float, digits: int, sign: str = "") -> str:
    """A mean with its interval; of one seed there is none."""
    text = f"{mean:{sign},.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:,.{digits}f}"


def in_short(found: list[Finding]) -> str:
    """The verdicts of a claim: one if all measures agree, else each with its measure."""
    verdicts = {finding.measure: finding.verdict for finding in found}
    agreed = set(verdicts.values())
    return agreed.pop() if len(agreed) == 1 else "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())


def setting(rows: list[dict]) -> str:
    """What the base recipe of the rows is, in a sentence."""
    row = next((row for row in rows if row["kind"] == "untrained"), rows[-1])
    name = NAMES.get(row["data"], row["data"])
    return (
        f"Encoder `{row['encoder']}`, {row['n']:,} training images of {name}, batch {row['batch_size']}, "
        f"{row['epochs']} epochs, K = {row['K']:,}, m = {row['m']:g}, tau = {row['temperature']:g}, unless said."
    )


def circumstances(rows: list[dict]) -> dict[str, float]:
    """The figures that the explanations name."""
    moco = [row for row in rows if row["mechanism"] == "moco"]
    n, epochs, largest = moco[0]["n"], moco[0]["epochs"], max(row["K"] for row in moco)
    return {"epochs": epochs, "steps": epochs * (n // moco[0]["batch_size"]), "largest_K": largest, "share": largest / n}


def main() -> int:
    """Draw and write; returns the exit status: 0 done, 2 wrong usage, 3 bad or missing data."""
    try:
        print(redraw(parse(Flags, sys.argv[1:], "python -m benchmarks.figures")))
    except (UsageError, DataError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
