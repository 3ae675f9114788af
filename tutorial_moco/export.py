"""A pre-trained encoder for other programs: torchvision, timm, Detectron2 and ONNX, or plain safetensors; with a card.

What goes out is the backbone of the query encoder: the head served the loss alone. What is written is read again, in the
other program where it is installed, and has to give the same features.
"""

import io
import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer, resnet50

from tutorial_moco import __version__
from tutorial_moco.encoders import ViTBackbone
from tutorial_moco.errors import DataError, UsageError
from tutorial_moco.figures import TITLES
from tutorial_moco.files import write_whole
from tutorial_moco.official import TIMM_VIT, renamed
from tutorial_moco.pretrain import load_encoder

CARD = "Card written by `tutorial-moco export`."
TOLERANCE = 1e-4  # largest difference of a feature, in parts of the largest feature
# How the names of a ResNet's tensors begin in torchvision, and in Detectron2.
DETECTRON2 = {"conv1.": "stem.conv1.", "bn1.": "stem.conv1.norm."}
for _stage in range(1, 5):
    _own, _theirs = f"layer{_stage}.{{}}.", f"res{_stage + 1}.{{}}."
    DETECTRON2 |= {f"{_own}downsample.0.": f"{_theirs}shortcut.", f"{_own}downsample.1.": f"{_theirs}shortcut.norm."}
    for _number in range(1, 4):
        DETECTRON2 |= {
            f"{_own}conv{_number}.": f"{_theirs}conv{_number}.",
            f"{_own}bn{_number}.": f"{_theirs}conv{_number}.norm.",
        }


def export(checkpoint: Path, form: str, out: Path) -> dict[str, object]:
    """Write an encoder for another program, and a card that says what it is and how it is read.

    Args:
        checkpoint: of this package, or of the published MoCo.
        form: a name in ``FORMS``. out: folder for ``model.…`` and ``README.md``.

    Returns:
        ``path``, ``bytes`` and ``largest_difference``: of a feature after it was read again, in parts of the largest; None
        where the other program is not installed. (Detectron2 cannot be: no index that pip reads has it.)

    Raises:
        DataError: no checkpoint, or its features are not finite. UsageError: the other program has no such network, or its
            package is missing, or ``out`` has a README.md of yours.
    """
    encoder, recipe, state = load_encoder(checkpoint)
    backbone = encoder.backbone.eval()
    name, write, read = FORMS[form]
    content, x = write(backbone), _pictures(backbone)
    path, difference = out / name, _difference(content, read, backbone, x) if read else None
    if difference is not None and not difference < TOLERANCE:
        raise DataError(f"{checkpoint} as {form} gives other features, by {difference:.1e} of the largest: use another format")
    about = out / "README.md"
    if about.exists() and CARD not in about.read_text(errors="replace"):
        raise UsageError(f"--out {out} has a README.md of its own, which the card would replace: name another folder")
    write_whole(path, content)
    facts = {"recipe": json.loads(recipe.to_json()), "steps": state["step"], "data_hash": state.get("data_hash")}
    facts |= {"mean": state["mean"], "std": state["std"], "published": state.get("published", False)}
    write_whole(about, card(form, backbone, encoder.feature_dim, facts).encode())
    return {"path": str(path), "bytes": len(content), "largest_difference": difference, "format": form, **facts}


@torch.no_grad()
def _difference(content: bytes, read, backbone: nn.Module, x: Tensor) -> float | None:
    """The largest of a feature, once read again, in parts of the largest feature; None if it cannot be read here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(content)
        again, features = read(path, backbone, x), backbone(x)
    return None if again is None else float((again - features).abs().max() / features.abs().max())


def _pictures(backbone: nn.Module) -> Tensor:
    side = backbone.image_size if isinstance(backbone, ViTBackbone) else 64
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _shape(backbone: ViTBackbone) -> dict[str, int]:
    """The arguments that make torchvision's transformer of this size."""
    return {
        "image_size": backbone.image_size, "patch_size": backbone.patch_size, "num_layers": len(backbone.encoder.layers),
        "num_heads": backbone.encoder.layers[0].num_heads, "hidden_dim": backbone.hidden_dim, "mlp_dim": backbone.mlp_dim,
    }  # fmt: skip


