"""Pictures that stay encoded: the same views from a folder, a .tar and shards, close to those cropped in memory."""

import contextlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as usual

from tutorial_moco import augment, cli, encoded
from tutorial_moco.errors import BadPicture, DataError, UsageError
from tutorial_moco.images import load_images
from tutorial_moco.pretrain import pretrain
from tutorial_moco.recipes import Recipe

CLASSES = ("bee", "cat", "yak")
SIZE = 32


def picture(number, width=90, height=70):
    """Smooth, so that a pixel's place tells its colour."""
    y, x = np.mgrid[:height, :width] / 100
    wave = [np.sin(3 * x + number + c) * np.cos(2 * y - c) for c in range(3)]
    return Image.fromarray((127 + 120 * np.stack(wave, axis=-1)).astype(np.uint8))


def as_bytes(image, kind="JPEG", **how):
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}) | how)
    return out.getvalue()


def sizes(number):
    return 60 + 7 * (number % 5), 50 + 9 * (number % 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "pets"
    for split, count in ("train", 8), ("val", 3):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                number = 100 * c + i
                kind, suffix = ("PNG", "png") if i == 1 else ("JPEG", "jpg")
                (root / split / name / f"{number:03}.{suffix}").write_bytes(as_bytes(picture(number, *sizes(number)), kind))
    return root


def packed(folder, out):
    with tarfile.open(out, "w") as tar:
        tar.add(folder, arcname=".")
    return out


def sharded(folder, out):
    """As WebDataset lays them out: two shards for a split, a picture and its class side by side."""
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.*"))
        for shard in range(2):
            out.mkdir(exist_ok=True)
            with tarfile.open(out / f"pets-{split}-{shard:04}.tar", "w") as tar:
                for file in files[shard * len(files) // 2 : (shard + 1) * len(files) // 2]:
                    for suffix, content in (
                        (file.suffix, file.read_bytes()),
                        (".cls", str(CLASSES.index(file.parent.name)).encode()),
                    ):
                        info = tarfile.TarInfo(f"{file.parent.name}_{file.stem}{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return out


def load(path, split="train", **how):
    return load_images(path, split, view_size=SIZE, progress=False, **how)


def test_a_folder_a_tar_and_shards_give_the_same_pictures(folder, tmp_path):
    sets = [folder, packed(folder, tmp_path / "pets.tar"), sharded(folder, tmp_path / "shards")]
    for split, count in ("train", 24), ("test", 9):
        found = [load(path, split) for path in sets]
        index = torch.tensor([[0, 9, 23], [5, 9, 1]]) % count
        crops = [one.images.crops(index, "v2", seed=3, epoch=2).wait() for one in found]
        for one, made in zip(found, crops, strict=True):
            assert len(one) == len(one.images) == count
            assert torch.equal(one.labels, found[0].labels)
            assert torch.equal(made, crops[0])
        assert found[0].classes == found[1].classes == CLASSES
        assert found[2].classes == ("0", "1", "2")


@pytest.mark.parametrize("augmentation", ["v2", "v3"])
def test_views_are_those_of_the_picture_in_memory(folder, augmentation):
    images = load(folder).images
    for row in (0, 1, 10, 23):  # 1 is a PNG
        index = torch.tensor([row])
        pixels = usual.pil_to_tensor(images.open(row).convert("RGB"))[None]
        crops = images.crops(index.expand(2, -1), augmentation, seed=1, epoch=4).wait()
        assert crops.shape == (2, 1, 3, SIZE, SIZE)
        found = augment.two_views(crops, index, augmentation, seed=1, epoch=4)
        expected = augment.two_views(pixels, index, augmentation, seed=1, epoch=4, size=SIZE)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == (1, 3, SIZE, SIZE)
            assert (ours - theirs).abs().mean() < 0.03  # of a spread of 1: crops are rounded to 8 bits
        for view in range(2):
            alone = augment.one_view(crops[view], index, augmentation, view, seed=1, epoch=4, cropped=True)
            torch.testing.assert_close(alone, found[view], rtol=0, atol=1e-5)


def test_pictures_are_evaluated_as_torchvision_does_it(folder):
    images = load(folder, "test").images
    found = images.to("cpu")
    assert found.shape == images.shape == (9, 3, SIZE, SIZE)
    for row in range(9):
        whole = images.open(row).convert("RGB")
        expected = usual.pil_to_tensor(usual.center_crop(usual.resize(whole, round(SIZE * 256 / 224)), [SIZE, SIZE]))
        assert (found[row].float() - expected.float()).abs().mean() < 3


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch):
    source, box = picture(1, 800, 640), [100.0, 60.0, 500.0, 460.0]
    whole = Image.open(io.BytesIO(as_bytes(source)))
    (found,) = encoded.cut(whole, [box], SIZE)
    assert whole.size == (200, 160)  # a quarter; 400 pixels became 100, more than twice 32
    expected = np.asarray(source.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
    assert abs(found.astype(float) - expected).mean() < 4
    whole = Image.open(io.BytesIO(as_bytes(source)))
    encoded.cut(whole, [box, [0.0, 0.0, 130.0, 130.0]], SIZE)
    assert whole.size == (400, 320)


def test_both_views_of_a_picture_are_cut_from_it_once_decoded(folder, monkeypatch):
    images, opened = load(folder).images, []
    whole = encoded.EncodedImages.open
    monkeypatch.setattr(encoded.EncodedImages, "open", lambda self, row: opened.append(row) or whole(self, row))
    images.crops(torch.tensor([[3, 4], [3, 4]]), "v1", seed=0, epoch=0).wait()
    assert sorted(opened) == [3, 4]
    images.crops(torch.tensor([[3, 4], [4, 3]]), "v1", seed=0, epoch=0).wait()
    assert sorted(opened) == [3, 3, 3, 4, 4, 4]


def test_a_photograph_that_was_held_on_its_side_is_turned(folder, tmp_path):
    mine = tmp_path / "pets"
    shutil.copytree(folder, mine)
    turned = Image.Exif()
    turned[0x0112] = 6
    source = picture(0, 90, 50)
    (mine / "train" / "bee" / "000.jpg").write_bytes(as_bytes(source.rotate(90, expand=True), exif=turned))
    (found,) = load(mine).images[:1].to("cpu")
    shutil.rmtree(mine / "train" / "bee")
    (mine / "train" / "bee").mkdir()
    (mine / "train" / "bee" / "000.jpg").write_bytes(as_bytes(source))
    (expected,) = load(mine).images[:1].to("cpu")
    assert (found.float() - expected.float()).abs().mean() < 4


# Training ------------------------------------------------------------------------------------------------------------

RECIPE = Recipe(encoder="tiny", K=32, batch_size=8, epochs=2, view_size=SIZE, augmentation="v2", seed=5)


def test_a_training_stopped_and_resumed_ends_in_the_same_bits(folder, tmp_path):
    train, test = load(folder), load(folder, "test")
    straight = pretrain(RECIPE, train, test, dtype=torch.float32, monitor=1, progress=False)
    assert len(straight.monitor) == 1
    assert straight.summary()["data_stall_percent"] >= 0
    tar = load(packed(folder, tmp_path / "pets.tar"))
    assert tar.hash != train.hash  # other places, so a run does not go on with it

    class Died(Exception):
        pass

    def step(run, *batch):
        if run.step == 4 and not died:
            died.append(True)
            raise Died
        return whole(run, *batch)

    died = []
    from tutorial_moco import pretrain as module

    whole, module.train_step = module.train_step, step
    saves, module.SAVE_EVERY = module.SAVE_EVERY, 0
    try:
        for _ in range(2):
            with contextlib.suppress(Died):
                resumed = pretrain(RECIPE, train, dtype=torch.float32, out=tmp_path / "run", progress=False)
    finally:
        module.train_step, module.SAVE_EVERY = whole, saves
    assert died
    for name, tensor in straight.mechanism.state_dict().items():
        assert torch.equal(tensor, resumed.mechanism.state_dict()[name]), name


def test_the_command_trains_on_pictures_and_evaluates_as_it_trained(folder, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data", str(folder), "--view-size", str(SIZE), "--encoder", "tiny", "--K", "32", "--batch-size", "8"]
    assert cli.main(["pretrain", *flags, "--epochs", "2", "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert 0 <= result["data_stall_percent"] <= 100
    assert (out / "report.html").exists()
    told = capsys.readouterr().err
    assert "24 training and 9 test images of 32 x 32 pixels, decoded when they are wanted, 3 classes" in told
    assert cli.main(["evaluate", "--data", str(folder), "--checkpoint", str(out / "checkpoint.safetensors"),
                     "--batch-size", "8", "--epochs", "2"]) == 0  # fmt: skip
    assert list(out.glob("probe-*.safetensors"))
    assert "decoded when they are wanted" in capsys.readouterr().err


def test_images_in_memory_are_not_mistaken_for_encoded_ones(folder):
    with pytest.raises(UsageError, match="--view-size 32 needs images that were loaded with it"):
        pretrain(RECIPE, load_images(folder, "train", progress=False), progress=False)
    with pytest.raises(UsageError, match="--view-size None needs"):
        pretrain(RECIPE.replace(view_size=None), load(folder), progress=False)


# What is wrong with the pictures -------------------------------------------------------------------------------------


def spoilt(folder, out):
    shutil.copytree(folder, out)
    (out / "train" / "bee" / "002.jpg").write_bytes(b"no picture")
    half = (out / "train" / "cat" / "103.jpg").read_bytes()
    (out / "train" / "cat" / "103.jpg").write_bytes(half[: len(half) // 2])
    return out


def test_a_bad_picture_ends_the_training_with_its_name_or_is_gray(folder, tmp_path, held):
    mine, every = spoilt(folder, tmp_path / "pets"), torch.arange(24).expand(2, -1)
    for rows, name in ([2], "train/bee/002.jpg"), ([11], "train/cat/103.jpg"):
        with pytest.raises(BadPicture, match=f"{name} cannot be decoded .*: mend it or take it out"):
            load(mine).images.crops(torch.tensor([rows, rows]), "none", seed=0, epoch=0).wait()
    images, sound = load(mine, on_bad_image="skip").images, load(folder).images
    found = images.crops(every, "none", seed=0, epoch=0).wait()
    expected = sound.crops(every, "none", seed=0, epoch=0).wait()
    for row in range(24):
        assert torch.equal(found[:, row], torch.full_like(found[:, row], encoded.GRAY) if row in (2, 11) else expected[:, row])
    assert sorted(images.bad) == ["train/bee/002.jpg", "train/cat/103.jpg"]
    held(
        "a bad picture is named or left out",
        "in the middle of a training from encoded pictures: named, or gray and listed",
        2,
        2,
    )


def test_a_bad_picture_in_a_training_is_told_in_a_line(folder, tmp_path, capsys):
    flags = ["--data", str(spoilt(folder, tmp_path / "pets")), "--view-size", str(SIZE), "--encoder", "tiny", "--K", "32"]
    flags += ["--batch-size", "8", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["pretrain", *flags]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tutorial-moco: ")]
    assert "cannot be decoded" in line
    assert cli.main(["pretrain", *flags, "--on-bad-image", "skip"]) == 0


def test_the_list_of_pictures_is_kept_until_the_folder_changes(folder, tmp_path, monkeypatch):
    mine, kept = tmp_path / "pets", tmp_path / "cache"
    shutil.copytree(folder, mine)
    first = load(mine, cache=kept)
    with monkeypatch.context() as patch:
        patch.setattr("tutorial_moco.images.catalogue", lambda *args: pytest.fail("listed once more"))
        again = load(mine, cache=kept)
    assert again.hash == first.hash
    assert torch.equal(again.images[:4].to("cpu"), first.images[:4].to("cpu"))
    (mine / "train" / "bee" / "new.jpg").write_bytes(as_bytes(picture(7)))
    assert len(load(mine, cache=kept)) == len(first) + 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda root, out: out / "none", "no folder or archive"),
        (lambda root, out: packed(root, out / "pets.tar.xz"), "cannot be read where it lies: unpack it"),
        (lambda root, out: shutil.copytree(root / "train", out / "flat"), "has no images to train on"),
        (lambda root, out: drop(sharded(root, out / "a"), "*val*"), "has shards of train: names must tell train and val"),
        (lambda root, out: cut_short(sharded(root, out / "b")), "is truncated or damaged"),
        (lambda root, out: without_class(sharded(root, out / "c")), "no .cls beside it"),
    ],
)
def test_what_cannot_be_read_where_it_lies_is_told_in_a_line(make, told, folder, tmp_path):
    with pytest.raises(DataError, match=told) as error:
        load(make(folder, tmp_path))
    assert "\n" not in str(error.value)


def drop(shards, which):
    for file in shards.glob(which):
        file.unlink()
    return shards


def cut_short(shards):
    file = next(shards.glob("*train*"))
    file.write_bytes(file.read_bytes()[:3000])
    return shards


def without_class(shards):
    with tarfile.open(next(shards.glob("*train*")), "w") as tar:
        info = tarfile.TarInfo("bee_000.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    return shards


def test_a_folder_of_pictures_may_hold_an_archive_too(folder, tmp_path):
    mine = tmp_path / "pets"
    shutil.copytree(folder, mine)
    packed(folder, mine / "originals.tar")
    assert len(load(mine)) == 24


def test_a_picture_that_was_mended_in_its_place_is_read_whole(folder, tmp_path):
    mine, kept = spoilt(folder, tmp_path / "pets"), tmp_path / "cache"
    with pytest.raises(BadPicture):
        load(mine, cache=kept).images[2:3].to("cpu")
    shutil.copy(folder / "train" / "bee" / "002.jpg", mine / "train" / "bee" / "002.jpg")  # longer than what was there
    assert load(mine, cache=kept).images[2:3].to("cpu").float().std() > 1


def test_a_fault_of_the_machine_is_no_bad_picture(folder, tmp_path):
    mine = tmp_path / "pets"
    shutil.copytree(folder, mine)
    images = load(mine, on_bad_image="skip").images
    (mine / "train" / "bee" / "000.jpg").unlink()
    with pytest.raises(BadPicture, match="No such file"):
        images[:1].to("cpu")
    assert images.bad == {}


def test_one_picture_a_class_trains_but_cannot_be_tested(folder, tmp_path):
    for name in CLASSES:
        (tmp_path / "few" / "train" / name).mkdir(parents=True)
        shutil.copy(next((folder / "train" / name).glob("*.jpg")), tmp_path / "few" / "train" / name)
    assert len(load(tmp_path / "few")) == 3
    with pytest.raises(DataError, match="has no images for a test split"):
        load(tmp_path / "few", "test")


def test_a_checkpoint_trained_on_encoded_pictures_is_evaluated_on_images_in_memory_too(folder, tmp_path, capsys):
    run = pretrain(RECIPE.replace(epochs=1), load(folder), dtype=torch.float32, out=tmp_path, progress=False)
    assert run.step == 3
    for flags in (["--data", "digits"], ["--data", str(folder), "--image-size", "32"]):
        assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "checkpoint.safetensors"), *flags]) == 0
        assert "decoded when" not in capsys.readouterr().err
    assert cli.main(["compare", "--data", str(folder), "--view-size", "32"]) == 2
    assert "--view-size is for pretrain" in capsys.readouterr().err


def test_the_two_ways_to_size_images_exclude_each_other(folder):
    with pytest.raises(UsageError, match="give one"):
        load(folder, image_size=32)
    with pytest.raises(DataError, match="no folder or archive 'shapes'"):
        load("shapes")
