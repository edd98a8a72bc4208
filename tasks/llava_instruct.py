"""Trains a LLaVA on visual instructions with DoRA, LoRA, magnitudes alone, or its full weights.

deepspeed tasks/llava_instruct.py --config configs/llava/<run>.yaml [--section.key value ...]

It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`, `metrics.json` and checkpoints to
training.output_dir; `--resume last` goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from dora_vl.errors import UserError, exit_on_user_error

STATUS_OF_A_SIGNAL = 128  # as shells count it: 130 after Ctrl-C, 143 after SIGTERM


@exit_on_user_error
def main() -> None:
    """Reads the settings, trains, tests."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    from dora_vl.training.command_line import read_run

    try:
        config = read_run(sys.argv[1:], program="llava_instruct.py", description=__doc__ or "")
    except UserError:
        if first:
            raise
        sys.exit(2)  # every rank finds the same mistake; the first one says it

    from dora_vl.training.run import run

    stopped_by = run(config, task="llava_instruct")
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        logging.getLogger(__name__).warning("stopped by %s; --resume last goes on from there", name)
        sys.exit(STATUS_OF_A_SIGNAL + stopped_by)


if __name__ == "__main__":
    main()
