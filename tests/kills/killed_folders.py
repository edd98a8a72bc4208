"""Kills merge, init and compare at any moment: what they write is whole or absent, and the next start leaves nothing.

Each is forked from this process and killed at, or a little after, a file operation. The trainings of a comparison are
written here; its files are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from dora_vl import cli
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import CHECK_FILE
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.example import Example
from dora_vl.evaluation.predictions import Predictions
from dora_vl.evaluation.scores.scored import ACCURACY, Tally
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet
from dora_vl.files import clear_leftovers
from dora_vl.report import compare
from dora_vl.start import init as start_init
from tests.backbones.tiny_language import write_tiny_language
from tests.core.dense_dora import move_trained
from tests.kills.killed_runs import LATER, LEFTOVERS, Kill, fork, watch_operations
from tests.training.tiny_run import write_tiny_llava

STRENGTHS = (0.5, 1.0)
ADAPTER_BYTES = 3_000_000
ITEMS = 8
Files = dict[str, bytes]


def write_material(folder: Path) -> None:
    """A base with two adapters, pictures with questions, and a run's settings to compare."""
    base = write_tiny_language(folder / "base")
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(base)
        apply_dora(model, DoRAConfig(rank=2, alpha=3.0, targets=("*.q_proj",)))
        move_trained(model, seed=seed)
        save_adapter(model, folder / f"adapter-{seed}", base_model=str(base))
    write_tiny_llava(folder / "llava")
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = ["image,question,answer"]
    for number in range(12):
        Image.new("RGB", (12, 8), (20 * number, 0, 0)).save(pictures / f"{number}.png")
        lines.append(f"{number}.png,How red is it?,{20 * number}")
    (pictures / "questions.csv").write_text("\n".join(lines))
    settings = {
        "task": "commonsense",
        "model": {"base": str(base), "template": "cloze"},
        "adapter": {"rank": 4, "alpha": 12.0},
        "data": {"train": [str(folder / "train.json")], "validation_size": 4},
        "training": {"output_dir": str(folder / "run"), "learning_rate": 0.01, "seed": 5},
        "evaluation": {"files": {"openbookqa": str(folder / "test.json")}},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))


def merge(material: Path, to: Path, number: int) -> None:
    """Adapter 0 or 1 into the base."""
    cli.main(["merge", "--adapter", str(material / f"adapter-{number}"), "--to", str(to)])


def init(material: Path, to: Path, number: int) -> None:
    """With the test of one seed or another; what can be read is looked at once the folder is whole."""
    start_init._probe_base = lambda run_file: iter(())  # of this process
    words = ["--model", str(material / "llava"), "--to", str(to), "--seed", str(number), "--overwrite"]
    cli.main(["init", str(material / "pictures"), *words])


def compared(material: Path, to: Path, _: int) -> None:
    """One contender, at several strengths."""
    compare.subprocess.run = trained  # type: ignore[assignment] - of this process
    words = ["--methods", "dora", "--ranks", "4", "--rates", "0.01,0.003", "--seeds", "1", "--to", str(to)]
    cli.main(["compare", str(material / "run.yaml"), *words, "--strengths", ",".join(map(str, STRENGTHS))])


