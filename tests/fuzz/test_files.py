"""Damaged publishers' files and predictions end in status 0, or 2 and one short line, with nothing half-written left.

    FUZZ_CASES=20000 OMP_NUM_THREADS=1 python -m pytest -m slow tests/fuzz/test_files.py

Each case damages one file in one to three ways, drawn by the case's number, and runs the command in this process.
`FUZZ_ONLY` runs one case again.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest

from dora_vl.cli import main
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import iterate_examples
from dora_vl.data.text_file import stream_records
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores.exact import PATTERNS
from tests.data.published import FIXTURES, SOURCE_OF

MOST_MEMORY_MB, MOST_SECONDS, LONGEST_LINE = 256.0, 120, 500
DEPTH, HUGE = 100_000, 60_000
LIKE = {"exact_match": "textvqa", **dict.fromkeys(sorted(PATTERNS.keys() - {"boolq", "openbookqa"}), "openbookqa")}
"""Benchmarks without a fixture, and whose records they are asked with."""
VALUES = (
    *("null", "true", "0", "-1", "0.5", '""', '"a"', '"a\\r\\nb\\u2028c\\u0085d"', '"a\\u0000b"', '"../../../x"'),
    *(f'"{"x" * HUGE}"', f'"{"a" * 300}/{"b" * 300}"', '"\\ud83d"', '"٣"', '"²"', f'"{"1" * 5_000}"', "[]", "{}"),
    *(
        '[1, "a", null]',
        '[[[1]], {"a": [2]}]',
        '{"text": "a", "answer": "b", "a": {"b": 1}}',
        "[" * DEPTH + "]" * DEPTH,
    ),
    *("1e999", "NaN", "-Infinity", "9223372036854775808", "9" * 5_000, "1e-999"),
)
"""These stand for a value in JSON."""
CELLS = ('"', "x" * HUGE, "ä", "\udcff\udcfe", "\0", "nan", "-1", "9" * 5_000, "\r", "a\nb", "")
NAMES = ("", "id", "answer", "row", "x" * HUGE, "a\nb", "\ud83d")
MARK = "\x01"
INSERTED = (b"\x00", b'"', b"]", b",", b"\n", b"\xff\xfe", b"y" * HUGE)
BYTE_CHANGES: Mapping[str, Callable[[bytes, Random], bytes]] = {
    "cut": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "doubled": lambda content, draw: content + draw.choice((b"", b"\n")) + content,
    "lines mixed": lambda content, draw: b"\n".join(draw.sample(lines := content.split(b"\n"), len(lines))),
    "empty": lambda content, draw: b"",
    "two byte order marks": lambda content, draw: b"\xef\xbb\xbf" * 2 + content,
    "utf-16": lambda content, draw: content.decode("utf-8", "replace").encode("utf-16", "replace"),
    "CR": lambda content, draw: content.replace(b"\n", b"\r"),
    "inserted": lambda content, draw: draw.choice(INSERTED).join(
        (content[: (position := draw.randrange(len(content) + 1))], content[position:])
    ),
    "nested deeply": lambda content, draw: draw.choice((b"[", b'{"a":')) * DEPTH + content,
}


@dataclass(frozen=True)
class Target:
    """A command and the files that it reads; `{files}` and `{out}` in its words are the case's folders."""

    name: str
    files: Mapping[str, bytes]
    words: Sequence[str]


