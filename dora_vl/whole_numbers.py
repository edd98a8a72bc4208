"""Whole numbers in text: those of a command line that count something, and ids."""

from __future__ import annotations

import argparse

MOST_DIGITS = 18
"""Fewer than 64 bits; an id of more is text."""


def number_of(text: str) -> int | None:
    """The number that a text is, in ASCII digits without a sign; None for other text ("²" is a digit for Python)."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else None


def positive(text: str) -> int:
    """A whole number from 1, as a type of argparse.

    Raises:
        ArgumentTypeError: it is less; argparse names the option.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
