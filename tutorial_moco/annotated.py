"""Images with annotations: drawn scenes, or a folder in the layout of PASCAL VOC or of COCO.

Whatever the source, a target is torchvision's, and coordinates are pixels of the image as it is stored: x runs right and y
down, and the centre of the top-left pixel is (0.5, 0.5). VOC counts pixels from 1 and a box's last pixel in, and COCO's
keypoints are numbers of pixels; both are shifted to that. EXIF orientation is not applied: annotations don't know of it.
Images of a folder are decoded when they are asked for; that each is there is seen to at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from tutorial_moco.dense import CROWD, DIFFICULT
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.pictures import rgb
from tutorial_moco.scenes import ARROW_RICH, KEYPOINTS, draw_scenes, semantic
from tutorial_moco.segmentation import IGNORED
from tutorial_moco.shapes import SHAPE_CLASSES

Task = Literal["detect", "keypoints", "segment"]
Example = tuple[Tensor, dict[str, Any]]  # an image and its target
SCENES = {"train": (2_000, 0), "test": (500, 1)}  # how many, and the seed they are drawn from


@dataclass(frozen=True, eq=False)
class Annotated(torch.utils.data.Dataset):
    """One split of a set of annotated images. The i-th is an image, uint8 (3, H, W), and its target, a dictionary.

    A target has ``image_id``, the number i, and for the k objects of the image:
    ``boxes`` float32 (k, 4), x0, y0, x1, y1 in pixels, of a positive size;
    ``labels`` int64 (k,), from 1 on: label i is ``classes[i - 1]``, 0 is the ground;
    ``area`` float32 (k,) in pixels; ``iscrowd`` int64 (k,), not 0 for what is not judged: 1 COCO's crowds, 2 VOC's difficult;
    ``masks`` uint8 (k, H, W), 0 or 1, if `has_masks`, for the task ``detect``;
    ``keypoints`` float32 (k, points, 3), if there are `keypoints`: x, y and 2 visible, 1 hidden, 0 not there (then x = y = 0).
    For the task ``segment`` it has ``semantic`` and ``image_id`` alone: int64 (H, W), a label for each pixel, or 255 where
    none is judged.

    Attributes:
        name: ``scenes``, or the name of the folder. split: ``train`` or ``test``.
        classes: names, without the ground; the same for both splits. keypoints: names, () if there are none.
        hash: sha256 in hex. Of scenes: over pixels and targets. Of a folder: over the bytes of the annotation files that
            were read, and over names and sizes of the images, in their order.
        has_masks: each object has a mask. in_memory: nothing is decoded when an image is asked for.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    keypoints: tuple[str, ...]
    hash: str
    has_masks: bool
    in_memory: bool
    records: Sequence[Any]
    read: Callable[[Any], Example]  # of a record; DataLoader's workers must be able to pickle it

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        image, target = self.read(self.records[i])
        return image, {**target, "image_id": range(len(self))[i]}


class _Object(NamedTuple):
    box: tuple[float, ...]
    label: int
    area: float
    crowd: int
    points: tuple[float, ...] = ()
    segmentation: bytes = b""  # COCO's, as JSON: as numbers of Python a million of them would take gigabytes

    def has_size(self) -> bool:
        x0, y0, x1, y1 = self.box
        return math.inf > x1 - x0 > 0 and math.inf > y1 - y0 > 0  # not, if one is no number


class _Record(NamedTuple):
    image: Path
    objects: list[_Object]
    more: Any = None  # VOC: the file of its pixels' labels; COCO: its height and width


