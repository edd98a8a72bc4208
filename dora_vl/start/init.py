"""`dora-vl init`: makes training and test files and a first run's YAML from a folder of pictures and questions."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from posixpath import normpath
from shlex import join, quote
from statistics import median

from tqdm import tqdm

from dora_vl.data.check import DOUBTS, SEVERAL_ANSWERS, FileCheck, MediaCheck, add_columns, columns_of, table
from dora_vl.data.column_names import holds_media
from dora_vl.data.columns import USUAL, Columns, ColumnsError, column_lines
from dora_vl.data.data_files import RUN_FILE, DataFiles, PictureFolder, find_files, overlooked, split_of
from dora_vl.data.detection import annotated_pictures
from dora_vl.data.example import Example
from dora_vl.data.objects import PLACE, in_fractions
from dora_vl.data.pictures import MediaFolder, path_inside, picture_facts, save_picture
from dora_vl.data.readers import read_row
from dora_vl.data.turns import IMAGE_PLACEHOLDER, KWARGS, SPEAKERS, TOOLS, VIDEO_PLACEHOLDER
from dora_vl.errors import BadSample, UserError, short_names, short_text
from dora_vl.files import clear_leftovers, content_key, file_sha256, whole_folder, write_json
from dora_vl.limited_process import JobFailed
from dora_vl.start.run_file import (
    MOST_NAMES,
    VIDEO_BASE,
    Data,
    choose_base,
    data_files,
    find_questions,
    picture_files,
    root_of_pictures,
    run_file_text,
)

DESCRIPTION = """\
Inspects a folder of pictures and questions, says what it found, sets a test set aside, and writes the YAML of a first
run: train.jsonl, test.jsonl and run.yaml in runs/NAME. Unusable rows are listed and left out. Your files are not
changed; pictures embedded in the questions file are written as files.

  dora-vl init my_pictures
  dora-vl init my_pictures --ask "what is it?"
  dora-vl init my_pictures --questions answers.parquet --model Qwen/Qwen2.5-VL-3B-Instruct --to runs/first

Questions are any file that training reads (docs/data.md): CSV with the columns image, question, answer, JSON, JSON
lines, Parquet, Arrow, tar; or a .txt of its name beside each picture. With --ask a folder per answer is enough, or a
table of pictures and labels. No picture is in both training and test; folders named train, val and test keep their
role.
"""
TRAIN, TEST, VALIDATION, MEDIA = "train.jsonl", "test.jsonl", "validation.jsonl", "media"
MOST_ASKED, ANSWERED = 24, 0.8
"""A base that answers this share of so many test questions has only to choose better among its answers."""
LARGE = 1e9  # parameters of a base that is not read on a CPU before a run asks for it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl init`."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    add, bases = parser.add_argument, "the demo's (runs/demo/base, for videos tuned) where it is, or SmolVLM"
    add("folder", type=Path, metavar="FOLDER", help="holds the pictures, and the questions")
    add("--questions", type=Path, metavar="FILE", help="default: the one file in FOLDER with questions")
    add_columns(parser)
    add("--model", metavar="BASE", help=f"folder or hub id; default: {bases}")
    add("--to", type=Path, metavar="DIR", help="folder of the run; default: runs/ and the folder's name")
    add("--test-share", type=float, metavar="X", help="held out; default 0.2, at most 1,000 rows")
    add("--seed", type=int, default=0, help="which pictures are held out; default 0")
    add("--overwrite", action="store_true", help="replace the three files of an earlier init")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Inspects the data, splits it and writes the files; yields the lines to print."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds your pictures")
    to, replaces = _target(arguments)
    columns = columns_of(arguments)
    records = _records(folder, arguments.questions, columns)
    if isinstance(records, PictureFolder):
        if others := [path.name for path in data_files(folder)]:
            yield f"no questions in {short_names(others)}: left out"
        if missed := overlooked(Path(records.name), records.fields):
            yield missed
    base = choose_base(arguments.model)
    with whole_folder(to) as staging:
        summary = inspect_data(folder, records, media_to=staging, columns=columns)
        yield from summary.lines()
        if summary.has_videos and arguments.model is None and VIDEO_BASE.is_dir():
            base = choose_base(str(VIDEO_BASE))
        share = arguments.test_share
        if share is None:  # a fifth; of large sets 1,000, which tell a score to 3 %
            share = min(0.2, 1_000 / max(1, len(summary.rows)))
        splits = split_data(summary, share=share, seed=arguments.seed)
        yield from summary.held_out(splits, f"by seed {arguments.seed}")
        on_gpu = _on_gpu()
        shards = on_gpu and find_spec("deepspeed") is not None
        start = _start_command(to / RUN_FILE, shards=shards)
        data = _data(summary, splits, to)
        words = [word for word in arguments.words if word != "--overwrite"]
        commands = [f"{_program('dora-vl')} {join(['init', *words])}", start]
        write_text = partial(run_file_text, base, output_dir=str(to), shards=shards, commands=commands)
        _write(staging, splits, write_text(data))
        if replaces:
            _keep_other_files(to, staging)
    size = f" ({base.parameters / 1e6:,.0f} million parameters)" if base.parameters else ""
    yield f"{to}: {', '.join(splits)} and {RUN_FILE} written, base {base.name}{size}"
    if Path(base.name).is_dir() and not summary.has_videos and (on_gpu or base.parameters < LARGE):
        yield from _ask_base(to / RUN_FILE, data, write_text)
        if base.is_llava and summary.pictures.keys:
            yield from _probe_base(to / RUN_FILE)
    yield f"\nnext:  {start}"


def _records(folder: Path, questions: Path | None, columns: Columns) -> DataFiles:
    """Returns the annotations or questions that are named, or that a folder holds."""
    if annotated := annotated_pictures(questions or folder, columns.ask):
        return annotated
    return find_files(questions) if questions else find_questions(folder, columns)


def _keep_other_files(to: Path, staging: Path) -> None:
    """Links into `staging` what runs have added to the folder `to` since an earlier init."""
    own = (TRAIN, TEST, VALIDATION, RUN_FILE, MEDIA, "probe.json")
    shutil.copytree(
        to,
        staging,
        symlinks=True,
        ignore=lambda at, _: own if Path(at) == to else (),
        copy_function=os.link,  # no copies: a run's checkpoints and stored outputs are large
        dirs_exist_ok=True,
    )


def _start_command(run_file: Path, *, shards: bool) -> str:
    """Returns the shell command that starts the run, by DeepSpeed's launcher where `shards`."""
    command = f"{_program('deepspeed')} --module dora_vl.cli train" if shards else f"{_program('dora-vl')} train"
    return f"{command} {quote(str(run_file))}"


