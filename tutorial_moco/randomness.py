"""Random numbers that are a function of what they are for, not of what was drawn before.

A view is drawn from (seed, epoch, view, sample) and the order of an epoch from (seed, epoch). So results depend neither on
the number of processes nor on where a run was interrupted, and the state of the whole loader is one integer: the step.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit words held in int64, in place (the "lowbias32" finaliser: two multiplications, three xor-shifts)."""
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_WORD)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_WORD)
    return x.bitwise_xor_(x >> 16)


def hash_words(*key: int | Tensor) -> Tensor:
    """One 32-bit hash (int64, 0 .. 2**32 - 1) of a key of whole numbers; tensors among them are broadcast.

    >>> hash_words(0, 1, torch.arange(3)).tolist()
    [1391022734, 349719878, 875239781]
    """
    h = torch.zeros((), dtype=torch.int64)
    for part in key:
        part = torch.as_tensor(part, dtype=torch.int64)
        h = _mix((h + 0x9E3779B9 + (part & _WORD)) & _WORD)
    return h


def uniform(*key: int | Tensor) -> Tensor:
    """Uniform float32 in [0, 1), 24 bits, one for each element of the broadcast key."""
    return (hash_words(*key) >> 8).to(torch.float32).mul_(2.0**-24)


def permutation(n: int, *key: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of ``range(n)``, int64 (n,), that is a function of the key alone (whole numbers)."""
    words = hash_words(*key, torch.arange(n, device=device))
    # The position breaks the rare ties of 32-bit words, so that every platform sorts alike.
    return torch.argsort((words << 31) + torch.arange(n, device=device))
