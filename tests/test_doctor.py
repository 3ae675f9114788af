"""The doctor: [OK] where all is well, and where it is not [FAIL], what was found, and the mend."""

import shutil
from types import SimpleNamespace

import pytest
import torchvision
from test_cli import call, image_folder, own_folders  # noqa: F401

from tutorial_moco import doctor


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    monkeypatch.delenv("TUTORIAL_MOCO_DATA", raising=False)
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


def break_widgets(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=missing))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (break_torchvision, "(operator torchvision::nms does not exist); install both together: pip install --force-reinstall"),
        (break_widgets, "ipywidgets is missing, and with it every slider; pip install ipywidgets"),
        (lambda patch: patch.setattr(doctor, "MEMORY", 2**60), "close other programs, or use --data shapes"),
        (lambda patch: patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29)), "0.5 GB of disk are free"),
    ],
)
def test_what_is_not_well_is_named_with_its_mend(broken, said, images, monkeypatch):
    broken(monkeypatch)
    result = call("doctor", "--data", images)
    assert result.status == 3
    (line,) = [line for line in result.out.splitlines() if line.startswith("[FAIL] ")]
    assert said in line
    assert "1 of 6 things are not well" in result.err


def test_images_that_are_not_there(tmp_path):
    result = call("doctor", "--data", tmp_path / "nowhere")
    assert result.status == 3
    assert "nowhere" in result.out
    assert "The chapters go on with images drawn by the program" in result.out