def damage(content: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """One change of a file, and its description; of JSON and tables mostly one that leaves them so."""
    ending = name.rpartition(".")[2]
    changed = None
    if draw.random() < 0.65:
        if ending in ("json", "jsonl"):
            changed = another_value(content, draw)
        elif ending in ("csv", "tsv"):
            changed = another_cell(content, draw, "," if ending == "csv" else "\t")
    kind = draw.choice(list(BYTE_CHANGES))
    return changed or (BYTE_CHANGES[kind](content, draw), kind)


def another_value(content: bytes, draw: Random) -> tuple[bytes, str] | None:
    """A value, a name or an entry is another one; None for a file that is no JSON any more."""
    try:
        text, lines = content.decode(), False
        try:
            document = json.loads(text)
        except ValueError:
            document, lines = [json.loads(line) for line in text.splitlines() if line.strip()], True
        inside, key = draw.choice(list(values_in(document)))
        kind, value = draw.choice(["value", "value", "removed", "renamed", "neighbour"]), draw.choice(VALUES)
        if kind == "value":
            inside[key] = MARK
        elif kind == "removed":
            del inside[key]
        elif kind == "renamed" and isinstance(inside, dict):
            inside[draw.choice([f"{key}_", str(key).upper(), *NAMES])] = inside.pop(key)
        else:
            inside[key] = inside[draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))]
        parts = document if lines else [document]
        written = "\n".join(json.dumps(part).replace(json.dumps(MARK), value) for part in parts)
    except (ValueError, RecursionError, IndexError):
        return None
    return written.encode(), f"{kind} at {str(key)[:40]!r}: {value[:20] if kind == 'value' else ''}"


def values_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Lists and objects, each with the index or name of one of its values."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in entries:
        yield value, key
        yield from values_in(inside)


def another_cell(content: bytes, draw: Random, delimiter: str) -> tuple[bytes, str]:
    """One cell of a line of a table is another, or lacks a half."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    row = draw.randrange(len(lines))
    cells = lines[row].split(delimiter)
    column = draw.randrange(len(cells))
    cells[column] = draw.choice((*CELLS, cells[column][: len(cells[column]) // 2], f'"{cells[column]}'))
    lines[row] = delimiter.join(cells)
    return "\n".join(lines).encode("utf-8", "surrogateescape"), f"cell {column} of line {row + 1}"


def prepare_words(source: str, folder: str, to: str) -> list[str]:
    return ["prepare", source, "--from", folder, "--to", to]


def publisher_targets() -> list[Target]:
    """One for each fixture, and one for each option that reads otherwise."""
    targets: list[Target] = []
    for folder in sorted(FIXTURES.iterdir()):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        source = SOURCE_OF[folder.name]
        targets.append(Target(folder.name, files, prepare_words(source, "{files}", "{out}")))
        if source == "nlvr":
            shares = ["--set", "shares=train:0.5,test:0.5"]
            targets.append(Target("nlvr in shares", files, [*prepare_words(source, "{files}", "{out}"), *shares]))
    return targets


def prediction_targets(scratch: Path) -> list[Target]:
    """Right answers to every benchmark, as lines and in its server's form, with records of one like it."""
    for fixture in FIXTURES.iterdir():
        with contextlib.redirect_stdout(io.StringIO()):
            main(prepare_words(SOURCE_OF[fixture.name], str(fixture), str(scratch / fixture.name)))
    paths = [path for path in sorted(scratch.glob("*/*/*.jsonl")) if "llava_mix" not in str(path)]
    paths = [path for path in paths if path.parent.name != "llava_pretrain"]
    paths.sort(key=lambda path: not next(iterate_examples(path)).answers)  # of a benchmark's splits one with answers
    targets = []
    for name, benchmark in BENCHMARKS.items():
        records = next(path for path in paths if path.parent.name == LIKE.get(name, name))
        examples = list(iterate_examples(records))
        answers = {example.id: example.answers[0].text if example.answers else "a" for example in examples}
        lines = "".join(json.dumps({"id": id, "answer": answer}) + "\n" for id, answer in answers.items())
        forms = {"predictions.jsonl": lines}
        if benchmark.submission is not None and name != "llava_bench":  # whose file holds a judge's questions
            forms |= [benchmark.submission(examples, answers)]
        for file, text in forms.items():
            files = {"records.jsonl": records.read_bytes(), file: text.encode()}
            words = ["evaluate", "--benchmarks", f"{name}={{files}}/records.jsonl"]
            targets.append(Target(name, files, [*words, "--predictions", f"{{files}}/{file}", "--to", "{out}"]))
    return targets


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, and captions take the tokenizer that stands in for Java's."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Target]]:
    return {"prepare": publisher_targets(), "evaluate": prediction_targets(tmp_path_factory.mktemp("records"))}


