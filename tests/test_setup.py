"""The project's own promises: one list of packages, and files that say what is true."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _lists(text: str) -> dict[str, set[str]]:
    """The lists of strings in a TOML file's text, by name: enough for ours, and Python 3.10 has no tomllib."""
    found = re.findall(r"^([\w-]+) = \[(.*?)\]$", text, re.M | re.S)
    return {name: set(re.findall(r'"([^"]+)"', body)) for name, body in found}


def test_environment_yml_lists_what_pyproject_lists():
    project = _lists((ROOT / "pyproject.toml").read_text())
    wanted = project["dependencies"].union(*(project[e] for e in ("notebooks", "book", "classroom", "export", "test")))
    lines = (ROOT / "environment.yml").read_text().partition("- pip:")[2].splitlines()
    listed = {line.strip().removeprefix("- ") for line in lines if line.strip()}
    assert "torch>=2.10" in wanted
    assert listed == wanted | {"-e ."}


def test_python_versions_agree():
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert "- python>=3.10" in (ROOT / "environment.yml").read_text()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file of it imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tutorial_moco":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tutorial_moco."):
            found.add(node.module.split(".")[1])
    return found


def test_every_file_has_a_row_in_the_design_and_imports_from_none_below():
    package, row_of = ROOT / "tutorial_moco", {}
    table = (ROOT / "docs" / "DESIGN.md").read_text().partition("| file | what |\n|---|---|\n")[2].partition("\n\n")[0]
    patterns = [
        (row, name) for row, line in enumerate(table.splitlines()) for name in re.findall(r"`(\S+?)`", line.split("|")[1])
    ]
    for row, name in sorted(patterns, key=lambda pattern: "*" in pattern[1]):  # a name of its own goes before *_figures.py
        files = package.glob(f"{name}*.py" if name.endswith("/") else name)
        for file in files:
            row_of.setdefault(file.relative_to(package).parts[0].removesuffix(".py"), row)
    files = {file for file in package.rglob("*.py") if file.name != "__init__.py"}
    assert {file.relative_to(package).parts[0].removesuffix(".py") for file in files} == set(row_of)
    for file in files:
        own = row_of[file.relative_to(package).parts[0].removesuffix(".py")]
        below = {name for name in imported(file) & set(row_of) if row_of[name] > own}
        assert not below, f"{file.name} imports {below}, which stand below it in docs/DESIGN.md"


def test_version_is_the_changelogs_newest_and_the_citations():
    from tutorial_moco import __version__

    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M).group(1)
    assert __version__ == newest == cited


def test_files_the_readme_points_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
