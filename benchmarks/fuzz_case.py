"""One case of `fuzz_files`: draws a target and its damage from a number, runs the command, looks at what is left."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from unittest import mock

from benchmarks.file_mutations import mutate
from benchmarks.fuzz_targets import PREDICTIONS, PUBLISHERS, SHARDS, Target
from dora_vl.cli import main
from dora_vl.data.example import iterate_examples
from dora_vl.data.text_file import stream_records
from dora_vl.errors import UserError

LONGEST_LINE = 500
MOST_MEMORY_MB = 256.0
MOST_SECONDS = 120
OUR_OWN = {".prepare.lock"}
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case.

    Attributes:
        damage: which file, and what was done to it.
        failure: what must not happen; empty where nothing did.
        memory_mb: how much more than before the process held at its highest; 0 where the system does not tell.
    """

    number: int
    kind: str
    target: str
    damage: str
    status: int | None
    failure: str
    detail: str
    memory_mb: float
    longest_line: int

    @property
    def said(self) -> str:
        """The case's number, what was damaged and how it ended, for a person."""
        ended = self.failure or f"status {self.status}"
        return f"{self.number}: {self.kind} {self.target}, {self.damage}: {ended} {self.detail}"[:600]


@dataclass(frozen=True)
class Run:
    """How a command ended and what it printed; `error` is an exception that passed through it."""

    status: int | None
    printed: str
    errors: str
    error: str = ""


def run_case(targets: Sequence[Target], scratch: Path, seed: int, number: int, keep: Path | None = None) -> Outcome:
    """Runs one case; its files are in a folder of their own, which goes unless it is to be kept."""
    draw = Random(f"{seed}/{number}")
    target = draw.choices(targets, [target.weight for target in targets])[0]
    folder = keep or scratch / f"case_{number}"
    try:
        damage = write_damaged(target, folder / "files", draw)
        if target.name == SHARDS and SHARDS not in _read_whole:
            _read_whole.add(SHARDS)
            write_files(target.files, folder / "whole" / "files")
            run_command([word.format(files=folder / "whole" / "files", out=folder / "whole") for word in target.words])
        words = [word.format(files=folder / "files", out=folder / "out") for word in target.words]
        before = memory_mb(begin=True)
        run = run_command(words, java=target.java)
        memory = max(0.0, memory_mb() - before)
        failure, detail = judged(run, folder / "out", target.kind, memory)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return Outcome(
        number=number,
        kind=target.kind,
        target=target.name,
        damage=damage,
        status=run.status,
        failure=failure,
        detail=detail,
        memory_mb=memory,
        longest_line=max(map(len, (run.printed + run.errors).split("\n"))),
    )


_read_whole: set[str] = set()
"""Targets that this process read undamaged first: the memory that importing `datasets` takes, 230 MB, is no case's."""


def write_damaged(target: Target, folder: Path, draw: Random) -> str:
    """Writes a target's files, one of them damaged in one to three ways; says which and how."""
    name = draw.choice(sorted(target.files))
    content, said = target.files[name], []
    for _ in range(draw.choice((1, 1, 2, 3))):
        mutated = mutate(content, name, draw)
        content = mutated.content
        said.append(mutated.said)
    write_files({**target.files, name: content}, folder)
    return f"{name}: {'; '.join(said)}"


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files by their path below the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def run_command(words: Sequence[str], *, java: bool = True) -> Run:
    """The command's own function, as its entry point calls it."""
    printed, errors = _terminal("strict"), _terminal("backslashreplace")
    without_java = {} if java else {"PATH": ""}
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
        mock.patch.dict(os.environ, without_java),
        _time_limit(),
    ):
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)  # to this case's stderr
        try:
            main(words)
            status, error = 0, ""
        except SystemExit as left:
            status, error = (left.code if isinstance(left.code, int) else 1), ""
        except Exception as problem:  # noqa: BLE001 whatever passes through is what is looked for
            place = traceback.extract_tb(problem.__traceback__)[-1]
            status, error = None, f"{type(problem).__name__} in {Path(place.filename).name}:{place.lineno}"
            errors.write(f"{error}: {str(problem)[:200]}\n")
    return Run(status, _content(printed), _content(errors), error)


def _terminal(of_others: str) -> io.TextIOWrapper:
    """A stream that takes what a terminal or a pipe in UTF-8 does."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=of_others, newline="\n", write_through=True)


def _content(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(run: Run, out: Path, kind: str, memory: float) -> tuple[str, str]:
    """What must not have happened, in words that are the same for all such cases, and what is special to this one."""
    lines = (run.printed + run.errors).split("\n")
    longest = max(lines, key=len)
    if run.error:
        return f"exception: {run.error}", run.errors.strip()[-200:]
    if run.status not in {0, 2}:
        return f"exit status {run.status}", run.errors[-200:]
    if len(longest) > LONGEST_LINE:
        return f"a line of more than {LONGEST_LINE} characters", f"{len(longest)}: {longest[:200]}"
    if "Traceback" in run.errors:
        return "a traceback is printed", run.errors[-200:]
    if run.status == 2 and (run.errors.count("\n") != 1 or not run.errors.startswith("error: ")):
        return "an error is not one line", repr(run.errors[:200])
    if memory > MOST_MEMORY_MB:
        return f"more than {MOST_MEMORY_MB:.0f} MB of memory", f"{memory:.0f} MB"
    if run.status == 2 and kind == PREDICTIONS and any(path.is_file() for path in out.rglob("*")):
        return "refused, and yet there are results", run.errors[-200:]
    return left_behind(out, kind)


def left_behind(out: Path, kind: str) -> tuple[str, str]:
    """Files that nobody would finish, or that cannot be read; empty where there are none."""
    files = [path for path in out.rglob("*") if path.is_file()]
    hidden = [path.name for path in files if path.name.startswith(".") and path.name not in OUR_OWN]
    if hidden:
        return "a hidden file is left", hidden[0]
    for path in files:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl" and kind == PUBLISHERS:
                problem = _unlike_its_manifest(path)
                if problem:
                    return "a file is not what its manifest says", f"{path.name}: {problem}"
            elif path.suffix == ".jsonl":
                for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
                    json.loads(line)
        except (UserError, ValueError, RecursionError) as error:
            return "a file that was written cannot be read back", f"{path.name}: {str(error)[:200]}"
    return "", ""


def _unlike_its_manifest(path: Path) -> str:
    manifest = path.with_name(MANIFEST)
    splits = json.loads(manifest.read_text(encoding="utf-8"))["splits"] if manifest.is_file() else {}
    if path.stem not in splits:
        return "it is in no manifest"
    entry = splits[path.stem]
    llava = path.parent.name in {"llava", "llava_mix665k", "llava_pretrain"}
    ids = [record["id"] for record in stream_records(path)] if llava else [each.id for each in iterate_examples(path)]
    if len(ids) != entry["written"] or len(set(ids)) != len(ids):
        return f"{len(ids)} records of {len(set(ids))} ids, {entry['written']} in the manifest"
    return ""


def memory_mb(*, begin: bool = False) -> float:
    """The most memory that this process held since `begin` was asked for; 0 where the system does not tell."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(peak.split()[1]) / 1024
