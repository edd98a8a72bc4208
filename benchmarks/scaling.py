"""Times one run on 1, 2, 4... ranks: tokens a second, and the bytes that each rank sends.

    python -m benchmarks.scaling --config llava/easyvqa_smollm2_dora --ranks 1,2 --json benchmarks/results.jsonl

Each rank takes the same micro-batch, so the work grows with the ranks: with nothing lost, two ranks do twice the tokens
in the same time. The ranks take turns by round, and quoted are medians of the ratios inside one round. Bytes are those
that a rank hands to collectives in a step, as a ring sends them (an all-reduce goes round twice). Nothing here differs
between processor cores and cards: ranks have a core each, or a card. Any further `--section.key value` changes the run
for all, `--training.deepspeed zero3` among them.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import median, table, write_json
from dora_vl.errors import UserError, exit_on_user_error

SENT = {"all_reduce": 2.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0, "broadcast": 1.0, "reduce": 1.0}
"""Maps each collective to how often every byte of the whole tensor goes round the ring."""


@exit_on_user_error
def main() -> None:
    """Runs the rounds, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="how many, with commas")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run; the first two are not timed")
    parser.add_argument("--rounds", type=int, default=2, help="how often each takes a turn")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--bytes-to", type=Path, help=argparse.SUPPRESS)  # a rank of a run
    args, config = parser.parse_known_args()
    if args.bytes_to is not None:
        run_rank(args.bytes_to, config)
        return
    counts = [int(count) for count in args.ranks.split(",")]
    rounds = [{ranks: timed(ranks, args.steps, config) for ranks in counts} for _ in range(args.rounds)]
    rates = {ranks: [each[ranks]["tokens_per_second"] for each in rounds] for ranks in counts}
    gains = {ranks: median([b / a for a, b in zip(rates[counts[0]], rates[ranks], strict=True)]) for ranks in counts}
    heads = ("ranks", "tokens/s (median)", f"x {counts[0]}", "of what is possible", "MB a rank sends in a step")
    rows = [(n, median(rates[n]), gains[n], gains[n] * counts[0] / n, rounds[0][n]["megabytes_a_step"]) for n in counts]
    print(table(heads, rows))
    if args.json is not None:
        write_json(args.json, {"settings": config, "steps": args.steps, "times": gains, "rounds": rounds})


def timed(ranks: int, steps: int, config: list[str]) -> dict[str, float]:
    """Times one run, whose ranks deepspeed starts; returns the tokens a second of all ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = {
            "training.output_dir": str(folder / "run"),
            "training.max_steps": str(steps),
            "training.logging_steps": "1",
            "training.save_strategy": "no",
            "training.eval_strategy": "no",
            "evaluation.file": "null",
            "watch": "0",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        start = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--module", "benchmarks.scaling"]
        command = [sys.executable, *start, "--bytes-to", str(folder / "sent.json"), *config, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{ranks} ranks ended with {done.returncode}: {done.stderr.strip()[-800:]}")
        lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        sent = json.loads((folder / "sent.json").read_text(encoding="utf-8"))
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:]
    result = {"tokens_per_second": median(rates), "megabytes_a_step": sent / steps / 1e6}
    print(f"{ranks} ranks: {result['tokens_per_second']:.0f} tokens/s", flush=True)
    return result


def run_rank(bytes_to: Path, config: list[str]) -> None:
    """Runs the shipped task as one rank and counts what it hands to collectives."""
    import torch.distributed as dist

    total = 0.0

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *rest: Any, **named: Any) -> Any:
            nonlocal total
            ranks = dist.get_world_size(named.get("group"))
            whole = rest[0] if name == "reduce_scatter_tensor" and rest else tensor  # its first is a rank's part
            total += SENT[name] * whole.nbytes * (ranks - 1) / ranks
            return collective(tensor, *rest, **named)

        return call

    for name in SENT:
        setattr(dist, name, counted(name, getattr(dist, name)))
    sys.argv = ["llava_instruct.py", *config]
    runpy.run_path("tasks/llava_instruct.py", run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        bytes_to.write_text(json.dumps(total), encoding="utf-8")


if __name__ == "__main__":
    main()
