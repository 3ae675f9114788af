"""Grade a folder or zip of notebooks with nbgrader: ``tutorial-moco grade A2 submissions.zip --out graded``.

Each notebook's work is first put into a clean copy of the assignment (`rescue`), then nbgrader runs that in a limited kernel
(`kernel`), one process a student, with a secret of the student's own. What comes out, below ``out``: grades.csv (nbgrader's,
of all assignments), and for each assignment points.csv (a line for each student and test, with the reason), feedback/ (a page
each) and class.html (table, histogram of misconceptions). What was graded by hand before stays. Students who hand in something
else than a notebook get a line that says so, and the others their points.
"""

import csv
import hashlib
import hmac
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from tqdm.auto import tqdm

from tutorial_moco.classroom import kernel
from tutorial_moco.classroom.release import LEVELS, read_source, source_of, student_version
from tutorial_moco.classroom.rescue import TOO_LARGE, collect, is_answer, is_test, read_notebook, rescue
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.figures import figure
from tutorial_moco.files import write_whole
from tutorial_moco.report import Picture, write_report

MOODLE, WALL_SECONDS = "_assignsubmission_", 1800
ENDED = "the code ended Python itself, by os._exit or by asking for too much memory or time; nothing could be graded."
NOT_ISOLATED = "bubblewrap is not there or may not work, so submissions run within limits but can reach files and network"


@dataclass
class Result:
    """What came of a student's submission: points and reasons by test, and remarks."""

    student: str
    points: dict[str, float] = field(default_factory=dict)
    says: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.points.values())


def grade(
    assignment: str, submissions: Path, out: Path, course: Path, secret: str, *, hide: Sequence[Path] = ()
) -> dict[str, object]:
    """Grade all submissions.

    Args:
        submissions: folder or zip: a folder or a file for each student, as Moodle, Canvas, nbgrader or a person names them.
        out: folder for the results; points and pages of an older grading of the assignment are replaced, its gradebook is not.
        course: folder that holds ``source/`` (notebooks/assignments of this repository).
        secret: decides the inputs of the hidden tests; any text that students don't know.
        hide: more that graded code may not see, where it is sandboxed: the file of the secret, say. The submissions, what comes
            out, the course, and the repository's tests and history are hidden anyhow.

    Raises:
        UsageError: nbgrader is not installed, there is no such assignment, or nothing to grade.
    """
    if shutil.which("nbgrader", path=search_path()) is None:
        raise UsageError("nbgrader is not installed: pip install 'tutorial_moco[classroom]' (Python 3.11 or newer)")
    try:
        source = read_source(assignment, course)
    except FileNotFoundError as error:
        raise UsageError(f"{error}: give --course, the folder notebooks/assignments of the repository") from error
    found = submissions_of(submissions, assignment)
    folder = out / assignment
    root = prepare(out / "nbgrader", course.resolve())
    repository = course.resolve().parent.parent
    unseen = (submissions, out, course, repository / "tests", repository / ".git", *hide)
    hidden = os.pathsep.join(str(path.resolve()) for path in unseen)
    print(f"{len(found)} submissions; " + ("sandboxed" if kernel.isolated() else NOT_ISOLATED))
    nbgrader(root, "generate_assignment", assignment, "--force")
    release, *levels = (student_version(source, level) for level in LEVELS)
    results = []
    for student, files in tqdm(found.items(), unit="student", disable=None):
        result = Result(student)
        results.append(result)
        try:
            book = choose(files, release, levels, result)
            place = root / "submitted" / student / assignment / source_of(assignment, course).name
            place.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(without_pictures(book or release), place)  # of nothing readable: the untouched assignment
            autograde(root, assignment, result, secret, hidden)
        except Exception as error:  # whatever a notebook does, the others are graded
            result.remarks.append(f"could not be graded: {type(error).__name__}: {str(error)[:200]}")
    write_points(folder / "points.csv", results)
    summary = write_class(folder / "class.html", assignment, results, source)
    nbgrader(root, "export", "--to", str((out / "grades.csv").resolve()))
    feedback(root, assignment, folder)
    print(f"{out / 'grades.csv'}; {folder}: points.csv, class.html, feedback/")
    return summary