@pytest.mark.parametrize("kind", ["prepare", "evaluate"])
@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_no_damage_passes_through(kind: str, count: int, targets: dict[str, list[Target]], tmp_path: Path) -> None:
    def run(number: int) -> str:
        draw = Random(f"{kind}/{number}")
        target = draw.choice(targets[kind])
        folder = tmp_path / f"case_{number}"
        name = draw.choice(sorted(target.files))
        content, described = target.files[name], []
        for _ in range(draw.choice((1, 1, 2, 3))):
            content, change = damage(content, name, draw)
            described.append(change)
        if failure := run_target(target, {name: content}, folder):
            return f"FUZZ_ONLY={number}: {target.name}, {name}: {'; '.join(described)}: {failure}"
        shutil.rmtree(folder)
        return ""

    only = os.environ.get("FUZZ_ONLY")
    numbers = [int(only)] if only else range(1, int(os.environ.get("FUZZ_CASES", count)) + 1)
    assert [failure for number in numbers if (failure := run(number))] == []


@pytest.mark.slow
def test_everything_is_read_without_damage(targets: dict[str, list[Target]], tmp_path: Path) -> None:
    assert {target.words[1] for target in targets["prepare"]} == set(SOURCES) - {"llava-json", "cloze"}
    assert set(BENCHMARKS) == {target.name for target in targets["evaluate"]}
    for number, target in enumerate((*targets["prepare"], *targets["evaluate"])):
        assert run_target(target, {}, tmp_path / str(number), statuses=(0,)) == "", target.name


def run_target(target: Target, damaged: Mapping[str, bytes], folder: Path, statuses: Sequence[int] = (0, 2)) -> str:
    """What must not have happened, or ""."""
    for path, content in {**target.files, **damaged}.items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_bytes(content)
    words = [word.format(files=folder / "files", out=folder / "out") for word in target.words]
    before = memory_mb(begin=True)
    status, printed, errors = run_command(words)
    memory = memory_mb() - before
    longest = max(map(len, (printed + errors).split("\n")))
    results = [path for path in (folder / "out").rglob("*") if path.is_file()]
    refused = status == 2
    failed = {
        f"status {status}: {errors[-300:]}": status not in statuses or "Traceback" in errors,
        f"a line of {longest} characters": longest > LONGEST_LINE,
        f"no one line: {errors[:200]!r}": refused and (errors.count("\n") != 1 or not errors.startswith("error: ")),
        f"{memory:.0f} MB of memory": memory > MOST_MEMORY_MB,
        "refused, and yet there are results": refused and words[0] == "evaluate" and bool(results),
    }
    return next((failure for failure, happened in failed.items() if happened), "") or left_behind(results)


def memory_mb(*, begin: bool = False) -> float:
    """The most memory that this process held since `begin`; 0 where the system does not say."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run_command(words: Sequence[str]) -> tuple[Any, str, str]:
    """Exit status (or the exception that passed through), what was printed and what went to stderr."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=of) for of in ("strict", "backslashreplace")]
    before = signal.signal(signal.SIGALRM, stop)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        signal.alarm(MOST_SECONDS)
        try:
            main(words)
            status: Any = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except Exception as error:  # noqa: BLE001 - whatever passes through is what is looked for
            status = "".join(traceback.format_exception(error)[-3:])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    for stream in streams:
        stream.seek(0)
    return status, streams[0].read(), streams[1].read()


def left_behind(results: Sequence[Path]) -> str:
    """Files that nobody would finish, that cannot be read, or that are not what their manifest says."""
    for path in results:
        if path.name.startswith(".") and path.name != ".prepare.lock":
            return f"a hidden file is left: {path.name}"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl" and path.with_name("manifest.json").is_file():
                entry = json.loads(path.with_name("manifest.json").read_text())["splits"][path.stem]
                ids = [row["id"] for row in stream_records(path)]
                if not len(ids) == len(set(ids)) == entry["written"]:
                    return f"{path.name}: {len(ids)} records of {len(set(ids))} ids, {entry['written']} in the manifest"
            elif path.suffix == ".jsonl":
                for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
                    json.loads(line)
        except (UserError, ValueError, KeyError, RecursionError) as error:
            return f"{path.name} cannot be read back: {str(error)[:200]}"
    return ""