def _ask_base(run_file: Path, data: Data, write_text: Callable[[Data], str]) -> Iterator[str]:
    """Asks the base some questions before a run on preferences; if it answers most, the run file needs no `sft`."""
    if data.loss is None:
        return
    from dora_vl.evaluation.open_model import ModelRequest, open_model
    from dora_vl.evaluation.predictor import Decoding, media_reader
    from dora_vl.evaluation.scores.exact import score
    from dora_vl.evaluation.test import check_test
    from dora_vl.run.base import image_folder
    from dora_vl.run.settings_parser import read_run_file

    config = read_run_file(run_file)
    examples = check_test(config)[:MOST_ASKED]
    decoding = Decoding(batch_size=MOST_ASKED, max_new_tokens=config.evaluation.max_new_tokens)
    try:
        model = open_model(ModelRequest(model=config.model.base, template=config.model.template)).adapted
        batches = model.predict(examples, media_reader(image_folder(config.data), frames=1), decoding)
        answers = {answer.id: answer.prediction for batch in batches for answer in batch}
    except UserError as error:
        yield f"the base was not asked: {error}"
        return
    right = sum(score(examples, answers).shares.values())
    yield f"the base answers {right:g} of {len(examples)} test questions before any training"
    if right >= ANSWERED * len(examples):
        run_file.write_text(write_text(replace(data, base_answers=True)), encoding="utf-8")


