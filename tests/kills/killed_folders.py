"""Kills every verb that writes at any moment: each file is whole or absent, and the next start leaves nothing else.

Each is forked from this process and killed at, or a little after, a file operation. The trainings of a comparison are
written here; its files are its own. `stored` fills a store of frozen outputs or features.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import matplotlib
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from dora_vl import cli
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import CHECK_FILE
from dora_vl.backbones import shards
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.example import Example
from dora_vl.evaluation.predictions import Predictions
from dora_vl.evaluation.scores.scored import ACCURACY, Tally
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet
from dora_vl.files import clear_leftovers
from dora_vl.report import compare
from dora_vl.report.push import HUB
from dora_vl.run.settings_parser import read_run_file
from dora_vl.start import init as start_init
from dora_vl.training.run import run
from dora_vl.training.train_command import pipeline_of
from tests.backbones.tiny_language import write_tiny_language
from tests.core.dense_dora import move_trained
from tests.kills.killed_runs import LATER, LEFTOVERS, Kill, fork, watch_operations
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

STRENGTHS = (0.5, 1.0)
ADAPTER_BYTES = 3_000_000
ITEMS = 8
OF_TIME = re.compile(rb'"(seconds|answers_from_earlier_run)": [\d.]+')
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
    records = write_tiny_data(folder / "conversation", samples=12)
    steps = {"max_steps": 2, "warmup_steps": 0, "report_to": "none", "output_dir": str(folder / "run")}
    run(pipeline_of(read_run_file(write_run(folder / "trained.yaml", folder / "llava", records, training=steps))))


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


def evaluated(material: Path, to: Path, _: int) -> None:
    """A run's adapter on its own questions, also about exchanged pictures."""
    data, words = material / "conversation", ["--to", str(to), "--batch-size", "4", "--max-new-tokens", "3"]
    words += ["--adapter", str(material / "run" / "adapter"), "--images", str(data)]
    cli.main(["evaluate", "--benchmarks", f"exact_match={data / 'train.json'}", *words])


def report(material: Path, to: Path, number: int) -> None:
    """Of a run, under one label or another; matplotlib draws the ids of a picture's parts without a salt."""
    matplotlib.rcParams["svg.hashsalt"] = "kills"
    cli.main(["report", str(material / "run"), "--to", str(to / "report.html"), "--label", f"run {number}"])


def pushed(_: Path, to: Path, number: int) -> None:
    """The folder that would be uploaded: a commit to the hub is whole or none."""
    cli.main(["push", str(to.parent), "own/name", "--dry-run", "--license", ("mit", "apache-2.0")[number]])


def stored(_: Path, to: Path, __: int) -> None:
    """A shard for each entry, those that are not there yet."""
    shards.SHARD_BYTES, shards.time = 1, SimpleNamespace(time_ns=lambda: 0)  # type: ignore[assignment]
    to.mkdir(exist_ok=True)
    shards.keep_settings(to, {"tower": "tiny"})
    store = shards.ShardStore(to)
    for number in range(ITEMS):
        if str(number) not in store.entries:
            store.add(str(number), {}, [torch.full((1000,), float(number))])


VERBS = {
    **{"merge": merge, "init": init, "compare": compared, "evaluate": evaluated, "report": report},
    **{"push": pushed, "stored": stored},
}
GROW = ("compare", "evaluate", "stored")
"""These go on with what is there."""


def content(folder: Path) -> Files:
    """Every file of a folder, empty where there is none, without what tells how long an evaluation took.

    Locks and logs of comparisons are no result, and a merge's check is written once the merged folder is whole.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".log"))
    paths = (path for path in files if path.name != CHECK_FILE)
    return {str(path.relative_to(folder)): OF_TIME.sub(b"", path.read_bytes()) for path in paths}


def wrong(verb: str, to: Path, old: Files, new: Files) -> str:
    """What is half-written of what a killed process left, once the next has cleared up."""
    if verb == "compare":  # folder by folder
        adapters = [path for path in to.rglob("adapter") if path.parent.name.startswith("strength_")]
        whole = {name.partition("/adapter/")[2]: data for name, data in new.items() if "/adapter/" in name}
        return "".join(f"half of {path} " for path in adapters if content(path) != whole)
    if verb in GROW:  # file by file; answers line by line, which the end shows
        files = {name: data for name, data in content(to).items() if not name.startswith((".", "predictions."))}
        return "".join(f"half of {name} " for name in files if files[name] != new.get(name))
    clear_leftovers(to.parent, to.name)
    for name in (CHECK_FILE, "report.html"):
        clear_leftovers(to, name)  # as the next start does
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
    to, start, wholes = scratch / (HUB if verb == "push" else "result"), VERBS[verb], []
    for number in (0, 1):
        shutil.copytree(material / "run", scratch)
        assert at_a_folder(lambda number=number: start(material, to, number), scratch, record, None) == 0
        wholes.append(content(to))
        operations = len(record.read_text().splitlines())
        if number == 0:
            shutil.rmtree(scratch)
    failures = []
    for number in range(count):
        draws = Random(f"{seed}/{verb}/{number}")
        shutil.rmtree(scratch)
        shutil.copytree(material / "run", scratch)
        replaces = verb not in GROW and number % 4 > 0
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
    parser.add_argument("--only", nargs="+", default=list(VERBS), choices=VERBS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert os.waitpid(fork(lambda: write_material(folder / "material")), 0)[1] == 0
        failures = [line for verb in options.only for line in kills(verb, options.count, folder, options.seed)]
    count = len(options.only) * options.count
    print(*failures, f"{count - len(failures)} of {count} whole or absent", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
