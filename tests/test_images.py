"""Images: every source, every way one can be damaged, and the cache."""

import hashlib
import http.server
import io
import lzma
import os
import pickle
import socket
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from tutorial_moco import archives, images, shapes
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.images import hold_out, load_images

FORMATS = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test may touch the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUTORIAL_MOCO_CACHE", str(folder))
    return folder


def picture(seed, size=(12, 12), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tree(train=3, test=2, lead=""):
    """Names and bytes of a small data set of two classes, every picture another."""
    files = {}
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                seed = (split == "test") * 1000 + label * 100 + i
                files[f"{lead}{split}/{name}/{i}.png"] = encode(picture(seed))
    return files


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, {".tar": "w", ".xz": "w:xz"}.get(path.suffix, "w:gz")) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def make(tmp_path, files, form=".zip"):
    return write_archive(tmp_path / f"mine{form}", files)


def load(data, split="train", **options):
    return load_images(data, split, progress=False, **options)


# ---- the same images from every source


@pytest.mark.parametrize("form", ["", *FORMATS])
@pytest.mark.parametrize("lead", ["", "mydata/", "./"])
def test_every_form_gives_the_same_images(tmp_path, form, lead):
    files = tree(lead=lead)
    path = make(tmp_path, files, form) if form else write_folder(tmp_path / "mine", files)
    for split, per_class in (("train", 3), ("test", 2)):
        found = load(path, split)
        names = [f"{lead}{split}/{label}/{i}.png" for label in ("cat", "dog") for i in range(per_class)]
        expected = np.stack([np.asarray(Image.open(io.BytesIO(files[name]))).transpose(2, 0, 1) for name in names])
        assert found.images.dtype == torch.uint8
        assert np.array_equal(found.images.numpy(), expected)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [0] * per_class + [1] * per_class
        assert (found.name, found.split, found.classes, found.factors) == (path.name, split, ("cat", "dog"), {})
        labels = found.labels.numpy().astype("<i8").tobytes()
        assert found.hash == hashlib.sha256(expected.tobytes() + labels).hexdigest()


@pytest.mark.parametrize("form", ["", ".tar", ".zip"])
def test_junk_is_ignored(tmp_path, form):
    junk = ("__MACOSX/train/cat/._0.png", "train/cat/.DS_Store", "train/cat/.hidden.png", ".git/train/x/1.png")
    files = tree() | dict.fromkeys((*junk, "README.md", "train/cat/notes.txt", "train/loose.png"), b"junk")
    path = make(tmp_path, files, form) if form else write_folder(tmp_path / "mine", files)
    assert load(path).classes == ("cat", "dog")
    assert len(load(path)) == 6


@pytest.mark.parametrize("second", ["val", "valid", "validation", "Test"])
def test_other_names_for_the_second_split(tmp_path, second):
    files = {name.replace("test/", f"{second}/"): content for name, content in tree().items()}
    assert len(load(make(tmp_path, files), "test")) == 4


def test_test_goes_before_val(tmp_path):
    files = tree(test=1) | {f"val/cat/{i}.png": encode(picture(i)) for i in range(5)}
    assert len(load(make(tmp_path, files), "test")) == 2


def test_without_a_second_split_every_tenth_image_becomes_one(tmp_path, capsys):
    files = {name: content for name, content in tree(train=25).items() if name.startswith("train")}
    files["train/lone/0.png"] = encode(picture(-7 % 5000))
    path = make(tmp_path, files)
    train, test = load(path), load(path, "test")
    assert test.labels.bincount(minlength=3).tolist() == [2, 2, 0]
    assert train.labels.bincount().tolist() == [23, 23, 1]
    tenth = sorted(f"train/cat/{i}.png" for i in range(25))[9]
    assert np.array_equal(test.images[0].permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(files[tenth]))))
    together = {image.numpy().tobytes() for image in torch.cat([train.images, test.images])}
    assert len(together) == 51
    assert capsys.readouterr().err.count("no test split, so every 10th image") == 1


def test_one_image_a_class_trains_but_cannot_be_tested(tmp_path):
    path = make(tmp_path, {f"train/{label}/0.png": encode(picture(i)) for i, label in enumerate("abc")})
    assert len(load(path)) == 3
    with pytest.raises(DataError, match="no images for a test split"):
        load(path, "test")