def _probe_base(run_file: Path) -> Iterator[str]:
    """Reports what a linear probe reads from the base's picture features, and keeps its answers for the run's test."""
    from dora_vl.evaluation.baselines import by_question, commonest_answers, probe_summary, right_text
    from dora_vl.evaluation.scores.exact import score
    from dora_vl.evaluation.test import check_test
    from dora_vl.run.folder import PROBE
    from dora_vl.run.settings_parser import read_run_file
    from dora_vl.training.decoder_pipeline import DecoderPipeline
    from dora_vl.training.extras.closed_form import readable
    from dora_vl.training.parts import adapt

    config = read_run_file(run_file)
    on_one_rank = {name: value for name, value in config.training.items() if name != "deepspeed"}
    try:
        pipeline = DecoderPipeline(replace(config, training=on_one_rank))
        arguments, backbone = pipeline.arguments(), pipeline.load()
        adapt(backbone.model, pipeline.dora_config(backbone))  # so that the run finds the outputs that are stored here
        answers = readable(pipeline.opened(arguments), backbone)
    except UserError as error:
        yield f"no linear probe was fitted: {error}"
        return
    examples = [example for example in check_test(config) if example.images]
    if not answers:
        yield "no linear probe was fitted: too few answers repeat"
        return
    digest = file_sha256(Path(str(config.evaluation.file)))
    write_json(run_file.with_name(PROBE), {"questions_sha256": digest, "answers": answers})
    yield "what a linear probe reads from the base's features of the test pictures, before any training:"
    commonest = score(examples, commonest_answers(examples, right_text)).shares
    probed = [example for example in examples if example.id in answers]
    for name, kind in by_question(examples, score(probed, answers).shares, commonest).items():
        yield f"  {name} {probe_summary(kind)} of {kind['n']}, its commonest answer {kind['learned']:g}"


def _target(arguments: argparse.Namespace) -> tuple[Path, bool]:
    """Returns the run's folder, and whether an earlier init's files in it are replaced."""
    name = re.sub(r"[^\w.\-]+", "_", arguments.folder.resolve().name).strip("._") or "my"
    to: Path = arguments.to or Path("runs") / name
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is a file; name a folder")
    if str(to).startswith("-"):
        raise UserError(f"--to {to}: commands would take this name for an option; name another folder")
    if Path.cwd().is_relative_to(to.resolve()):
        raise UserError(f"--to {to} is the folder you are in; name one of its own")
    clear_leftovers(to.parent, to.name)
    earlier = [name for name in (TRAIN, TEST, VALIDATION, RUN_FILE) if (to / name).exists()]
    if earlier and not arguments.overwrite:
        raise UserError(f"{to} holds an earlier {', '.join(earlier)}: --overwrite it, or name another folder with --to")
    if not earlier and to.is_dir() and any(to.iterdir()):
        raise UserError(f"{to} holds other files; --to DIR names a folder of its own")
    if earlier:
        from dora_vl.run.folder import lock_run_folder  # torch: not for --help

        with lock_run_folder(to):  # refused while a run writes there
            pass
    return to, bool(earlier)


def _data(summary: DataSummary, splits: Mapping[str, Sequence[UsableRow]], to: Path) -> Data:
    answers = [text for row in summary.rows for text in row.texts("assistant")]
    words, compares = [len(text.split()) for text in answers], any(row.conversation.rejected for row in summary.rows)
    is_judged = any(row.conversation.is_good is not None for row in summary.rows)
    return Data(
        train=str(to / TRAIN),
        test=str(to / TEST),
        validation=str(to / VALIDATION) if VALIDATION in splits else None,
        root=str(to if summary.file_holds_pictures else summary.root),
        rows=len(splits[TRAIN]),
        answer_words=max(words),
        answer_characters=max(map(len, answers)),
        usual_answer_words=float(median(words)),
        has_videos=summary.has_videos,
        follow_links=summary.links_out,
        loss="dpo" if compares else "kto" if is_judged else None,
    )


def _write(staging: Path, splits: Mapping[str, Sequence[UsableRow]], text: str) -> None:
    """Writes all files, and reads the settings back as a run would."""
    from dora_vl.run.settings_parser import read_run_file

    count = Counter[str]()
    for name, rows in splits.items():
        with (staging / name).open("w", encoding="utf-8") as file:
            for row in rows:
                key = row.conversation.id
                count[key] += 1
                record = row.record(key if count[key] == 1 else f"{key}#{count[key]}")
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    (staging / RUN_FILE).write_text(text, encoding="utf-8")
    read_run_file(staging / RUN_FILE)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _program(name: str) -> str:
    """Returns how a shell finds a program of this environment, which may not be in PATH."""
    own, in_path = Path(sys.executable).with_name(name), shutil.which(name)
    if own.exists() and not (in_path and own.samefile(in_path)):
        return quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))
    module = {"dora-vl": "dora_vl.cli", "deepspeed": "deepspeed.launcher.runner"}[name]
    return name if in_path else f"{quote(sys.executable)} -m {module}"


