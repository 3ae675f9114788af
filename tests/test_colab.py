"""A chapter opened on its own, as in Colab: the usual packages are there, ours is not. The first cell installs that alone."""

import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from notebooks import FOLDER, NAMES, cells

CHAPTER = "01_dictionary_lookup.ipynb"
OFFLINE = FOLDER.parent / "tests" / "offline"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A fresh environment that sees the packages of this one, but not ours; and what runs in it, with our wheel at hand."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)  # an old one, else on top
    (folder / "usual").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "tutorial_moco" not in path.name and path.suffix != ".pth":
            (folder / "usual" / path.name).symlink_to(path)
    own = next((folder / "env").glob("lib/*/site-packages"))
    (own / "usual.pth").write_text(f"{folder / 'usual'}\n")
    for name in (
        "tutorial_moco",
        "data",
        "notebooks/assignments/release",
    ):  # of a copy: setuptools leaves a folder behind, and would take from it again
        shutil.copytree(FOLDER.parent / name, folder / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(FOLDER.parent / name, folder / "source")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    wheel += ["--wheel-dir", folder / "wheels", folder / "source"]
    subprocess.run(wheel, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TUTORIAL_MOCO"))}
    environment |= {"PIP_FIND_LINKS": str(folder / "wheels"), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                    "PYTHONPATH": str(OFFLINE), "TUTORIAL_MOCO_CACHE": str(folder / "cache")}  # fmt: skip
    return python, folder, environment


def packages(runtime):
    """Names of what is installed in the environment itself."""
    return {path.name.partition("-")[0] for path in (runtime[1] / "env").glob("lib/*/site-packages/*.dist-info")}


def test_the_wheel_holds_all_that_the_chapters_read(runtime):
    wheel = next((runtime[1] / "wheels").glob("tutorial_moco*.whl"))
    held = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tutorial_moco/data/")}
    assert {path.name for path in (FOLDER.parent / "data").iterdir()} - {"README.md"} <= held


def test_every_chapter_begins_with_the_same_cell():
    assert {cells(name)[0] for name in NAMES} == {cells(CHAPTER)[0]}


def test_a_chapter_runs_in_an_empty_environment(runtime):
    python, folder, environment = runtime
    missing = subprocess.run([python, "-c", "import tutorial_moco"], capture_output=True, cwd=folder, env=environment)
    assert b"No module named 'tutorial_moco'" in missing.stderr
    before = packages(runtime)
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "",
        "language": "python",
    }
    (folder / "kernels" / "colab").mkdir(parents=True)
    (folder / "kernels" / "colab" / "kernel.json").write_text(json.dumps(spec))
    kernels = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    book = nbformat.read(FOLDER / CHAPTER, as_version=4)
    client = NotebookClient(
        book,
        km=AsyncKernelManager(kernel_name="colab", kernel_spec_manager=kernels),
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    del client
    gc.collect()  # now its sockets warn that nobody closed them, and not in a later test, which takes warnings for errors
    assert packages(runtime) - before == {"tutorial_moco"}
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert "[OK] info_nce agrees with tutorial_moco.losses.info_nce" in printed
    assert "does not exist" not in printed  # measured runs and encoders came with the wheel
    asked = "from tutorial_moco.classroom.check import released; print([len(released(f'A{n}')) for n in range(1, 7)])"
    found = subprocess.run([python, "-c", asked], capture_output=True, cwd=folder, env=environment, text=True)
    assert found.stdout == "[2, 2, 2, 2, 2, 2]\n", found.stderr  # and so did the assignments, for `tutorial-moco check`