# ---- decoding and size


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_modes(tmp_path, mode, held):
    kind, suffix = ("TIFF", "tif") if mode == "CMYK" else ("PNG", "png")
    original = picture(1, mode=mode)
    files = tree() | {f"train/cat/0.{suffix}": encode(original, kind)}
    if suffix != "png":
        del files["train/cat/0.png"]
    assert np.array_equal(load(make(tmp_path, files)).images[0].permute(1, 2, 0), np.asarray(original.convert("RGB")))
    held(
        "a bad picture is named or left out", "gray, palette, transparent, CMYK, one bit: the picture as Pillow shows it", 1, 1
    )


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path):
    original = picture(1, mode="P")
    files = tree() | {"train/cat/0.png": encode(original, transparency=bytes(range(256)))}
    assert np.array_equal(load(make(tmp_path, files)).images[0].permute(1, 2, 0), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("TIFF", "tif")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, kind, suffix):
    gray = (np.arange(144, dtype=np.uint16) * 450).reshape(12, 12)
    files = tree() | {f"train/cat/0.{suffix}": encode(Image.fromarray(gray), kind)}
    if suffix != "png":
        del files["train/cat/0.png"]
    assert np.array_equal(load(make(tmp_path, files)).images[0, 1], gray >> 8)


def test_exif_orientation_is_applied(tmp_path):
    original, exif = picture(1), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    files = tree() | {"train/cat/0.png": encode(original, exif=exif)}
    expected = np.asarray(original.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(load(make(tmp_path, files)).images[0].permute(1, 2, 0), expected)


def test_images_of_one_small_square_size_keep_it(tmp_path, capsys):
    files = {f"{name}x.png": encode(picture(i, (96, 96))) for i, name in enumerate(tree())}
    assert load(make(tmp_path, files)).images.shape == (6, 3, 96, 96)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("odd", [(12, 13), (13, 13), (97, 97), (200, 20)])
@pytest.mark.parametrize("place", ["train/cat/0.png", "test/dog/1.png"])
def test_others_are_fitted_to_64_and_it_is_said_once(tmp_path, capsys, odd, place):
    path = make(tmp_path, tree() | {place: encode(picture(1, odd))})
    assert load(path).images.shape == (6, 3, 64, 64)
    assert load(path, "test").images.shape == (4, 3, 64, 64)
    assert capsys.readouterr().err.count("resized to 64 pixels") == 1


def test_resizing_keeps_the_centre_and_antialiases(tmp_path):
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, 40:80] = 200  # what the crop must keep ...
    stripes[::2] //= 2  # ... with lines that alias to 200 or 100 unless they are averaged
    images = load(make(tmp_path, tree() | {"train/cat/0.png": encode(Image.fromarray(stripes))}), image_size=10).images
    assert images.shape == (6, 3, 10, 10)
    assert (images[0, :, :, 1:-1].float() - 150).abs().max() < 15


@pytest.mark.parametrize("size", [7, 0, -1])
def test_too_small_a_size_is_a_wrong_setting(tmp_path, size):
    with pytest.raises(UsageError, match="--image-size"):
        load(make(tmp_path, tree()), image_size=size)


def test_unknown_split_is_a_wrong_setting(tmp_path):
    with pytest.raises(UsageError, match="split"):
        load(make(tmp_path, tree()), "val")


@pytest.mark.parametrize("form", ["", ".tar.xz", ".zip"])
@pytest.mark.parametrize("content", [b"", b"no image", tree()["train/cat/0.png"][:-30]])
def test_an_undecodable_image_is_named(tmp_path, form, content, held):
    files = tree(lead="pets/") | {"pets/train/dog/2.png": content}
    path = make(tmp_path, files, form) if form else write_folder(tmp_path / "mine", files)
    with pytest.raises(DataError, match=r"pets/train/dog/2\.png cannot be decoded"):
        load(path)
    held("a bad picture is named or left out", "empty, no image, cut off; in a folder, a packed archive, a zip: named", 1, 1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [20, 100])  # twice the limit is an error of Pillow's, once only a warning
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit, held):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"0\.png is larger than Pillow decodes"):
        load(make(tmp_path, tree()))
    held("a bad picture is named or left out", "a decompression bomb: refused before it is decoded", 1, 1)