@dataclass(frozen=True, kw_only=True)
class UsableRow:
    """One usable sample; `split` is the one that its picture's folder or its own column names."""

    conversation: Example
    kind: str | None = None
    split: str = ""

    @property
    def media(self) -> tuple[str, ...]:
        """Names the row's pictures and videos."""
        row = self.conversation
        return (*row.images, *row.rejected_images, *(clip.path for clip in row.videos))

    def texts(self, role: str) -> list[str]:
        """Returns the turns of the user, or of the assistant, without placeholders."""
        texts = [turn.text for turn in self.conversation.turns if turn.role == role]
        return [text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip() for text in texts]

    def record(self, name: str) -> dict[str, object]:
        """Returns the row as LLaVA's JSON, under this id."""
        conversation = self.conversation
        record: dict[str, object] = {"id": name}
        if conversation.images:
            record["image"] = conversation.images[0] if len(conversation.images) == 1 else list(conversation.images)
        if conversation.videos:
            record["videos"] = [
                {key: value for key, value in vars(clip).items() if value is not None} for clip in conversation.videos
            ]
        if self.kind is not None:
            record["kind"] = self.kind
        turns: list[dict[str, object]] = []
        for turn in conversation.turns:
            more = turn.fields
            record |= {name: more.pop(name) for name in (TOOLS, KWARGS) if name in more}
            more |= {} if turn.is_trained else {"loss": False}
            turns.append({"from": SPEAKERS[turn.role], "value": turn.text, **more})
        if conversation.rejected:
            *turns, chosen = turns
            record |= {"chosen": chosen, "rejected": list(conversation.rejected)}
        if conversation.rejected_images:
            record["rejected_images"] = list(conversation.rejected_images)
        if conversation.is_good is not None:
            record["label"] = conversation.is_good
        if conversation.answers:
            turns.pop()
            record["answers"] = [answer.text for answer in conversation.answers]
        return {**record, "conversations": turns}


