"""The doctor: [OK] where all is well, and where it is not [FAIL], what was found, and the mend."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torchvision
from test_cli import call, image_folder, own_folders  # noqa: F401

from tutorial_moco import doctor


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    monkeypatch.delenv("TUTORIAL_MOCO_DATA", raising=False)
    monkeypatch.setattr(doctor, "ROOM", 2**20)  # so that the machine the tests run on is well, whichever it is
    monkeypatch.setattr(doctor, "MEMORY", 2**20)
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "meminfo")
    doctor.MEMINFO.write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    return image_folder(tmp_path / "pictures")


def test_all_is_well(images):
    result = call("doctor", "--data", images)
    assert result.status == 0, result.out
    lines = result.out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("[OK] ") for line in lines)
    assert "48 training images of 8 pixels" in lines[4]


def break_torchvision(monkeypatch):
    def nms(*_):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(torchvision.ops, "nms", nms)


def test_without_torch_each_thing_still_has_its_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    for name in [name for name in sys.modules if name.startswith("tutorial_moco.") and name != "tutorial_moco.doctor"]:
        monkeypatch.delitem(sys.modules, name)
    assert [well for well, _ in doctor.report("shapes")].count(False) >= 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("[FAIL] torch and torchvision do not work together")
    assert "it could not be looked at" in lines[4]


def break_widgets(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=missing))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (break_torchvision, "(operator torchvision::nms does not exist); install both together: pip install --force-reinstall"),
        (break_widgets, "ipywidgets is missing, and with it every slider; pip install ipywidgets"),
        (lambda patch: patch.setattr(doctor, "MEMORY", 2**33), "4.0 GB of memory are free, 4 are wanted; close other programs"),
        (lambda patch: patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**19)), "0.0 GB of disk are free"),
    ],
)
def test_what_is_not_well_is_named_with_its_mend(broken, said, images, monkeypatch):
    broken(monkeypatch)
    result = call("doctor", "--data", images)
    assert result.status == 3
    (line,) = [line for line in result.out.splitlines() if line.startswith("[FAIL] ")]
    assert said in line
    assert "1 of 6 things are not well" in result.err


def test_the_answers_are_written_also_if_something_is_not_well(tmp_path):
    result = call("doctor", "--data", tmp_path / "nowhere", "--json", tmp_path / "answers.json")
    assert result.status == 3
    checks = json.loads((tmp_path / "answers.json").read_text())["checks"]
    assert [check["well"] for check in checks] == [True, True, True, True, False, True]


def test_images_that_are_not_there(tmp_path):
    result = call("doctor", "--data", tmp_path / "nowhere")
    assert result.status == 3
    assert "nowhere" in result.out
    assert "The chapters go on with images drawn by the program" in result.out