def test_more_than_half_of_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "machine_memory", lambda: 2 * 10 * 3 * 12 * 12)
    assert len(load(make(tmp_path, tree()))) == 6
    with pytest.raises(DataError, match="smaller --image-size"):
        load(make(tmp_path, tree()), image_size=13)


@pytest.mark.parametrize("form", [".tar", ".zip"])
def test_a_huge_member_is_refused_unread(tmp_path, monkeypatch, form):
    monkeypatch.setattr(archives, "LARGEST_FILE", 10_000)
    with pytest.raises(DataError, match=r"bomb\.png.*too large"):
        load(make(tmp_path, tree() | {"train/cat/bomb.png": bytes(10_001)}, form))


def test_memory_is_known_or_assumed(monkeypatch):
    assert images.machine_memory() > 1 << 28
    monkeypatch.delattr(os, "sysconf", raising=False)  # as on Windows
    assert images.machine_memory() > 1 << 28


# ---- what cannot be learned from


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'mnist'.*shapes, digits, cifar10, cifar100, stl10.*folder or archive") as caught:
        load("mnist")
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no data set or path"):
        load(tmp_path / "nowhere")


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "photo.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        load(tmp_path / "photo.rar")


@pytest.mark.parametrize("form", ["", *FORMATS])
def test_no_images(tmp_path, form):
    path = make(tmp_path, {}, form) if form else tmp_path / "mine"
    path.mkdir() if not form else None
    with pytest.raises(DataError, match="no images"):
        load(path)


def test_one_class_only(tmp_path):
    with pytest.raises(DataError, match="one class only, 'cat'"):
        load(make(tmp_path, {name: content for name, content in tree().items() if "cat" in name}))


def test_a_test_class_that_was_never_trained_on(tmp_path):
    with pytest.raises(DataError, match="no training images of the class 'cow'"):
        load(make(tmp_path, tree() | {"test/cow/0.png": encode(picture(1))}))


def test_a_training_class_without_test_images_is_fine(tmp_path):
    path = make(tmp_path, {name: content for name, content in tree().items() if name[:8] != "test/cat"})
    assert load(path, "test").labels.tolist() == [1, 1]
    assert load(path, "test").classes == ("cat", "dog")


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_no_permission_for_an_archive(tmp_path, monkeypatch):
    path = make(tmp_path, tree())
    monkeypatch.setattr(type(path), "open", refuse)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(DataError, match="Permission denied"):
        load(path)


def test_no_permission_for_a_folder(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "mine", tree())
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: refuse() if str(p).endswith("dog") else real(p))
    with pytest.raises(DataError, match="Permission denied"):
        load(path)


# ---- files that cannot be decoded