@dataclass(kw_only=True)
class Pictures:
    """The pictures and videos that usable rows name; `keys` maps names to content hashes, the same for copies."""

    keys: dict[str, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, name: str, path: Path) -> None:
        """Records format, size and content hash of one picture."""
        self.keys[name] = content_key(path)
        try:
            facts = picture_facts(path, decode=False)
        except JobFailed:  # a video, or a picture that cannot be read
            self.formats[path.suffix.lstrip(".").upper() or "other"] += 1
            return
        self.formats[facts["format"]] += 1
        self.sizes.append(tuple(facts["size"]))


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Holds everything that was found in the data.

    Attributes:
        check: the check of the questions file.
        root: of the paths in `rows`.
        file_names: the files of the names in the questions file, where their folders are left out.
        file_holds_pictures: True where the questions file holds the pictures itself; they are in `root` then.
        unnamed: how many pictures no row names.
        has_question: True where `--ask` gave the question.
        trouble: what `check-data` says of rows that are left out, line by line.
        doubts: what `check-data` doubts in rows that are kept, line by line.
    """

    check: FileCheck
    root: Path
    file_names: Mapping[str, str] | None
    file_holds_pictures: bool
    rows: Sequence[UsableRow]
    pictures: Pictures
    unnamed: int
    has_question: bool
    trouble: Sequence[str]
    doubts: Sequence[str]

    @property
    def has_videos(self) -> bool:
        """Tells whether any row shows a video."""
        return any(row.conversation.videos for row in self.rows)

    @property
    def media(self) -> str:
        """Names what the rows are about: pictures, videos, or both."""
        shows_pictures = any(row.conversation.images for row in self.rows)
        names = [name for name, shown in (("pictures", shows_pictures), ("videos", self.has_videos)) if shown]
        return " and ".join(names) or "pictures"

    @property
    def links_out(self) -> bool:
        """Tells whether a file that the rows name is a link out of their folder."""
        try:
            for name in chain.from_iterable(row.media for row in self.rows):
                path_inside(self.root, name)
        except BadSample:
            return True
        return False

    def lines(self) -> Iterator[str]:
        """Yields the lines that `dora-vl init` prints of the data."""
        formats = " and ".join(self.check.formats)
        yield f"{self.check.path}: {formats}, {self.check.rows:,} rows, {len(self.rows):,} usable"
        yield from column_lines(self.check.uses)
        pictures = self.pictures
        if pictures.keys:
            formats = ", ".join(f"{name} {count:,}" for name, count in pictures.formats.most_common())
            more = f"; {self.unnamed:,} more that no row names" if self.unnamed else ""
            where = "the file itself" if self.file_holds_pictures else self.root
            yield f"{self.media}: {len(pictures.keys):,} in {where}, {formats}{more}"
            if self.file_names:
                name, file = next(iter(self.file_names.items()))
                yield f"the rows name them in folders that are not there: for {name} {file} is read"
        else:
            yield "pictures: none, the rows are text only"
        if pictures.sizes:
            by_area = sorted(pictures.sizes, key=lambda size: size[0] * size[1])
            smallest, middle, largest = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
            yield f"sizes: {smallest} to {largest} pixels, median {middle}"
        questions, answers = (
            list(chain.from_iterable(row.texts(role) for row in self.rows)) for role in ("user", "assistant")
        )
        rounds = [len(row.texts("assistant")) for row in self.rows]
        yield f"questions: {_spread(rounds)} per row, {_lengths(questions)}"
        ordered = self.answers.most_common()
        commonest, times = ordered[0]
        yield (
            f"answers: {_lengths(answers)}, {len(ordered):,} different, most often "
            f"{short_text(commonest, 30)} ({times / len(answers):.0%})"
        )
        if len(ordered) == 1 or len(self.rows) < FEW_ROWS:
            why = "every answer is the same" if len(ordered) == 1 else f"{len(self.rows)} rows are very few"
            yield f"{why}: a run will learn to repeat what it has seen, whatever a picture shows"
        if several := sum(1 for row in self.rows if row.conversation.answers):
            yield SEVERAL_ANSWERS.format(several)
        if self.has_classes:
            names = (f"{name} {count:,}" for name, count in ordered)
            yield f"answers as they are named: {short_names(names, SHOWN_CLASSES, 40)}"
        if self.trouble:
            yield from ("left out, as check-data reports them:", *self.trouble)
        if self.doubts:
            yield from ("trained on as they are, though probably mistakes:", *self.doubts)

    @property
    def answers(self) -> Counter[str]:
        """Counts every answer."""
        return Counter(chain.from_iterable(row.texts("assistant") for row in self.rows))

    @property
    def has_classes(self) -> bool:
        """Tells whether all rows have the one question of `--ask`, and its answers repeat."""
        return self.has_question and 2 * len(self.answers) <= len(self.rows)

    def held_out(self, splits: Mapping[str, Sequence[UsableRow]], chosen: str) -> Iterator[str]:
        """Yields the lines on how the rows are split."""
        media = {name: {self.pictures.keys[key] for row in rows for key in row.media} for name, rows in splits.items()}
        counts = {
            name: f"{len(rows):,} rows about {len({key for row in rows for key in row.media}):,} {self.media}"
            for name, rows in splits.items()
        }
        train, test = ({row.split for row in splits[name]} for name in (TRAIN, TEST))
        chosen = "by their own split" if train.isdisjoint(test) else chosen
        for_loss = f"; to measure the loss on: {counts[VALIDATION]}" if VALIDATION in splits else ""
        yield f"held out {chosen}: {counts[TEST]}; to train on: {counts[TRAIN]}{for_loss}"
        all_bad, kept = (
            sum(row.conversation.is_good is False for row in rows) for rows in (self.rows, chain(*splits.values()))
        )
        if all_bad > kept:
            yield f"{all_bad - kept:,} held-out rows with bad answers are left out: a test needs right answers"
        if shared := len(media[TRAIN] & media[TEST]):
            yield f"{shared:,} {self.media} are in both the training and the test split: the score will be too high"
        tested = {answer for row in splits[TEST] for answer in row.texts("assistant")}
        if self.has_classes and (untested := [name for name in self.answers if name not in tested]):
            yield f"too few to be in the test: {short_names(untested, SHOWN_CLASSES, 40)}"


SHOWN_CLASSES, FEW_ROWS = 20, 10


def inspect_data(folder: Path, records: DataFiles, *, media_to: Path, columns: Columns = USUAL) -> DataSummary:
    """Reads the questions and checks every picture that they name; those that their file holds go into `media_to`."""
    questions, has_splits = Path(records.name), isinstance(records, PictureFolder)
    columns = _take_media(columns, next(iter(records.rows()), {}))
    first = map(FileCheck(questions, columns=columns).read, islice(records.rows(), MOST_NAMES))
    examples = [row for row in first if isinstance(row, Example)]
    holds_pictures = any(example.image_bytes for example in examples)
    names = [name for row in examples for name in UsableRow(conversation=row).media if name not in row.image_bytes]
    root, is_flat = (media_to, False) if holds_pictures else root_of_pictures(folder, questions, names)
    file_names = FileNames() if is_flat else None
    media = MediaCheck(MediaFolder(root, follow_links=True), decode=True)
    check = FileCheck(questions, columns=columns, media=media)
    rows: list[UsableRow] = []
    named = set[str]()
    for record in tqdm(records.rows(), "reading", unit=" rows", disable=None, leave=False):
        row = _usable(check, record, media_to if holds_pictures else None, columns, file_names, named)
        if row is not None:
            rows.append(replace(row, split=str(record.get("split", "")) if has_splits else split_of(record) or ""))
    if file_names is not None:
        file_names.refuse_same(questions)
    if unmet := columns.missing_column(check.uses):
        raise UserError(f"{questions}: {unmet}")
    findings = {name: finding for name, finding in check.findings.items() if name != "duplicate id"}
    trouble, doubts = (
        table([(questions, finding) for name, finding in findings.items() if (name in DOUBTS) is doubtful])
        for doubtful in (False, True)
    )
    if not rows:
        raise _none_usable(questions, check)
    pictures = Pictures()
    names = list(dict.fromkeys(chain.from_iterable(row.media for row in rows)))
    for name in tqdm(names, "pictures", disable=None, leave=False):
        pictures.add(name, path_inside(MediaFolder(root, follow_links=True), name))
    files = (
        set[str]() if holds_pictures else {path.relative_to(root).as_posix().casefold() for path in picture_files(root)}
    )
    return DataSummary(
        check=check,
        root=root,
        file_holds_pictures=holds_pictures,
        rows=rows,
        file_names=file_names,
        pictures=pictures,
        unnamed=len(files.difference(normpath(name).casefold() for name in named)),
        has_question=bool(columns.ask),
        trouble=[*trouble, *filter(None, [check.remedy])] if len(trouble) > 1 else (),  # the first line is the heading
        doubts=doubts if len(doubts) > 1 else (),
    )


def _take_media(columns: Columns, record: Mapping[str, object]) -> Columns:
    """Returns the columns, with a role for one of an unknown name if it holds the first row's only picture or video."""
    try:
        columns.resolve(record)
    except ColumnsError as error:
        remedy = error.remedy
        is_medium = [*remedy.roles.values()] in (["image"], ["video"]) and holds_media(record.get(*remedy.roles))
        if is_medium and not (remedy.ignored or remedy.ask):
            return replace(columns, roles={**columns.roles, **remedy.roles})
    except (UserError, RecursionError):
        pass  # reading the row says what is wrong with it
    return columns


