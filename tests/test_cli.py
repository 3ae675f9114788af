"""The command line, called as a user would: statuses, one-line complaints, and one small run from start to report."""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import tutorial_moco
from tutorial_moco import cli, compare
from tutorial_moco.images import load_images
from tutorial_moco.pretrain import pretrain
from tutorial_moco.provenance import git_commit, provenance
from tutorial_moco.recipes import RECIPES, Recipe

SMALL = ["--encoder", "tiny", "--dim", "8", "--K", "16", "--batch-size", "16", "--precision", "float32"]
PROVENANCE = ("version", "commit", "command", "hardware", "torch", "data", "data_hash")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test may touch the user's cache, or leave runs where it was started."""
    monkeypatch.setenv("TUTORIAL_MOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def call(*argv, encoding="utf-8"):
    """Exit status, stdout and stderr of a command on a terminal of this encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            status = stop.code or 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    return SimpleNamespace(status=status, out=out, err=err)


def image_folder(root, train=24, test=20, classes=("cat", "dog")):
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng((split == "test") * 1000 + label * 100 + i).integers(0, 200, (8, 8, 3))
                pixels[..., label] += 55  # cats are redder, dogs greener
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images") / "pets")


def assert_one_line(result, status, named):
    lines = [line for line in result.err.splitlines() if line.startswith("tutorial-moco:")]
    assert result.status == status, result.err
    assert len(lines) == 1, result.err
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err + result.out
    assert named in lines[0]


# ---- mistakes


WRONG = {
    "unknown command": (["trian"], 2, "trian is no command"),
    "unknown flag": (["pretrain", "--temprature", "0.1"], 2, "perhaps --temperature"),
    "unknown flag of compare": (["compare", "--batchsize", "9"], 2, "perhaps --batch-size"),
    "no number": (["pretrain", "--K", "many"], 2, "--K"),
    "no value": (["pretrain", "--K"], 2, "--K"),
    "K of 0": (["pretrain", "--K", "0"], 2, "--K must be at least 1, not 0"),
    "m above 1": (["pretrain", "--m", "1.5"], 2, "--m must be in [0, 1], not 1.5"),
    "temperature of 0": (["pretrain", "--temperature", "0"], 2, "--temperature must be above 0, not 0"),
    "temperature below 0": (["pretrain", "--temperature", "-1"], 2, "--temperature must be above 0, not -1"),
    "unknown mechanism": (["pretrain", "--mechanism", "mocov4"], 2, "--mechanism"),
    "unknown recipe": (["pretrain", "--recipe", "imagenet22k"], 2, "--recipe imagenet22k is not known"),
    "unknown recipe with =": (["compare", "--recipe=imagenet22k"], 2, "--recipe imagenet22k is not known"),
    "unknown encoder": (["pretrain", "--encoder", "resnet34"], 2, "--encoder"),
    "unknown norm": (["pretrain", "--data", "FOLDER", *SMALL, "--norm", "split:1"], 2, "--norm split:1 is not known"),
    "minutes below 0": (["pretrain", "--data", "FOLDER", *SMALL, "--minutes", "-1"], 2, "--minutes must be above 0, not -1"),
    "minutes of 0": (["compare", "--data", "FOLDER", *SMALL, "--minutes", "0"], 2, "--minutes must be above 0, not 0"),
    "hold-out above 1": (["pretrain", "--data", "FOLDER", "--hold-out", "1.5"], 2, "--hold-out must be in [0, 1), not 1.5"),
    "images too small": (["pretrain", "--data", "FOLDER", "--image-size", "4"], 2, "4"),
    "batch above data": (["pretrain", "--data", "FOLDER", "--batch-size", "49"], 2, "--batch-size must be at most"),
    "bank above data": (["compare", "--data", "FOLDER", "--batch-size", "8", "--K", "48"], 2, "--K must be at most 47"),
    "nce without noise": (["compare", "--data", "FOLDER", *SMALL, "--loss", "nce"], 2, "--loss nce"),
    "unknown data": (["pretrain", "--data", "cifra10"], 3, "cifra10"),
    "missing folder": (["compare", "--data", "./nowhere"], 3, "nowhere"),
    "missing checkpoint": (["evaluate", "--data", "FOLDER", "--checkpoint", "none.safetensors"], 3, "none.safetensors"),
}


@pytest.mark.parametrize("argv_status_named", WRONG.values(), ids=WRONG)
def test_a_mistake_ends_in_one_line_and_its_status_and_leaves_nothing_behind(argv_status_named, folder, tmp_path):
    argv, status, named = argv_status_named
    argv = [str(folder) if word == "FOLDER" else word for word in argv]
    trains = argv[0] in ("pretrain", "compare")
    result = call(*argv, *(["--out", "out"] if trains and argv[-1] != "--K" else []))
    assert_one_line(result, status, named)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_a_wrong_image_size_is_named_as_the_flag_it_was_given_by(folder):
    assert_one_line(call("data", "--data", folder, "--image-size", "4"), 2, "--image-size")


def test_a_proposal_is_also_made_on_a_terminal_that_knows_ascii_only():
    """tyro then frames its complaint with other characters."""
    result = call("pretrain", "--temprature", "0.1", encoding="ascii")
    assert_one_line(result, 2, "Unrecognized options: --temprature, 0.1 (perhaps --temperature)")
    assert "---" not in result.err


@pytest.mark.parametrize("kind", ["one class", "truncated", "outside", "no archive"])
def test_bad_data_ends_in_one_line_and_status_3(kind, folder, tmp_path):
    if kind == "one class":
        path = image_folder(tmp_path / "lonely", 3, 2, classes=("cat",))
    else:
        path = tmp_path / ("pets.tar" if kind != "no archive" else "pets.rar")
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "pets")
            if kind == "outside":
                archive.addfile(tarfile.TarInfo("../train/cat/evil.png"))
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    named = {"one class": "one class", "truncated": "truncated", "outside": "../train/cat/evil.png", "no archive": "pets.rar"}
    assert_one_line(call("pretrain", "--data", path, *SMALL, "--minutes", "0.01", "--out", "out"), 3, named[kind])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x80\x04\x95cposix\nsystem\n", b'\x08\0\0\0\0\0\0\0{"a":1}\n'])
def test_a_file_that_is_no_checkpoint_ends_in_one_line_and_status_3(content, folder, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert_one_line(call("evaluate", "--data", folder, "--checkpoint", "bad.safetensors"), 3, "bad.safetensors")


def test_without_a_network_cifar10_ends_in_one_line_that_proposes_shapes(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert_one_line(call("pretrain", "--data", "cifar10", "--out", "out"), 3, "--data shapes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--json", "--sheet"])
def test_a_file_that_cannot_be_written_ends_in_one_line(flag, folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = call("data", "--data", folder, flag, "file/result")
    assert result.status in (2, 3)
    assert_one_line(result, result.status, "file/result")


# ---- help


def test_without_a_command_the_commands_are_shown():
    for argv in ([], ["--help"], ["-h"]):
        result = call(*argv)
        assert result.status == 0
        assert all(f"  {name} " in result.out for name in cli.COMMANDS)
    assert call("--version").out.strip() == tutorial_moco.__version__


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_mentions_every_flag_and_explains_it(command):
    result = call(command, "--help")
    assert result.status == 0
    flags_type = cli.COMMANDS[command][0]
    names = [field.name for field in dataclasses.fields(flags_type) if field.name != "settings"]
    if issubclass(flags_type, cli.RunFlags):
        names += [field.name for field in dataclasses.fields(Recipe)]
    for name in names:
        assert re.search(rf"--{name.replace('_', '-')}[ ,\n]|{name.upper()}", result.out), name
    assert flags_type.__doc__.splitlines()[0].split(":")[0] in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("argv", "recipe"),
    [
        ([], "shapes"),
        (["--data", "cifar10"], "small"),
        (["--data=cifar10"], "small"),
        (["--data", "Shapes"], "shapes"),
        (["--recipe", "cifar10-resnet18"], "cifar10-resnet18"),
        (["--data", "shapes", "--recipe", "small"], "small"),
    ],
)
def test_the_recipe_decides_the_other_flags_defaults_and_a_users_value_stands(argv, recipe):
    flags = cli.parse(cli.Pretrain, [*argv, "--lr", "0.77", "--K", "5"], "tutorial-moco pretrain")
    assert flags.settings == RECIPES[recipe].replace(lr=0.77, K=5)
    plain = cli.parse(cli.Pretrain, argv, "tutorial-moco pretrain")
    assert plain.settings == RECIPES[recipe]


def test_the_same_settings_find_the_same_folder_and_others_do_not():
    def out(*argv):
        return cli.default_out(cli.parse(cli.Pretrain, list(argv), ""), "pets.tar.gz")

    assert out("--lr", "0.1") == out("--lr=0.1")
    others = [("--seed", "0"), ("--lr", "0.1"), ("--minutes", "2"), ("--hold-out", "0.1"), ("--image-size", "16")]
    assert len({out(*words) for words in others}) == 5
    assert out("--seed", "0").parts[0] == "runs"


# ---- one run, from start to report


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    """The smallest comparison there is: 1.2 seconds of training each."""
    root = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTORIAL_MOCO_CACHE", str(root / "cache"))
        flags = [*SMALL, "--minutes", "0.02", "--seed", "3", "--out", root / "out", "--json", root / "result.json"]
        result = call("compare", "--data", folder, *flags)
    assert result.status == 0, result.err
    return SimpleNamespace(out=root / "out", json=json.loads((root / "result.json").read_text()), stdout=result.out)


def test_compare_ends_with_a_table_and_the_path_of_its_report(compared):
    for title in ("raw pixels", "untrained encoder", "end-to-end", "memory bank", "MoCo"):
        assert f"\n{title} " in compared.stdout
    assert compared.stdout.strip().splitlines()[-1] == f"report: {compared.out / 'report.html'}"


def test_the_report_needs_no_network_and_no_eyes(compared):
    links, images, tags = [], [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            tags.append(tag)
            links.extend(attributes[name] for name in ("src", "href", "srcset", "data", "action") if attributes.get(name))
            if tag == "img":
                images.append(attributes)

    text = (compared.out / "report.html").read_text(encoding="utf-8")
    Reader().feed(text)
    assert len(images) >= 6
    assert all(image.get("alt") for image in images)
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe"} & set(tags)
    assert "url(" not in text
    assert "@import" not in text


def test_result_json_carries_every_field_that_results_have(compared):
    for record in (compared.json, json.loads((compared.out / "result.json").read_text())):
        assert all(name in record for name in PROVENANCE)
        assert record["version"] == tutorial_moco.__version__
        assert record["data"] == "pets"
        assert len(record["data_hash"]) == 64
        results = {result["mechanism"]: result for result in record["results"]}
        assert set(results) == {"pixels", "untrained", "end_to_end", "memory_bank", "moco"}
        for name in ("end_to_end", "memory_bank", "moco"):
            result = results[name]
            for field in ("knn_top1", "linear_top1"):
                assert 0 <= result[field] <= 100
            assert result["images_per_second"] > 0
            assert result["peak_memory_bytes"] > 10e6
            assert result["seed"] == 3
            assert 1.2 <= result["train_seconds"] < 2.5  # equal budgets
            assert result["images_seen"] == 16 * result["steps"]
        assert [results[name]["dictionary_bytes"] for name in ("end_to_end", "memory_bank", "moco")] == [0, 48 * 32, 16 * 32]


def test_evaluate_reads_the_same_accuracy_from_the_checkpoint(compared, folder, tmp_path):
    results = {result["mechanism"]: result for result in compared.json["results"]}
    for name in ("end_to_end", "memory_bank", "moco"):
        checkpoint = compared.out / name / "checkpoint.safetensors"
        result = call("evaluate", "--data", folder, "--checkpoint", checkpoint, "--json", "read.json")
        assert result.status == 0, result.err
        read = json.loads((tmp_path / "read.json").read_text())
        assert read["knn_top1"] == results[name]["knn_top1"]
        assert read["linear_top1"] == pytest.approx(results[name]["linear_top1"], abs=1e-6)
        assert read["steps"] == results[name]["steps"]


@pytest.mark.parametrize("flag", ["--lr 0.5", "--epochs 3", "--batch-size 7", "--out elsewhere"])
def test_a_flag_of_the_sgd_probe_is_not_taken_in_silence_by_the_regression(flag, compared, folder):
    checkpoint = compared.out / "moco" / "checkpoint.safetensors"
    assert_one_line(call("evaluate", "--data", folder, "--checkpoint", checkpoint, *flag.split()), 2, "is for --probe sgd")


def test_a_learning_rate_that_explodes_is_none_in_json(compared, folder, tmp_path):
    checkpoint = compared.out / "moco" / "checkpoint.safetensors"
    words = ["--probe", "sgd", "--epochs", "6", "--batch-size", "16", "--lr", "1e38", "1", "--json", "read.json", "--out"]
    result = call("evaluate", "--data", folder, "--checkpoint", checkpoint, *words, tmp_path / "probes")
    assert result.status == 0, result.err
    assert "linear exploded" in result.out
    read = json.loads((tmp_path / "read.json").read_text(), parse_constant=pytest.fail)
    assert read["linear_top1"] is None
    assert read["linear_top1_of_lr"]["1"] > 0


def test_a_test_split_of_one_image_is_no_reason_to_lose_a_training(tmp_path, monkeypatch):
    train, test = (load_images("digits", split).take(slice(0, n)) for split, n in (("train", 32), ("test", 1)))
    recipe = Recipe(encoder="tiny", dim=8, K=16, batch_size=16, epochs=1)
    compare.compare([recipe], train, test, tmp_path / "out", baselines=False)
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / "result.json").unlink()
    monkeypatch.setattr(compare, "draw", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.compare([recipe], train, test, tmp_path / "out", baselines=False)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["results"]


@pytest.mark.parametrize("command", ["evaluate", "data"])
def test_what_json_writes_says_where_it_comes_from(command, compared, folder, tmp_path):
    checkpoint = ["--checkpoint", compared.out / "moco" / "checkpoint.safetensors"] if command == "evaluate" else []
    assert call(command, "--data", folder, *checkpoint, "--json", "read.json").status == 0
    read = json.loads((tmp_path / "read.json").read_text())
    assert set(PROVENANCE) <= set(read)


def test_a_checkpoint_is_safetensors_with_every_tensor_of_the_run(compared):
    with safe_open(compared.out / "moco" / "checkpoint.safetensors", "pt") as file:
        names = set(file.keys())
    for name in ("queue", "pointer", "filled", "born", "steps", "encoder.head.weight", "key_encoder.head.weight"):
        assert f"mechanism.{name}" in names
    assert any(name.startswith("optimizer.") and name.endswith("momentum_buffer") for name in names)


def test_a_folder_with_a_run_of_other_settings_is_refused_and_left_alone(compared, folder):
    before = (compared.out / "moco" / "checkpoint.safetensors").read_bytes()
    result = call("pretrain", "--data", folder, *SMALL, "--lr", "0.5", "--minutes", "0.01", "--out", compared.out / "moco")
    assert_one_line(result, 2, "choose another --out")
    assert (compared.out / "moco" / "checkpoint.safetensors").read_bytes() == before


def test_data_shows_what_there_is(folder, tmp_path):
    result = call("data", "--data", folder, "--sheet", "sheet.png", "--json", "data.json")
    assert result.status == 0
    assert "cat, dog" in result.out
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["train"], found["test"], found["classes"]) == (48, 40, ["cat", "dog"])
    assert found["data_hash"] in result.out


def test_hold_out_evaluates_on_training_images(folder, tmp_path):
    result = call("data", "--data", folder, "--hold-out", "0.25", "--json", "data.json")
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["train"], found["test"]) == (36, 12)
    assert "validation" in result.err


def test_a_handful_of_images_is_enough_to_pretrain_and_report(tmp_path):
    few = image_folder(tmp_path / "few", train=3, test=2)
    result = call("pretrain", "--data", few, *SMALL[:4], "--K", "4", "--batch-size", "4", "--epochs", "2", "--out", "out",
                  "--precision", "float32")  # fmt: skip
    assert result.status == 0, result.err
    assert (tmp_path / "out" / "report.html").exists()


def test_evaluate_reads_features_in_the_number_format_of_the_run(folder, tmp_path, monkeypatch):
    """Else a run in bfloat16 and `evaluate` on its checkpoint tell two accuracies of the same encoder."""
    train, test = (load_images(folder, split, progress=False) for split in ("train", "test"))
    recipe = Recipe(encoder="tiny", dim=8, K=16, batch_size=16, epochs=1)
    pretrain(recipe, train, out=tmp_path / "out", device=torch.device("cpu"), dtype=torch.bfloat16, progress=False)
    used, extract = [], compare.extract_features

    def spy(backbone, images, *, dtype=torch.float32, **options):
        used.append(dtype)
        return extract(backbone, images, dtype=dtype, **options)

    monkeypatch.setattr(compare, "extract_features", spy)
    compare.evaluate_checkpoint(tmp_path / "out" / "checkpoint.safetensors", train, test)
    assert set(used) == {torch.bfloat16}


def test_an_interruption_ends_with_status_130_and_one_line(monkeypatch):
    def interrupted(flags):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "data", (cli.Data, interrupted))
    assert_one_line(call("data"), 130, "interrupted")


def test_a_results_command_names_no_folder_of_the_machine(monkeypatch):
    words = ["/somewhere/bin/tutorial-moco", "pretrain", "--data", "/somewhere/else/pictures.tar", "--out", "runs/mine"]
    words += ["--json=/somewhere/secret/result.json"]
    monkeypatch.setattr(sys, "argv", words)
    facts = provenance(load_images("digits", "test"), torch.device("cpu"))
    assert facts["command"] == "tutorial-moco pretrain --data pictures.tar --out runs/mine --json=result.json"


def test_a_package_that_lies_in_another_projects_checkout_has_no_commit(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    installed = tmp_path / ".venv" / "provenance.py"
    installed.parent.mkdir()
    installed.write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "theirs")
    monkeypatch.setattr("tutorial_moco.provenance.__file__", str(installed))
    assert git_commit() is None
    git("add", "-f", ".venv")
    git("commit", "-q", "-m", "ours")
    assert len(git_commit()) == 12