def damaged_tree():
    """Sound images in three classes, one of them written in another script, and files that are none."""
    files = tree(train=4, test=2) | {f"train/ねこ/{i}.png": encode(picture(70 + i)) for i in range(3)}
    whole = encode(picture(99))
    bad = {
        "train/cat/a cut off.png": whole[: len(whole) // 2], "train/cat/empty.png": b"", "train/dog/text.jpg": b"I am a text",
        "test/dog/header.png": whole[:20], "train/ねこ/壊れた.png": whole[:-40],
    }  # fmt: skip
    return files, bad


@pytest.mark.parametrize("size", [None, 20])
def test_bad_images_are_skipped_if_asked_and_listed_and_the_rest_is_as_without_them(tmp_path, size, capsys, held):
    files, bad = damaged_tree()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    sound, mixed = make(tmp_path / "a", files), make(tmp_path / "b", files | bad)
    with pytest.raises(DataError, match="cannot be decoded"):
        load(mixed, image_size=size)
    for split in ("train", "test"):
        expected, found = (load(path, split, image_size=size, on_bad_image="skip") for path in (sound, mixed))
        assert found.hash == expected.hash
        assert torch.equal(found.images, expected.images)
        assert expected.skipped == ()
        assert sorted(line.partition(" (")[0].removesuffix(" cannot be decoded") for line in found.skipped) == sorted(
            name for name in bad if name.startswith(split)
        )
        assert load(mixed, split, image_size=size, on_bad_image="skip").skipped == found.skipped  # from the cache
    assert "4 of its train files skipped: " in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be decoded"):  # what was skipped once is no licence
        load(mixed, image_size=size)
    told = "cut off, empty, no image, a header alone, a name in another script: each listed, the rest as without them"
    held("a bad picture is named or left out", told, len(bad), len(bad))


def test_where_no_image_can_be_decoded_there_is_nothing_to_skip_to(tmp_path):
    path = make(tmp_path, {f"train/{label}/{i}.png": b"no image" for label in "ab" for i in range(2)})
    with pytest.raises(DataError, match="has no image that can be decoded"):
        load(path, on_bad_image="skip")
    files = tree() | {f"test/{label}/{i}.png": b"no image" for label in ("cat", "dog") for i in range(2)}
    (tmp_path / "half").mkdir()
    with pytest.raises(DataError, match="has no image for its test split that can be decoded"):
        load(make(tmp_path / "half", files), "test", on_bad_image="skip")
    with pytest.raises(UsageError, match="--on-bad-image must be raise or skip, not guess"):
        load(path, on_bad_image="guess")


@pytest.mark.parametrize("data", ["shapes", "digits"])
def test_drawn_images_that_do_not_fit_into_memory_are_refused_before_they_are_drawn(data, tmp_path):
    with pytest.raises(DataError, match=f"{data} would take .* choose a smaller --image-size"):
        load_images(data, "train", image_size=200_000, cache=tmp_path)


# ---- unsafe and damaged archives


@pytest.mark.parametrize("form", [".tar", ".tar.xz", ".zip"])
@pytest.mark.parametrize("name", ["../train/cat/evil.png", "train/../../x.png", "/etc/evil.png", r"C:\evil.png", r"..\x"])
def test_members_that_point_outside_are_refused(tmp_path, monkeypatch, form, name, held):
    path = make(tmp_path, tree() | {name: b"evil"}, form)
    monkeypatch.setattr(images, "_decode", lambda *args: pytest.fail("decoded from an unsafe archive"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"is refused.*outside"):
        load(path)
    assert sorted(tmp_path.rglob("*")) == before
    held("no file is run", "archives with a member that points outside: refused, nothing written", 1, 1)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices_are_refused(tmp_path, kind):
    path = make(tmp_path, tree(), ".tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("train/cat/link.png")
        info.type, info.linkname = kind, "0.png"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"link\.png' is a link or a device"):
        load(path)


def test_zip_links_are_refused(tmp_path):
    path = make(tmp_path, tree())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/cat/link.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "0.png")
    with pytest.raises(DataError, match=r"link\.png' is a link or a device"):
        load(path)


def test_a_name_of_many_megabytes_is_refused(tmp_path):
    path = tmp_path / "mine.tar.xz"
    with lzma.open(path, "wb") as stream:
        long_name = tarfile.TarInfo("././@LongLink")
        long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
        stream.write(long_name.tobuf())
        stream.write(bytes(64 << 20))
    with pytest.raises(DataError, match="damaged: a file name of"):
        load(path)


def pixels_of(path):
    """Both splits, decoded from the archive itself, not from the cache."""
    made = images._decode_splits(path, path.name, None, False)
    return {split: (found.hash, found.classes) for split, (found, _) in made.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_cut_anywhere(tmp_path, form, held):
    path = make(tmp_path, tree(train=2, test=1), form)
    whole, content = pixels_of(path), path.read_bytes()
    end = len(content) - 1
    if form == ".tar":  # after the two blocks of zeros that end an archive there is only padding
        end = len(content.rstrip(b"\0"))
        end += -end % 512 + 1023
    cuts = {*np.linspace(0, end, 60).astype(int).tolist(), end}
    cuts |= set(range(0, end, 512)) if form == ".tar" else set(range(end - 25, end))
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match="truncated or damaged"):
            load(path)
    held("damage is found before it is parsed", "archives of images cut off anywhere", len(cuts), len(cuts))
    path.write_bytes(content)
    assert pixels_of(path) == whole
    if form == ".tar":
        path.write_bytes(content[: end + 1])  # nothing but padding is missing
        assert pixels_of(path) == whole


@pytest.mark.parametrize("form", [".tar.xz", ".tar.gz", ".zip"])
def test_flipped_bytes(tmp_path, form):
    path = make(tmp_path, tree(train=2, test=1), form)
    whole, content = pixels_of(path), path.read_bytes()
    step = max(1, len(content) // 250)
    refused = 0
    for at in [*range(0, len(content), step), *range(len(content) - 60, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            assert pixels_of(path) == whole, f"byte {at} changed the images and was not noticed"
        except DataError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused > 150


def test_flipped_bytes_in_a_tar_header(tmp_path):
    path = make(tmp_path, tree(train=2, test=1), ".tar")
    content = path.read_bytes()
    for header in [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]:
        path.write_bytes(content[: header + 3] + b"\xff" + content[header + 4 :])
        with pytest.raises(DataError, match="truncated or damaged"):
            load(path)


def test_a_refused_archive_leaves_nothing_behind(tmp_path, cache):
    path = make(tmp_path, tree(), ".tar.xz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError):
        load(path)
    assert list(tmp_path.iterdir()) == [path]


# ---- the cache


def no_decoding(*args):
    raise AssertionError("decoded although it was in the cache")


@pytest.mark.parametrize("form", ["", ".tar.xz"])
def test_the_second_load_comes_from_the_cache(tmp_path, cache, monkeypatch, form):
    path = make(tmp_path, tree(), form) if form else write_folder(tmp_path / "mine", tree())
    first = load(path)
    monkeypatch.setattr(images, "_decode", no_decoding)
    again = load(path)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    for name in ("name", "split", "classes", "hash", "factors"):
        assert getattr(first, name) == getattr(again, name)
    assert len(load(path, "test")) == 4
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(AssertionError, match="decoded"):
        load(path, image_size=10)


def test_a_changed_source_is_decoded_anew(tmp_path):
    path = make(tmp_path, tree())
    folder = write_folder(tmp_path / "folder", tree())
    before = load(path).hash
    assert load(folder).hash == before
    write_archive(path, tree(train=2))
    (folder / "train/cat/2.png").unlink()
    (folder / "train/dog/2.png").unlink()
    assert before != load(path).hash == load(folder).hash


def test_the_note_on_a_made_test_split_comes_with_the_cache_too(tmp_path, capsys):
    path = make(tmp_path, {name: content for name, content in tree().items() if name.startswith("train")})
    for _ in range(2):
        load(path, "test")
        assert "every 10th image" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "foreign", "no metadata"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, capsys, damage):
    path = make(tmp_path, tree())
    first = load(path)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    if damage == "foreign":
        load(make(tmp_path / "cache", tree(train=2)))
        (other,) = (found for found in cache.glob("*.safetensors") if found != file)
        content = other.read_bytes()
    elif damage == "no metadata":
        images.save_file({"train.images": first.images.clone()}, file)
        content = file.read_bytes()
    file.unlink()
    file.write_bytes({"cut": content[:-100], "empty": b"", "garbage": b"\xff" * 500}.get(damage, content))
    again = load(path)
    assert again.hash == first.hash
    assert torch.equal(again.images, first.images)
    assert capsys.readouterr().err.count("is damaged") == 1
    load(path)
    assert capsys.readouterr().err == ""


def test_without_a_writable_cache_it_goes_on(tmp_path, cache, capsys):
    cache.write_text("a file where the folder should be")
    assert len(load(make(tmp_path, tree()))) == 6
    assert "warning: no cache" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_no_half_cache(tmp_path, cache, capsys):
    import resource

    path = make(tmp_path, tree())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert len(load(path)) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "warning: no cache" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert images.default_cache() == tmp_path / "cache"
    monkeypatch.delenv("TUTORIAL_MOCO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert images.default_cache() == tmp_path / "tutorial_moco"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert images.default_cache() == tmp_path / ".cache" / "tutorial_moco"


def test_a_named_cache_goes_first(tmp_path):
    load(make(tmp_path, tree()), cache=tmp_path / "other")
    assert len(list((tmp_path / "other").iterdir())) == 1
    assert not (tmp_path / "cache").exists()


# ---- shapes


def fake_draw(n, seed, size=32):
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)
    return pixels, torch.arange(n) % 10, {"hue": torch.rand(n, generator=random)}


def test_shapes_are_drawn_once_with_their_factors(monkeypatch):
    monkeypatch.setattr(images, "SHAPES", {"train": (200, 0), "test": (40, 1)})
    monkeypatch.setattr(shapes, "draw_shapes", fake_draw)
    drawn, labels, factors = fake_draw(200, 0)
    for _ in range(2):
        found = load("Shapes")
        assert torch.equal(found.images, drawn)
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.factors["hue"], factors["hue"])
        assert found.classes == shapes.SHAPE_CLASSES
        monkeypatch.setattr(shapes, "draw_shapes", no_decoding)
    assert len(load("shapes", "test")) == 40
    assert torch.equal(found.take(torch.tensor([5, 3])).factors["hue"], factors["hue"][[5, 3]])
    with pytest.raises(UsageError, match="at least 16"):
        load("shapes", image_size=8)


def test_real_shapes(monkeypatch):
    monkeypatch.setattr(images, "SHAPES", {"train": (20, 0), "test": (10, 1)})
    found = load("shapes", image_size=16)
    assert found.images.shape == (20, 3, 16, 16)
    assert len(found.classes) == 10
    assert all(len(factor) == 20 for factor in found.factors.values())


# ---- subsets


@pytest.fixture
def hundred():
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 3, 8, 8).contiguous()
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])
    return images.ImageSet("mine", "train", pixels, labels, ("a", "b", "c", "d"), images._hash(pixels, labels))