def _none_usable(questions: Path, check: FileCheck) -> UserError:
    """Makes the error for a file without a usable row, which names the most frequent problem."""
    worst = max(check.findings.values(), key=lambda finding: finding.count)
    detail, ids = next(iter(worst.examples.items()))
    return UserError(
        f"{questions}: not one of its {check.rows:,} rows can be used; {worst.count:,} times {worst.problem}, for "
        f"example {ids[0]}: {short_text(detail, 120)}{f'; {check.remedy}' if check.remedy else ''}"
    )


def _usable(
    check: FileCheck,
    record: Mapping[str, object],
    media_to: Path | None,
    columns: Columns,
    files: FileNames | None,
    named: set[str],
) -> UsableRow | None:
    """Returns the row, and adds its media to `named`; None if it cannot be used, which `check` has then noted."""
    example = check.read(record)
    if files is not None and isinstance(example, Example):
        example = _with_media(example, files)
    named.update(UsableRow(conversation=example).media if isinstance(example, Example) else ())
    if not check.check(example) or isinstance(example, BadSample):
        return None
    try:
        conversation = read_row({**record, "id": example.id}, columns=columns)
        if files is not None:
            conversation = _with_media(conversation, files)
        elif media_to is not None:
            saved = {
                name: save_picture(data, media_to, conversation.id) for name, data in conversation.image_bytes.items()
            }
            names = {name: saved.get(name, name) for name in UsableRow(conversation=conversation).media}
            conversation = _with_media(conversation, names)
        conversation = _boxes_in_fractions(conversation, check, example.images, record)
    except BadSample as error:
        check.check(error)
        return None
    kind = record.get("kind")
    return UsableRow(conversation=conversation, kind=kind if isinstance(kind, str) and kind else None)