def _ours(backbone: ViTBackbone) -> dict[str, int]:
    """The same for `ViTBackbone`."""
    own = _shape(backbone)
    return {
        "side": own["image_size"], "patch": own["patch_size"], "layers": own["num_layers"], "heads": own["num_heads"],
        "dim": own["hidden_dim"],
    }  # fmt: skip


def _timms_shape(backbone: ViTBackbone) -> dict[str, int]:
    """The same for timm's."""
    own = _shape(backbone)
    return {
        "img_size": own["image_size"], "patch_size": own["patch_size"], "depth": own["num_layers"],
        "num_heads": own["num_heads"], "embed_dim": own["hidden_dim"], "mlp_ratio": own["mlp_dim"] / own["hidden_dim"],
        "num_classes": 0,
    }  # fmt: skip


# Tensors under other names --------------------------------------------------------------------------------------------


def _plain(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})


def _by_ourselves(path: Path, backbone: nn.Module, x: Tensor) -> Tensor:
    net = deepcopy(backbone)
    for tensor in net.state_dict().values():
        tensor.zero_()
    net.load_state_dict(load_file(path))
    return net(x)


def _theirs(backbone: nn.Module) -> nn.Module:
    """torchvision's own network of this kind, with fresh weights.

    Raises:
        UsageError: it has none.
    """
    if isinstance(backbone, ViTBackbone):
        return VisionTransformer(**_shape(backbone))
    if isinstance(backbone, ResNet) and backbone.conv1.kernel_size == (7, 7) and type(backbone.bn1) is nn.BatchNorm2d:
        return resnet50()
    raise UsageError(
        "torchvision, timm and Detectron2 have no such network (a small encoder, the stem for small images, or another norm "
        "than BatchNorm): take --format safetensors or onnx"
    )


def _for_torchvision(backbone: nn.Module) -> bytes:
    _theirs(backbone)
    return _plain(backbone.state_dict())


def _by_torchvision(path: Path, backbone: nn.Module, x: Tensor) -> Tensor:
    net = _theirs(backbone)
    name = "heads" if isinstance(backbone, ViTBackbone) else "fc"
    setattr(net, name, nn.Identity())
    net.load_state_dict(load_file(path))
    return net.eval()(x)


def _for_timm(backbone: nn.Module) -> bytes:
    _theirs(backbone)
    return _plain(renamed(backbone.state_dict(), {ours: timms for timms, ours in TIMM_VIT.items()}))


def _by_timm(path: Path, backbone: nn.Module, x: Tensor) -> Tensor | None:
    try:
        import timm
    except ModuleNotFoundError:
        return None
    if isinstance(backbone, ViTBackbone):
        net = timm.models.VisionTransformer(**_timms_shape(backbone))
    else:
        net = timm.create_model("resnet50", num_classes=0)
    net.load_state_dict(load_file(path))
    return net.eval()(x)


def _for_detectron2(backbone: nn.Module) -> bytes:
    if not isinstance(_theirs(backbone), ResNet):
        raise UsageError("--format detectron2 is for a ResNet-50: take torchvision or timm for a transformer")
    counters = ("num_batches_tracked",)  # Detectron2 keeps none
    tensors = {name: t.contiguous() for name, t in backbone.state_dict().items() if not name.endswith(counters)}
    buffer = io.BytesIO()
    torch.save({"model": renamed(tensors, DETECTRON2), "matching_heuristics": True}, buffer)
    return buffer.getvalue()


# A graph --------------------------------------------------------------------------------------------------------------


