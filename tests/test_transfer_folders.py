"""The dense tasks from folders in VOC's and COCO's formats, through the command line: scenes written to disk and read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.mask import encode

from tutorial_moco import cli, transfer_report
from tutorial_moco.annotated import load_annotated
from tutorial_moco.checkpoint import pack, save_checkpoint
from tutorial_moco.encoders import build_encoder
from tutorial_moco.images import load_images
from tutorial_moco.recipes import Recipe
from tutorial_moco.scenes import ARROW_RICH, KEYPOINTS, draw_scenes, semantic
from tutorial_moco.shapes import SHAPE_CLASSES
from tutorial_moco.transfer import Start, classify, dense, load_start

DATA = Path(__file__).parent.parent / "data"
FEW = {"train": (6, 0), "test": (3, 1)}
VIT = {"recipe": Recipe(encoder="vit").to_json(), "step": 1}
OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{:.0f}</xmin><ymin>{:.0f}</ymin>"
    "<xmax>{:.0f}</xmax><ymax>{:.0f}</ymax></bndbox></object>"
)


def save(path, pixels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image = image.convert("L").convert("P")
        image.putdata(pixels.flatten().tolist())
    image.save(path)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A folder in VOC's layout, with a label for each pixel."""
    root = tmp_path_factory.mktemp("voc")
    names = {"trainval": [], "test": []}
    for (listing, mine), (count, seed) in zip(names.items(), FEW.values(), strict=True):
        images, targets = draw_scenes(count, seed)
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            name = f"{listing}_{i:06}"
            mine.append(name)
            save(root / "JPEGImages" / f"{name}.png", image.permute(1, 2, 0).numpy())
            save(root / "SegmentationClass" / f"{name}.png", semantic(target).to(torch.uint8).numpy(), palette=True)
            rows = zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
            objects = "".join(OBJECT.format(SHAPE_CLASSES[k - 1], x0 + 1, y0 + 1, x1, y1) for k, (x0, y0, x1, y1) in rows)
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / kind / f"{listing}.txt").write_text("\n".join(mine) + "\n")
    return root


def coco_objects(image, targets, points):
    for target in targets:
        for i, (x0, y0, x1, y1) in enumerate(target["boxes"].tolist()):
            code = encode(np.asfortranarray(target["masks"][i].numpy()))
            told = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(target["area"][i]), "iscrowd": 0}
            told |= {"segmentation": {"size": code["size"], "counts": code["counts"].decode()}}
            if points:
                told["keypoints"] = (target["keypoints"][i] - torch.tensor([0.5, 0.5, 0])).flatten().tolist()
            yield told | {"image_id": image, "category_id": 3 * int(target["labels"][i])}  # sparse numbers, as COCO's


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder in COCO's layout, with masks, and keypoints in files of their own."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for (count, seed), year in zip(FEW.values(), ("train2017", "val2017"), strict=True):
        for prefix, kinds in (("instances", None), ("person_keypoints", ARROW_RICH)):
            images, targets = draw_scenes(count, seed, kinds=kinds)
            names = [f"{prefix}_{i:06}.png" for i in range(count)]
            for name, image in zip(names, images, strict=True):
                save(root / year / name, image.permute(1, 2, 0).numpy())
            points = {"keypoints": list(KEYPOINTS)} if kinds else {}
            listed = [{"id": i, "file_name": name, "height": 96, "width": 96} for i, name in enumerate(names)]
            objects = [told for i, t in enumerate(targets) for told in coco_objects(i, [t], points)]
            kinds_told = [{"id": 3 * (i + 1), "name": name, **points} for i, name in enumerate(SHAPE_CLASSES)]
            content = {
                "images": listed,
                "annotations": [o | {"id": i} for i, o in enumerate(objects)],
                "categories": kinds_told,
            }
            (root / "annotations" / f"{prefix}_{year}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("task", ["detect", "keypoints", "segment"])
def test_scenes_in_cocos_format_train_the_same_model_as_scenes_in_memory(task, coco):
    results = []
    for data in ("scenes", coco):
        sets = [load_annotated(data, split, task, n=count) for split, (count, _) in FEW.items()]
        start = load_start("none", torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)), encoder="tiny")
        trained = dense(start, task, *sets, epochs=1, batch_size=2, dtype=torch.float32, progress=False)
        results.append([trained.result, *trained.model.state_dict().values()])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(*pair) for pair in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize(("task", "field"), [("detect", "ap_boxes"), ("segment", "miou")])