# In: whatever was handed in -------------------------------------------------------------------------------------------


def submissions_of(path: Path, assignment: str) -> dict[str, list[tuple[str, bytes]]]:
    """(name, content) of each student's files, from a folder or a zip that is read where it is; content of notebooks only.

    Raises:
        DataError: it can't be read, or there is nothing in it.
    """
    try:
        files = [(PurePosixPath(unicodedata.normalize("NFC", name)), content) for name, content in members(path)]
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a folder or a .zip of notebooks") from error
    files = [(name, content) for name, content in files if not any(skipped(part) for part in name.parts)]
    if not files:
        raise DataError(f"{path} holds no files: give a folder or a .zip with a notebook for each student")
    while (
        all(len(name.parts) > 1 for name, _ in files)
        and len({name.parts[0] for name, _ in files}) == 1
        and (any(len(name.parts) > 2 for name, _ in files) or len(files) > 1)
        and not is_ones_own([name for name, _ in files], assignment)
    ):  # a folder around all
        files = [(PurePosixPath(*name.parts[1:]), content) for name, content in files]
    found: dict[str, list[tuple[str, bytes]]] = {}
    raw: dict[str, str] = {}
    for name, content in files:
        told = told_of(name, assignment)
        student = re.sub(r"[^\w.-]+", "-", told).strip("-.") or "unnamed"
        while raw.setdefault(student.casefold(), told) != told:
            student += "_"  # another name that looks the same
        found.setdefault(student, []).append((str(name), content))
    return dict(sorted(found.items()))


def is_ones_own(names: list[PurePosixPath], assignment: str) -> bool:
    """Whether the folder around these files is a student's, and not one around a class: Moodle's, or with one notebook in it
    that is named by the assignment alone, there or in a folder of that name, as nbgrader has it.
    """
    if MOODLE in names[0].parts[0]:
        return True
    books = [name for name in names if name.suffix == ".ipynb"]
    if len(books) != 1:
        return False
    inside = books[0].parts[1:]
    return inside[-1].startswith(assignment) and inside[:-1] in ((), (assignment,))


def skipped(part: str) -> bool:
    """Files and folders that systems and Jupyter leave."""
    return part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini")


def members(path: Path):
    """(name, content) of the files in a folder or zip; links are not followed, and only notebooks of some size are read."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(path).as_posix().encode("utf-8", "replace").decode()
                wanted = file.suffix == ".ipynb" and file.stat().st_size <= TOO_LARGE
                yield name, file.read_bytes() if wanted else b""
    else:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    wanted = info.filename.endswith(".ipynb") and info.file_size <= TOO_LARGE
                    yield info.filename, archive.read(info) if wanted else b""


def told_of(name: PurePosixPath, assignment: str) -> str:
    """The student's name as a path tells it: the folder, or the file's name without Canvas's numbers and the assignment's."""
    if len(name.parts) > 1:
        return name.parts[0].split(MOODLE)[0]
    canvas = re.match(r"([^_]+)(?:_LATE)?_(\d+)_\d+_", name.name)
    if canvas:
        return f"{canvas[1]}_{canvas[2]}"
    return re.sub(rf"(^|[-_ ]+){assignment}(?![0-9A-Za-z]).*$", "", name.stem) or name.stem


def choose(files: list[tuple[str, bytes]], release, levels: list, result: Result):
    """A clean notebook with the work of the fullest of a student's notebooks; None, with a remark, if there is none."""
    best, most = None, -1
    for name, content in files:
        if not name.endswith(".ipynb"):
            continue
        try:
            if not content:
                raise ValueError(f"{name} is empty, or larger than {TOO_LARGE / 2**20:.0f} MiB")
            book = read_notebook(content, name)
            size = len(collect(book, release, *levels).parts)
        except Exception as error:  # a file that somebody has handed in can be anything
            result.remarks.append(f"{str(error)[:200] or type(error).__name__}.")
            continue
        if size > most:
            best, most = book, size
    if best is None:
        result.remarks.append("no notebook that can be read: " + ", ".join(sorted(name for name, _ in files))[:200])
        return None
    if sum(name.endswith(".ipynb") for name, _ in files) > 1:
        result.remarks.append("several notebooks; the one with most of the work is graded.")
    clean, remarks = rescue(best, release, *levels)
    result.remarks += remarks
    return clean


