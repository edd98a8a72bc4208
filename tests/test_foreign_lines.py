"""Lines of other libraries with nothing to do are left out, all others stay."""

from __future__ import annotations

import logging

import pytest

from dora_vl.foreign_lines import LEFT_OUT, leave_out_foreign_lines


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_known_lines_alone_are_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    before, propagated = list(logger.filters), logger.propagate
    logger.propagate = True
    try:
        leave_out_foreign_lines()
        leave_out_foreign_lines()
        assert len(logger.filters) == max(1, len(before))
        for beginning in LEFT_OUT[name]:
            logger.warning(f"{beginning}: %s and more", "this")
        logger.warning("something that matters")
    finally:
        logger.filters, logger.propagate = before, propagated
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]
