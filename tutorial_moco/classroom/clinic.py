"""The bug clinic of assignment A5: eight measured runs, each with one bug, as charts and vital signs."""

from types import SimpleNamespace

from matplotlib.figure import Figure

from tutorial_moco.checks import CheckFailed
from tutorial_moco.feature_figures import run_curves
from tutorial_moco.report import text_table
from tutorial_moco.results import load_rows

MENU = {
    "A": "the keys stay in their shuffled order",
    "B": "the temperature multiplies, where it should divide",
    "C": "the momentum update is the wrong way round",
    "D": "the first queue was not normalised",
    "E": "the learning rate is 0",
    "F": "the pointer is set back to 0 after each step",
    "G": "the queries are not normalised",
    "H": "both views of an image are the same",
    "I": "the keys are enqueued before the logits are made",
    "J": "the labels of the cross-entropy are the row numbers",
}
"""What a patient may have. Two of them no patient has."""


def patients() -> dict[int, dict]:
    """The rows of data/study-clinic.jsonl by the patient's number; 0 is healthy.

    Raises:
        DataError: there is no such file.
    """
    return {row["patient"]: row for row in load_rows("clinic", scale="clinic")}


def chart(number: int) -> Figure:
    """A patient's loss, pretext accuracy and kNN over the steps, beside the healthy run's."""
    rows = patients()
    runs = {"healthy": SimpleNamespace(**rows[0]), f"patient {number}": SimpleNamespace(**rows[number])}
    return run_curves(runs)


def vital_signs(number: int) -> str:
    """A table of what was measured of a patient in the middle of its run, beside the healthy run."""
    rows = patients()
    names = rows[0]["signs"]
    table = [["measured in the middle of the run", "healthy", f"patient {number}"]]
    return text_table(table + [[name, f"{rows[0]['signs'][name]:.2f}", f"{rows[number]['signs'][name]:.2f}"] for name in names])


def check_diagnosis(diagnosis: dict[int, str]) -> None:
    """Check that each of the eight patients has a letter of the menu; whether it is the right one is not told.

    Raises:
        CheckFailed: says what is missing.
    """
    if not isinstance(diagnosis, dict) or sorted(diagnosis) != list(range(1, 9)):
        raise CheckFailed("diagnosis: a dict with the numbers 1 to 8 as its keys is wanted.")
    for number, letter in diagnosis.items():
        if letter not in MENU:
            raise CheckFailed(f"diagnosis: patient {number} has {letter!r}; choose one of {', '.join(MENU)}.")
    if len(set(diagnosis.values())) < 8:
        raise CheckFailed("diagnosis: no two patients have the same bug.")
    print("[OK] diagnosis: every patient has one; whether it is the right one, the grading tells")
