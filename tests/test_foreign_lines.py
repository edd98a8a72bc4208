"""Lines of other libraries with nothing to do are left out, all others stay."""

from __future__ import annotations

import logging

import pytest

from dora_vl.errors import LEFT_OUT, leave_out_foreign_lines


class Kept(logging.Handler):
    """Keeps what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_known_lines_alone_are_left_out(name: str) -> None:
    logger, kept = logging.getLogger(name), Kept()
    before = list(logger.filters)
    logger.addHandler(kept)
    try:
        leave_out_foreign_lines()
        leave_out_foreign_lines()
        assert len(logger.filters) == max(1, len(before))
        for beginning in LEFT_OUT[name]:
            logger.warning(f"{beginning}: %s and more", "this")
        logger.warning("something that matters")
    finally:
        logger.removeHandler(kept)
        logger.filters = before
    assert kept.lines == ["something that matters"]
