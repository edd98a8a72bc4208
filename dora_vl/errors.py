"""The errors a person can act on, the one place that turns them into a line and an exit status, and Pillow's own."""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

USER_ERROR_STATUS = 2

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    struct.error,
)
"""What Pillow's decoders raise on bytes that are no picture, or no longer one, beside its `DecompressionBombError`:
mutated files of ten formats raised OSError, ValueError and that; its plugins hold code for the rest."""


class UserError(Exception):
    """Something in the input is wrong; the message names the file, key or id, the numbers and the next step."""


class BadSample(UserError):
    """One sample cannot be used; counted and skipped by the data part, up to `data.max_bad_share`."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        # Exceptions unpickle from their message alone; data workers send this one across processes.
        return type(self), (self.sample_id, self.reason)


def exit_on_user_error(main: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit status 2, never a traceback."""

    @functools.wraps(main)
    def run(*arguments: Inputs.args, **options: Inputs.kwargs) -> Result:
        try:
            return main(*arguments, **options)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(USER_ERROR_STATUS)

    return run
