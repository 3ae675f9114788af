"""Files made to do harm: none of them is run, and nothing is written where it should not be."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tutorial_moco import cli, results
from tutorial_moco.annotated import load_annotated
from tutorial_moco.checkpoint import load_checkpoint
from tutorial_moco.errors import DataError
from tutorial_moco.images import load_images
from tutorial_moco.masked import load_painter
from tutorial_moco.pretrain import load_encoder
from tutorial_moco.transfer import load_start, load_trained


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def packed(name, data):
    """A tar with one member of this name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def harmful(marker):
    """Kinds of files that run code in whoever unpickles them."""
    plain = pickle.dumps(Payload(marker))
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": Payload(marker)}, saved)
    np.save(array, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return {
        "pickle": plain,
        "torch": saved.getvalue(),
        "numpy": array.getvalue(),
        "zip of a pickle": zipped(archive__data__pkl=plain, data__pkl=plain),
        "tar of a pickle": packed("data.pkl", plain),
        "python": f"import os\nos.system('touch {marker}')\n".encode(),
    }


def as_image_folder(path, data):
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "cat")):
        (path / split / label).mkdir(parents=True, exist_ok=True)
        (path / split / label / "0.png").write_bytes(data)
    return path


def as_coco(path, data):
    (path / "annotations").mkdir(parents=True)
    (path / "train2017").mkdir()
    (path / "annotations" / "instances_train2017.json").write_bytes(data)
    return path


def as_file(name):
    def put(path, data):
        path.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
        return path / name

    return put


READERS = {  # how a file is put there, and who reads it
    "a checkpoint": (as_file("checkpoint.safetensors"), load_checkpoint),
    "an encoder": (as_file("checkpoint.safetensors"), load_encoder),
    "a start": (as_file("checkpoint.pth.tar"), lambda path: load_start(path, torch.empty(0))),
    "a trained model": (as_file("model.safetensors"), load_trained),
    "a painter": (as_file("painter.safetensors"), load_painter),
    "a shipped run": (as_file("moco.safetensors"), lambda path: results.load_run("moco", path.parent)),
    "shipped features": (as_file("moco-features.safetensors"), lambda path: results.load_features("moco", path.parent)),
    "rows": (as_file("rows.jsonl"), lambda path: results.load_rows(path=path)),
    "an archive": (as_file("images.zip"), lambda path: load_images(path, "train", progress=False)),
    "a packed archive": (as_file("images.tar.xz"), lambda path: load_images(path, "train", progress=False)),
    "images": (as_image_folder, lambda path: load_images(path, "train", progress=False)),
    "annotations": (as_coco, lambda path: load_annotated(path, "train", "detect")),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_file_is_run_by_who_reads_it(reader, tmp_path, monkeypatch, held):
    monkeypatch.setenv("TUTORIAL_MOCO_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "it-was-run"
    put, read = READERS[reader]
    files = harmful(marker)
    for number, (kind, data) in enumerate(files.items()):
        path = put(tmp_path / str(number), data)
        with pytest.raises(DataError) as told:
            read(path)
        assert "\n" not in str(told.value), kind
        assert not marker.exists(), kind
    held("no file is run", f"files that run code when they are unpickled, as {reader}", len(files), len(files))


def test_the_harm_is_real(tmp_path):
    """Else the test above could not fail."""
    marker = tmp_path / "run"
    for kind, data in harmful(marker).items():
        (tmp_path / "file").write_bytes(data)
        code = {
            "pickle": "import pickle; pickle.load(open('file', 'rb'))",
            "torch": "import torch; torch.load('file', weights_only=False)",
            "numpy": "import numpy; numpy.load('file', allow_pickle=True)",
            "python": "exec(open('file').read())",
        }.get(kind)
        if code:
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
            assert marker.exists(), kind
            marker.unlink()


def test_a_cache_that_was_replaced_by_a_pickle_is_not_read_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUTORIAL_MOCO_CACHE", str(tmp_path))
    first = load_images("digits", "train")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    assert load_images("digits", "train").hash == first.hash
    assert "is made anew" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_a_pickle(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUTORIAL_MOCO_CACHE", str(Path(tmp_path) / "cache"))
    (tmp_path / "checkpoint.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    flags = ["--data", "digits", "--encoder", "tiny", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(["pretrain", *flags]) == 3
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "checkpoint.safetensors").write_text(json.dumps({"__reduce__": "os.system"}))
    assert cli.main(["pretrain", *flags]) == 3
