"""Kills training runs at any moment, resumes them, and compares them with the run that was never killed.

Processes are forked from this one, which has imported everything and computed nothing, so that a run costs what it
trains. Each is a whole run: pipeline, process group, files. File operations are counted by an audit hook (PEP 578),
called before each is done; what libraries write in C++ and Rust in between is met by kills that come a little later.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import datasets  # noqa: F401 - once for every run
import deepspeed  # noqa: F401
from safetensors.numpy import load_file

from dora_vl.files import PREVIOUS, UNFINISHED
from dora_vl.run.folder import is_finished_run, read_log
from dora_vl.run.launch import log_to_stderr
from dora_vl.run.settings_parser import read_run
from dora_vl.training.extras import replay
from dora_vl.training.run import run
from dora_vl.training.train_command import pipeline_of
from tests.training.launched import free_port
from tests.training.recorded_run import record_samples
from tests.training.tiny_run import write_chats, write_pairs, write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import write_vlbart_data, write_vlbart_run

KINDS = ("llava", "vlbart", "streamed", "pairs", "rewards", "replay")
ENGINES, RANKS = ("none", "zero2", "zero3"), (1, 2)
REPLAY = 0.25
"""The share of an epoch's samples that are chats: four of them."""
STEP_SAMPLES, STEPS, SAMPLES = 4, 8, 16
"""SAMPLES are an epoch's, so that a run is two epochs."""
SECONDS = 240.0
"""A run that takes longer hangs."""
LATER = 0.03
"""Seconds after a file operation within which a kill may come."""
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.move")
REMOVES = ("os.remove", "os.rmdir", "shutil.rmtree")
LEFTOVERS = (UNFINISHED, PREVIOUS)
OF_TIME = ("train_seconds", "samples_per_second")


class Case(NamedTuple):
    """A kind of run on so many ranks of an engine."""

    kind: str
    engine: str
    ranks: int


CASES = [
    Case(kind, engine, ranks)
    for engine in ENGINES
    for ranks in RANKS
    for kind in KINDS
    if (kind, engine) != ("rewards", "zero3")  # answers are not drawn from weights in shards
]
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "pairs": {"loss": {"dpo": 0.8, "bco": 0.2, "sft": 1.0}, "beta": 0.5},
    "rewards": {
        **{"loss": "grpo", "group": 4, "max_new_tokens": 4, "kl": 0.1},
        **{"rewards": {"format": 1.0}, "format": "[a-m].*"},  # some of what a model draws that knows nothing
    },
}
"""A kind's section `objective`."""


class Kill(NamedTuple):
    """So many seconds after the file operation `number` begins on `rank`; without a number after the start."""

    rank: int
    seconds: float
    number: int | None = None


class Ended(NamedTuple):
    """`killed` where the kill came in time; `error` says what went wrong by itself.

    `saves` are the operations, by rank and number, that write or remove a checkpoint.
    """

    killed: bool
    error: str
    seconds: float
    saves: Sequence[tuple[int, int]]


def write_material(folder: Path) -> None:
    """The tiny models and data of every kind."""
    write_tiny_llava(folder / "llava")
    write_tiny_data(folder / "conversation", samples=SAMPLES)
    write_pairs(folder / "pairs", samples=SAMPLES)
    write_chats(folder / "chats.jsonl")
    write_vlbart_data(folder / "vlbart")


