"""PEFT's own tests about LoRA and DoRA, run as they are and once more with `accelerate_peft` on every model they make.

    git clone https://github.com/huggingface/peft && git -C peft checkout 5d602fdbf
    HF_HUB_OFFLINE=1 python -m benchmarks.peft_suite peft --records runs/peft_suite --minutes 9 \\
        --json benchmarks/results.jsonl

The second run's failures must be the first one's. Call it again until it says that every file is complete: each
test's outcome is kept in `--records`, and neither a test that has one nor a file that is complete is run again.
PEFT's tests need `attrs`, `diffusers`, `parameterized` and `scipy` besides this package's `dev` extra. Tests that load
models from the hub fail in both runs where there is no network.

Selected (this file is a plugin of pytest too) are tests of the files below whose id or text names LoRA or DoRA, not
another method such as AdaLoRA. Dropout is PEFT's (`whole_change`): a test that draws one mask twice sees it twice.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.report import table, write_json
from dora_vl.adapters.peft_model import accelerate_peft

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

OTHER_METHODS = ("ada", "de", "g", "gra", "monte", "rand", "tiny", "uni", "v", "vb", "ve", "x")
"""What stands before `lora` in the names of other methods: AdaLoRA, DeLoRA and so on."""
SUBJECT = re.compile("".join(f"(?<!{before})" for before in OTHER_METHODS) + "lora|dora", re.IGNORECASE)
ENTRY_POINTS = ("get_peft_model", "inject_adapter_in_model")

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
    plugin = ["-p", "peft_suite", "--records", str(records)]
    return [sys.executable, "-m", "pytest", *options, *plugin, *words, file]


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


# The plugin: selects tests, accelerates every PEFT model that they make, and writes one line of JSON for each that has
# run. It leaves out those that have a line already, so that a run that was cut off goes on where it stopped.


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's three settings."""
    parser.addoption("--accelerate", action="store_true", help="accelerate every PEFT model")
    parser.addoption("--records", type=Path, required=True, help="file of JSON lines, one a test; continued")
    parser.addoption("--minutes", type=float, default=1e9, help="stop after so long, at the end of a test")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the recorder up, and accelerates before any test module takes its functions from PEFT."""
    options: Any = config.option
    recorder = Recorder(options.records, options.minutes)
    config.pluginmanager.register(recorder)
    if config.getoption("--accelerate"):
        accelerate_everything(recorder)


class Recorder:
    """Selects tests, and writes each one's outcome when it is known."""

    def __init__(self, file: Path, minutes: float) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        self.layers = 0
        """Layers accelerated in the present test."""
        self.outcome, self.message = "passed", ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keeps the tests about LoRA and DoRA that have no line yet."""
        done = {json.loads(line)["test"] for line in self.file.open(encoding="utf-8")} if self.file.exists() else set()
        kept = [item for item in items if is_about_lora(item) and item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        stay_offline()

    def pytest_runtest_logstart(self) -> None:
        """A test begins."""
        self.layers, self.outcome, self.message = 0, "passed", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call or teardown is over; the first that did not pass decides."""
        if report.passed or self.outcome != "passed":
            return
        self.outcome = "error" if report.failed and report.when != "call" else report.outcome
        reasons = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
        self.message = reasons[0] if reasons else report.longreprtext.strip().rpartition("\n")[2]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test is over."""
        record = {"test": nodeid, "outcome": self.outcome, "layers": self.layers, "message": self.message[:300]}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Makes this test the last one when the time is over."""
        if time.monotonic() > self.end:
            item.session.shouldstop = "the minutes are over"


def is_about_lora(item: pytest.Item) -> bool:
    """Whether its id or its own text names LoRA or DoRA, and not only another method whose name ends so."""
    if SUBJECT.search(item.nodeid.partition("::")[2]):
        return True
    function: Any = getattr(item, "function", None)
    return function is not None and "[" not in item.nodeid and bool(SUBJECT.search(inspect.getsource(function)))


def stay_offline() -> None:
    """Takes the context away in which PEFT's tests go online; without a network each model would wait half a minute."""
    for module in list(sys.modules.values()):
        if "hub_online_once" in vars(module):
            setattr(module, "hub_online_once", lambda *_: nullcontext())  # noqa: B010 - no module declares it


def accelerate_everything(recorder: Recorder) -> None:
    """Replaces the ways in which tests make PEFT models by ones that accelerate the model as well."""

    def accelerating(make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)
        def made_and_accelerated(*positional: Any, **named: Any) -> Any:
            model = make(*positional, **named)
            if isinstance(model, nn.Module) and any(isinstance(layer, LoraLayer) for layer in model.modules()):
                # PEFT's own dropout, so that a test that draws the same mask twice sees the same numbers.
                recorder.layers += len(accelerate_peft(model, dropout_mode="whole_change").layers)
            return model

        return made_and_accelerated

    for name in ENTRY_POINTS:
        setattr(peft, name, accelerating(getattr(peft, name)))
    of_class = peft.PeftModel.from_pretrained.__func__
    peft.PeftModel.from_pretrained = classmethod(accelerating(of_class))  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