def without_pictures(book):
    """A notebook without the cells that only draw or train: they take time and give no points."""
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    idle = [cell for cell in code[1:] if not is_answer(cell, "code") and not is_test(cell) and cell.metadata.get("nbgrader")]
    return nbformat.from_dict(book | {"cells": [cell for cell in book.cells if not any(cell is one for one in idle)]})


# Through nbgrader -----------------------------------------------------------------------------------------------------


def prepare(root: Path, course: Path) -> Path:
    """A course folder for nbgrader, with our settings and the limited kernel. Its gradebook stays, and grades by hand in it.

    Raises:
        UsageError: it can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(root / "source", ignore_errors=True)
        shutil.copytree(course / "source", root / "source")
        (root / "nbgrader_config.py").write_text(
            f"import os\n\nload_subconfig({str(course / 'nbgrader_config.py')!r})\n"
            f"c = get_config()\nc.CourseDirectory.root = {str(root.resolve())!r}\nc.Application.log_level = 'WARN'\n"
            f"if {kernel.CONNECTION!r} in os.environ:  # tutorial-moco grade: the limited kernel\n"
            f"    c.Execute.kernel_name = {kernel.NAME!r}\n    c.ConnectionFileMixin.transport = {kernel.TRANSPORT!r}\n"
            f"    c.ConnectionFileMixin.connection_file = os.environ[{kernel.CONNECTION!r}]\n"
        )
    except OSError as error:
        raise UsageError(f"--out {root.parent} could not be written: {error.strerror or error}") from error
    return root.resolve()


def search_path() -> str:
    """PATH with this Python's own commands first, which nbgrader and what it starts need."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def nbgrader(root: Path, *words: str, seconds: float = 600, **more: str) -> None:
    """Run nbgrader on a course in a process of its own.

    Raises:
        DataError: it failed; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="moco") as folder:
        environment = os.environ | kernel.install(Path(folder)) | {"PATH": search_path()} | more
        try:
            done = subprocess.run(
                ["nbgrader", *words],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"nbgrader {words[0]} took more than {seconds:.0f} s") from error
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line]
        raise DataError(f"nbgrader {' '.join(words)} failed: {told[-1] if told else done.stderr[-300:]}")


def autograde(root: Path, assignment: str, result: Result, secret: str, hidden: str) -> None:
    """Run a student's clean notebook and read its points and reasons."""
    own = {
        "TUTORIAL_MOCO_SECRET": hmac.new(secret.encode(), result.student.encode(), hashlib.sha256).hexdigest(),
        kernel.HIDE: hidden,
    }
    words = ("autograde", assignment, "--student", result.student, "--create", "--force")
    try:
        nbgrader(root, *words, seconds=WALL_SECONDS, **own)
    except DataError as error:
        result.remarks.append(ENDED if "Kernel died" in str(error) or "DeadKernel" in str(error) else str(error))
        return
    [path] = (root / "autograded" / result.student / assignment).glob("*.ipynb")
    from nbgrader.utils import determine_grade

    for cell in nbformat.read(path, as_version=4).cells:
        if is_test(cell):
            name = cell.metadata.nbgrader.grade_id
            result.points[name] = float(determine_grade(cell)[0] or 0)
            result.says[name] = reasons(cell)


def reasons(cell) -> list[str]:
    """Why a test gave less than all points, a line each; none if it gave them all."""
    lines = []
    for output in cell.outputs:
        if output.output_type == "error":
            timeout = "Timeout" in output.ename or output.ename == "KeyboardInterrupt"
            lines.append("it took too long and was stopped." if timeout else output.evalue or output.ename)
        elif output.output_type == "stream" and output.name == "stdout":
            lines += [line.split("] ", 1)[1] for line in output.text.splitlines() if line.startswith("[0 of ")]
        elif output.output_type == "stream":
            lines.append(f"it wrote to stderr, which nbgrader takes for a failure: {output.text.strip()[:100]}")
    return lines


