"""Mistakes a user can mend: each is one line that says what was wrong and what to do.

The command line prints the line and ends with the class's exit status; a notebook shows it as the
last line of a short traceback.
"""


class UsageError(ValueError):
    """A setting that cannot work, such as ``K=0``. Names the argument, its value and the mend."""

    exit_status = 2


class LostProcess(RuntimeError):
    """Of several processes one has ended without a word, is frozen, or cannot be reached. Names it, and how far it was."""

    exit_status = 4

    def __str__(self) -> str:
        return f"{self.args[0]}; the same command goes on from the last checkpoint"


class DataError(ValueError):
    """Images that are missing, damaged or unfit to learn from. Names the file or folder and the mend."""

    exit_status = 3


class BadPicture(DataError):
    """A picture that turned out in the middle of a training not to be one; of several processes one alone has met it."""
