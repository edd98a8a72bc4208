"""Numbers on a command line that count something."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1, as a type of argparse.

    Raises:
        ArgumentTypeError: it is less; argparse names the option.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
