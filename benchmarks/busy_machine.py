"""How fast a DoRA step is alone and beside other busy processes, by how OpenMP's threads wait for each other.

    python benchmarks/busy_machine.py --json benchmarks/results.jsonl

A thread that waits at a barrier by spinning keeps the core that its partner needs, where another process takes part
of the machine. Each setting is an environment of its own process, since libgomp reads it when it is loaded; settings
take turns, and what is compared are the medians of their rates inside a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from report import median, table, write_json

SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's own": {},
    "here": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 50,000": {"GOMP_SPINCOUNT": "50000"},
}
HERE = "here"
"""As tasks and demos wait: asleep while others need the cores (`dora_vl/run/busy_cores.py`)."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WARM_UP_SECONDS = 3.0


def main() -> None:
    """Prints the table of rates and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="busy processes beside the step")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps that are timed, in each turn")
    parser.add_argument("--json", default=None, help="file for the figures")
    parser.add_argument("--give-way", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(steps_a_second(options.seconds, give_way=options.give_way)))
        return
    rates: dict[str, dict[int, list[float]]] = {
        name: {count: [] for count in options.busy} for name in options.settings
    }
    for _ in range(options.rounds):
        for count in options.busy:
            for name in options.settings:
                rates[name][count].append(measured(name, count, options.seconds))
    shares = relative(rates, options.settings[0])
    heads = (
        "setting",
        *(f"steps/s, {count} busy" for count in options.busy),
        *(f"x {count}" for count in options.busy),
    )
    rows = [(name, *(median(one) for one in rates[name].values()), *shares[name].values()) for name in options.settings]
    print(table(heads, rows))
    if options.json is not None:
        write_json(options.json, {"steps_per_second": rates, "of_the_first_alone": shares, "settings": SETTINGS})


def relative(rates: dict[str, dict[int, list[float]]], first: str) -> dict[str, dict[int, float]]:
    """Each rate as a share of the first setting's alone, medians of the ratios inside a round."""
    alone = rates[first][min(rates[first])]
    return {
        name: {
            count: median([rate / base for rate, base in zip(found, alone, strict=True)])
            for count, found in one.items()
        }
        for name, one in rates.items()
    }


def measured(setting: str, busy: int, seconds: float) -> float:
    """One turn of a setting beside so many processes that keep a core busy."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= SETTINGS[setting]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command: Sequence[str] = (sys.executable, __file__, "--measure", "--seconds", str(seconds))
        command = (*command, *(["--give-way"] if setting == HERE else []))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for one in others:
            one.kill()
            one.wait()
    return float(json.loads(done.stdout.splitlines()[-1]))


def steps_a_second(seconds: float, *, give_way: bool) -> float:
    """Forward, backward and AdamW of a small Llama with DoRA, as many as fit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dora_vl.core import DoRAConfig, apply_dora
    from dora_vl.training.launch import available_cores, give_way_when_busy

    torch.set_num_threads(available_cores())
    if give_way:
        give_way_when_busy()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    apply_dora(model, DoRAConfig(rank=16, alpha=32, targets=("model.layers.*proj",)))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    ids = torch.randint(0, 2048, (8, 64))
    steps, began = 0, time.monotonic()
    warm: tuple[int, float] | None = None
    while warm is None or time.monotonic() - warm[1] < seconds:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if warm is None and time.monotonic() - began > WARM_UP_SECONDS:
            warm = (steps, time.monotonic())
    return (steps - warm[0]) / (time.monotonic() - warm[1])


if __name__ == "__main__":
    main()
