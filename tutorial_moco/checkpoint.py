"""Checkpoints: one safetensors file with every tensor of a run and its settings and counters as JSON. No pickle."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tutorial_moco.errors import DataError
from tutorial_moco.files import write_whole

_FORMAT = "tutorial_moco checkpoint 1"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
    """Write tensors and JSON-able state, in one move.

    Raises:
        DataError: the disk refused; the message names the path.
    """
    data = save({name: t.detach().contiguous() for name, t in tensors.items()}, {"format": _FORMAT, "state": json.dumps(state)})
    write_whole(path, data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the state that `save_checkpoint` wrote.

    Raises:
        DataError: no such file, or not one of ours, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the checkpoint.safetensors of a run") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged or is no checkpoint ({error}): use another one") from error
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{path} is not a checkpoint of this package: give the checkpoint.safetensors of a run")
    return tensors, json.loads(metadata["state"])


def pack(**parts: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of modules and optimizers, flat, named ``part.path.of.tensor``."""
    flat = {}
    for part, owner in parts.items():
        if isinstance(owner, nn.Module):
            flat |= {f"{part}.{name}": tensor for name, tensor in owner.state_dict().items()}
        else:
            for number, values in owner.state_dict()["state"].items():
                flat |= {f"{part}.{number}.{name}": value for name, value in values.items() if value is not None}
    return flat


def unpack(tensors: dict[str, Tensor], **parts: nn.Module | torch.optim.Optimizer) -> None:
    """Put back what `pack` took: every tensor must find its place and every place its tensor."""
    for part, owner in parts.items():
        own = {name[len(part) + 1 :]: t for name, t in tensors.items() if name.startswith(part + ".")}
        if isinstance(owner, nn.Module):
            owner.load_state_dict(own)
            continue
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in own.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        owner.load_state_dict({**owner.state_dict(), "state": state})
