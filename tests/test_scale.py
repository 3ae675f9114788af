"""The benchmark of what grows: it runs, each part alone and all together, and its verdict follows from its figures."""

import json
import sys

import pytest
from drawn import random_pictures, write_two_classes

from benchmarks import scale


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    large = (small.resize((400, 300)) for small in random_pictures(12, 30, 40))
    return write_two_classes(tmp_path_factory.mktemp("pictures"), large, "jpg")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["scale", *map(str, words)])
    return scale.main()


def test_a_quick_run_has_every_part_and_ends_with_the_verdict(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "KEYS", (4096,))
    path, flags = tmp_path / "scale.json", ["--rounds", 1, "--seconds", 0.3, "--only", "pictures,keys,bytes"]
    assert run(monkeypatch, "--data", pictures, *flags, "--json", path) == 0
    result, told = json.loads(path.read_text()), capsys.readouterr().out
    assert told.splitlines()[-1] == scale.verdict(result)
    assert {"version", "commit", "command", "date", "hardware", "torch", "data_hash"} <= set(result)
    assert all(rate > 0 for rate in result["pictures"]["pictures_per_second_and_core"].values())
    assert [(row["K"], row["dictionary_bytes"]) for row in result["keys"]] == [(4096, 4 * 128 * 4096)]
    assert [row["processes"] for row in result["bytes"]] == [2, 8, 64]
    for title in ("two views of a picture", "ms a step", "more if images were sent"):
        assert title in told, title


def test_processes_share_a_training():
    found = scale.together(2, 1, 0.5)
    assert (found["processes"], found["threads"]) == (2, 1)
    assert found["images_per_second"] > 0


def test_both_ways_show_the_same_kind_of_views(pictures):
    loaded = scale.load_images(pictures, "train", view_size=64, progress=False)
    assert len(loaded) == 10  # two were taken out to test on
    theirs, ours = next(scale.by_torchvision_alone(loaded)), next(scale.ours(loaded))
    assert theirs.shape == (scale.FEW, 2, 3, 64, 64)
    assert [view.shape for view in ours] == [(10, 3, 64, 64)] * 2
    assert abs(theirs.std() - ours[0].std()) < 0.4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "pictures"], "pictures and training need --data"),
        (["--only", "colours"], "--only colours is not known: choose of pictures, training, keys, batches, processes, bytes"),
        (["--rounds", "0"], "must be above 0"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(words, told, monkeypatch, capsys):
    assert run(monkeypatch, *words) == 2
    assert told in capsys.readouterr().err


def test_without_pictures_the_verdict_says_so():
    assert scale.verdict({}) == "verdict: no pictures were decoded (--data)"