def test_take(hundred):
    some = hundred.take(torch.tensor([70, 2]))
    assert some.images[:, 0, 0, 0].tolist() == [70, 2]
    assert some.labels.tolist() == [1, 0]
    assert some.hash == hundred.take(torch.arange(70, 1, -68)).hash != hundred.hash
    assert hundred.take(slice(None)).hash == hundred.hash
    assert len(hundred.take(slice(0, 0))) == 0


def test_hold_out_is_stratified_disjoint_and_deterministic(hundred):
    left, held = hold_out(hundred, 0.1)
    assert held.labels.bincount(minlength=4).tolist() == [6, 3, 1, 0]
    assert (left.split, held.split) == ("train", "validation")
    assert sorted(torch.cat([left.images, held.images])[:, 0, 0, 0].tolist()) == list(range(100))
    assert hold_out(hundred, 0.1)[1].hash == held.hash
    assert hold_out(hundred, 0.1, seed=1)[1].hash != held.hash


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_hold_out_refuses_a_share_that_leaves_nothing(hundred, share):
    with pytest.raises(UsageError, match="share"):
        hold_out(hundred, share)


def test_hold_out_needs_two_images_of_a_class(hundred):
    with pytest.raises(DataError, match="two or more"):
        hold_out(hundred.take(torch.tensor([0, 60, 99])), 0.5)


