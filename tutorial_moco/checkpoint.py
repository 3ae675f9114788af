"""Checkpoints: one safetensors file with every tensor of a run and its settings and counters as JSON. No pickle.

A seal in the file's header, the SHA-256 of all its other bytes, is looked at before anything is parsed.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tutorial_moco.errors import DataError
from tutorial_moco.files import write_whole

_FORMAT, _UNSEALED = "tutorial_moco checkpoint 2", "tutorial_moco checkpoint 1"
_SEAL, _BLANK = re.compile(rb'"sha256":"([0-9a-f]{64})"'), b"0" * 64
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
PREVIOUS = "-previous"  # in the name of the checkpoint before


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, object], *, keep_previous: bool = False) -> None:
    """Write tensors and JSON-able state, in one move.

    Args:
        keep_previous: the file that was there stays, as `previous_of` names it.

    Raises:
        DataError: the disk refused; the message names the path.
    """
    about = {"format": _FORMAT, "state": json.dumps(state), "sha256": _BLANK.decode()}
    data = bytearray(save({name: t.detach().contiguous() for name, t in tensors.items()}, about))
    place = _SEAL.search(data, 8, 8 + _header_bytes(data)).start(1)
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    write_whole(path, data, previous_of(path) if keep_previous else None)


def previous_of(path: Path) -> Path:
    """``checkpoint-previous.safetensors`` of ``checkpoint.safetensors``."""
    return path.with_stem(path.stem + PREVIOUS)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the state that `save_checkpoint` wrote.

    Raises:
        DataError: no such file, or not one of ours, or damaged.
    """
    try:
        _verify(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the checkpoint.safetensors of a run") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged or is no checkpoint ({error}): use another one") from error
    return tensors, json.loads(metadata["state"])


def _header_bytes(start: bytes) -> int:
    """The length of a safetensors header, which its first eight bytes tell."""
    return int.from_bytes(start[:8], "little")


def _verify(path: Path) -> None:
    """See to it that the bytes are those that were sealed. Files of the first format have no seal, and are believed.

    Raises:
        OSError: they are not. DataError: neither a seal nor the name of a format is in the header.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        header = bytearray(file.read(min(_header_bytes(start), _LONGEST_HEADER)))
        seal = _SEAL.search(header)
        if seal is None and _UNSEALED.encode() in header:
            return
        if seal is None:
            raise DataError(f"{path} is damaged or is no checkpoint of this package: give the checkpoint.safetensors of a run")
        told, header[slice(*seal.span(1))] = seal[1], _BLANK
        digest = hashlib.sha256(start + header)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest().encode() != told:
        raise OSError("its bytes are not those that were written")


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in float16, half the file; what is short (norms, biases) or whole numbers stays as exact as it is."""
    return {name: t.half() if t.is_floating_point() and t.ndim > 1 else t for name, t in tensors.items()}


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors that `halved` ones are worked with."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


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
