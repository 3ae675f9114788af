"""The project's own promises: one list of packages, and files that say what is true."""

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