def feedback(root: Path, assignment: str, out: Path) -> None:
    """nbgrader's pages, one a student, as out/feedback/STUDENT.html."""
    if not any((root / "autograded").glob(f"*/{assignment}/*.ipynb")):
        return
    nbgrader(root, "generate_feedback", assignment, "--force", seconds=3600)
    shutil.rmtree(out / "feedback", ignore_errors=True)
    (out / "feedback").mkdir(parents=True)
    for page in (root / "feedback").glob(f"*/{assignment}/*.html"):
        shutil.copyfile(page, out / "feedback" / f"{page.parts[-3]}.html")


# Out: for the lecturer ------------------------------------------------------------------------------------------------


def write_points(path: Path, results: list[Result]) -> None:
    """A line for each student and test: points, and why not more."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["student", "test", "points", "why"])
    for result in results:
        table.writerows(
            [result.student, name, f"{points:g}", " | ".join(result.says[name])] for name, points in result.points.items()
        )
        table.writerows([result.student, "", "", remark] for remark in result.remarks)
    write_whole(path, text.getvalue().encode("utf-8", "replace"))


def misconceptions(results: list[Result]) -> Counter[str]:
    """How many students lost points for each reason; numbers in a reason don't make it another."""
    counts: Counter[str] = Counter()
    for result in results:
        told = {
            plain(f"{name}: {line}" if not line.startswith(name.split("-")[0]) else line)
            for name, lines in result.says.items()
            for line in lines
        }
        counts.update(line for line in told if "not written yet" not in line)
    return counts


def plain(reason: str) -> str:
    """A reason without the numbers of the case it was found in."""
    return re.sub(r"\s*\([^()]*\d[^()]*\)", "", re.sub(r"-?\d+\.\d{2,}", "…", reason)).strip()


def short(text: str, most: int = 80) -> str:
    """A text that fits; the whole of it is in points.csv."""
    return text if len(text) <= most else text[: most - 2] + " …"


def write_class(path: Path, assignment: str, results: list[Result], source) -> dict[str, object]:
    """The page for the lecturer: everybody's points, and what went wrong how often."""
    tests = [cell.metadata.nbgrader for cell in source.cells if is_test(cell)]
    table = [["student", *(f"{mark.grade_id} ({mark.points:g})" for mark in tests), "total", "noticed"]]
    for result in results:
        cells = [f"{result.points[mark.grade_id]:g}" if mark.grade_id in result.points else "-" for mark in tests]
        table.append([result.student, *cells, f"{result.total:g}", short(" ".join(result.remarks))])
    counts = misconceptions(results)
    pictures = []
    if counts:
        shown = counts.most_common(15)[::-1]
        fig = figure(9.5, 0.8 + 0.42 * len(shown))
        axes = fig.subplots()
        axes.barh(range(len(shown)), [number for _, number in shown], color="#0072B2")
        axes.set_yticks(range(len(shown)), [short(reason, 90) for reason, _ in shown], fontsize=8)
        axes.set(xlabel="students")
        axes.xaxis.get_major_locator().set_params(integer=True)
        caption = (
            "Each bar is a reason for lost points, and how many students it cost some. The longest first in the next lecture."
        )
        pictures.append(
            Picture("What went wrong", fig, "; ".join(f"{n}: {reason}" for reason, n in counts.most_common(15)), caption)
        )
    possible = sum(float(mark.points) for mark in tests)
    lead = f"{len(results)} submissions, {possible:g} points by tests. Written answers are graded by hand."
    facts = {"assignment": assignment, "sandbox": "bubblewrap" if kernel.isolated() else NOT_ISOLATED}
    write_report(path, f"{assignment}: points and misconceptions", lead, table, pictures, facts)
    return {
        "assignment": assignment, "of": possible, "misconceptions": dict(counts.most_common()),
        "students": {result.student: {"points": result.total, "remarks": result.remarks} for result in results},
    }  # fmt: skip
