"""PEFT's own tests about LoRA and DoRA, run as they are and once more with `accelerate_peft` on every model they make.

    git clone https://github.com/huggingface/peft && git -C peft checkout 5d602fdbf
    HF_HUB_OFFLINE=1 python -m benchmarks.peft_suite peft --records runs/peft_suite --minutes 9 \\
        --json benchmarks/results.jsonl

The second run's failures must be the first one's. Call it again until it says that every file is complete: each
test's outcome is kept in `--records`, and neither a test that has one nor a file that is complete is run again.
PEFT's tests need `attrs`, `diffusers`, `parameterized` and `scipy` besides this package's `dev` extra. Tests that load
models from the hub fail in both runs where there is no network.

Selected (see `peft_suite_plugin.py`) are tests of the files below whose id or text names LoRA or DoRA, not another
method such as AdaLoRA. Dropout is PEFT's (`whole_change`), so that a test that draws one mask twice sees it twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.report import table, write_json

FILES = (
    "test_lora_variants.py", "test_low_level_api.py", "test_lora_conversion.py", "test_lora_intruders.py",
    "test_lorafa.py", "test_loraplus.py", "test_mixed.py", "test_other.py", "test_tuners_utils.py",
    "test_torch_compile.py", "test_trainable_tokens.py", "test_target_parameters.py", "test_initialization.py",
    "test_custom_models.py",
)  # fmt: skip
"""Test files that make LoRA or DoRA models and need no GPU, the quick ones first."""
HUB_FILES = (
    "test_decoder_models.py", "test_encoder_decoder_models.py", "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)  # fmt: skip
"""Files in which every test loads a model from the hub."""
RUNS: Mapping[str, tuple[str, ...]] = {"plain": (), "accelerated": ("--accelerate",)}
COMPLETE = (0, 1, 5)
"""pytest's exit statuses when it came to its end: all passed, some failed, none selected."""

Records = dict[str, dict[str, Any]]
"""Test's id -> its line."""


def main() -> None:
    """Runs what has not been run yet, prints the counts and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="checkout of PEFT's repository")
    parser.add_argument("--records", type=Path, required=True, help="folder for the outcomes; continued")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="test files to run, such as '*variants*'")
    parser.add_argument("--hub", action="store_true", help="also the files in which every test loads a hub's model")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    options.records.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    chosen = FILES + HUB_FILES if options.hub else FILES
    files = [file for file in chosen if fnmatch(file, options.only)]
    left = [
        f"{file} ({run})" for file in files for run in RUNS if not ran(options.peft, file, run, options.records, end)
    ]
    print(f"not complete: {', '.join(left)}; call again" if left else "every file is complete")
    figures = compare(*(read_records(options.records / f"{run}.jsonl") for run in RUNS))
    print(table(("", *RUNS), [(name, *counts) for name, counts in figures["counts"].items()]))
    print("fail under accelerate_peft alone:", *(figures["only_accelerated"] or ["none"]), sep="\n  ")
    if options.json is not None:
        write_json(options.json, {"not_complete": left, **figures})


def ran(peft: Path, file: str, run: str, records: Path, end: float) -> bool:
    """Runs what is left of one file's tests; whether they came to their end in time."""
    minutes, complete = (end - time.monotonic()) / 60, records / f"{run}.complete"
    if complete.exists() and file in complete.read_text().split():
        return True
    if minutes <= 0:
        return False
    here = Path(__file__).resolve().parent
    words = ("--minutes", str(minutes), *RUNS[run])
    command = pytest_command(f"tests/{file}", (records / f"{run}.jsonl").resolve(), words)
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    with (records / f"{run}-{file}.log").open("a") as log:
        status = subprocess.run(command, cwd=peft, env=environment, stdout=log, stderr=log, check=False).returncode
    print(f"{file}, {run}: pytest ended with {status}", flush=True)
    if status in COMPLETE:
        with complete.open("a") as done:
            done.write(f"{file}\n")
    return status in COMPLETE


def pytest_command(file: str, records: Path, words: Sequence[str]) -> list[str]:
    """Runs one file's tests under the plugin, PEFT's own pytest options left out."""
    options = ["-q", "--no-header", "--tb=line", "--rootdir=.", "-o", "addopts=", "-p", "no:cacheprovider"]
    return [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-p",
        "peft_suite_plugin",
        "--records",
        str(records),
        *words,
        file,
    ]


def read_records(file: Path) -> Records:
    """The lines of one run."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {record["test"]: record for record in map(json.loads, lines)}


def compare(plain: Records, accelerated: Records) -> dict[str, Any]:
    """Counts of both runs, and the tests whose outcomes differ."""
    runs = (plain, accelerated)
    outcomes = [Counter(record["outcome"] for record in run.values()) for run in runs]
    counts = {name: [count[name] for count in outcomes] for name in ("passed", "failed", "skipped", "error")}
    counts["selected"] = [len(run) for run in runs]
    counts["with accelerated layers"] = [sum(record["layers"] > 0 for record in run.values()) for run in runs]
    both = plain.keys() & accelerated.keys()
    differing = sorted(test for test in both if plain[test]["outcome"] != accelerated[test]["outcome"])
    return {
        "counts": counts,
        "only_accelerated": [test for test in differing if accelerated[test]["outcome"] in ("failed", "error")],
        "only_plain": [test for test in differing if plain[test]["outcome"] in ("failed", "error")],
        "passed_with_accelerated_layers": sum(
            record["layers"] > 0 and record["outcome"] == "passed" for record in accelerated.values()
        ),
    }


if __name__ == "__main__":
    main()