def settings_file(case: Case, material: Path, run_folder: Path, *, dropout: float) -> Path:
    """The YAML of a case, beside its run's folder."""
    training: dict[str, Any] = {
        "output_dir": str(run_folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "gradient_accumulation_steps": 2 // case.ranks,
        "report_to": "none",
        **({} if case.engine == "none" else {"deepspeed": case.engine}),
    }
    path, adapter = run_folder.with_suffix(".yaml"), {"dropout": dropout}
    if case.kind == "vlbart":
        training |= {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 0.01}
        data = {"batch_size": STEP_SAMPLES, "workers": 0}
        return write_vlbart_run(
            path, material / "vlbart", ("vqav2", "tvc"), training=training, adapter=adapter, data=data
        )
    training |= {"per_device_train_batch_size": STEP_SAMPLES // 2}
    streamed = {"streaming": True, "group_by_modality_length": False, "shuffle_buffer": 6}
    of_kinds = {"streamed": streamed, "replay": {"limit": SAMPLES - 4, "replay": REPLAY}}
    data = of_kinds.get(case.kind, {})
    records = material / ("pairs" if case.kind == "pairs" else "conversation") / "train.json"
    objective = {"objective": OBJECTIVES[case.kind]} if case.kind in OBJECTIVES else {}
    return write_run(path, material / "llava", records, training=training, adapter=adapter, data=data, **objective)


def start(case: Case, settings: Path, notes: Path, *, kill: Kill | None = None, resume: Sequence[str] = ()) -> Ended:
    """A run to its end, or to where one rank is killed; the others then die as a launcher ends them."""
    notes.mkdir(parents=True, exist_ok=True)
    begun, port = time.monotonic(), free_port()

    def work(rank: int) -> None:
        log = os.open(notes / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        watch_operations(
            settings.with_suffix(""), notes / f"operations-{rank}", kill if kill and kill.rank == rank else None
        )
        if case.ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_SIZE": case.ranks}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CROSS_RANK": 0, "CROSS_SIZE": 1}
            os.environ.update({name: str(value) for name, value in names.items()})
        record_samples(notes / f"samples-{rank}")
        log_to_stderr()
        options = ["--config", str(settings), *resume]
        config = read_run(options)
        if not is_finished_run(config):  # as `dora-vl train` looks; the kill may have come in its last milliseconds
            run(pipeline_of(config))

    statuses = _statuses([fork(lambda rank=rank: work(rank)) for rank in range(case.ranks)])
    killed = kill is not None and statuses[kill.rank] == signal.SIGKILL and time.monotonic() - begun < SECONDS
    saves = [
        (rank, number)
        for rank in range(case.ranks)
        for number, line in enumerate((notes / f"operations-{rank}").read_text().splitlines())
        if line == "save" and number > 0
    ]
    error = ""
    if not killed and any(statuses):
        error = f"status {statuses}: {(notes / 'rank-0.log').read_text(errors='replace')[-400:]}"
    return Ended(killed, error, time.monotonic() - begun, saves)


def fork(work: Callable[[], None]) -> int:
    """A process that does it and ends, with status 1 where it fails."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - whatever ends a run is in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _statuses(processes: Sequence[int]) -> list[int]:
    """How each ended; one that fails takes the others with it, and what hangs is killed."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(statuses) < len(processes):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            statuses[process] = status
        elif any(statuses.values()) or time.monotonic() > end:
            for other in set(processes) - statuses.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[process] for process in processes]


def watch_operations(run_folder: Path, record: Path, kill: Kill | None) -> None:
    """Notes the phase of each file operation in the run's folder, and kills this process in one of them."""
    count, file = 0, os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            mode, flags = arguments[1] or "", arguments[2] or 0
            if not set(mode) & set("wax+") and not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in WRITES:
            return
        path = str(arguments[0])
        in_a_tree = event in REMOVES and "/" not in path  # by rmtree, which names what is in a folder it has open
        if not path.startswith(str(run_folder)) and not in_a_tree:
            return
        saves = event in REMOVES or any(part in path for part in ("checkpoint-", UNFINISHED, "adapter"))
        os.write(file, b"save\n" if saves else b"steps\n")
        count += 1
        if kill is not None and kill.number == count - 1:
            end() if kill.seconds == 0 else threading.Timer(kill.seconds, end).start()

    if kill is not None and kill.number is None:
        threading.Timer(kill.seconds, end).start()
    sys.addaudithook(hook)


# ---- how two runs differ; "" where they do not


def exactly(reference: Path, folder: Path) -> str:
    """Two runs that should be the same to the bit, with nothing left behind."""
    for name in ("log.jsonl", "metrics.json"):
        ours, theirs = (numbers(run / name) for run in (reference, folder))
        if ours != theirs:
            return f"{name} differs: {ours} and {theirs}"
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (reference, folder))
    if ours.keys() != theirs.keys() or any(ours[name].tobytes() != theirs[name].tobytes() for name in ours):
        return "the adapters differ"
    left = [path.name for path in folder.iterdir() if any(mark in path.name for mark in LEFTOVERS)]
    return f"left behind: {', '.join(left)}" if left else ""


def numbers(path: Path) -> Any:
    """Each logged step's loss, or a run's metrics but for those of time."""
    if path.suffix == ".jsonl":
        return [(line["step"], line.get("rewards/mean", line["loss"])) for line in read_log(path) if "loss" in line]
    metrics = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name not in OF_TIME}


def closely(reference: Path, folder: Path) -> str:
    """Losses that may differ by rounding."""
    ours, theirs = (numbers(run / "log.jsonl") for run in (reference, folder))
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        return f"steps differ: {ours} and {theirs}"
    far = max(abs(loss - other) for (_, loss), (_, other) in zip(ours, theirs, strict=True))
    return f"losses differ by {far:.2g}" if far > 1e-4 else ""


