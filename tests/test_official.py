"""Published checkpoints, read by their structure: look-alikes with the official names, of torchvision's and timm's parts."""

import itertools
import json

import pytest
import torch
import torchvision
from torch import nn
from torchvision import transforms

from tutorial_moco import cli, compare, transfer
from tutorial_moco.annotated import load_annotated
from tutorial_moco.errors import DataError
from tutorial_moco.export import export
from tutorial_moco.images import load_images
from tutorial_moco.mechanisms import MoCo, MoCoV3
from tutorial_moco.official import load_official
from tutorial_moco.pretrain import load_encoder
from tutorial_moco.transfer import load_trained, save_trained


def mlp(*widths, last_norm=True):
    """v3's projector and predictor: linear layers without bias, each with BatchNorm, the last one's without weights."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
        last = number == len(widths) - 1
        layers += [nn.Linear(inputs, outputs, bias=False)]
        layers += [nn.BatchNorm1d(outputs, affine=False)] * last_norm if last else [nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def resnet(head):
    """As the official code makes it: torchvision's ResNet-50 whose fc is the head."""
    net = torchvision.models.resnet50()
    net.fc = head
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def named(begin, net):
    return {f"{begin}.{name}": tensor for name, tensor in net.state_dict().items()}


def save(path, tensors, **more):
    torch.save(
        {"epoch": 200, "arch": "resnet50", "state_dict": tensors, "optimizer": {"state": {}, "param_groups": []}, **more}, path
    )
    return path


def v1_or_v2(version):
    torch.manual_seed(0)
    heads = [
        nn.Linear(2048, 128) if version == 1 else nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
        for _ in "qk"
    ]
    q, k = map(resnet, heads)
    queue = nn.functional.normalize(torch.randn(128, 96), dim=0)
    tensors = named("module.encoder_q", q) | named("module.encoder_k", k)
    return q, k, tensors | {"module.queue": queue, "module.queue_ptr": torch.tensor([32])}


@pytest.mark.parametrize("version", [1, 2])
def test_v1_and_v2_come_with_both_encoders_the_queue_and_its_pointer(version, tmp_path):
    q, k, tensors = v1_or_v2(version)
    moco, recipe, epochs = load_official(save(tmp_path / "moco.pth.tar", tensors))
    assert isinstance(moco, MoCo)
    assert (recipe.encoder, recipe.head, recipe.K, recipe.dim) == ("resnet50", "mlp" if version == 2 else "linear", 96, 128)
    assert epochs == 200
    assert torch.equal(moco.queue, tensors["module.queue"].T)
    assert (int(moco.pointer), int(moco.filled)) == (32, 96)
    view = torch.randn(2, 3, 64, 64)
    for mine, theirs in ((moco.encoder, q), (moco.key_encoder, k)):
        torch.testing.assert_close(mine.eval()(view), nn.functional.normalize(theirs(view), dim=1), rtol=1e-4, atol=1e-5)
    moco.train()
    contrast = moco.contrast(view, view, torch.arange(2))
    moco.update_dictionary(contrast, torch.arange(2))
    assert int(moco.pointer) == 34
    assert not any(parameter.requires_grad for parameter in moco.key_encoder.parameters())


