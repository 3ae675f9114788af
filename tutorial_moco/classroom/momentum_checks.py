"""Visible checks of the momentum encoder (A3); `tutorial_moco.checks` says how a check diagnoses."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_moco.checks import CheckFailed, _called, _diagnose, _tensor, _unit
from tutorial_moco.feature_checks import _number


def check_ema(yours: Callable) -> None:
    """Check ``yours(signal, m)``: y[0] = signal[0], y[t] = m y[t-1] + (1 - m) signal[t], (T,).

    Raises:
        CheckFailed: names the likely mistake.
    """
    signal, m = torch.tensor([1.0, 3.0, -2.0, 0.5, 4.0]), 0.8
    found = _called(yours, "ema", signal.clone(), m)
    found = torch.stack([torch.as_tensor(value) for value in found]) if isinstance(found, list | tuple) and found else found
    _tensor(found, "ema", (5,))
    _diagnose("ema", found, followed(signal, m), {
        "it is the wrong way round: with m near 1 the average keeps most of what it was.": followed(signal, 1 - m),
        "it starts from 0; start from the first value of the signal.": followed(torch.cat([torch.zeros(1), signal]), m)[1:],
        "each value is mixed with the signal's value before, not with the average before.":
            torch.cat([signal[:1], m * signal[:-1] + (1 - m) * signal[1:]]),
        "the signal's part is not scaled by 1 - m.": followed(signal, m, share=1.0),
        "nothing is averaged: it is the signal.": signal,
    })  # fmt: skip
    print("[OK] ema: each value is a weighted mean of all values so far")


def followed(signal: Tensor, m: float, share: float | None = None) -> Tensor:
    """The exponential moving average of a signal (T,), from its first value on; ``share`` of each is 1 - m if left out."""
    share = 1 - m if share is None else share
    values = [signal[0]]
    for value in signal[1:]:
        values.append(m * values[-1] + share * value)
    return torch.stack(values)


def check_half_life(yours: Callable) -> None:
    """Check ``yours(m)``: steps until half of a jump of the encoder has reached the key encoder.

    Raises:
        CheckFailed: names the likely mistake.
    """
    for m in (0.9, 0.99, 0.999):
        found, expected = _number(_called(yours, "half_life", m), "half_life").item(), math.log(0.5) / math.log(m)
        if abs(found - expected) > 0.01 * expected:
            likely = (
                "that is log m / log 0.5, the fraction upside down." if math.isclose(found, 1 / expected, rel_tol=0.02)
                else "the number of steps is positive." if math.isclose(found, -expected, rel_tol=0.02)
                else "1 / (1 - m) is the mean age; after so many steps 37 % is left, not half."
                if math.isclose(found, 1 / (1 - m), rel_tol=0.02)
                else "after t steps m ** t of the jump is still missing. When is that one half?"
            )  # fmt: skip
            raise CheckFailed(f"half_life: for m = {m} it is {expected:.1f} steps, not {found:.3g}: {likely}")
    for m, expected in ((0.0, 0.0), (1.0, math.inf)):
        found = _number(_called(yours, "half_life", m), "half_life").item()
        if found != expected:
            raise CheckFailed(
                f"half_life: right, but for m = {m:g} it should be {expected:g}, not {found:g}: "
                + ("a copy follows at once." if m == 0 else "it never moves.")
            )
    print("[OK] half_life: 7 steps at m = .9, 69 at .99, 693 at .999")


def check_similarity_by_age(yours: Callable) -> None:
    """Check ``yours(stored, again, ages)``: a dict from each age to the mean cosine of stored keys with keys encoded again.

    Raises:
        CheckFailed: names the likely mistake.
    """
    stored, again = 2 * _unit(9, 8, seed=1), 3 * (_unit(9, 8, seed=1) + 0.7 * _unit(9, 8, seed=2))
    ages = torch.tensor([3, 1, 2, 1, 3, 3, 2, 5, 5])
    found = _called(yours, "similarity_by_age", stored.clone(), again.clone(), ages.clone())
    if not isinstance(found, dict):
        raise CheckFailed(f"similarity_by_age: it returns {type(found).__name__}, not a dict from age to cosine.")
    keys = sorted(float(age) for age in found)
    if keys != [1.0, 2.0, 3.0, 5.0]:
        raise CheckFailed(
            f"similarity_by_age: the ages that occur are 1, 2, 3 and 5; the dict has {', '.join(f'{age:g}' for age in keys)}."
            + (" Are its keys tensors? Two equal tensors are two keys: use int(age)." if len(keys) > 4 else "")
        )
    values = torch.stack([_number(found[age], "similarity_by_age") for age in sorted(found, key=float)])

    def mean(cosines: Tensor) -> Tensor:
        return torch.stack([cosines[ages == age].mean() for age in (1, 2, 3, 5)])

    cosines = F.cosine_similarity(stored, again)
    _diagnose("similarity_by_age", values, mean(cosines), {
        "it is the dot product; the cosine divides by both lengths. Normalise first.": mean((stored * again).sum(dim=1)),
        "it is the distance; the cosine is wanted.": mean((F.normalize(stored) - F.normalize(again)).norm(dim=1)),
        "it is the sum over keys of an age; take their mean.":
            torch.stack([cosines[ages == age].sum() for age in (1, 2, 3, 5)]),
        "every stored key meets every key encoded again: only row i of both is one key.":
            mean((F.normalize(stored) @ F.normalize(again).T).mean(dim=1)),
        "it is the mean over all keys, the same for each age.": cosines.mean().expand(4),
        "they are normalised over the keys (dim=0); a key is a row (dim=1).":
            mean((F.normalize(stored, dim=0) * F.normalize(again, dim=0)).sum(dim=1)),
    })  # fmt: skip
    print("[OK] similarity_by_age: how stale the keys of each age are")
