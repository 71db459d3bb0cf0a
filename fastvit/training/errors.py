"""Errors a user can mend. The command line prints them as one line; everything else keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something outside the code is wrong: an option, a file, a folder. The message is one line."""


class OptionError(UserError):
    """An option with a value that is not accepted. The command line rewrites ``name`` as ``--name``."""

    def __init__(self, name: str, value: object, accepted: str) -> None:
        super().__init__(name, value, accepted)
        self.name, self.value, self.accepted = name, value, accepted

    def __str__(self) -> str:
        return f"{self.name} = {self.value!r}: accepted is {self.accepted}"


class DataError(UserError):
    """An image or a folder of images that cannot be used; names the file."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is no longer a number."""
