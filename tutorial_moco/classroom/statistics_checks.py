"""Visible checks of what a few runs can say (A6); `tutorial_moco.checks` says how a check diagnoses."""

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

from tutorial_moco.checks import CheckFailed, _called, _diagnose
from tutorial_moco.feature_checks import _number


def check_interval(yours: Callable) -> None:
    """Check ``yours(values) -> (mean, half)``: mean, and half the width of the 95 % confidence interval by Student's t.

    Raises:
        CheckFailed: names the likely mistake.
    """
    values = [51.0, 54.5, 53.0, 58.0]
    found = _pair(_called(yours, "interval", list(values)), "interval")
    deviation = torch.tensor(values).std().item()
    half = stats.t.ppf(0.975, 3) * deviation / 2
    _diagnose("interval", found[:1], torch.tensor([54.125]), {})
    _diagnose("interval", found[1:], torch.tensor([half]), {
        "it is the standard deviation of the runs; the interval is about their mean.": torch.tensor([deviation]),
        "it is the standard error; multiply it by Student's t.": torch.tensor([deviation / 2]),
        "1.96 is for many runs; for four it is Student's t with 3 degrees of freedom, 3.18.":
            torch.tensor([1.96 * deviation / 2]),
        "the standard deviation divides by n - 1 (n is the number of runs).":
            torch.tensor([stats.t.ppf(0.975, 3) * torch.tensor(values).std(correction=0).item() / 2]),
        "Student's t has n - 1 degrees of freedom.": torch.tensor([stats.t.ppf(0.975, 4) * deviation / 2]),
        "95 % on both sides together: the quantile is 0.975.": torch.tensor([stats.t.ppf(0.95, 3) * deviation / 2]),
        "it is the whole width; half of it is wanted.": torch.tensor([2 * half]),
        "the standard error divides by the square root of n.": torch.tensor([half / 2]),
    })  # fmt: skip
    one = _pair(_called(yours, "interval", [51.0]), "interval")
    if one[0] != 51.0 or not math.isnan(one[1]):
        raise CheckFailed("interval: of one run the mean is that run, and the interval is not known: math.nan.")
    print("[OK] interval: mean and half-width by Student's t")


def check_difference(yours: Callable) -> None:
    """Check ``yours(a, b) -> (mean, half)``: of the differences of runs with the same seed, with its 95 % interval.

    Raises:
        CheckFailed: names the likely mistake.
    """
    a, b = {0: 55.0, 1: 58.0, 2: 53.0}, {2: 50.0, 0: 53.0, 1: 54.0}
    found = _pair(_called(yours, "difference", dict(a), dict(b)), "difference")
    pairs = torch.tensor([2.0, 4.0, 3.0])
    half = stats.t.ppf(0.975, 2) * pairs.std().item() / math.sqrt(3)
    wrong = torch.tensor([55.0 - 50.0, 58.0 - 53.0, 53.0 - 54.0])
    deviations = [torch.tensor([*side.values()]).std().item() for side in (a, b)]
    alone = math.hypot(*deviations) / math.sqrt(3)  # the standard error of a difference of means that are not paired
    _diagnose("difference", found, torch.tensor([pairs.mean().item(), half]), {
        "runs are paired in the order they stand in; pair those of the same seed.":
            torch.tensor([wrong.mean().item(), stats.t.ppf(0.975, 2) * wrong.std().item() / math.sqrt(3)]),
        "it is b less a; a less b is wanted.": torch.tensor([-pairs.mean().item(), half]),
        "the runs are not paired: with the same seed two runs share order and views, so take the differences first.":
            torch.tensor([pairs.mean().item(), stats.t.ppf(0.975, 2) * alone]),
        "the runs are not paired: take the differences of runs with the same seed first.":
            torch.tensor([pairs.mean().item(), stats.t.ppf(0.975, 4) * alone]),
    })  # fmt: skip
    try:
        answer = _called(yours, "difference", {0: 1.0, 1: 2.0, 7: 3.0}, {0: 0.5, 1: 1.0})
    except CheckFailed as failed:
        raise CheckFailed(f"difference: a seed that only one side has is to be left out. {failed}") from failed
    if abs(_pair(answer, "difference")[0] - 0.75) > 1e-4:
        raise CheckFailed("difference: a seed that only one side has should be left out.")
    print("[OK] difference: paired by seed, with its interval")


def check_verdict(yours: Callable) -> None:
    """Check ``yours(mean, half)``: "came out", "did not" or "too small to tell".

    Raises:
        CheckFailed: names the likely mistake.
    """
    cases = {(3.0, 1.0): "came out", (-3.0, 1.0): "did not", (3.0, 4.0): "too small to tell", (-3.0, 4.0): "too small to tell",
             (3.0, math.nan): "too small to tell", (0.0, 0.5): "too small to tell"}  # fmt: skip
    for (mean, half), expected in cases.items():
        found = _called(yours, "verdict", mean, half)
        if found != expected:
            raise CheckFailed(
                f"verdict: for a difference of {mean:g} and a half-width of {half:g} it is {expected!r}, not {found!r}"
                + (
                    ": one run tells nothing about chance."
                    if math.isnan(half)
                    else ": the interval holds 0."
                    if abs(mean) < half
                    else "."
                )
            )
    print("[OK] verdict: decided only where the whole interval lies on one side of 0")


def check_rows(rows: list[dict]) -> None:
    """Check the rows of a project: at least two settings with at least three seeds each, equal budgets, plausible numbers.

    Raises:
        CheckFailed: says what is missing.
    """
    wanted = {"setting", "seed", "images_seen", "knn_top1"}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and wanted <= set(row) for row in rows):
        raise CheckFailed(
            f"rows: a list of dicts with {', '.join(sorted(wanted))} is wanted; paste what the experiment printed."
        )
    seeds = {}
    for row in rows:
        seeds.setdefault(row["setting"], []).append(row["seed"])
        if not 0 <= row["knn_top1"] <= 100:
            raise CheckFailed(f"rows: an accuracy of {row['knn_top1']} is no percentage.")
    if len(seeds) < 2:
        raise CheckFailed("rows: at least two settings are needed, or there is nothing to compare.")
    for setting, of in seeds.items():
        if len(set(of)) < len(of):
            raise CheckFailed(f"rows: {setting!r} has a seed twice. The same seed is the same run, and tells nothing new.")
        if len(of) < 3:
            raise CheckFailed(
                f"rows: {setting!r} has {len(of)} runs; at least three seeds are needed for an interval worth drawing."
            )
    if len({tuple(sorted(of)) for of in seeds.values()}) > 1:
        raise CheckFailed("rows: the settings have different seeds, so that not all runs can be paired.")
    if len({row["images_seen"] for row in rows}) > 1:
        raise CheckFailed(
            "rows: some runs have seen more images than others. With unequal budgets nothing can be said of the setting."
        )
    if len({row["knn_top1"] for row in rows}) == 1:
        raise CheckFailed("rows: all accuracies are the same number. Are these measured?")
    print(f"[OK] rows: {len(seeds)} settings, {len(next(iter(seeds.values())))} seeds each, equal budgets")


def _pair(answer, name: str) -> Tensor:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise CheckFailed(f"{name}: return two numbers (mean, half), not {type(answer).__name__}.")
    return torch.stack([_number(value, name) for value in answer])