# ---- downloads: torchvision's own code against a server of ours


def look_alike(folder="cifar-10-batches-py"):
    """A CIFAR-10 archive of 5 x 4 training and 4 test images, and the md5 of everything in it."""
    files, random = {}, np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]})
    files["batches.meta"] = pickle.dumps({"label_names": list("abcd")})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.answer
        self.server.hits += 1
        if answer == "better at the third try":  # torchvision asks twice a try: first where it has moved to
            answer = {1: "500", 3: "cut off"}.get(self.server.hits, "whole")
        if answer == "elsewhere" and self.path != "/moved":
            self.send_response(302)
            self.send_header("Location", "/moved")
            self.end_headers()
            return
        self.send_response(int(answer) if answer.isdigit() else 200)
        content = b"" if answer.isdigit() else self.server.content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if answer == "wrong bytes":
            content = content[:100] + b"\0" * 10 + content[110:]
        self.wfile.write(content[: len(content) // 2] if answer == "cut off" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    content, sums = look_alike()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.answer, found.hits, found.content = "whole", 0, content
        kind = datasets.CIFAR10
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{found.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(images, "RETRIES", (0.0, 0.0))
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(content).hexdigest())
        monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in sums if name.startswith("data")])
        monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
        monkeypatch.setattr(kind, "meta", meta)
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_a_download_is_kept_and_cached(server, cache):
    train, test = load("CIFAR10"), load("cifar10", "test")
    assert (train.images.shape, test.images.shape) == ((20, 3, 32, 32), (4, 3, 32, 32))
    assert (train.name, train.classes, test.labels.tolist()) == ("cifar10", ("a", "b", "c", "d"), [0, 1, 2, 3])
    with tarfile.open(fileobj=io.BytesIO(server.content)) as archive:
        served = pickle.load(archive.extractfile("cifar-10-batches-py/test_batch"))
    assert np.array_equal(test.images.numpy().reshape(4, -1), served["data"])
    hits, server.answer = server.hits, "500"
    assert load("cifar10").hash == train.hash
    assert load("cifar10", image_size=16).images.shape == (20, 3, 16, 16)  # from the archive that was kept
    assert server.hits == hits
    assert sorted(file.suffix for file in cache.iterdir()) == [".gz", ".safetensors", ".safetensors"]


