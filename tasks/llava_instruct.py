"""Trains a LLaVA on visual instructions with DoRA, LoRA, magnitudes alone, or its full weights.

deepspeed tasks/llava_instruct.py --config configs/llava/<run>.yaml [--section.key value ...]

It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`, `metrics.json` and checkpoints to
training.output_dir; `--resume last` goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import signal
import sys

from dora_vl.errors import exit_on_user_error

STATUS_OF_A_SIGNAL = 128  # as shells count it: 130 after Ctrl-C, 143 after SIGTERM


@exit_on_user_error
def main() -> None:
    """Reads the settings, trains, tests."""
    from dora_vl.training.command_line import read_run
    from dora_vl.training.launch import first_rank_speaks, log_to_stderr

    log_to_stderr()
    with first_rank_speaks():
        config = read_run(sys.argv[1:], program="llava_instruct.py", description=__doc__ or "")

        from dora_vl.training.llava_task import (
            LlavaTask,
        )  # seconds of imports, after mistakes in the settings were told
        from dora_vl.training.run import run

        stopped_by = run(LlavaTask(config))
    if stopped_by is not None:
        logging.getLogger(__name__).info(
            "stopped by %s; --resume last goes on from there", signal.Signals(stopped_by).name
        )
        sys.exit(STATUS_OF_A_SIGNAL + stopped_by)


if __name__ == "__main__":
    main()
