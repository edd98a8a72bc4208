"""A pytest plugin: PEFT's own tests about LoRA and DoRA, with every PEFT model that they make accelerated.

Loaded with `-p peft_suite_plugin` by `peft_suite.py`. It selects tests, writes one line of JSON for each that has
run, and leaves out those that have a line already, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora import LoraLayer
from torch import nn

from dora_vl.adapters.peft_model import accelerate_peft

OTHER_METHODS = ("ada", "de", "g", "gra", "monte", "rand", "tiny", "uni", "v", "vb", "ve", "x")
"""What stands before `lora` in the names of other methods: AdaLoRA, DeLoRA and so on."""
SUBJECT = re.compile("".join(f"(?<!{before})" for before in OTHER_METHODS) + "lora|dora", re.IGNORECASE)
ENTRY_POINTS = ("get_peft_model", "inject_adapter_in_model")


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
        said = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
        self.message = said[0] if said else report.longreprtext.strip().rpartition("\n")[2]

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