def _boxes_in_fractions(
    conversation: Example, check: FileCheck, names: Sequence[str], record: Mapping[str, object]
) -> Example:
    """Returns an example whose boxes are fractions; raises BadSample: they are pixels of a picture of another size."""
    if check.media is None or not any("_px" in turn.text and PLACE.search(turn.text) for turn in conversation.turns):
        return conversation
    known = {name: check.media.size(name, conversation.image_bytes.get(name)) for name in names}
    if unread := [name for name, size in known.items() if size is None]:
        raise BadSample(conversation.id, f"its boxes are in pixels of {unread[0]}, which cannot be read")
    sizes = [size for name in names if (size := known[name]) is not None]
    said = (record.get("width"), record.get("height"))
    if len(sizes) == 1 and all(isinstance(side, int) for side in said) and said != sizes[0]:
        (width, height), (w, h) = said, sizes[0]
        raise BadSample(conversation.id, f"its boxes are of {width} x {height} pixels, and its picture has {w} x {h}")
    return in_fractions(conversation, sizes)


class FileNames(dict[str, str]):
    """Maps the names of pictures and videos to those of their files, which is what follows the last folder."""

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, PurePosixPath(name).name)

    def refuse_same(self, questions: Path) -> None:
        """Refuses two names of one file: they may have been two pictures."""
        names = {file: name for name, file in self.items()}
        for name, file in self.items():
            if names[file] != name:
                raise UserError(
                    f"{questions} names {name} and {names[file]}, whose folders are not there; put the files into "
                    "folders as it names them"
                )


def _with_media(example: Example, files: Mapping[str, str]) -> Example:
    images, others = (tuple(files[name] for name in names) for names in (example.images, example.rejected_images))
    videos = tuple(replace(clip, path=files[clip.path]) for clip in example.videos)
    return replace(example, images=images, rejected_images=others, videos=videos)


def _lengths(texts: Sequence[str]) -> str:
    words = _spread(len(text.split()) for text in texts)
    return f"{words} word{'' if words == '1' else 's'}"


def _spread(numbers: Iterable[int]) -> str:
    """Writes a range with its median, such as `3 to 12 (median 5)`."""
    ordered = sorted(numbers)
    if ordered[0] == ordered[-1]:
        return f"{ordered[0]:,}"
    return f"{ordered[0]:,} to {ordered[-1]:,} (median {median(ordered):g})"


def split_data(summary: DataSummary, *, share: float, seed: int) -> dict[str, list[UsableRow]]:
    """Splits the rows into training, test and, if folders or a column name one, validation, in the file's order.

    Rows of one picture, by its content, stay together, so that no picture is in both, not even as a copy; so do rows of
    one question without a picture. Each large enough class is in the test by its share. Bad answers are in no test,
    since they are not right.
    """
    from dora_vl.data.table import held_out_indices  # torch: not for --help

    named = {name: [row for row in summary.rows if row.split == name] for name in ("train", "test", "validation")}
    test = named["test"] or named.pop("validation")
    if named["train"] and test:
        train = [row for row in summary.rows if row.split in ("train", "")]
        validation = named.get("validation")
        return {TRAIN: train, TEST: _good(test)} | ({VALIDATION: validation} if validation else {})
    media = [[summary.pictures.keys[name] for name in row.media] for row in summary.rows]
    questions = (" ".join("\n".join(row.texts("user")).casefold().split()) for row in summary.rows)
    ids = [question or f"{number}" for number, question in enumerate(questions)]
    classes = None
    if summary.has_classes:
        counts = summary.answers
        answers = [row.texts("assistant")[-1] for row in summary.rows]
        classes = [answer if counts[answer] * share >= 1 else "" for answer in answers]
    test_indices = set(held_out_indices(ids, media, share=share, seed=seed, classes=classes).tolist())
    return {
        TRAIN: [row for index, row in enumerate(summary.rows) if index not in test_indices],
        TEST: _good(row for index, row in enumerate(summary.rows) if index in test_indices),
    }


def _good(rows: Iterable[UsableRow]) -> list[UsableRow]:
    good = [row for row in rows if row.conversation.is_good is not False]
    if not good:
        raise UserError("every held-out row has a bad answer; give another --test-share, or more good answers")
    return good
