"""Checkpoints of the published code, read by their structure: v1 and v2 (facebookresearch/moco), v3 (facebookresearch/moco-v3).

Nothing in such a file is run: torch reads it with ``weights_only=True``.
"""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from tutorial_moco.encoders import Encoder, ViTBackbone, build_encoder
from tutorial_moco.errors import DataError
from tutorial_moco.mechanisms import Mechanism, MoCo, MoCoV3
from tutorial_moco.recipes import Recipe

QUERY = ("module.encoder_q.", "module.base_encoder.")  # how the names of f_q's tensors begin in v1 and v2, and in v3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which their images were normalised
VIT_HEADS = 12  # of v3's ViT-S and ViT-B alike; the tensors do not tell
# How the names of a transformer's tensors begin in timm, and in torchvision; {} is the number of a layer.
TIMM_VIT = {
    "patch_embed.proj.": "conv_proj.",
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "norm.": "encoder.ln.",
    "blocks.{}.norm1.": "encoder.layers.encoder_layer_{}.ln_1.",
    "blocks.{}.norm2.": "encoder.layers.encoder_layer_{}.ln_2.",
    "blocks.{}.attn.qkv.": "encoder.layers.encoder_layer_{}.self_attention.in_proj_",
    "blocks.{}.attn.proj.": "encoder.layers.encoder_layer_{}.self_attention.out_proj.",
    "blocks.{}.mlp.fc1.": "encoder.layers.encoder_layer_{}.mlp.0.",
    "blocks.{}.mlp.fc2.": "encoder.layers.encoder_layer_{}.mlp.3.",
}


def renamed(tensors: dict[str, Tensor], begins: dict[str, str]) -> dict[str, Tensor]:
    """Tensors whose names begin as a key says, under names that begin as its value says; others keep their names."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in begins.items():
            if match := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
                name = new.format(*match.groups()) + name[match.end() :]
                break
        found[name] = tensor
    return found


def load_official(path: Path) -> tuple[Mechanism, Recipe, int]:
    """The mechanism of a published checkpoint, on the CPU: both encoders, and the queue with its pointer or the predictor.

    Args:
        path: such as ``moco_v2_800ep_pretrain.pth.tar``, with ResNet-50, or for v3 also ViT-S or ViT-B.

    Returns:
        A `MoCo` or a `MoCoV3`; the recipe as far as the file tells it, the rest as published; epochs it was trained.

    Raises:
        DataError: the file is missing, damaged, or not of this structure.
    """
    tensors, epochs = _read(path)
    begin = next((begin for begin in QUERY if any(name.startswith(begin) for name in tensors)), None)
    if begin is None:
        raise DataError(f"{path} is no checkpoint of MoCo: its names begin neither with {' nor with '.join(QUERY)}")
    try:
        if begin == QUERY[0]:
            return *_moco(tensors), epochs
        return *_moco_v3(tensors), epochs
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} has not the structure of the published MoCo ({reason}): give an untouched one") from error


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the checkpoint of a run") from error
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path} is damaged or no checkpoint, or holds more than tensors ({reason}): use another one"
        ) from error
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"{path} has no state_dict of tensors: give a checkpoint of facebookresearch/moco or moco-v3")
    return tensors, int(content.get("epoch", 0))


def _part(tensors: dict[str, Tensor], begin: str) -> dict[str, Tensor]:
    return {name[len(begin) :]: tensor for name, tensor in tensors.items() if name.startswith(begin)}


def _moco(tensors: dict[str, Tensor]) -> tuple[Mechanism, Recipe]:
    """v1 and v2."""
    queue = tensors["module.queue"]  # (C, K), the paper's way round
    dim, K = queue.shape
    version = (
        {"head": "mlp", "temperature": 0.2, "augmentation": "v2", "schedule": "cosine"}
        if "module.encoder_q.fc.0.weight" in tensors
        else {"head": "linear", "temperature": 0.07, "augmentation": "v1", "schedule": "steps"}
    )
    usual = {"batch_size": 256, "epochs": 200, "lr": 0.03, "weight_decay": 1e-4}
    recipe = Recipe(encoder="resnet50", dim=dim, K=K, m=0.999, shuffle=True, **version, **usual)
    moco = MoCo(_encoder(_part(tensors, "module.encoder_q."), "fc."), K, recipe.m, shuffle=True)
    moco.key_encoder = _encoder(_part(tensors, "module.encoder_k."), "fc.").requires_grad_(False)
    moco.queue.copy_(queue.T)
    moco.pointer.copy_(tensors["module.queue_ptr"].view(()))
    moco.filled.fill_(K)
    moco.born.fill_(0)
    return moco, recipe


def _moco_v3(tensors: dict[str, Tensor]) -> tuple[Mechanism, Recipe]:
    transformer = "module.base_encoder.cls_token" in tensors
    head = "head." if transformer else "fc."
    encoder = _encoder(_part(tensors, "module.base_encoder."), head)
    mechanism = MoCoV3(encoder)
    mechanism.key_encoder = _encoder(_part(tensors, "module.momentum_encoder."), head).requires_grad_(False)
    mechanism.predictor = _layers(_part(tensors, "module.predictor."))
    named = "vit" if transformer else "resnet50"
    recipe = Recipe(mechanism="moco_v3", encoder=named, head="mlp3", dim=encoder.dim, temperature=0.2 if transformer else 1.0)
    return mechanism, recipe.replace(augmentation="v3", batch_size=4096)


def _encoder(tensors: dict[str, Tensor], head: str) -> Encoder:
    """The backbone and the head of these tensors, whose names begin with ``head``."""
    projection = _layers(_part(tensors, head))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
    if "cls_token" in rest:
        backbone, feature_dim = _transformer(rest)
    else:
        fresh = build_encoder("resnet50")
        backbone, feature_dim = fresh.backbone, fresh.feature_dim
        backbone.load_state_dict(rest)
    encoder = Encoder(backbone, feature_dim, "linear", 2)
    last = [module for module in projection.modules() if isinstance(module, nn.Linear)][-1]
    encoder.head, encoder.dim = projection, last.out_features
    return encoder.to(memory_format=torch.channels_last)


def _transformer(tensors: dict[str, Tensor]) -> tuple[nn.Module, int]:
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    side = patch * round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    backbone = ViTBackbone(side, patch, layers=layers, heads=VIT_HEADS, dim=dim)
    backbone.load_state_dict(renamed(tensors, TIMM_VIT))
    return backbone, dim


def _layers(tensors: dict[str, Tensor]) -> nn.Sequential | nn.Linear:
    """Layers one after the other, told by their tensors: a matrix is linear, running means are BatchNorm, a gap is ReLU."""
    if "weight" in tensors:  # one layer, without a number
        layer = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], bias="bias" in tensors)
        layer.load_state_dict(tensors)
        return layer
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    layers: list[nn.Module] = [nn.ReLU(inplace=True) for _ in range(numbers[-1] + 1)]
    for number in numbers:
        own = _part(tensors, f"{number}.")
        if "running_mean" in own:
            layers[number] = nn.BatchNorm1d(len(own["running_mean"]), affine="weight" in own)
        else:
            outputs, inputs = own["weight"].shape
            layers[number] = nn.Linear(inputs, outputs, bias="bias" in own)
    made = nn.Sequential(*layers)
    made.load_state_dict(tensors)
    return made