def _for_onnx(backbone: nn.Module) -> bytes:
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'tutorial_moco[export]'") from error
    x = _pictures(backbone)
    sizes = {0: torch.export.Dim("images")}
    if not isinstance(backbone, ViTBackbone):
        sizes |= {2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            backbone, (x,), path, input_names=["images"], output_names=["features"], dynamic_shapes=(sizes,), dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
        return path.read_bytes()


def _by_onnx(path: Path, backbone: nn.Module, x: Tensor) -> Tensor | None:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


Writer, Reader = Callable[[nn.Module], bytes], Callable[[Path, nn.Module, Tensor], Tensor | None]
FORMS: dict[str, tuple[str, Writer, Reader | None]] = {
    "safetensors": ("model.safetensors", lambda backbone: _plain(backbone.state_dict()), _by_ourselves),
    "torchvision": ("model.safetensors", _for_torchvision, _by_torchvision),
    "timm": ("model.safetensors", _for_timm, _by_timm),
    "detectron2": ("model.pth", _for_detectron2, None),
    "onnx": ("model.onnx", _for_onnx, _by_onnx),
}


# The card -------------------------------------------------------------------------------------------------------------

READ_IT = {
    "safetensors": """from safetensors.torch import load_file
from tutorial_moco.encoders import {maker}

backbone = {ours}
backbone.load_state_dict(load_file("model.safetensors"))""",
    "torchvision": """from safetensors.torch import load_file
import torchvision

net = torchvision.models.{torchvision}
net.load_state_dict(load_file("model.safetensors"), strict=False)  # all but the classifier""",
    "timm": """import timm
from safetensors.torch import load_file

net = {timm}
net.load_state_dict(load_file("model.safetensors"))""",
    "detectron2": '''MODEL:
  WEIGHTS: "model.pth"
  BACKBONE:
    FREEZE_AT: 0
  PIXEL_MEAN: {mean255}
  PIXEL_STD: {std255}
  RESNETS:
    STRIDE_IN_1X1: False
    NORM: "SyncBN"
INPUT:
  FORMAT: "RGB"''',
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(features,) = session.run(None, {{"images": images}})  # float32 (N, 3, H, W)""",
}


def _words(arguments: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def card(form: str, backbone: nn.Module, feature_dim: int, facts: dict[str, object]) -> str:
    """A model card in Markdown: what it is, how it was made, what it wants, how it is read."""
    recipe, transformer = facts["recipe"], isinstance(backbone, ViTBackbone)
    words = {
        "maker": "ViTBackbone" if transformer else "build_encoder",
        "ours": f"ViTBackbone({_words(_ours(backbone))})" if transformer
        else f'build_encoder("{recipe["encoder"]}", norm="{recipe["norm"]}").backbone',
        "mean255": [round(255 * value, 3) for value in facts["mean"]],
        "std255": [round(255 * value, 3) for value in facts["std"]],
        "torchvision": f"VisionTransformer({_words(_shape(backbone))})" if transformer else "resnet50()",
        "timm": f"timm.models.VisionTransformer({_words(_timms_shape(backbone))})" if transformer
        else 'timm.create_model("resnet50", num_classes=0)',
    }  # fmt: skip
    source = {"simclr": "arXiv 2002.05709", "moco_v3": "arXiv 2104.02057"}.get(recipe["mechanism"], "arXiv 1911.05722")
    maker, made_of = f"tutorial_moco {__version__}, {facts['steps']:,} steps of {TITLES[recipe['mechanism']]} ({source})", ""
    if facts["data_hash"]:
        made_of = f"SHA-256 of the training images and labels: {facts['data_hash']}."
    if facts["published"]:
        told = "settings below that the file does not tell are as published"
        maker = f"the authors of MoCo, {facts['steps']:,} epochs on ImageNet ({told})"
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in recipe.items())
    language = "yaml" if form == "detectron2" else "python"
    return f"""---
library_name: {form if form in ("timm", "onnx") else "pytorch"}
pipeline_tag: image-feature-extraction
tags: [contrastive-learning{", momentum-contrast" * recipe["mechanism"].startswith("moco")}]
---

# {recipe["mechanism"]}, {recipe["encoder"]}

An encoder that was pre-trained without labels by {maker}. Its features have {feature_dim} numbers. {CARD}

Images: RGB in [0, 1], less the mean {list(facts["mean"])}, divided by {list(facts["std"])}. {made_of}

```{language}
{READ_IT[form].format(**words)}
```

| setting | |
|---|---|
{settings}
"""