def load_annotated(data: str | Path, split: Literal["train", "test"], task: Task, *, n: int | None = None) -> Annotated:
    """One split of annotated images.

    ``scenes`` has 2,000 images to train on and 500 to test on, half of whose objects are arrows for the task ``keypoints``.
    Of a folder the test split is ``test``, else ``val``; the training split is ``trainval``, else ``train``, less what is
    in the test split. Images lie in the order of their names. Those without an object are kept for testing and left out
    of training, where torchvision's detectors learn nothing from them; so are, in training, objects with ``iscrowd``,
    which are no single thing (the pixels of ``semantic`` keep them). Objects whose box has no size are left out, and
    counted in a line on stderr. In ``semantic``, pixels that COCO gives to two classes are 255.

    A VOC folder's classes are VOC's twenty if its annotations name no others, else the sorted names of them all; the number
    of a class in SegmentationClass is its place in that order, from 1. Of several years of COCO the last is taken.

    Args:
        data: ``scenes``, in any case, or the path of a folder; a folder of that name is ``./scenes``.
        task: ``detect``, ``keypoints`` (VOC has none) or ``segment``.
        n: at most so many images: of a folder, spread evenly over all; of scenes, so many are drawn. All if None.

    Raises:
        DataError: the folder or the split is missing, in no known layout, damaged, or lacks what the task needs.
            A damaged image shows only when it is asked for.
        UsageError: an argument is none of the above.
    """
    if split not in SCENES or task not in get_args(Task) or (n is not None and n < 1):
        can = f"split train or test, task one of {', '.join(get_args(Task))}, n at least 1 or None for all"
        raise UsageError(f"split={split!r}, task={task!r}, n={n} cannot be: take {can}")
    if str(data).lower() == "scenes":
        return _scenes(split, task, n)
    path = Path(data).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is no folder: take scenes, or the path of a folder in the layout of VOC or COCO")
    sets = [p for p in (path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*"))) if (p / "JPEGImages").is_dir()]
    if len(sets) > 1:
        raise DataError(f"{path} holds several sets of images, {', '.join(map(str, sets))}: name the folder of one")
    if sets:
        return _voc(sets[0], split, task, n)
    if any((path / "annotations").glob("*_*.json")):
        return _coco(path, split, task, n)
    voc = "VOC's (JPEGImages/, Annotations/, ImageSets/, there or in VOC2012/ or VOCdevkit/VOC2012/)"
    coco = "COCO's (annotations/instances_*.json or person_keypoints_*.json)"
    raise DataError(f"{path} is in neither layout that can be read, {voc} or {coco}: arrange it so")


def load_splits(data: str | Path, task: Task) -> tuple[Annotated, Annotated]:
    """The training and the test split, of which the second can be judged by what the first teaches.

    Where objects of one split only have masks, they count for none, and a line on stderr says so.

    Raises:
        DataError: as `load_annotated`; or the splits have not the same classes or keypoints, or nothing in the test split
            can be judged.
    """
    train, test = (load_annotated(data, split, task) for split in SCENES)
    if task == "segment" and len(train.classes) >= IGNORED:
        raise DataError(f"{train.name} has {len(train.classes)} classes: segment tells up to {IGNORED - 1} apart, take a part")
    for what in ("classes", "keypoints"):
        ours, theirs = getattr(train, what), getattr(test, what)
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs))[:3] or "their order"
            raise DataError(f"{train.name}: the splits train and test have not the same {what} ({odd}): list the same in both")
    if not test.in_memory and task != "segment":
        objects = [o for record in test.records for o in record.objects if not o.crowd]
        if not (any(any(o.points[2::3]) for o in objects) if task == "keypoints" else objects):
            raise DataError(f"{test.name} has nothing to judge in its test split, {len(objects)} objects for {task}: add some")
    if train.has_masks != test.has_masks:
        print(f"{train.name}: objects of one split have no masks, so boxes alone are trained and judged", file=sys.stderr)
        return replace(train, has_masks=False), replace(test, has_masks=False)
    return train, test


