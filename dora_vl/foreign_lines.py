"""Lines of other libraries that tell a person of nothing to do: left out of what our programs say."""

from __future__ import annotations

import logging
from collections.abc import Mapping

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    # It looks for a kernel of the hub's at import; its own way on a CPU does the same.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The tables before the first step say which device it is.
    "DeepSpeed": ("Setting accelerator to CPU", "Unable to find hostfile"),
}
"""A logger's name -> how such lines begin."""


class _Without(logging.Filter):
    """Lets through whatever does not begin so."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)


def leave_out_foreign_lines() -> None:
    """Leaves them out of this process; may be called again."""
    for name, beginnings in LEFT_OUT.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(beginnings))