def test_a_download_that_fails_is_tried_again(server, cache, capsys, held):
    server.answer = "better at the third try"
    assert len(load("cifar10")) == 20
    assert server.hits == 5
    said = capsys.readouterr().err
    assert said.count("cifar10 could not be downloaded (") == said.count("once more in 0 s") == 2
    held("a download is whole, or leaves nothing", "better at the third try", 1, 1)


def test_a_file_that_is_not_there_is_asked_for_once(server, cache):
    server.answer = "404"
    with pytest.raises(DataError, match="404"):
        load("cifar10")
    assert server.hits == 1


def test_a_download_that_has_moved_is_followed(server, cache):
    server.answer = "elsewhere"
    assert len(load("cifar10")) == 20


@pytest.mark.parametrize("answer", ["500", "cut off", "wrong bytes", "refused"])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(server, cache, monkeypatch, answer, held):
    server.answer = answer
    if answer == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{unused.getsockname()[1]}/c.tar.gz")
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load("cifar10")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (datasets.CIFAR10.url, str(cache), "--data shapes"))
    assert {"500": "500", "refused": "refused"}.get(answer, "not the published file") in message
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None
    server.answer = "whole"
    if answer != "refused":
        assert len(load("cifar10")) == 20
    held("a download is whole, or leaves nothing", f"the server answers: {answer}; the next start succeeds", 1, 1)


def test_an_archive_brought_by_hand_needs_no_network(server, cache):
    server.answer = "500"
    cache.mkdir()
    (cache / "cifar-10-python.tar.gz").write_bytes(server.content)
    assert len(load("cifar10")) == 20
    assert server.hits == 0


def test_a_wrong_archive_brought_by_hand_is_removed_unread(server, cache, monkeypatch):
    server.answer = "500"
    cache.mkdir()
    (cache / "cifar-10-python.tar.gz").write_bytes(server.content[:-1])
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(DataError, match="could not be downloaded"):
        load("cifar10")
    assert list(cache.iterdir()) == []


def test_nothing_is_unpickled_that_does_not_match_its_md5(server, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", "0" * 32]])
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(DataError, match="could not be downloaded"):
        load("cifar10")


def test_half_an_extraction_of_a_killed_start_is_not_taken_for_good(server, cache, held):
    half = cache / "cifar-10-batches-py"
    half.mkdir(parents=True)
    (half / "data_batch_1").write_bytes(b"half")
    assert len(load("cifar10")) == 20
    held("a download is whole, or leaves nothing", "half an extraction of a killed start", 1, 1)


def test_a_download_without_a_writable_cache(server, cache, capsys):
    cache.write_text("a file where the folder should be")
    assert len(load("cifar10")) == 20
    assert "warning: no cache" in capsys.readouterr().err


def test_stl10_is_its_labelled_part(tmp_path, cache, monkeypatch):
    kind, random = datasets.STL10, np.random.default_rng(0)
    files = {"class_names.txt": b"a\nb\n", "fold_indices.txt": b"0\n", "unlabeled_X.bin": bytes(27648)}
    for split, count in (("train", 4), ("test", 2)):
        files[f"{split}_X.bin"] = random.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()
        files[f"{split}_y.bin"] = bytes([1, 2] * (count // 2))
    cache.mkdir()
    write_archive(cache / "stl10_binary.tar.gz", {f"stl10_binary/{name}": content for name, content in files.items()})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((cache / "stl10_binary.tar.gz").read_bytes()).hexdigest())
    for list_name in ("train_list", "test_list"):
        sums = [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in getattr(kind, list_name)]
        monkeypatch.setattr(kind, list_name, sums)
    train, test = load("stl10"), load("STL10", "test")
    assert (train.images.shape, test.images.shape) == ((4, 3, 96, 96), (2, 3, 96, 96))
    assert (train.labels.tolist(), train.classes) == ([0, 1, 0, 1], ("a", "b"))
    column_first = np.frombuffer(files["test_X.bin"], np.uint8).reshape(2, 3, 96, 96).transpose(0, 1, 3, 2)
    assert np.array_equal(test.images.numpy(), column_first)