def once_an_epoch(notes: Path) -> str:
    """Samples that were not trained on exactly once in each epoch, by what the killed and the resumed run noted."""
    steps: dict[int, list[str]] = {}
    for part in ("killed", "resumed"):
        rows = [json.loads(line) for path in (notes / part).glob("samples-*/*.jsonl") for line in path.open()]
        first = min((row["step"] for row in rows), default=STEPS + 1)
        steps = {step: ids for step, ids in steps.items() if step < first}
        for row in rows:
            steps.setdefault(row["step"], []).extend(row["samples"])
    size = SAMPLES // STEP_SAMPLES
    for epoch in range(STEPS // size):
        seen = Counter(sample for step in range(size) for sample in steps[1 + epoch * size + step])
        if len(seen) != SAMPLES or set(seen.values()) != {1}:
            return f"epoch {epoch}: samples seen {dict(seen)}"
    return ""


# ---- the kills


class Killer:
    """Kills and resumes runs; the one that is never killed is trained once for each case."""

    def __init__(self, folder: Path, *, changes: bool) -> None:
        self._folder, self._changes = folder, changes
        self._whole: dict[Case, Ended] = {}
        replay.chats_path = lambda *_: folder / "material" / "chats.jsonl"  # which the base has written
        # In a process of its own, so that this one computes nothing.
        assert os.waitpid(fork(lambda: write_material(folder / "material")), 0)[1] == 0

    def kill(self, case: Case, draws: Random, *, in_files: bool) -> str:
        """One kill, the resume and the comparison: "" where the run ended as the one that was never killed."""
        reference, folder = (self._folder / f"{'-'.join(map(str, case))}-{part}" for part in ("whole", "killed"))
        notes = folder.with_name(f"{folder.name}-notes")
        if case not in self._whole:
            self._whole[case] = self._start(case, reference, reference.with_name("whole-notes"))
        whole = self._whole[case]
        for _ in range(10):  # a run that ended before the kill came is drawn again
            for path in (folder, notes):
                shutil.rmtree(path, ignore_errors=True)
            ended = self._start(case, folder, notes / "killed", kill=_draw(whole, case, draws, in_files=in_files))
            if ended.killed or ended.error:
                break
        if whole.error or ended.error or not ended.killed:
            return f"before the kill: {whole.error or ended.error or 'it ended ten times'}"
        then, resume = case, ["--resume", "if_stopped"]
        if self._changes:
            others = [other[1:] for other in CASES if other.kind == case.kind and other != case]
            then = Case(case.kind, *draws.choice(others))
            resume = ["--resume", "last"] if any(folder.glob("checkpoint-*/")) else ["--overwrite", "true"]
        resumed = self._start(then, folder, notes / "resumed", resume=resume)
        if resumed.error or not self._changes:
            return resumed.error or exactly(reference, folder)
        counted = "" if case.kind == "vlbart" else once_an_epoch(notes)  # a VL-BART's samples repeat by its plan
        return closely(reference, folder) or counted

    def _start(self, case: Case, folder: Path, notes: Path, **how: Any) -> Ended:
        dropout = 0.0 if self._changes else 0.2
        return start(case, settings_file(case, self._folder / "material", folder, dropout=dropout), notes, **how)


def _draw(whole: Ended, case: Case, draws: Random, *, in_files: bool) -> Kill:
    if in_files and whole.saves:
        rank, number = draws.choice(whole.saves)
        return Kill(rank, draws.choice((0.0, draws.uniform(0, LATER))), number)
    return Kill(draws.randrange(case.ranks), draws.uniform(0.05, 0.95) * whole.seconds)


def main() -> None:
    """Prints a line for each kill whose run ended otherwise, and ends with status 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="llava, zero3, 2...: what a case must have")
    parser.add_argument("--change", action="store_true", help="resume on other ranks or another engine")
    options = parser.parse_args()
    cases = [case for case in CASES if set(options.only) <= set(map(str, case))]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), changes=options.change)
        for number in range(options.count):
            case = cases[number % len(cases)]
            failure = killer.kill(case, Random(f"{options.seed}/{number}"), in_files=number % 5 < 2)
            failed += bool(failure)
            if failure:
                print(f"kill {number} of {case}: {failure}", flush=True)
    print(f"{options.count - failed} of {options.count} ended as the run that was never killed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
