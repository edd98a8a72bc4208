"""A run one of whose ranks goes wrong in the middle of its third step: `faulty_rank.py HOW --config ...`."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from dora_vl.training.trainer import AdapterTrainer
from tasks.llava_instruct import main

FAULTY, STEP = "1", 2


def go_wrong(how: str) -> None:
    if how == "none":
        return
    if how.startswith("link:"):  # says that it is here, and goes on when its link is gone
        Path(how.removeprefix("link:"), "here").touch()
        while not Path(how.removeprefix("link:"), "cut").exists():
            time.sleep(0.1)
        return
    sys.stderr.write(f"goes wrong at {time.time()}\n")
    if how == "raise":
        raise LookupError("no such word")
    if how == "sleep":
        time.sleep(600)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


def faulty(how: str, words: list[str]) -> None:
    compute = AdapterTrainer.compute_loss

    def computed(self: AdapterTrainer, *options: Any, **named: Any) -> Any:
        if self.state.global_step == STEP and os.environ["RANK"] == FAULTY:
            go_wrong(how)
        return compute(self, *options, **named)

    with (
        mock.patch.object(AdapterTrainer, "compute_loss", computed),
        mock.patch.object(sys, "argv", ["llava_instruct.py", *words]),
    ):
        main()


if __name__ == "__main__":
    at = next(n for n, word in enumerate(sys.argv) if not word.startswith("--local_rank") and n > 0)
    faulty(sys.argv[at], sys.argv[at + 1 :])