def _scenes(split: str, task: Task, n: int | None) -> Annotated:
    count, seed = SCENES[split]
    images, targets = draw_scenes(n or count, seed, kinds=ARROW_RICH if task == "keypoints" else None)
    digest = hashlib.sha256(images.numpy().reshape(-1))
    for tensor in (tensor for target in targets for tensor in target.values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    records, read, masks = list(zip(images, targets, strict=True)), partial(_read_scene, task=task), task == "detect"
    return Annotated("scenes", split, SHAPE_CLASSES, KEYPOINTS, digest.hexdigest(), masks, True, records, read)


def _read_scene(record: tuple[Tensor, dict[str, Tensor]], task: Task) -> Example:
    image, target = record
    if task == "segment":
        return image, {"semantic": semantic(target)}
    wanted = {name: value for name, value in target.items() if name != "masks" or task == "detect"}
    return image, wanted | {"iscrowd": torch.zeros_like(target["labels"])}


@contextlib.contextmanager
def _parsing(what: str | Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on damaged bytes parsers raise almost anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise DataError(f"{what} cannot be read ({reason}): mend it or fetch it again") from error


def _decode(path: Path) -> Tensor:
    with _parsing(path), Image.open(path) as image:
        return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1).contiguous()


def _target(objects: list[_Object], points: int = 0) -> dict[str, Tensor]:
    target = {
        "boxes": torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([o.label for o in objects], dtype=torch.int64),
        "area": torch.tensor([o.area for o in objects], dtype=torch.float32),
        "iscrowd": torch.tensor([o.crowd for o in objects], dtype=torch.int64),
    }
    if points:
        x, y, visible = torch.tensor([o.points for o in objects], dtype=torch.float32).view(-1, points, 3).unbind(2)
        target["keypoints"] = torch.stack([x + 0.5, y + 0.5, visible], 2).where(visible[:, :, None] > 0, 0.0)
    return target


def _wanted(target: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    rows = (target["iscrowd"] == 0) | (split == "test")
    return {name: values[rows] for name, values in target.items()}


def _choose(records: list[_Record], split: str, n: int | None, name: str, keep_all: bool = False) -> list[_Record]:
    """Records in the order of their names, without objects of no size and, to train on, without images of no object."""
    sized = [r._replace(objects=[o for o in r.objects if o.has_size()]) for r in sorted(records, key=lambda r: r.image)]
    if flat := sum(len(r.objects) for r in records) - sum(len(r.objects) for r in sized):
        print(f"{name}: {flat} object(s) of the {split} split left out, as their boxes have no size", file=sys.stderr)
    chosen = [r for r in sized if keep_all or split == "test" or not all(o.crowd for o in r.objects)]
    if not chosen:
        raise DataError(f"{name} has no image {'with an object ' * (split == 'train')}in its {split} split: add some")
    count = min(n or len(chosen), len(chosen))
    return [chosen[i * len(chosen) // count] for i in range(count)]


def _hash(annotations: Iterable[bytes], records: list[_Record]) -> str:
    parts = [hashlib.sha256(content).digest() for content in annotations]
    parts += [f"{record.image.name}\0{record.image.stat().st_size}\n".encode() for record in records]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ---- PASCAL VOC


def _voc(root: Path, split: str, task: Task, n: int | None) -> Annotated:
    if task == "keypoints":
        raise UsageError(f"{root} is in VOC's layout, which has no keypoints: take scenes or a folder in COCO's layout")
    if task == "segment" and not (root / "SegmentationClass").is_dir():
        raise DataError(f"{root} has no SegmentationClass/, whose files label each pixel: add it, or take the task detect")
    listing, names = _voc_names(root / "ImageSets" / ("Segmentation" if task == "segment" else "Main"), split)
    folder, ending = ("SegmentationClass", ".png") if task == "segment" else ("Annotations", ".xml")
    images = {p.stem: p for p in sorted((root / "JPEGImages").iterdir())}
    marks = {p.stem: p for p in sorted((root / folder).glob(f"*{ending}"))}
    for name, (at, there) in itertools.product(names, (("JPEGImages", images), (folder, marks))):
        if name not in there:
            mend = "add it, or take out the line, or the whole list where annotations are secret, as those of VOC2012's test"
            raise DataError(f"{listing} names {name}, which is not in {root / at}: {mend}")
    parsed = {p.stem: _voc_objects(p) for p in sorted((root / "Annotations").glob("*.xml"))}
    classes, title = _voc_classes({name for objects in parsed.values() for name, _ in objects}), root.resolve().name
    if task == "segment":
        records = [_Record(images[name], [], marks[name]) for name in names]
        read = partial(_read_voc_segment, classes=len(classes))
    else:
        label = {name: i for i, name in enumerate(classes, 1)}
        records = [_Record(images[name], [o._replace(label=label[c]) for c, o in parsed[name]]) for name in names]
        read = partial(_read_voc, split=split)
    records = _choose(records, split, n, title, keep_all=task == "segment")
    digest = _hash((marks[name].read_bytes() for name in names), records)
    return Annotated(title, split, classes, (), digest, False, False, records, read)


def _voc_names(folder: Path, split: str) -> tuple[Path, list[str]]:
    """The list of the split's images, and what it names."""

    def read(*stems: str) -> tuple[Path | None, set[str]]:
        found = next((file for stem in stems if (file := folder / f"{stem}.txt").is_file()), None)
        with _parsing(found or folder):
            return found, {line.split()[0] for line in found.read_text().splitlines() if line.strip()} if found else set()

    wanted = {"train": ("trainval", "train"), "test": ("test", "val")}
    listing, names = read(*wanted[split])
    if listing is None:
        raise DataError(f"{folder} has no {'.txt or '.join(wanted[split])}.txt: write one, the name of an image a line")
    return listing, sorted(names if split == "test" else names - read(*wanted["test"])[1])


def _voc_classes(names: set[str]) -> tuple[str, ...]:
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    official = tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])  # was trained on VOC's classes
    return official if names <= set(official) else tuple(sorted(names))


def _voc_objects(file: Path) -> list[tuple[str, _Object]]:
    """Names of classes and objects, still without labels."""
    with _parsing(file):
        text = file.read_bytes().decode("utf-8-sig", errors="replace")
        if "<!DOCTYPE" in text:  # only there can entities be declared, which might grow to gigabytes or name other files
            raise ValueError("it has a DOCTYPE, which VOC's files have not")
        found = []
        for node in ElementTree.fromstring(text).findall("object"):
            x0, y0, x1, y1 = (float(_text(node, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (node.findtext("difficult") or "").strip() == "1"
            box, area = (x0 - 1, y0 - 1, x1, y1), (x1 - x0 + 1) * (y1 - y0 + 1)
            found.append((_text(node, "name"), _Object(box, 0, area, DIFFICULT * difficult)))
        return found


def _text(node: ElementTree.Element, path: str) -> str:
    text = (node.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"an object without {path}")
    return text


def _read_voc(record: _Record, split: str) -> Example:
    return _decode(record.image), _wanted(_target(record.objects), split)


def _read_voc_segment(record: _Record, classes: int) -> Example:
    image = _decode(record.image)
    with _parsing(record.more), Image.open(record.more) as marks:
        labels = torch.from_numpy(np.array(marks)).long()
        if labels.shape != image.shape[1:]:
            raise ValueError(f"{marks.size} pixels of mode {marks.mode}, not the image's number with a label each")
        if unknown := labels[(labels > classes) & (labels != IGNORED)].tolist():
            raise ValueError(f"label {unknown[0]}, but there are {classes} classes")
    return image, {"semantic": labels}


# ---- COCO


def _coco(root: Path, split: str, task: Task, n: int | None) -> Annotated:
    prefix = "person_keypoints" if task == "keypoints" else "instances"
    kinds = ("train",) if split == "train" else ("test", "val")
    files = [file for kind in kinds for file in sorted((root / "annotations").glob(f"{prefix}_{kind}*.json"), reverse=True)]
    if not files:
        wanted = " or ".join(f"{prefix}_{kind}*.json" for kind in kinds)
        raise DataError(f"{root / 'annotations'} has no {wanted}, which the {split} split of the task {task} needs: add it")
    file = files[0]
    folders = [root / at / file.stem.removeprefix(f"{prefix}_") for at in (".", "images")] + [root / "images"]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise DataError(f"{file} has no images: looked for {', '.join(map(str, folders))}, add one of them")
    content, title = file.read_bytes(), root.resolve().name
    known = _index(file, content)
    with _parsing(f"{file}, its categories"):
        classes = tuple(str(known.cats[number]["name"]) for number in sorted(known.cats))
        named = [tuple(c["keypoints"]) for c in known.cats.values() if c.get("keypoints") and task == "keypoints"]
        points = named[0] if named else ()
    if task == "keypoints" and not points:
        raise DataError(f"{file} has no names of keypoints in its categories: add them, or take the task detect")
    records = _choose(_coco_records(known, file, folder, points), split, n, title)
    outlined = all(o.segmentation for record in records for o in record.objects)
    if task == "segment" and not outlined:
        raise DataError(f"{file} has objects without a segmentation: add it to each, or take the task detect")
    has_masks = outlined and task == "detect"
    read = partial(_read_coco, file=file, split=split, task=task, points=len(points), has_masks=has_masks)
    return Annotated(title, split, classes, points, _hash([content], records), has_masks, False, records, read)


def _index(file: Path, content: bytes) -> Any:
    known = COCO()
    with _parsing(file), contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress
        known.dataset = json.loads(content)
        if not isinstance(known.dataset, dict):
            raise ValueError("no dictionary")
        known.createIndex()
    if lost := sorted(known.imgToAnns.keys() - known.imgs.keys(), key=str):
        raise DataError(f"{file} annotates the image {lost[0]}, which is not in its list of images: add it, or take that out")
    return known


def _coco_records(known: Any, file: Path, folder: Path, points: tuple[str, ...]) -> list[_Record]:
    labels, records = {number: label for label, number in enumerate(sorted(known.cats), 1)}, []
    for number, image in known.imgs.items():
        with _parsing(f"{file}, image {number}"):
            name, size = Path(image["file_name"]), (int(image["height"]), int(image["width"]))
            objects = [_coco_object(a, labels, len(points)) for a in known.imgToAnns.get(number, ())]
        if name.is_absolute() or ".." in name.parts or not (folder / name).is_file():
            raise DataError(f"{file} names the image {name}, which is not in {folder}: add it, or take out what names it")
        records.append(_Record(folder / name, objects, size))
    return records


def _coco_object(annotation: dict, labels: dict[int, int], points: int) -> _Object:
    x, y, width, height = map(float, annotation["bbox"])
    where, category = annotation.get("keypoints") or (0,) * 3 * points, annotation["category_id"]
    if category not in labels:
        raise ValueError(f"annotation {annotation['id']} has the category {category}, which is not in the list of them")
    if points and len(where) != 3 * points:
        raise ValueError(f"annotation {annotation['id']} has {len(where)} numbers for {points} keypoints, not {3 * points}")
    area, crowd = float(annotation.get("area", width * height)), CROWD * bool(annotation.get("iscrowd", 0))
    box, shape = (x, y, x + width, y + height), annotation.get("segmentation")
    outline = json.dumps(shape).encode() if shape else b""
    return _Object(box, labels[category], area, crowd, tuple(map(float, where)) if points else (), outline)


def _read_coco(record: _Record, *, file: Path, split: str, task: Task, points: int, has_masks: bool) -> Example:
    image, size = _decode(record.image), record.more
    if (found := tuple(image.shape[1:])) != size:
        raise DataError(f"{record.image} has height and width {found}, but {file} says {size}: bring what was annotated")
    target = _target(record.objects, points)
    if task == "segment":
        return image, {"semantic": _painted(_masks(record, file), target["labels"])}
    return image, _wanted(target | ({"masks": _masks(record, file)} if has_masks else {}), split)


def _masks(record: _Record, file: Path) -> Tensor:
    """uint8 (k, H, W)."""
    known = COCO()
    known.imgs = {0: {"height": record.more[0], "width": record.more[1]}}  # all it asks for, and far less than to keep it
    masks = torch.zeros(len(record.objects), *record.more, dtype=torch.uint8)
    with _parsing(f"{file}, a segmentation of {record.image.name}"):
        for mask, found in zip(masks, record.objects, strict=True):
            shape = json.loads(found.segmentation)
            mask[:] = torch.from_numpy(known.annToMask({"image_id": 0, "segmentation": shape}))
    return masks


def _painted(masks: Tensor, labels: Tensor) -> Tensor:
    """The class of each pixel (H, W), of objects that may overlap: which lies on top is not known."""
    pixels = torch.zeros(masks.shape[1:], dtype=torch.int64)
    for mask, label in zip(masks.bool(), labels, strict=True):
        pixels[mask] = torch.where((pixels[mask] == 0) | (pixels[mask] == label), label, IGNORED)
    return pixels
