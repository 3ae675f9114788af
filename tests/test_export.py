"""Encoders for other programs: read by those programs, they give the same features."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tutorial_moco import cli
from tutorial_moco import pretrain as training
from tutorial_moco.augment import plain_view
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.export import FORMS, TOLERANCE, export
from tutorial_moco.images import ImageSet
from tutorial_moco.pretrain import load_encoder, save_run
from tutorial_moco.recipes import Recipe

PIXELS = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = ImageSet("random", "train", PIXELS, torch.arange(8) % 2, ("even", "odd"), "hash of these")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run of each kind of encoder at step 0, with running statistics of its own."""
    found = {}
    for name in ("small", "resnet18", "resnet50", "vit", "grouped"):
        changes = {"vit": {"mechanism": "moco_v3", "head": "mlp3"}, "grouped": {"norm": "group", "encoder": "resnet50"}}.get(
            name, {}
        )
        changes = {"encoder": name} | changes
        run = training.start(Recipe(K=8, dim=8, batch_size=4, **changes), IMAGES, torch.device("cpu"), torch.float32)
        for _ in range(20):  # BatchNorm's running statistics
            run.mechanism.encoder(plain_view(PIXELS))
        found[name] = tmp_path_factory.mktemp(name) / "checkpoint.safetensors"
        save_run(run, found[name].parent)
    return found


@pytest.mark.parametrize(
    ("form", "encoder"),
    [("safetensors", "resnet18"), ("torchvision", "resnet50"), ("torchvision", "vit"), ("timm", "resnet50"), ("timm", "vit"),
     ("onnx", "small"), ("onnx", "vit")],
)  # fmt: skip
def test_the_other_program_gives_the_same_features(form, encoder, checkpoints, tmp_path):
    if form in ("timm", "onnx"):
        pytest.importorskip({"timm": "timm", "onnx": "onnxruntime"}[form], reason=f"{form} is not installed")
    found = export(checkpoints[encoder], form, tmp_path)
    assert found["largest_difference"] < TOLERANCE
    assert (tmp_path / FORMS[form][0]).stat().st_size == found["bytes"]


def detectron2s_resnet(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Detectron2's ResNet-50 as its documentation has it, by the names of its tensors: the pooled last stage."""

    def conv(name, x, stride=1):
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=weights[f"{name}.weight"].shape[-1] // 2)
        return F.batch_norm(x, *(weights[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.max_pool2d(F.relu(conv("stem.conv1", x, 2)), 3, 2, 1)
    for stage, blocks in zip(range(2, 6), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            name, stride = f"res{stage}.{block}", 2 if block == 0 and stage > 2 else 1
            short = conv(f"{name}.shortcut", x, stride) if block == 0 else x
            h = F.relu(conv(f"{name}.conv1", x))
            x = F.relu(conv(f"{name}.conv3", F.relu(conv(f"{name}.conv2", h, stride))) + short)
    return x.mean(dim=(2, 3))


def test_detectron2s_names_are_those_of_its_network(checkpoints, tmp_path):
    export(checkpoints["resnet50"], "detectron2", tmp_path)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content["matching_heuristics"] is True
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    used, weights = set(), content["model"]

    class Watched(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    with torch.no_grad():
        expected = load_encoder(checkpoints["resnet50"])[0].backbone.eval()(x)
        torch.testing.assert_close(detectron2s_resnet(Watched(weights), x), expected, rtol=1e-4, atol=1e-4)
    assert used == set(weights)


@pytest.mark.parametrize(
    ("form", "encoder"),
    [("safetensors", "small"), ("safetensors", "vit"), ("torchvision", "vit"), ("timm", "resnet50"), ("timm", "vit"),
     ("onnx", "small")],
)  # fmt: skip
def test_the_lines_of_the_card_read_the_file(form, encoder, checkpoints, tmp_path, monkeypatch):
    if form in ("timm", "onnx"):
        pytest.importorskip({"timm": "timm", "onnx": "onnxruntime"}[form], reason=f"{form} is not installed")
    export(checkpoints[encoder], form, tmp_path)
    card = (tmp_path / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    side = 40 if form == "onnx" else 32
    names = {"images": torch.randn(3, 3, side, side).numpy()}
    exec(lines, names)
    if form == "onnx":
        assert names["features"].shape == (3, 128)
    assert "hash of these" in card
    assert ("of MoCo v3 (arXiv 2104.02057)" if encoder == "vit" else "of MoCo (arXiv 1911.05722)") in card
    assert f"| `encoder` | {encoder} |" in card


def test_plain_tensors_are_the_backbones(checkpoints, tmp_path):
    export(checkpoints["small"], "safetensors", tmp_path)
    expected = load_encoder(checkpoints["small"])[0].backbone.state_dict()
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("form", "encoder"),
    [
        ("torchvision", "small"),
        ("timm", "resnet18"),
        ("detectron2", "vit"),
        ("detectron2", "grouped"),
        ("torchvision", "grouped"),
    ],
)
def test_a_network_that_the_other_program_has_not_is_told_and_nothing_is_written(form, encoder, checkpoints, tmp_path):
    with pytest.raises(UsageError, match="take"):
        export(checkpoints[encoder], form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_calls_no_file_published_but_the_authors_and_none_momentum_contrast_that_has_no_momentum(tmp_path):
    run = training.start(
        Recipe(mechanism="end_to_end", encoder="tiny", dim=8, batch_size=4), IMAGES, torch.device("cpu"), torch.float32
    )
    run.data_hash = ""
    save_run(run, tmp_path)
    export(tmp_path / "checkpoint.safetensors", "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "authors" not in card
    assert "0 steps of end-to-end (arXiv 1911.05722)" in card
    assert "tags: [contrastive-learning]" in card


def test_a_readme_of_ones_own_is_not_replaced_but_a_card_is(checkpoints, tmp_path):
    for _ in range(2):
        export(checkpoints["small"], "safetensors", tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(UsageError, match=r"has a README\.md of its own"):
        export(checkpoints["small"], "safetensors", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_the_command(checkpoints, tmp_path, capsys):
    out, result = tmp_path / "out", tmp_path / "result.json"
    words = ["export", str(checkpoints["resnet50"]), "--format", "torchvision", "--out", str(out), "--json", str(result)]
    assert cli.main(words) == 0
    assert "read again, the features differ by" in capsys.readouterr().out
    assert result.exists()
    assert cli.main(["export", str(tmp_path / "none.safetensors")]) == DataError.exit_status
    assert "does not exist" in capsys.readouterr().err
