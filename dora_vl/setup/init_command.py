"""`dora-vl init`: a folder of pictures and questions becomes training and test files and the YAML of a first run."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from os import getpid
from pathlib import Path
from shlex import quote
from statistics import median
from typing import TYPE_CHECKING

from dora_vl.errors import UserError
from dora_vl.sources.check_command import add_columns, columns_of

if TYPE_CHECKING:
    from dora_vl.setup.look import Look, Row
    from dora_vl.setup.run_file import Base, Data

DESCRIPTION = """\
Looks at a folder of pictures and questions, says what it saw, holds a test out, and writes the YAML of a first run:
train.jsonl, test.jsonl and run.yaml in runs/NAME. Rows that cannot be used are told and left out. The pictures and the
questions are not touched; pictures that the questions file holds itself are written as files.

  dora-vl init my_pictures
  dora-vl init my_pictures --questions answers.parquet --model Qwen/Qwen2.5-VL-3B-Instruct --to runs/first

Questions are any file that training reads (docs/data.md): CSV with the columns image, question, answer, JSON, JSON
lines, Parquet, Arrow, tar. No picture is in both halves.
"""
TRAIN, TEST, RUN = "train.jsonl", "test.jsonl", "run.yaml"
MEDIA = "media"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl init`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds the pictures, and the questions")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="default: the one file in FOLDER that holds some"
    )
    add_columns(parser)
    parser.add_argument(
        "--model",
        metavar="BASE",
        help="folder or hub id; default: what the demo trained (runs/demo/tuned) where it is, else a small SmolVLM",
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder of the run; default: runs/ and the folder's name"
    )
    parser.add_argument("--test-share", type=float, metavar="X", help="held out; default 0.2, at most 1,000 rows")
    parser.add_argument("--seed", type=int, default=0, help="which pictures are held out; default 0")
    parser.add_argument("--overwrite", action="store_true", help="replace the three files of an earlier init")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Looks, splits and writes; yields the lines to print."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds your pictures")
    if arguments.questions is not None and not arguments.questions.exists():
        raise UserError(f"--questions {arguments.questions}: no such file")
    to: Path = arguments.to or Path("runs") / _name_of(folder)
    _refuse_earlier(to, overwrite=arguments.overwrite)

    from dora_vl.setup.look import look_at  # seconds, so not for --help
    from dora_vl.setup.questions_file import find_questions
    from dora_vl.setup.run_file import HUB_BASE, base_of, written
    from dora_vl.setup.split import split, usual_share

    base = base_of(arguments.model)
    columns = columns_of(arguments)
    questions = arguments.questions or find_questions(folder, columns)
    staging = to.with_name(f".{to.name}.writing-{getpid()}")
    try:
        look = look_at(folder, questions, media_to=staging, columns=columns)
        yield from look.lines()
        if base.is_llava and any(row.conversation.videos for row in look.rows):
            raise UserError(
                f"{folder} holds videos, and {base.name} is a LLaVA-1.5, which is not trained on them; --model names "
                f"another base, such as {HUB_BASE}"
            )
        share = usual_share(len(look.rows)) if arguments.test_share is None else arguments.test_share
        train, test = split(look, share=share, seed=arguments.seed)
        yield (
            f"held out by seed {arguments.seed}: {len(test):,} rows about {_media(test):,} {look.media}; to train on: "
            f"{len(train):,} rows about {_media(train):,}"
        )
        start = f"{_command()} {quote(str(to / RUN))}"
        text = written(base, _data(look, train, to), output_dir=str(to), on_gpu=_on_gpu(), command=start)
        _write(staging, to, train, test, text)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    yield f"{to}: {TRAIN}, {TEST} and {RUN} written, base {base.name}{_size(base)}"
    yield ""
    yield f"next:  {start}"


def _write(staging: Path, to: Path, train: Sequence[Row], test: Sequence[Row], text: str) -> None:
    """Writes all files under other names, reads the settings as a run would, and moves them into place."""
    from dora_vl.run.command_line import read_run_file
    from dora_vl.setup.split import write_rows

    staging.mkdir(parents=True, exist_ok=True)
    seen = Counter[str]()
    write_rows(staging / TRAIN, train, seen)
    write_rows(staging / TEST, test, seen)
    (staging / RUN).write_text(text, encoding="utf-8")
    read_run_file(staging / RUN)
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted((staging / MEDIA).iterdir()) if (staging / MEDIA).is_dir() else ():
        (to / MEDIA).mkdir(exist_ok=True)
        path.replace(to / MEDIA / path.name)
    for name in (TRAIN, TEST, RUN):
        (staging / name).replace(to / name)


def _refuse_earlier(to: Path, *, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is a file; name a folder")
    there = [name for name in (TRAIN, TEST, RUN) if (to / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{to} holds an earlier {', '.join(there)}; --overwrite replaces what init wrote, --to DIR names another "
            "folder"
        )


def _data(look: Look, train: Sequence[Row], to: Path) -> Data:
    from dora_vl.setup.run_file import Data

    answers = [text for row in look.rows for text in row.texts("assistant")]
    words = [len(text.split()) for text in answers]
    return Data(
        train=str(to / TRAIN),
        test=str(to / TEST),
        root=str(to if look.holds else look.root),
        rows=len(train),
        answer_words=max(words),
        answer_characters=max(map(len, answers)),
        usual_answer_words=float(median(words)),
        has_videos=any(row.conversation.videos for row in look.rows),
        follow_links=look.links_out,
    )


def _name_of(folder: Path) -> str:
    return re.sub(r"[^\w.\-]+", "_", folder.resolve().name).strip("._") or "my"


def _media(rows: Sequence[Row]) -> int:
    return len({name for row in rows for name in row.media})


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _command() -> str:
    """What starts a run, as a shell here finds it: on GPUs through the launcher."""
    if _on_gpu():
        return f"{_program('deepspeed')} --module dora_vl.cli train"
    return f"{_program('dora-vl')} train"


def _program(name: str) -> str:
    """A program of this environment, which may be in no PATH."""
    own, in_path = Path(sys.executable).with_name(name), shutil.which(name)
    if own.exists() and not (in_path and own.samefile(in_path)):
        return quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))
    module = {"dora-vl": "dora_vl.cli", "deepspeed": "deepspeed.launcher.runner"}[name]
    return name if in_path else f"{quote(sys.executable)} -m {module}"


def _size(base: Base) -> str:
    return f" ({base.parameters / 1e6:,.0f} million parameters)" if base.parameters else ""
