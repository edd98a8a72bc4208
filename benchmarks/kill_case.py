"""One run of `benchmarks/kills.py`: its settings, its processes, and where in its work one of them is killed.

Processes are forked from one that has imported everything, so that a run costs what it trains. Each is a whole run of
its own: pipeline, process group, files. File operations are counted by an audit hook (PEP 578), which is called before
each is done; what libraries write in C++ and Rust between two of them is met by kills that come a little later.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("llava", "vlbart", "streamed")
ENGINES = ("none", "zero2", "zero3")
RANKS = (1, 2)
STEP_SAMPLES = 4
STEPS, SAVE_EVERY = 8, 2
SAMPLES = 16
"""An epoch's, so that a run is two epochs."""
SECONDS = 240.0
"""A run that takes longer hangs."""
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.move")
REMOVES = ("os.remove", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Case:
    """A kind of run on so many ranks of an engine."""

    kind: str
    engine: str
    ranks: int

    @property
    def name(self) -> str:
        """For tables and folders."""
        return f"{self.kind}-{self.engine}-{self.ranks}"

    @classmethod
    def named(cls, name: str) -> Case:
        """The inverse of `name`."""
        kind, engine, ranks = name.split("-")
        return cls(kind, engine, int(ranks))


CASES = tuple(Case(kind, engine, ranks) for engine in ENGINES for ranks in RANKS for kind in KINDS)


@dataclass(frozen=True)
class Operation:
    """A file operation inside a run's folder."""

    rank: int
    number: int
    event: str
    phase: str
    """save, removal (of a checkpoint or of what is in its way), or steps."""


@dataclass(frozen=True)
class Kill:
    """When a process is killed: before its file operation `number` on `rank` and so many seconds more, or by the clock.

    Without a number `seconds` count from the start.
    """

    rank: int
    seconds: float
    number: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended: `killed` where the kill came in time; `error` says what went wrong by itself."""

    killed: bool
    error: str | None
    seconds: float
    operations: tuple[Operation, ...]

    def write(self, path: Path) -> None:
        """Keeps it for another process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Ended:
        """What `write` kept."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**found, "operations": tuple(Operation(**one) for one in found["operations"])})


def write_material(folder: Path) -> None:
    """The tiny models and data of every kind; to be called in a process of its own, since it computes."""
    from tests.training.tiny_run import write_tiny_data, write_tiny_llava
    from tests.training.tiny_vlbart_run import write_vlbart_data

    write_tiny_llava(folder / "llava")
    write_tiny_data(folder / "talk", samples=SAMPLES)
    write_vlbart_data(folder / "vlbart")


def settings_file(case: Case, material: Path, run_folder: Path, *, dropout: float) -> Path:
    """The YAML of a case, whose run goes into `run_folder`; beside it, so that two cases never share a file."""
    from tests.training.tiny_run import write_run
    from tests.training.tiny_vlbart_run import write_vlbart_run

    training: dict[str, Any] = {
        "output_dir": str(run_folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "save_total_limit": 1,
        "gradient_accumulation_steps": 2 // case.ranks,
        "report_to": "none",
        **({} if case.engine == "none" else {"deepspeed": case.engine}),
    }
    path = run_folder.with_suffix(".yaml")
    adapter: dict[str, object] = {"dropout": dropout}
    if case.kind == "vlbart":
        data = material / "vlbart"
        more = {"batch_size": STEP_SAMPLES, "workers": 0}
        training |= {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 0.01}
        return write_vlbart_run(path, data, ("vqav2", "tvc"), training=training, adapter=adapter, data=more)
    training |= {"per_device_train_batch_size": STEP_SAMPLES // 2}
    streamed = {"streaming": True, "group_by_modality_length": False, "shuffle_buffer": 6}
    more = streamed if case.kind == "streamed" else {}
    records = material / "talk" / "train.json"
    return write_run(path, material / "llava", records, training=training, adapter=adapter, data=more)


def start(case: Case, settings: Path, notes: Path, *, kill: Kill | None = None, resume: Sequence[str] = ()) -> Ended:
    """A run from its settings to its end, or to where it is killed; the other ranks then die as a launcher ends them.

    Args:
        case: its ranks and engine.
        settings: as `settings_file` wrote them.
        notes: a folder for what each process says and the samples that it trains on.
        kill: when.
        resume: options for going on.
    """
    notes.mkdir(parents=True, exist_ok=True)
    port, begun = _free_port(), time.monotonic()
    told, tells = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = _Process(case, port, settings, notes, kill, tuple(resume), tells)
    ranks = [process.fork(rank) for rank in range(case.ranks)]
    os.close(tells)
    killed = _wait_and_kill(told, ranks, kill, begun)
    os.close(told)
    statuses = [os.waitpid(one, 0)[1] for one in ranks]
    seconds = time.monotonic() - begun
    operations = tuple(
        Operation(rank, number, *line.split(" ", 1))
        for rank in range(case.ranks)
        for number, line in enumerate((notes / f"operations-{rank}").read_text().splitlines())
    )
    error = None
    if not killed and any(statuses):
        said = (notes / "rank-0.log").read_text(errors="replace").strip().splitlines()
        hung = "it did not end in time; " if seconds > SECONDS else ""
        error = f"{hung}status {statuses}: {' | '.join(said[-3:])[-400:]}"
    return Ended(killed, error, seconds, operations)


def _wait_and_kill(told: int, ranks: Sequence[int], kill: Kill | None, begun: float) -> bool:
    """Kills at the kill's time, and everything that hangs; returns whether the kill found a process to kill."""
    at = begun + kill.seconds if kill is not None and kill.number is None else None
    while True:
        left = max(0.0, (at if at is not None else begun + SECONDS) - time.monotonic())
        readable = select.select([told], [], [], left)[0]
        message = os.read(told, 1) if readable else b"late"
        if message == b"":  # every process has closed it, so all have ended
            return False
        if readable and kill is not None:  # the operation was reached
            time.sleep(kill.seconds)
        first = ranks if kill is None else [ranks[kill.rank], *ranks]
        for one in first:
            os.kill(one, signal.SIGKILL)
        return kill is not None and time.monotonic() - begun < SECONDS


@dataclass(frozen=True)
class _Process:
    """What the ranks of one start share."""

    case: Case
    port: int
    settings: Path
    notes: Path
    kill: Kill | None
    resume: tuple[str, ...]
    tells: int

    def fork(self, rank: int) -> int:
        """One rank's process; returns its id here, and nowhere there."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            log = os.open(self.notes / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            stop = self.kill.number if self.kill is not None and self.kill.rank == rank else None
            _watch_operations(self.settings.with_suffix(""), self.notes / f"operations-{rank}", stop, self.tells)
            _join_launch(self.case, rank, self.port)
            _note_samples(self.notes / f"samples-{rank}.jsonl")
            _train(self.case, self.settings, self.resume)
            status = 0
        except BaseException:  # noqa: BLE001 - whatever ends a run is told in its log
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _join_launch(case: Case, rank: int, port: int) -> None:
    """The environment that the deepspeed launcher gives a rank."""
    random.seed()
    if case.ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_SIZE": case.ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CROSS_RANK="0", CROSS_SIZE="1")


def _train(case: Case, settings: Path, resume: Sequence[str]) -> None:
    from dora_vl.training.command_line import read_run, read_settings
    from dora_vl.training.decoder_pipeline import DecoderPipeline
    from dora_vl.training.launch import log_to_stderr
    from dora_vl.training.recipe import VlBartRunConfig
    from dora_vl.training.run import run
    from dora_vl.training.vlbart_pipeline import VlBartPipeline
    from tests.training.tiny_vlbart_run import all_subtasks

    log_to_stderr()
    options = ["--config", str(settings), *resume]
    if case.kind == "vlbart":
        run(VlBartPipeline(read_settings(options, VlBartRunConfig), all_subtasks(), name="tiny"))
    else:
        run(DecoderPipeline(read_run(options)))


def _watch_operations(run_folder: Path, record: Path, stop_before: int | None, tells: int) -> None:
    """Writes a line for each file operation in the run's folder, and stops this process before one of them."""
    inside, count = str(run_folder), 0
    file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, found: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            mode, flags = found[1], found[2]
            writes = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            if not writes:
                return
        elif event not in WRITES:
            return
        path = str(found[0])
        in_a_tree = event in REMOVES and "/" not in path  # by rmtree, which names what is in a folder it has open
        if not path.startswith(inside) and not in_a_tree:
            return
        os.write(file, f"{event} {_phase(event, path)}\n".encode())
        count += 1
        if stop_before is not None and count > stop_before:
            os.write(tells, b"x")
            time.sleep(SECONDS)

    sys.addaudithook(hook)


def _phase(event: str, path: str) -> str:
    if event in REMOVES:
        return "removal"
    return "save" if any(part in path for part in ("checkpoint-", ".writing", "adapter")) else "steps"


def _note_samples(record: Path) -> None:
    """Has every step write the ids of its samples, so that each can be counted."""
    from dora_vl.training.trainer import AdapterTrainer

    original = AdapterTrainer.get_batch_samples

    def noted(self: Any, *options: Any, **named: Any) -> Any:
        found = original(self, *options, **named)
        ids = [one for batch in self.faults._ids for one in batch]
        with record.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step + 1, "ids": ids}) + "\n")
        return found

    AdapterTrainer.get_batch_samples = noted  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