def trained(command: list[str], **_: Any) -> SimpleNamespace:
    """What `dora-vl train` would leave."""
    words = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
    folder = Path(words["training.output_dir"])
    if "evaluation.strength" not in words:
        (folder / "adapter").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "recipe.json"):
            (folder / "adapter" / name).write_bytes(name.encode() * (ADAPTER_BYTES // len(name)))
    (folder / "log.jsonl").write_text(json.dumps({"step": 3, "eval_loss": 1.0}) + "\n")
    tally, examples = Tally(), [Example(id=f"q{number}") for number in range(ITEMS)]
    for number, example in enumerate(examples):
        tally.add(example.id, number % 2, {"right": number % 2, "asked": 1.0}, unit=f"p{number}")
    test = TestSet(name="openbookqa", examples=examples, score=None)
    tested = Tested(test=test, predictions=Predictions(), scored=tally.scored({"accuracy": ACCURACY}))
    ResultFolder(folder=folder, header={"train_steps": 3}).write([tested])
    return SimpleNamespace(returncode=0)


VERBS = {"merge": merge, "init": init, "compare": compared}


def content(folder: Path) -> Files:
    """Every file of a folder, empty where there is none.

    Locks and logs of comparisons are no result, and a merge's check is written once the merged folder is whole.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".log"))
    paths = (path for path in files if path.name != CHECK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wrong(verb: str, to: Path, old: Files, new: Files) -> str:
    """What is half-written of what a killed process left, once the next has cleared up."""
    if verb == "compare":  # folder by folder
        adapters = [path for path in to.rglob("adapter") if path.parent.name.startswith("strength_")]
        whole = {name.partition("/adapter/")[2]: data for name, data in new.items() if "/adapter/" in name}
        return "".join(f"half of {path} " for path in adapters if content(path) != whole)
    clear_leftovers(to.parent, to.name)
    clear_leftovers(to, CHECK_FILE)  # as the next check does
    if content(to) == new or content(to) == old:
        return ""
    return f"neither whole: {sorted(content(to))}"


def left_behind(folder: Path) -> list[str]:
    """Names of what a killed process should not leave."""
    return [path.name for path in folder.rglob("*") if any(mark in path.name for mark in LEFTOVERS)]


def at_a_folder(work: Callable[[], None], folder: Path, record: Path, kill: Kill | None) -> int:
    """How a process ended that does some work in a folder and may be killed there."""

    def run() -> None:
        log = os.open(record.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        watch_operations(folder, record, kill)
        work()

    status = os.waitpid(fork(run), 0)[1]
    assert status in (0, signal.SIGKILL), record.with_suffix(".log").read_text()
    return status


def kills(verb: str, count: int, folder: Path, seed: int) -> list[str]:
    """So many kills of a verb; a line for each that went wrong."""
    material, scratch, record = folder / "material", folder / verb, folder / f"{verb}-operations"
    to, start, wholes = scratch / "result", VERBS[verb], []
    for number in (0, 1):
        scratch.mkdir()
        assert at_a_folder(lambda number=number: start(material, to, number), scratch, record, None) == 0
        wholes.append(content(to))
        operations = len(record.read_text().splitlines())
        if number == 0:
            shutil.rmtree(scratch)
    failures = []
    for number in range(count):
        draws = Random(f"{seed}/{verb}/{number}")
        shutil.rmtree(scratch)
        scratch.mkdir()
        replaces = verb != "compare" and number % 4 > 0
        if replaces:
            assert at_a_folder(lambda: start(material, to, 0), scratch, record, None) == 0
        status = 0
        while status != signal.SIGKILL:  # a process that ended before it was killed is started again
            kill = Kill(0, draws.choice((0.0, draws.uniform(0, LATER))), draws.randrange(operations))
            status = at_a_folder(lambda: start(material, to, 1), scratch, record, kill)
        problem = wrong(verb, to, wholes[0] if replaces else {}, wholes[1])
        assert at_a_folder(lambda: start(material, to, 1), scratch, record, None) == 0
        if content(to) != wholes[1]:
            problem += " the next start made something else"
        if left := left_behind(scratch):
            problem += f" left behind: {', '.join(left)}"
        failures += [f"kill {number} of {verb} at operation {kill.number}: {problem}"] if problem else []
    return failures


def main() -> None:
    """Prints a line for each kill that left something half-written or behind, and ends with status 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="of each verb")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert os.waitpid(fork(lambda: write_material(folder / "material")), 0)[1] == 0
        failures = [line for verb in VERBS for line in kills(verb, options.count, folder, options.seed)]
    print(
        *failures,
        f"{len(VERBS) * options.count - len(failures)} of {len(VERBS) * options.count} whole or absent",
        sep="\n",
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
