"""The speed benchmark: it runs, says what it must, and its verdict follows from its figures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drawn import random_pictures, write_two_classes

from benchmarks import throughput
from benchmarks.throughput import ratios, verdict

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """96 random images of two classes."""
    return write_two_classes(tmp_path_factory.mktemp("pictures"), random_pictures(96, 32, 32))


def run(pictures, *flags, **environment):
    command = [sys.executable, "-m", "benchmarks.throughput", "--data", str(pictures), "--encoder", "tiny", *flags]
    environment = os.environ | {"TUTORIAL_MOCO_CACHE": str(pictures / "cache")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


QUICK = ("--batch-size", "32", "--K", "64", "--rounds", "1", "--seconds", "0.3")


def test_a_quick_run_gives_every_field_and_ends_with_the_verdict(pictures, tmp_path):
    done = run(pictures, *QUICK, "--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    lines = done.stdout.splitlines()
    assert lines[-1] == verdict(result)
    has_lightly = importlib.util.find_spec("lightly") is not None
    assert list(result["images_per_second"]) == ["usual", *["lightly"] * has_lightly, "ours", "limit"]
    assert ("lightly" in result["skipped"]) is not has_lightly
    figures = [*result["images_per_second"].values(), *result["augmentation_microseconds"].values()]
    figures += [result[f"ratio_{name}{end}"] for name in ("usual", "limit") for end in ("", "_min", "_max")]
    figures += [result["peak_memory_bytes"], result["wall_seconds"]]
    assert all(figure > 0 for figure in figures)
    settings = {name: result[name] for name in ("encoder", "batch_size", "K", "data", "seed")}
    assert settings == {"encoder": "tiny", "batch_size": 32, "K": 64, "data": pictures.name, "seed": 0}
    assert result["precision"] in ("float32", "bfloat16")
    assert {"version", "commit", "command", "date", "hardware", "torch", "data_hash"} <= result.keys()
    assert result["hardware"] in lines[0]


def test_without_lightly_the_others_are_measured_and_the_reason_is_printed(pictures, tmp_path):
    (tmp_path / "lightly.py").write_text("raise ImportError('none here')")
    done = run(pictures, *QUICK, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "lightly is skipped: it cannot be imported (none here)\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("verdict: ours is ")


@pytest.mark.parametrize(("flag", "value"), [("--K", "65"), ("--rounds", "0"), ("--seconds", "0"), ("--encoder", "huge")])
def test_a_wrong_flag_ends_in_one_line_and_status_2(monkeypatch, capsys, flag, value):
    monkeypatch.setattr(sys, "argv", ["throughput", flag, value])
    assert throughput.main() == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert flag in told


def test_ratios_are_medians_of_ratios_within_a_round():
    found = ratios({"usual": [1.0, 2.0, 4.0], "ours": [4.0, 4.0, 10.0], "limit": [4.0, 8.0, 10.0]})
    assert (found["ratio_usual"], found["ratio_usual_min"], found["ratio_usual_max"]) == (2.5, 2.0, 4.0)
    assert (found["ratio_limit"], found["ratio_limit_min"], found["ratio_limit_max"]) == (1.0, 0.5, 1.0)


def test_the_verdict_says_which_bar_is_met():
    line = verdict({"ratio_usual": 3.99, "ratio_limit": 0.85, "hardware": "a laptop", "precision": "float32"})
    assert line == (
        "verdict: ours is 3.99x the usual way (bar 4.0: not met) and 0.85 of the limit (bar 0.85: met) on a laptop, float32"
    )
