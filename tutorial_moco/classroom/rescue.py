"""Find a student's work in whatever notebook was handed in, and put it into a clean copy of the assignment.

Cells get copied, split, moved, deleted; tests get overwritten. So nothing is taken by its place: a function, class or constant
is found by its name, a written answer by its cell's id. What a clean copy gets from the student is definitions alone; what
only *does* something at the top level of a cell (prints, loops, training) stays behind.
"""

import ast
import builtins
import copy
import re
import textwrap
import warnings
from dataclasses import dataclass, field

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

TOO_LARGE = 20 * 2**20  # bytes of a notebook file


@dataclass(frozen=True)
class Part:
    """A definition: what it is, for comparing, and its text with the student's own comments."""

    tree: str
    text: str


@dataclass
class Work:
    """A student's definitions by name, in the order of the notebook, and what was noticed on the way."""

    parts: dict[str, Part] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def rescue(submitted: NotebookNode, release: NotebookNode, *levels: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """A copy of the release with the student's work in its answer cells, and remarks on what was left out, and why.

    Args:
        levels: other student versions of the assignment; what stands in them untouched is no work either.
    """
    clean = copy.deepcopy(release)
    stubs = stubs_of(clean)
    work = collect(submitted, release, *levels)
    answers = [cell for cell in clean.cells if is_answer(cell, "code")]
    for cell in answers:
        cell.source = "\n\n\n".join(work.parts.pop(name, stubs[name]).text for name, _ in parts_of(cell.source))
    for text in [*(part.text for part in reversed(work.parts.values())), *reversed(dict.fromkeys(work.imports))]:
        after = [cell for cell in answers if needed_at_once(text) & {name for name, _ in parts_of(cell.source)}]
        place = clean.cells.index(after[-1]) + 1 if after else clean.cells.index(answers[0])
        clean.cells.insert(place, new_cell("code", text))  # a cell each, so that one that fails costs itself alone
    write_answers(submitted, release, clean, work.remarks)
    if work.remarks:
        noticed = "\n".join(f"- {remark}" for remark in work.remarks)
        clean.cells.insert(1, new_cell("markdown", f"**What the grader noticed in this notebook**\n\n{noticed}"))
    return clean, work.remarks


def collect(submitted: NotebookNode, release: NotebookNode, *levels: NotebookNode) -> Work:
    """All definitions of the notebook that may be used. Of several of a name the last that is not untouched."""
    work, locked, stubs, twice, left = Work(), protected(release), stubs_of(release), [], []
    untouched = {(name, part.tree) for book in (release, *levels) for name, part in stubs_of(book).items()}
    for number, cell in enumerate(submitted.cells, 1):
        if cell.cell_type != "code" or is_test(cell):
            continue
        try:
            tree = ast.parse(plain(cell.source))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if cell.source.strip():
                line = f" in its line {error.lineno}" if isinstance(error, SyntaxError) else ""
                work.remarks.append(f"cell {number} is left out: {getattr(error, 'msg', type(error).__name__)}{line}.")
            continue
        for node in top_level(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                keep_import(node, locked, work)
            elif not is_definition(node):
                left += assigned(node)
        for name, part in parts_of(cell.source):
            if name not in stubs and (name in locked or hasattr(builtins, name)):
                if locked.get(name) != part.tree:
                    work.remarks.append(f"your own {name} is left out: the name belongs to the assignment or to Python.")
            elif (name, part.tree) in untouched:
                continue
            elif calls_the_package(part.text):
                work.remarks.append(f"{name} is left out: it imports tutorial_moco. Build it with PyTorch.")
            else:
                if work.parts.pop(name, None):  # so that it stands where it was last defined
                    twice.append(name)
                work.parts[name] = part
    if twice:
        work.remarks.append(f"there more than once, and the last one counts: {', '.join(dict.fromkeys(twice))}.")
    used = {part.id for one in work.parts.values() for part in ast.walk(ast.parse(one.text)) if isinstance(part, ast.Name)}
    for name in dict.fromkeys(left):
        if name in (used | set(stubs)) - set(work.parts) - set(locked):
            mend = "Write it out, or make it where it is used"
            work.remarks.append(f"{name}, made by a call outside of all functions, is left out: such are not run. {mend}.")
    if missing := [name for name in stubs if name not in work.parts]:
        work.remarks.append(f"not there, or not begun: {', '.join(missing)}.")
    work.remarks = list(dict.fromkeys(work.remarks))
    return work


def keep_import(part: ast.Import | ast.ImportFrom, locked: dict[str, str], work: Work) -> None:
    """Keep an import, but not of the package whose functions are asked for, nor under a name of the assignment's own."""
    for bound, one in bindings(part):
        module = getattr(one, "module", None) or one.names[0].name
        if ast.dump(one) == locked.get(bound) or module == "__future__":
            continue  # the assignment has it already
        if module.split(".")[0] == "tutorial_moco":
            work.remarks.append(f"the import of {bound} is left out: build it with PyTorch, not with tutorial_moco.")
        elif bound in locked or hasattr(builtins, bound) or bound == "*":
            work.remarks.append(f"the import of {bound} is left out: the name belongs to the assignment or to Python.")
        else:
            work.imports.append(ast.unparse(one))


def bindings(part: ast.Import | ast.ImportFrom):
    """(name, import of it alone) for each name that an import binds."""
    for alias in part.names:
        one = copy.copy(part)
        one.names = [alias]
        yield alias.asname or alias.name.split(".")[0], one


def write_answers(submitted: NotebookNode, release: NotebookNode, clean: NotebookNode, remarks: list[str]) -> None:
    """Put the written answers into their cells, found by id; text that stands in no such cell goes below the last answer."""
    own: dict[str, list[str]] = {}
    for cell in submitted.cells:
        if cell.cell_type == "markdown" and grade_id(cell):
            own.setdefault(grade_id(cell), []).append(cell.source)
    places = [cell for cell in clean.cells if is_answer(cell, "markdown")]
    for cell in places:  # a cell that was split has its id twice
        texts = [text for text in own.get(grade_id(cell), []) if text.strip() and text.strip() != cell.source.strip()]
        cell.source = "\n\n".join(texts) or cell.source
    known = {cell.source.strip() for cell in [*release.cells, *places]}
    loose = [cell.source for cell in submitted.cells if cell.cell_type == "markdown" and not grade_id(cell)]
    loose = [text for text in loose if text.strip() and text.strip() not in known]
    if loose and places:
        places[-1].source += "\n\n**Found elsewhere in the notebook:**\n\n" + "\n\n".join(loose)
        remarks.append("text outside the answer cells was added to the last written answer.")


# Cells and names ------------------------------------------------------------------------------------------------------


def plain(source: str) -> str:
    """A cell's code as Python: magics and shell lines become calls, which are no definitions; ``%%time`` alone is dropped."""
    first, _, rest = source.lstrip().partition("\n")
    if re.match(r"%%(time|timeit|capture)\b", first):
        source = rest
    return TransformerManager().transform_cell(source)


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """The statements of a module, also those under an ``if`` or ``try`` of it."""
    found = []
    for node in tree.body:
        inner = node.body + node.orelse if isinstance(node, ast.If) else node.body if isinstance(node, ast.Try) else None
        found += [node] if inner is None else top_level(ast.Module(inner, []))
    return found


def parts_of(source: str) -> list[tuple[str, Part]]:
    """(name, part) of the functions, classes and constants that a cell's top level defines."""
    source, found = plain(source), []
    lines = source.splitlines()
    for node in top_level(ast.parse(source)):
        first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
        part = Part(ast.dump(node), textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append((node.name, part))
        elif is_definition(node):
            found += [(name, part) for name in assigned(node)]
    return found


def targets_of(node: ast.stmt) -> list[ast.expr]:
    """What an assignment assigns to; nothing for other statements."""
    one = isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None
    return node.targets if isinstance(node, ast.Assign) else [node.target] if one else []


def assigned(node: ast.stmt) -> list[str]:
    """Names to which, or into which, a statement assigns."""
    return [part.id for target in targets_of(node) for part in ast.walk(target) if isinstance(part, ast.Name)]


def is_definition(node: ast.stmt) -> bool:
    """Whether a statement gives constants their names."""
    named = targets_of(node) and all(isinstance(target, ast.Name | ast.Tuple) for target in targets_of(node))
    return bool(named) and not isinstance(node, ast.AugAssign) and is_constant(node.value)


def is_constant(value: ast.expr) -> bool:
    """What is made without calling anything: literals, names, attributes, lambdas, arithmetic."""
    if isinstance(value, ast.Lambda):
        return True
    busy = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.comprehension)
    return not any(isinstance(node, busy) for node in ast.walk(value))


def needed_at_once(text: str) -> set[str]:
    """Names that a definition uses when it is made, not when it is called: bases, decorators, defaults, values."""
    [node, *_] = ast.parse(text).body
    lazy = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []
    inside = {id(part) for statement in lazy for part in ast.walk(statement)}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and id(part) not in inside}


def calls_the_package(text: str) -> bool:
    """Whether code imports tutorial_moco somewhere inside."""
    nodes = list(ast.walk(ast.parse(text)))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return any(module.split(".")[0] == "tutorial_moco" for module in modules)


def stubs_of(book: NotebookNode) -> dict[str, Part]:
    """What stands in the answer cells of a student version, by name."""
    return {name: part for cell in book.cells if is_answer(cell, "code") for name, part in parts_of(cell.source)}


def protected(release: NotebookNode) -> dict[str, str]:
    """Names that the assignment's own cells bind, and how; a student may not bind them otherwise."""
    names = {}
    for cell in release.cells:
        if cell.cell_type == "code" and grade_id(cell) and not is_answer(cell, "code"):
            for part in top_level(ast.parse(plain(cell.source))):
                names |= dict.fromkeys(assigned(part), ast.dump(part))  # by a call, too: the images, say
                if isinstance(part, ast.Import | ast.ImportFrom):
                    names |= {bound: ast.dump(one) for bound, one in bindings(part)}
            names |= {name: part.tree for name, part in parts_of(cell.source)}
    return names


def new_cell(kind: str, source: str) -> NotebookNode:
    """A fresh cell of a kind (code or markdown)."""
    return getattr(nbformat.v4, f"new_{kind}_cell")(source)


def marks_of(cell: NotebookNode) -> dict:
    """nbgrader's marks of a cell, whatever a student has made of them."""
    marks = cell.metadata.get("nbgrader", {})
    return marks if isinstance(marks, dict) else {}


def grade_id(cell: NotebookNode) -> str | None:
    """nbgrader's id of a cell, or None."""
    found = marks_of(cell).get("grade_id")
    return found if isinstance(found, str) else None


def is_answer(cell: NotebookNode, kind: str) -> bool:
    """Whether a student writes in this cell."""
    return cell.cell_type == kind and bool(marks_of(cell).get("solution"))


def is_test(cell: NotebookNode) -> bool:
    """Whether the cell gives points by itself; a student's version of it doesn't count."""
    return cell.cell_type == "code" and bool(marks_of(cell).get("grade")) and not marks_of(cell).get("solution")


def read_notebook(content: bytes, name: str) -> NotebookNode:
    """A notebook from bytes.

    Raises:
        ValueError: too large, or no notebook; one line.
    """
    if len(content) > TOO_LARGE:
        raise ValueError(f"{name} has {len(content) / 2**20:.0f} MiB; more than {TOO_LARGE / 2**20:.0f} is not read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cell ids that are there twice: cells get copied
            book = nbformat.reads(content.decode("utf-8"), as_version=4)
        for cell in book.cells:
            cell.source = cell.get("source", "").encode("utf-8", "replace").decode()  # half of an emoji can't be written again
        return book
    except Exception as error:
        raise ValueError(f"{name} is not a notebook: {type(error).__name__}, {str(error).splitlines()[0][:100]}") from error