def test_the_command_takes_a_voc_folder_and_leaves_a_report_rows_and_a_model(task, field, voc, tmp_path, capsys):
    flags = [
        "--encoder",
        "tiny",
        "--epochs",
        "1",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert cli.main(["transfer", "--task", task, "--data", str(voc), *flags]) == 0
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["data"] == voc.name
    assert 0 <= told["results"][0][field] <= 100
    assert told["results"][0]["start"] == "none"
    assert json.loads((tmp_path / "result.json").read_text())["results"] == told["results"]
    assert (tmp_path / "model-1.safetensors").exists()
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_a_row_and_a_model_are_written_before_the_next_training_which_may_fail(voc, tmp_path, monkeypatch, capsys):
    done = []

    def twice(*args, **how):
        if done:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(dense(*args, **how))
        return done[0]

    monkeypatch.setattr(transfer_report, "dense", twice)
    flags = ["--encoder", "tiny", "--epochs", "1", "--batch-size", "2", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(["transfer", "--task", "segment", "--data", str(voc), *flags]) == 2
    assert "the GPU's memory is full: take a smaller --batch-size" in capsys.readouterr().err
    assert [row["seed"] for row in json.loads((tmp_path / "result.json").read_text())["results"]] == [0]
    assert (tmp_path / "model-1.safetensors").exists()


def test_runs_of_the_same_name_are_told_apart_in_the_report(tmp_path):
    starts = [
        Start(f"runs/{run}/moco/checkpoint.safetensors", torch.nn.Identity(), 3, Recipe(), steps=1)
        for run in ("first", "second")
    ]
    colours, titles = transfer_report._looks([*starts, Start("none", torch.nn.Identity(), 3, Recipe())])
    assert titles == {start.name: start.name for start in starts} | {"none": "fresh weights"}
    assert len(set(colours.values())) == 3


def test_an_image_of_any_size_gives_the_fresh_encoder_something_to_see(tmp_path):
    class Data(list):
        pass

    sizes = [(20, 300), (96, 96), (500, 40)]
    images = Data((torch.randint(0, 256, (3, *size), dtype=torch.uint8), {}) for size in sizes)
    assert transfer_report.sample(images).shape == (3, 3, 96, 96)


def test_the_command_classifies_with_few_labels_from_several_starts(tmp_path, capsys):
    shipped = str(DATA / "moco-shapes.safetensors")
    flags = ["--labels", "0.003", "--epochs", "1", "--encoder", "tiny", "--out", str(tmp_path), "--data", "digits"]
    assert cli.main(["transfer", "--checkpoint", shipped, "none", *flags]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [row["start"] for row in rows] == [shipped, "none"]
    assert all({"labels", "linear_top1", "fine_tuned_top1", "seed"} <= set(row) for row in rows)
    assert "none, 10 labels" in capsys.readouterr().out  # one of each of ten classes


def test_a_checkpoint_of_a_memory_bank_is_fine_tuned_on_fewer_images_than_its_dictionary_has_keys():
    train = load_images("digits", "train").take(slice(0, 100))
    start = load_start(DATA / "memory_bank.safetensors", torch.empty(0))
    assert len(train) < start.recipe.K
    assert 0 <= classify(start, train, train, how="fine_tuned", epochs=1, progress=False)["fine_tuned_top1"] <= 100


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (["--task", "detect", "--data", "here"], 3, "neither layout"),
        (["--task", "detect", "--data", "nowhere"], 3, "is no folder"),
        (["--task", "guess"], 2, "--task"),
        (["--task", "detect", "--data", "voc", "--labels", "0.1"], 2, "--labels (0.1,) is for --task classify"),
        (["--task", "segment", "--data", "voc", "--neck", "c4"], 2, "--neck c4 is for --task detect and keypoints"),
        (["--task", "segment", "--data", "voc", "--image-size", "1"], 2, "--image-size must be at least 8, not 1"),
        (["--labels", "1.5"], 2, "--labels must be shares in (0, 1]"),
        (["--frozen"], 2, "--frozen is for detect, keypoints and segment"),
        (["--checkpoint", "vit", "--task", "detect", "--data", "voc"], 2, "has no maps of several sizes"),
        (["--epochs", "0"], 2, "--epochs must be above 0, not 0"),
        (["--seeds", "-1"], 2, "--seeds must be above 0, not -1"),
        (["--task", "keypoints", "--data", "voc"], 2, "no keypoints"),
        (["--task", "detect", "--checkpoint", "gone", "--data", "voc"], 3, "gone does not exist"),
        (["--task", "detect", "--data", "voc", "--batch-size", "99"], 2, "--batch-size must be at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(flags, status, told, voc, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    save_checkpoint(tmp_path / "vit", pack(**{"mechanism.encoder": build_encoder("vit")}), VIT)
    places = {"vit": tmp_path / "vit", "here": tmp_path / "here", "nowhere": tmp_path / "nowhere", "voc": voc}
    words = [str(places.get(word, word)) for word in flags]
    assert cli.main(["transfer", *words, "--out", str(tmp_path / "out")]) == status
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in message
    assert message.startswith("tutorial-moco: ")
    assert not (tmp_path / "out").exists()