def test_v3_comes_with_its_predictor(tmp_path):
    torch.manual_seed(0)
    q, k = (resnet(mlp(2048, 64, 32)) for _ in "qk")
    predictor = mlp(32, 64, 32, last_norm=False).eval()
    tensors = named("module.base_encoder", q) | named("module.momentum_encoder", k) | named("module.predictor", predictor)
    mechanism, recipe, _ = load_official(save(tmp_path / "r-50.pth.tar", tensors))
    assert isinstance(mechanism, MoCoV3)
    assert (recipe.mechanism, recipe.encoder, recipe.dim) == ("moco_v3", "resnet50", 32)
    mechanism.eval()
    view = torch.randn(2, 3, 64, 64)
    expected = predictor(q(view))
    torch.testing.assert_close(mechanism.predictor(mechanism.encoder(view, unit=False)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mechanism.key_encoder(view, unit=False), k(view), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A transformer's block as timm has it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        n, tokens, dim = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim)
        x = x + self.attn.proj(mixed)
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A vision transformer as timm has it."""

    def __init__(self, head, dim=24, layers=2, patch=8, side=32):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, 12) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), head

    def forward(self, x):
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def test_v3s_transformers_are_read_too(tmp_path):
    torch.manual_seed(0)
    q, k = (Transformer(mlp(24, 64, 64, 32)).eval() for _ in "qk")
    tensors = named("module.base_encoder", q) | named("module.momentum_encoder", k)
    tensors |= named("module.predictor", mlp(32, 64, 32))
    path = save(tmp_path / "vit-s-300ep.pth.tar", tensors, arch="vit_small")
    mechanism, recipe, _ = load_official(path)
    view = torch.randn(3, 3, 32, 32)
    assert recipe.encoder.startswith("vit")
    torch.testing.assert_close(mechanism.eval().encoder(view, unit=False), q(view), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mechanism.key_encoder(view, unit=False), k(view), rtol=1e-4, atol=1e-5)
    assert torch.equal(load_encoder(path)[0].eval().backbone(view), mechanism.encoder.backbone(view))


def test_the_commands_take_a_published_checkpoint(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "moco_v1.pth.tar", v1_or_v2(1)[2])
    flags = ["--checkpoint", str(path), "--data", "digits", "--json", str(tmp_path / "found.json")]
    assert cli.main(["evaluate", *flags]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["recipe"]["encoder"] == "resnet50"
    assert 10 < found["linear_top1"] <= 100


def test_the_commands_normalise_images_as_a_published_checkpoint_takes_them(tmp_path, monkeypatch):
    path, digits = save(tmp_path / "moco_v1.pth.tar", v1_or_v2(1)[2]), load_images("digits", "test").take(slice(0, 6))
    backbone, taken = load_encoder(path)[0].eval().backbone, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = backbone(taken(digits.images / 255))
    seen = []
    monkeypatch.setattr(compare, "evaluate_features", lambda train, *rest: seen.append(train) or {})
    compare.evaluate_checkpoint(path, digits, digits)
    monkeypatch.setattr(transfer, "linear_top1", lambda train, *rest: seen.append(train) or 0.0)
    start = transfer.load_start(path, torch.empty(0))
    transfer.classify(start, digits, digits)
    for features in seen:
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert len(seen) == 2

    trained = []
    monkeypatch.setattr(transfer, "fit", lambda model, *rest, **how: trained.append(model) or 0.0)
    monkeypatch.setattr(transfer, "average_precision", lambda *rest: {})
    monkeypatch.setattr(transfer, "mean_iou", lambda *rest: 0.0)
    few = load_annotated("scenes", "train", "segment", n=8)
    for task in ("detect", "segment"):
        transfer.dense(
            start, task, few, few, dtype=torch.float32, keep=lambda t, task=task: save_trained(tmp_path / task, t, {})
        )
    assert tuple(trained[0].transform.image_mean) == (0.485, 0.456, 0.406)
    torch.testing.assert_close(trained[1].std.flatten(), torch.tensor((0.229, 0.224, 0.225)))
    again, _ = load_trained(tmp_path / "detect")
    assert tuple(again.transform.image_std) == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: {f"net.{name}": tensor for name, tensor in tensors.items()}, "is no checkpoint of MoCo"),
        (lambda tensors: {name: t for name, t in tensors.items() if "layer4.2.conv3" not in name}, "has not the structure"),
        (lambda tensors: {name: t for name, t in tensors.items() if name != "module.queue"}, "has not the structure"),
        (lambda tensors: {"module.encoder_q.a": 3}, "has no state_dict of tensors"),
    ],
)
def test_what_is_no_published_checkpoint_is_told_in_a_line(change, told, tmp_path):
    path = save(tmp_path / "other.pth.tar", change(v1_or_v2(1)[2]))
    with pytest.raises(DataError, match=told) as error:
        load_official(path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        load_official(tmp_path / "gone.pth.tar")


def test_the_card_of_a_published_checkpoint_tells_its_own_normalisation(tmp_path):
    path = save(tmp_path / "published.pth.tar", v1_or_v2(2)[2])
    export(path, "detectron2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in card
    assert "less the mean [0.485, 0.456, 0.406]" in card
    assert "by the authors of MoCo, 200 epochs on ImageNet" in card
