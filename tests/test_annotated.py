"""Annotated images: folders like VOC's and COCO's read back against values by hand, and every way they can be wrong."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tutorial_moco import annotated
from tutorial_moco.annotated import load_annotated, load_splits
from tutorial_moco.dense import DIFFICULT
from tutorial_moco.detection import average_precision
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.scenes import KEYPOINTS, draw_scenes, semantic
from tutorial_moco.segmentation import IGNORED
from tutorial_moco.shapes import SHAPE_CLASSES

WIDTH, HEIGHT = 40, 30


def picture(path, seed=0, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ---- drawn scenes


def test_scenes_are_those_that_are_drawn_with_what_a_target_needs_besides():
    train, test = (load_annotated("Scenes", split, "detect", n=6) for split in ("train", "test"))
    assert (train.name, train.split, train.classes, train.keypoints) == ("scenes", "train", SHAPE_CLASSES, KEYPOINTS)
    assert train.has_masks
    assert train.in_memory
    for found, seed in ((train, 0), (test, 1)):
        images, targets = draw_scenes(6, seed)
        assert len(found) == 6
        for i, (image, target) in enumerate(found):
            assert torch.equal(image, images[i])
            assert all(torch.equal(target[name], targets[i][name]) for name in targets[i])
            assert target["iscrowd"].tolist() == [0] * len(target["labels"])
            assert target["image_id"] == i
            assert set(target) - set(targets[i]) == {"iscrowd", "image_id"}
    assert train[-1][1]["image_id"] == 5
    with pytest.raises(IndexError):
        train[6]


def with_another_label(n, seed, **how):
    images, targets = draw_scenes(3, seed, **how)
    targets[2]["labels"] = targets[2]["labels"] % 10 + 1
    return images, targets


def test_scenes_have_the_promised_number_and_the_hash_tells_them_apart(monkeypatch):
    asked = []
    monkeypatch.setattr(annotated, "draw_scenes", lambda n, seed, **kw: asked.append((n, seed)) or draw_scenes(3, seed, **kw))
    hashes = [load_annotated("scenes", split, task).hash for split in ("train", "test") for task in ("detect", "keypoints")]
    assert asked == [(2000, 0), (2000, 0), (500, 1), (500, 1)]
    assert len(set(hashes)) == 4
    assert load_annotated("scenes", "train", "detect").hash == hashes[0]
    assert load_annotated("scenes", "train", "segment").hash == hashes[0]
    monkeypatch.setattr(annotated, "draw_scenes", with_another_label)
    assert load_annotated("scenes", "train", "detect").hash not in hashes


def test_scenes_for_keypoints_are_half_arrows_and_for_segmentation_have_classes_of_pixels():
    labels = torch.cat([target["labels"] for _, target in load_annotated("scenes", "test", "keypoints", n=40)])
    assert (labels == SHAPE_CLASSES.index("arrow") + 1).float().mean() == pytest.approx(0.5, abs=0.05)
    _, target = load_annotated("scenes", "test", "segment", n=2)[0]
    assert torch.equal(target["semantic"], semantic(draw_scenes(2, 1)[1][0]))


def test_a_target_has_what_its_task_needs():
    assert "masks" not in load_annotated("scenes", "test", "keypoints", n=2)[0][1]
    assert set(load_annotated("scenes", "test", "segment", n=2)[0][1]) == {"semantic", "image_id"}


# ---- PASCAL VOC

PERSON = """<object><name>person</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
  <bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25.5</ymax></bndbox>
  <part><name>head</name><bndbox><xmin>5</xmin><ymin>4</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></part></object>"""


def voc_object(name, box, difficult=0):
    edges = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{name}</name>\n<difficult>{difficult}</difficult>\n<bndbox>{edges}</bndbox>\n</object>\n"


def voc_xml(name, *objects):
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    head = f"<folder>VOC2012</folder><filename>{name}.jpg</filename><owner><name>someone</name></owner>"
    return f"<annotation>{head}{size}<segmented>1</segmented>{''.join(objects)}</annotation>\n"


@pytest.fixture
def voc(tmp_path):
    """Training: one with a person and a difficult car, one with a difficult car alone, one with nothing. Test: two."""
    root = tmp_path / "mine" / "VOCdevkit" / "VOC2012"
    inside = {
        "2007_000003": [PERSON, voc_object("car", (1, 1, 10, 10), 1)], "2007_000001": [voc_object("car", (2, 2, 9, 9), 1)],
        "2007_000002": [], "2008_000002": [voc_object("dog", (11, 2, 40, 30)), voc_object("dog", (9, 5, 8, 20))],
        "2008_000001": [],
    }  # fmt: skip
    for seed, (name, objects) in enumerate(inside.items()):
        picture(root / "JPEGImages" / f"{name}.jpg", seed)
        write(root / "Annotations" / f"{name}.xml", voc_xml(name, *objects))
    train, val = list(inside)[:3], list(inside)[3:]
    for kind, seen in (("Main", (train, val)), ("Segmentation", (train[:1], val[:1]))):
        for split, names in zip(("train", "val", "trainval"), (*seen, seen[0] + seen[1]), strict=True):
            write(root / "ImageSets" / kind / f"{split}.txt", "".join(f"{name}\n" for name in names))
    write(root / "ImageSets" / "Main" / "dog_val.txt", "2008_000002  1\n2008_000001 -1\n")
    marks = np.zeros((HEIGHT, WIDTH), np.uint8)
    marks[:5, :5], marks[10:12], marks[29, 39] = 15, IGNORED, 20
    for name in (train[0], val[0]):
        image = Image.fromarray(marks, "P")
        image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        image.save(root / "SegmentationClass" / f"{name}.png")
    return root


def test_voc_boxes_are_shifted_to_corners_and_training_leaves_out_what_is_not_judged(voc):
    train = load_annotated(voc.parents[1], "train", "detect")
    assert (train.name, train.keypoints, train.has_masks, train.in_memory) == ("VOC2012", (), False, False)
    assert len(train.classes) == 20
    assert (train.classes[0], train.classes[14], train.classes[19]) == ("aeroplane", "person", "tvmonitor")
    assert len(train) == 1  # trainval without val, without a difficult car alone and without nothing
    image, target = train[0]
    with Image.open(voc / "JPEGImages" / "2007_000003.jpg") as file:
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(file))
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[2, 3, 20, 25.5]]
    assert target["labels"].tolist() == [15]
    assert target["area"].tolist() == [18 * 22.5]
    assert set(target) == {"boxes", "labels", "area", "iscrowd", "image_id"}


def test_sixteen_bits_of_gray_are_scaled_here_too(voc):
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 50
    Image.fromarray(gray).save(voc / "JPEGImages" / "2007_000003.jpg", "PNG")
    image, _ = load_annotated(voc, "train", "detect")[0]
    assert np.array_equal(image[1], gray >> 8)


def test_voc_tests_on_all_images_in_the_order_of_names_and_counts_boxes_of_no_size(voc, capsys):
    test = load_annotated(voc, "test", "detect")
    assert capsys.readouterr().err == "VOC2012: 1 object(s) of the test split left out, as their boxes have no size\n"
    assert len(test) == 2
    empty, one = test[0][1], test[1][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)
    assert one["boxes"].tolist() == [[10, 1, 40, 30]]
    assert test.classes[one["labels"].tolist()[0] - 1] == "dog"
    assert one["image_id"] == 1


def test_voc_difficult_objects_are_marked_in_a_test_split(voc):
    write(voc / "ImageSets" / "Main" / "test.txt", "2007_000003\n")
    test = load_annotated(voc, "test", "detect")  # test goes before val
    _, target = test[0]
    assert target["iscrowd"].tolist() == [0, DIFFICULT]
    assert target["labels"].tolist() == [15, 7]
    assert target["boxes"].tolist()[1] == [0, 0, 10, 10]
    train = load_annotated(voc, "train", "detect")  # what is left of trainval
    assert [train[i][1]["labels"].tolist() for i in range(len(train))] == [[12]]


def test_voc_segmentation_reads_the_numbers_of_the_palette(voc):
    train = load_annotated(voc, "train", "segment")
    image, target = train[0]
    assert set(target) == {"semantic", "image_id"}
    assert target["semantic"].dtype == torch.int64
    assert target["semantic"].shape == image.shape[1:]
    counts = target["semantic"].flatten().bincount()
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == {0: 1200 - 25 - 80 - 1, 15: 25, 20: 1, 255: 80}
    assert target["semantic"][0, 4] == 15
    assert len(load_annotated(voc, "test", "segment")) == 1


def test_other_classes_in_vocs_layout_are_their_sorted_names_in_both_splits(voc):
    write(voc / "Annotations" / "2008_000001.xml", voc_xml("2008_000001", voc_object("zebra", (1, 1, 4, 4))))
    train, test = (load_annotated(voc, split, "detect") for split in ("train", "test"))
    assert train.classes == test.classes == ("car", "dog", "person", "zebra")
    assert train[0][1]["labels"].tolist() == [3]
    assert test[0][1]["labels"].tolist() == [4]


def test_a_hash_changes_with_annotations_images_and_choice(voc):
    def found(**how):
        return load_annotated(voc, "test", "detect", **how).hash

    first = found()
    assert first == found()
    assert len({first, found(n=1), load_annotated(voc, "train", "detect").hash}) == 3
    picture(voc / "JPEGImages" / "2008_000001.jpg", seed=77)
    second = found()
    write(voc / "Annotations" / "2008_000001.xml", voc_xml("2008_000001", voc_object("cow", (1, 1, 4, 4))))
    assert len({first, second, found()}) == 3


def test_n_spreads_over_all_images(voc):
    for i in range(10):
        picture(voc / "JPEGImages" / f"x{i}.jpg", seed=i)
        write(voc / "Annotations" / f"x{i}.xml", voc_xml(f"x{i}", voc_object("cow", (1, 1, 4 + i, 4))))
    write(voc / "ImageSets" / "Main" / "test.txt", "".join(f"x{i}\n" for i in reversed(range(10))))
    some = load_annotated(voc, "test", "detect", n=4)
    assert [target["boxes"].tolist()[0][2] for _, target in some] == [4, 6, 9, 11]  # the 1st, 3rd, 6th and 8th
    assert len(load_annotated(voc, "test", "detect", n=99)) == 10


# ---- COCO

FACE = ["nose", "left_eye", "right_eye"]


def rectangle(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def annotation(number, image, category, box, **more):
    x, y, width, height = box
    shape = {"segmentation": rectangle(x, y, x + width, y + height), "area": width * height - 1.5, "iscrowd": 0}
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), **shape, **more}


def coco_json(names, annotations, categories=((44, "bottle"), (1, "person"), (18, "dog")), **more):
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in names.items()]
    kinds = [{"id": i, "name": name, "supercategory": "thing", **more} for i, name in categories]
    return {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations, "categories": kinds}


def save_json(root, name, content):
    write(root / "annotations" / f"{name}2017.json", json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for i, split in ((9, "train"), (8, "train"), (7, "train"), (5, "val"), (4, "val")):
        picture(root / f"{split}2017" / f"00000000000{i}.jpg", seed=i)
    names = {i: f"00000000000{i}.jpg" for i in (9, 8, 7)}
    # A run-length code counts down the columns: here 1,190 pixels of nothing, then the last 10 of the last column.
    crowd = annotation(3, 8, 1, (39, 20, 1, 10), iscrowd=1, segmentation={"counts": [1190, 10], "size": [HEIGHT, WIDTH]})
    inside = [
        annotation(1, 8, 44, (10, 5, 10, 10)), annotation(2, 8, 1, (15, 10, 20, 5)), crowd,
        annotation(4, 9, 18, (0, 0, 40, 30)), annotation(5, 9, 18, (3, 3, 0, 8)), annotation(6, 7, 1, (1, 1, 5, 5), iscrowd=1),
    ]  # fmt: skip
    save_json(root, "instances_train", coco_json(names, inside))
    val = {5: "000000000005.jpg", 4: "000000000004.jpg"}
    save_json(root, "instances_val", coco_json(val, [annotation(9, 5, 18, (2, 2, 6, 6)), crowd | {"image_id": 5}]))
    points = [12, 7, 2, 18, 9, 1, 0, 0, 0]
    person = [annotation(1, 8, 1, (10, 5, 10, 10), keypoints=points, num_keypoints=2), annotation(2, 8, 1, (0, 0, 5, 5))]
    save_json(root, "person_keypoints_train", coco_json({8: names[8]}, person, [(1, "person")], keypoints=FACE, skeleton=[]))
    return root


def test_more_classes_than_a_map_of_bytes_can_tell_apart_are_refused(coco):
    for split in ("train", "val"):
        path = coco / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"] += [{"id": 100 + i, "name": f"kind {i}"} for i in range(252)]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has 255 classes: segment tells up to 254 apart"):
        load_splits(coco, "segment")


def test_coco_categories_are_numbered_from_one_and_crowds_are_left_out_of_training(coco, capsys):
    train = load_annotated(coco, "train", "detect")
    assert (train.name, train.classes, train.keypoints) == ("coco", ("person", "dog", "bottle"), ())
    assert train.has_masks
    assert not train.in_memory
    assert capsys.readouterr().out == ""  # pycocotools is talkative
    assert len(train) == 2  # the image with a crowd alone is left out; 8 goes before 9
    image, target = train[0]
    with Image.open(coco / "train2017" / "000000000008.jpg") as file:
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(file))
    assert target["boxes"].tolist() == [[10, 5, 20, 15], [15, 10, 35, 15]]
    assert target["labels"].tolist() == [3, 1]
    assert target["area"].tolist() == [98.5, 98.5]
    assert target["iscrowd"].tolist() == [0, 0]
    expected = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    expected[0, 5:15, 10:20], expected[1, 10:15, 15:35] = 1, 1
    assert torch.equal(target["masks"], expected)
    assert train[1][1]["boxes"].tolist() == [[0, 0, 40, 30]]


def test_coco_counts_boxes_of_no_size(coco, capsys):
    load_annotated(coco, "train", "detect")
    assert capsys.readouterr().err == "coco: 1 object(s) of the train split left out, as their boxes have no size\n"


def test_coco_tests_on_all_images_with_their_crowds(coco):
    test = load_annotated(coco, "test", "detect")
    assert [len(target["labels"]) for _, target in test] == [0, 2]
    empty, target = test[0][1], test[1][1]
    assert empty["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["masks"].sum((1, 2)).tolist() == [36, 10]
    assert target["masks"][1, 20:, 39].sum() == 10


def test_coco_keypoints_lie_in_the_middle_of_their_pixels(coco):
    train = load_annotated(coco, "train", "keypoints")
    assert train.keypoints == tuple(FACE)
    assert train.classes == ("person",)
    _, target = train[0]
    assert target["keypoints"].tolist() == [[[12.5, 7.5, 2], [18.5, 9.5, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert target["keypoints"].dtype == torch.float32


def test_coco_pixels_have_the_class_of_their_masks_and_two_classes_are_none(coco):
    _, target = load_annotated(coco, "train", "segment")[0]
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
    expected[5:15, 10:20], expected[10:15, 15:35] = 3, 1
    expected[10:15, 15:20] = IGNORED
    expected[20:, 39] = 1  # the crowd, which is no object of the target, is of its class
    assert torch.equal(target["semantic"], expected)


def test_pixels_of_three_objects_have_a_class_only_if_all_agree():
    masks = torch.ones(3, 1, 2, dtype=torch.uint8)
    masks[1, 0, 0] = 0
    assert annotated._painted(masks, torch.tensor([4, 2, 4])).tolist() == [[4, IGNORED]]


def test_coco_without_segmentations_has_boxes_alone(coco):
    bare = [annotation(1, 8, 18, (10, 5, 10, 10), segmentation=[])]
    save_json(coco, "instances_train", coco_json({8: "000000000008.jpg"}, bare))
    train = load_annotated(coco, "train", "detect")
    assert not train.has_masks
    assert "masks" not in train[0][1]
    with pytest.raises(DataError, match="objects without a segmentation: add it to each, or take the task detect"):
        load_annotated(coco, "train", "segment")


def test_splits_that_do_not_go_together_are_told_before_anything_is_trained(coco, capsys):
    assert [split.split for split in load_splits(coco, "detect")] == ["train", "test"]
    bare = [annotation(9, 5, 18, (2, 2, 6, 6), segmentation=[])]
    val = {5: "000000000005.jpg"}
    save_json(coco, "instances_val", coco_json(val, bare))
    assert [split.has_masks for split in load_splits(coco, "detect")] == [False, False]
    assert "objects of one split have no masks, so boxes alone are trained and judged" in capsys.readouterr().err
    save_json(coco, "instances_val", coco_json(val, []))
    with pytest.raises(DataError, match="nothing to judge in its test split"):
        load_splits(coco, "detect")
    save_json(coco, "instances_val", coco_json(val, bare, [(18, "dog"), (44, "bottle")]))
    with pytest.raises(DataError, match=r"have not the same classes \(\['person'\]\): list the same in both"):
        load_splits(coco, "detect")


def test_coco_images_may_lie_in_images(coco):
    before = load_annotated(coco, "train", "detect")[0][0]
    (coco / "images").mkdir()
    (coco / "train2017").rename(coco / "images" / "train2017")
    assert torch.equal(load_annotated(coco, "train", "detect")[0][0], before)


def test_of_several_years_the_last_is_read(coco):
    write(coco / "annotations" / "instances_train2014.json", "{")
    assert len(load_annotated(coco, "train", "detect")) == 2


def test_workers_can_take_it_over_and_a_perfect_answer_is_judged_so(coco, voc):
    for path, kinds in ((coco, ["boxes", "masks"]), (voc, ["boxes"])):
        test = pickle.loads(pickle.dumps(load_annotated(path, "test", "detect")))
        targets = [test[i][1] for i in range(len(test))]
        answers = [{**t, "scores": torch.ones(len(t["labels"]))} for t in targets]
        found = average_precision(zip(targets, answers, strict=True), kinds)
        assert all(value == pytest.approx(100) for value in found.values())


# ---- what is refused


def refuse(match, *args, kind=DataError):
    with pytest.raises(kind, match=match) as caught:
        list(load_annotated(*args))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "names"),
    [(("validation", "detect"), "split='validation'"), (("test", "classify"), "task='classify'.*detect, keypoints, segment")],
)
def test_arguments_that_cannot_be_are_refused_by_name(args, names):
    refuse(names, "scenes", *args, kind=UsageError)
    with pytest.raises(UsageError, match=r"n=0.*at least 1"):
        load_annotated("scenes", "test", "detect", n=0)


def test_a_folder_that_is_missing_or_of_another_kind_is_refused(tmp_path):
    refuse(r"nowhere is no folder: take scenes, or", tmp_path / "nowhere", "train", "detect")
    picture(tmp_path / "train" / "cat" / "1.png")
    refuse(r"in neither layout .*JPEGImages/.*VOCdevkit/VOC2012/.*instances_\*\.json", tmp_path, "train", "detect")


def test_several_sets_in_one_folder_are_refused(voc):
    picture(voc.parent / "VOC2007" / "JPEGImages" / "1.jpg")
    refuse("holds several sets of images, .*VOC2007, .*VOC2012: name the folder of one", voc.parent, "train", "detect")


def test_what_voc_lacks_is_said(voc):
    refuse("VOC's layout, which has no keypoints: take scenes", voc, "train", "keypoints", kind=UsageError)
    (voc / "ImageSets" / "Main" / "val.txt").unlink()
    refuse(r"Main has no test\.txt or val\.txt: write one", voc, "test", "detect")
    (voc / "SegmentationClass").rename(voc / "other")
    refuse(r"has no SegmentationClass/.*take the task detect", voc, "train", "segment")


def test_a_voc_list_may_not_name_what_is_missing(voc):
    (voc / "JPEGImages" / "2008_000002.jpg").unlink()
    refuse(r"val\.txt names 2008_000002, which is not in .*JPEGImages: add it", voc, "test", "detect")
    (voc / "Annotations" / "2007_000002.xml").unlink()
    refuse(r"trainval\.txt names 2007_000002, which is not in .*Annotations: .*whole list", voc, "train", "detect")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("<annotation><object>", "ParseError"),
        (voc_xml("x", "<object><name>dog</name></object>"), "an object without bndbox/xmin"),
        (voc_xml("x", voc_object("dog", ("one", 1, 2, 2))), "could not convert string to float: 'one'"),
        ('<!DOCTYPE a [<!ENTITY b "dog">]>' + voc_xml("x", voc_object("&b;", (1, 1, 2, 2))), "it has a DOCTYPE"),
    ],
    ids=["cut off", "no box", "no number", "entity"],
)
def test_damaged_xml_is_refused_and_entities_are_not_expanded(voc, text, names):
    write(voc / "Annotations" / "2008_000001.xml", text)
    refuse(rf"2008_000001\.xml cannot be read \(.*{names}.*\): mend it or fetch it again", voc, "test", "detect")


def test_a_doctype_in_another_encoding_is_refused_too(voc):
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "dog">]>' + voc_xml("x")
    (voc / "Annotations" / "2008_000001.xml").write_bytes(text.encode("utf-16"))
    refuse(r"2008_000001\.xml cannot be read", voc, "test", "detect")


def test_a_damaged_image_is_named_when_it_is_asked_for(voc):
    (voc / "JPEGImages" / "2008_000002.jpg").write_bytes(b"no picture")
    test = load_annotated(voc, "test", "detect")
    assert test[0][0].shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"2008_000002\.jpg cannot be read .*: mend it or fetch it again"):
        test[1]


@pytest.mark.parametrize(
    ("marks", "names"),
    [
        (np.full((HEIGHT, WIDTH), 21, np.uint8), "label 21, but there are 20 classes"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), "mode RGB"),
        (np.zeros((HEIGHT, 7), np.uint8), r"\(7, 30\) pixels"),
    ],
)
def test_labels_of_pixels_that_cannot_be_are_refused(voc, marks, names):
    Image.fromarray(marks).save(voc / "SegmentationClass" / "2008_000002.png")
    refuse(rf"2008_000002\.png cannot be read \(.*{names}", voc, "test", "segment")


def test_a_split_of_no_objects_is_refused(voc):
    write(voc / "ImageSets" / "Main" / "trainval.txt", "2007_000002\n")
    refuse("VOC2012 has no image with an object in its train split", voc, "train", "detect")


def test_what_coco_lacks_is_said(coco):
    refuse(r"annotations has no person_keypoints_test\*\.json or person_keypoints_val\*\.json", coco, "test", "keypoints")
    (coco / "val2017").rename(coco / "elsewhere")
    refuse(r"instances_val2017\.json has no images: looked for .*val2017, .*images", coco, "test", "detect")
    save_json(coco, "person_keypoints_train", coco_json({}, []))
    refuse("no names of keypoints in its categories", coco, "train", "keypoints")


def broken(change):
    """The training annotations with one thing changed."""
    content = coco_json({8: "000000000008.jpg"}, [annotation(1, 8, 18, (10, 5, 10, 10))], [(18, "dog")])
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c: c["annotations"][0].pop("bbox"), r"image 8 cannot be read \(KeyError: 'bbox'\)"),
        (lambda c: c["annotations"][0].update(category_id=77), "annotation 1 has the category 77"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotates the image 99, which is not in its list"),
        (lambda c: c["annotations"][0].pop("image_id"), r"json cannot be read \(KeyError: 'image_id'\)"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), r"names the image gone\.jpg, which is not in .*train2017"),
        (lambda c: c["images"][0].update(file_name="../val2017/000000000005.jpg"), r"names the image \.\./val2017"),
        (lambda c: c["images"][0].update(width=41), r"height and width \(30, 40\), but .*json says \(30, 41\)"),
        (lambda c: c["annotations"][0].update(segmentation={"counts": [0, 9], "size": [3, 3]}), "a segmentation of 0+8.jpg"),
        (lambda c: c["categories"][0].pop("name"), r"categories cannot be read \(KeyError: 'name'\)"),
    ],
)
def test_damaged_coco_annotations_are_refused(coco, change, names):
    save_json(coco, "instances_train", broken(change))
    refuse(names, coco, "train", "detect")


@pytest.mark.parametrize("text", ['{"images": [', "[1, 2]", "\x00"])
def test_what_is_no_json_of_coco_is_refused(coco, text):
    write(coco / "annotations" / "instances_train2017.json", text)
    refuse(r"instances_train2017\.json cannot be read \(.*\): mend it or fetch it again", coco, "train", "detect")


def test_wrong_numbers_of_keypoints_are_refused(coco):
    wrong = [annotation(5, 8, 1, (10, 5, 10, 10), keypoints=[1, 2])]
    content = coco_json({8: "000000000008.jpg"}, wrong, [(1, "person")], keypoints=FACE)
    save_json(coco, "person_keypoints_train", content)
    refuse("annotation 5 has 2 numbers for 3 keypoints, not 9", coco, "train", "keypoints")
