"""`dora-vl evaluate`: an adapter, a model without one, or a file of predictions, scored on benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import getpid
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from dora_vl.data.example import iterate_examples
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.text_file import stream_values
from dora_vl.errors import UserError, positive, shown
from dora_vl.evaluation.ask_command import add_model_options
from dora_vl.evaluation.baselines import Exchange, digest, exchanged
from dora_vl.evaluation.benchmarks import find_benchmark
from dora_vl.evaluation.finish import finish
from dora_vl.evaluation.predictions import METRICS, Predictions, file_sha256, join, refuse_anothers
from dora_vl.evaluation.questions import (
    EvaluationSet,
    Question,
    as_question,
    is_question,
    read_question_file,
    read_questions,
    read_set,
    with_middle_frame,
)
from dora_vl.evaluation.scores.benchmark import read_rows

if TYPE_CHECKING:
    from dora_vl.data.example import Example
    from dora_vl.evaluation.ask import Asker
    from dora_vl.evaluation.open_model import ModelSource, Wanted

EXCHANGED = "exchanged"
TASKS: Mapping[str, str] = {"vqav2_karpathy": "vqav2"}
"""Benchmark -> the task that a VL-BART is asked it as, where the names differ."""
DESCRIPTION = """\
Scores a model on published benchmarks, or one of your own, as official scripts do, with 95 % intervals.

  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope,gqa --images data --to runs/my/evaluation
  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope --against runs/other/adapter
  dora-vl evaluate --model OWNER/NAME --benchmarks pope --images data --to runs/base
  dora-vl evaluate --benchmarks yc2c --predictions my_captions.jsonl
  dora-vl evaluate --adapter runs/demo/adapter --benchmarks exact_match=runs/demo/data/test.json \\
      --images runs/demo/assets/easy_vqa --answer-after ", so "
  torchrun --nproc_per_node 8 -m dora_vl.cli evaluate ...      one process for each GPU

A benchmark is NAME (its records are looked for in records/NAME/), NAME:SPLIT, NAME=FILE, or one of your own, FILE.yaml.
The file is records that `dora-vl prepare` writes, or questions in LLaVA's JSON. Predictions are JSON lines with an id
and an answer each, LLaVA's answer files, or what the benchmark's official script takes. A run that was stopped goes on
where it stopped. metrics.json holds every number, also those that the table leaves out; those of other benchmarks stay
in it while they are true.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--benchmarks", required=True, help="NAME, NAME:SPLIT, NAME=FILE or FILE.yaml, commas between")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run, or of PEFT")
    parser.add_argument("--model", help="folder or hub id of a model that is asked without an adapter")
    parser.add_argument("--predictions", type=Path, help="scores this file instead of asking a model (one benchmark)")
    parser.add_argument("--against", type=Path, help="another adapter, model or predictions file: paired difference")
    parser.add_argument("--records", type=Path, default=Path("records"), help="folder of records (default: records)")
    parser.add_argument("--images", type=Path, default=Path(), help="root of the pictures (default: here)")
    parser.add_argument("--follow-links", action="store_true", help="read pictures that are links out of that folder")
    parser.add_argument("--to", type=Path, help="results (default: `evaluation` beside the adapter or predictions)")
    parser.add_argument("--mode", action="append", default=[], help="NAME=VERSION, such as vqav2=before_2021")
    parser.add_argument("--limit", type=positive, help="only the first so many examples of each benchmark")
    parser.add_argument("--batch-size", type=positive, default=32, help="questions at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest answer (default: the benchmark's own)")
    parser.add_argument("--frames", type=positive, help="frames of a video that are shown (default: benchmark's own)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead (default: 0)")
    parser.add_argument("--answer-after", help="exact_match: scores what follows the last of this text in an answer")
    parser.add_argument(
        "--answer-by",
        choices=("generation", "likelihood"),
        default="generation",
        help="likelihood: of choices the likeliest letter (default: generation)",
    )
    parser.add_argument(
        "--no-exchange",
        action="store_true",
        help="leaves out asking at most 200 questions again about others' pictures, which shows whether they count",
    )
    add_model_options(parser)
    parser.add_argument("--all-metrics", action="store_true", help="the table shows parts of sets too")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Answers, scores, writes; yields the table's lines in the first process of a launch.

    Raises:
        UserError: an option, a file or a folder is wrong; nothing is asked before all benchmarks are read.
    """
    if options.predictions is None:
        yield from _ask_and_score(options)
        return
    sets = _sets(options)
    if options.against is not None and options.against.is_dir():
        raise UserError("--predictions is compared with another predictions file; --against names a folder")
    to = options.to or options.predictions.parent / "evaluation"
    refuse_anothers(to / METRICS)
    predictions = {sets[0].name: _from_file(options.predictions, sets[0], options)}
    yield from finish(sets, predictions, _against_file(sets, options), options, to)


def _ask_and_score(options: argparse.Namespace) -> Iterator[str]:
    """All processes of a launch ask; the first scores."""
    from dora_vl.adapters.folder import WEIGHTS_FILE
    from dora_vl.evaluation.ask import check_pictures, joined_launch
    from dora_vl.run.launch import first_rank_speaks, is_first_rank

    with first_rank_speaks(), joined_launch():
        sets = _sets(options)
        if options.to is None and options.adapter is None:
            raise UserError("say with --to where the results go; beside --model there is no run they belong to")
        to = options.to or options.adapter.parent / "evaluation"
        refuse_anothers(to / METRICS)
        for one in sets:
            images = (path for example in one.examples for path in example.images)
            check_pictures(images, options.images, of=one.name, setting="--images")
        wanted = _wanted(options, adapter=options.adapter, model=options.model)
        predictions, exchanges = _asked(sets, wanted, options, to, exchange=not options.no_exchange)
        against = _against_file(sets, options)
        if against is None and options.against is not None:
            folder: Path = options.against
            is_adapter = (folder / WEIGHTS_FILE).is_file() and not (folder / "config.json").is_file()
            adapter, model = (folder, None) if is_adapter else (None, str(folder))
            other = _wanted(options, adapter=adapter, model=model)
            against, _ = _asked(sets, other, options, to / "against", exchange=False)
        if is_first_rank():
            yield from finish(sets, predictions, against, options, to, exchanges)


def _wanted(options: argparse.Namespace, *, adapter: Path | None, model: str | None) -> Wanted:
    from dora_vl.evaluation.open_model import Wanted

    about_adapter = {} if adapter is None else {"base": options.base, "any_base": options.any_base}
    return Wanted(adapter=adapter, model=model, template=options.template, **about_adapter)


def _sets(options: argparse.Namespace) -> list[EvaluationSet]:
    requests = [request for request in options.benchmarks.split(",") if request]
    modes: dict[str, str] = {}
    for text in options.mode:
        name, _, modes[name] = text.partition("=")
        if not modes[name]:
            raise UserError(f"--mode {text}: write it as NAME=VERSION, such as vqav2=before_2021")
    names = [find_benchmark(request.partition("=")[0]).name for request in requests]
    if not requests or len(set(names)) < len(names):
        raise UserError(f"--benchmarks {shown(options.benchmarks)} must name at least one benchmark, each once")
    if strange := sorted(modes.keys() - set(names)):
        raise UserError(f"--mode names {strange[0]}, which --benchmarks does not")
    if sum(one is not None for one in (options.adapter, options.model, options.predictions)) != 1:
        raise UserError(
            "give --adapter DIR or --model FOLDER to ask a model, or --predictions FILE to score answers, one of these"
        )
    if options.predictions is not None and len(requests) > 1:
        raise UserError(f"--predictions holds one benchmark's answers; --benchmarks names {len(requests)}")
    if options.against is not None and not options.against.exists():
        raise UserError(f"--against {options.against}: no such adapter, model or predictions file")
    sets = [
        read_set(request, options.records, mode=modes.get(name), limit=options.limit)
        for request, name in zip(requests, names, strict=True)
    ]
    if options.answer_by == "likelihood" and (without := [one.name for one in sets if not one.benchmark.chooses]):
        raise UserError(
            f"--answer-by likelihood compares the letters of choices, and {without[0]} has none; leave it out"
        )
    return sets


def _from_file(path: Path, one: EvaluationSet, options: argparse.Namespace) -> Predictions:
    """A file's answers; one to a record that cannot be read is none, as nothing says what would be right."""
    whole = one if options.limit is None else read_set(one.request, options.records, mode=None, limit=None)
    joined = join(one.benchmark, whole.examples, read_rows(path), path=path, questions=one.file)
    known = {*joined.strangers, *({example.id for example in one.examples} - one.unreadable.keys())}
    rows = [row for row in joined.rows if row.id in known]
    return replace(joined, rows=rows, failed=one.unreadable, sha256={"predictions": file_sha256(path)})


def _against_file(sets: Sequence[EvaluationSet], options: argparse.Namespace) -> dict[str, Predictions] | None:
    """The other model's answers where --against is a file of them."""
    if options.against is None or options.against.is_dir():
        return None
    if len(sets) > 1:
        raise UserError(f"--against {options.against} holds one benchmark's answers; --benchmarks names {len(sets)}")
    return {sets[0].name: _from_file(options.against, sets[0], options)}


def _asked(
    sets: Sequence[EvaluationSet], wanted: Wanted, options: argparse.Namespace, to: Path, *, exchange: bool
) -> tuple[dict[str, Predictions], dict[str, Exchange]]:
    """Every benchmark put to one model, and where `exchange` says so a sample of it about others' pictures."""
    from dora_vl.backbones.families import sees_pictures
    from dora_vl.evaluation.open_model import find_source, hashes, open_model
    from dora_vl.run.base import VLBART

    source = find_source(wanted)
    shows = next((one.name for one in sets if any(example.images or example.videos for example in one.examples)), None)
    if source.kind != VLBART and not sees_pictures(source.place, source.revision) and shows is not None:
        raise UserError(
            f"{shows} shows pictures or videos, and {wanted.adapter or source.place} is a language model, which takes "
            "none; a run of tasks/commonsense.py is tested by itself, with --test_only true"
        )
    if options.answer_by == "likelihood" and source.kind == VLBART:
        raise UserError(f"{wanted.adapter}: a VL-BART answers each task as it was trained; leave --answer-by out")
    model, sha256 = open_model(source).adapted, hashes(source)
    pictures = MediaFolder(options.images, options.follow_links, as_published=bool(source.recipe.get("as_published")))
    made_with = {f"{name}_sha256": value for name, value in sha256.items()}
    ask_set = partial(_ask_set, model, options=options, pictures=pictures)
    predictions: dict[str, Predictions] = {}
    exchanges: dict[str, Exchange] = {}
    for one in sets:
        examples = [example for example in one.examples if example.id not in one.unreadable]
        mine = ask_set(one, examples, to / one.name, made_with)
        predictions[one.name] = replace(mine, failed={**one.unreadable, **mine.failed}, sha256=sha256)
        if exchange and one.scorer is not None:
            sample = exchanged(one.scored, mine.answers, together=one.benchmark.together)
            folder, extra = to / one.name / EXCHANGED, {**made_with, "exchanged": digest(sample)}
            others = ask_set(one, sample, folder, extra) if sample else Predictions()
            exchanges[one.name] = Exchange(examples=sample, answers=others.answers)
    return predictions, exchanges


def _ask_set(
    model: Asker,
    one: EvaluationSet,
    examples: Sequence[Example],
    folder: Path,
    depends_on: Mapping[str, object],
    *,
    options: argparse.Namespace,
    pictures: MediaFolder,
) -> Predictions:
    """Examples of a benchmark put to a model: to a VL-BART as the task that it was trained on, else by the prompt."""
    from dora_vl.evaluation.ask import Assistant, Decoding, ask_together, media_reader

    benchmark = one.benchmark
    frames, by_likelihood = options.frames or benchmark.frames, options.answer_by == "likelihood"
    decoding = Decoding(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or benchmark.max_new_tokens,
        workers=options.workers,
        by="letters" if by_likelihood else "generation",
        task=TASKS.get(one.name, one.name),
        letters=not benchmark.labels_choices,
    )
    settings: dict[str, object] = {
        **depends_on,
        "questions_sha256": file_sha256(one.file),
        "images": str(options.images.resolve()),
        "max_new_tokens": decoding.max_new_tokens,
    }
    one_length, prompt = False, None
    if isinstance(model, Assistant):
        examples, prompt = [*map(with_middle_frame, examples)], benchmark.prompt
        one_length = model.prompts.videos_of_one_length
        settings["prompt"] = prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt)
        if any(example.videos for example in examples):
            settings["frames"] = frames
        if by_likelihood:
            settings["answers"] = "likelihood"
    questions = [as_question(example, prompt) for example in examples]
    media = media_reader(pictures, frames=frames, one_length=one_length)
    try:
        predictions = ask_together(model, questions, media, decoding, folder=folder, settings=settings)
    finally:
        media.close()
    asked_with = {
        "images": str(options.images),
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": options.batch_size,
        **({"frames": frames} if one.has_videos else {}),
        **({"answer_by": options.answer_by} if by_likelihood else {}),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return replace(predictions, options=asked_with)


# `--check`: the options, the questions, and the certificate of what a command has written.


CHECK_HELP = """\
With --check the unmerged model and what was written answer the same questions, those of the run's test or of a file,
and the differences are printed and written beside the weights (certificate.json, certificate.md). Exit status 1 where
more answers differ than --most-different allows."""

QUESTIONS, BATCH, LONGEST_ANSWER, FRAMES = 20, 8, 32, 8
FAILED_STATUS = 1


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that can check what it wrote."""
    group = parser.add_argument_group("checking the result")
    group.add_argument(
        "--no-check", dest="check", action="store_const", const=0, help="merge: compares no logits either"
    )
    group.add_argument(
        "--check",
        type=positive,
        nargs="?",
        const=QUESTIONS,
        metavar="N",
        help=f"asks N questions (default {QUESTIONS})",
    )
    group.add_argument(
        "--questions", type=Path, metavar="FILE", help="in any format that training reads (default: the run's test)"
    )
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="root of their pictures (default: the run's, or here)"
    )
    group.add_argument("--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json")
    group.add_argument(
        "--check-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="that the models compute in (default: float32; the run's own where its base was quantised)",
    )
    group.add_argument("--check-tokens", type=positive, default=LONGEST_ANSWER, metavar="N", help="longest answer")
    group.add_argument(
        "--most-different",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the questions whose answers may differ, 0 to 1 (default: 0)",
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is going to be asked.

    Attributes:
        questions: of a VL-BART as its tasks have them.
        file: where they come from.
        images: root of their pictures.
        frames: of each video that are shown.
        task: a VL-BART's that they belong to; "" where nothing says it.
    """

    questions: list[Question]
    file: Path
    images: Path
    frames: int
    dtype: str | None
    max_new_tokens: int
    most_different: float
    task: str = ""


def planned_check(options: argparse.Namespace, adapter: Path) -> Check | None:
    """The questions, read and with a folder of pictures; None where no check is asked for.

    Args:
        adapter: the first adapter; a run's folder around it says what its test is.

    Raises:
        UserError: options that belong to --check without it, no questions, or no picture of theirs.
    """
    if not options.check:
        if options.questions is not None or options.images is not None or options.check_dtype is not None:
            raise UserError("--questions, --images and --check-dtype say how --check asks; add --check")
        return None
    if not 0 <= options.most_different <= 1:
        raise UserError(f"--most-different is {options.most_different}; it is a share, 0 to 1")
    from dora_vl.evaluation.ask import check_pictures
    from dora_vl.evaluation.open_model import read_recipe
    from dora_vl.run.base import VLBART

    run = _settings_of_run(adapter)
    data, evaluation = run.get("data") or {}, run.get("evaluation") or {}
    task, file = ("", options.questions) if options.questions else _test_file(evaluation, adapter)
    root = "." if options.questions else evaluation.get("image_folder") or data.get("image_folder") or "."
    images = options.images or Path(root)
    recipe = read_recipe(adapter) if adapter.is_dir() else {}
    is_vlbart = recipe.get("backbone") == VLBART
    questions = [*map(as_question, iterate_examples(file))] if is_vlbart else _read(file)
    if not questions:
        raise UserError(f"{file}: holds no questions")
    questions = spread(questions, options.check)
    check_pictures((path for question in questions for path in question.images), images, setting="--images")
    return Check(
        questions=questions,
        file=file,
        images=images,
        frames=int(data.get("video_frames") or FRAMES),
        dtype=options.check_dtype,
        max_new_tokens=options.check_tokens,
        most_different=options.most_different,
        task=task,
    )


def _settings_of_run(adapter: Path) -> Mapping[str, Any]:
    """The settings of the run that an adapter folder, or a checkpoint's, lies in; empty where there is none."""
    from dora_vl.run.folder import SETTINGS

    for folder in adapter.resolve().parents[:2]:
        if (folder / SETTINGS).is_file():
            content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def _test_file(evaluation: Mapping[str, Any], adapter: Path) -> tuple[str, Path]:
    """The run's test, the first where there are several, and the task that it is of."""
    files = {"": evaluation["file"]} if evaluation.get("file") else evaluation.get("files") or {}
    task, file = next(iter(files.items()), ("", None))
    if not isinstance(file, str):
        raise UserError(f"{adapter} lies in no run with a test of its own; say with --questions FILE what to ask")
    if not Path(file).is_file():
        raise UserError(f"the run's test {file} is not there any more; say with --questions FILE what to ask")
    return task, Path(file)


def _read(file: Path) -> list[Question]:
    """Questions of any format that training reads, or as LLaVA's evaluation takes them."""
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        _, first = next(stream_values(file, "questions"), (0, None))
        if is_question(first):
            return [Question(id=one.id, images=one.images, turns=one.turns) for one in read_question_file(file)]
    questions, unreadable = read_questions(file)
    if not questions:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"{file}: not one question can be read; {shown(name)}: {reason}")
    return questions


def spread(questions: list[Question], count: int) -> list[Question]:
    """So many of them, evenly over the file: neighbours are often about one picture."""
    count = min(count, len(questions))
    return [questions[place * len(questions) // count] for place in range(count)]


def checked(
    check: Check,
    reference: ModelSource,
    others: Mapping[str, Callable[[], ModelSource]],
    folder: Path,
    about: Mapping[str, object],
) -> Iterator[str]:
    """Asks, writes the certificate into the folder, and yields the lines to print.

    Args:
        reference: the unmerged model.
        others: what opens each of the others, by name.
        about: what the certificate says was compared.

    Raises:
        SystemExit: with status 1, more answers differ than may.
    """
    from dora_vl.evaluation.ask import Decoding, media_reader
    from dora_vl.evaluation.certificate import TEXT_FILE, certify, table, verdict, write_certificate
    from dora_vl.evaluation.open_model import open_model

    def opening(find: Callable[[], ModelSource]) -> Callable[[], Asker]:
        return lambda: open_model(find()).adapted

    scratch = folder.with_name(f".{folder.name}.checking-{getpid()}")
    scratch.mkdir(parents=True)
    media = media_reader(check.images, frames=check.frames, one_length=True)
    try:
        certificate = certify(
            ("unmerged", opening(lambda: reference)),
            {name: opening(find) for name, find in others.items()},
            check.questions,
            media,
            Decoding(batch_size=BATCH, max_new_tokens=check.max_new_tokens, task=check.task),
            most_different=check.most_different,
            scratch=scratch,
        )
    finally:
        media.close()
        shutil.rmtree(scratch, ignore_errors=True)
    asked = {"questions": str(check.file), "images": str(check.images), "longest answer": check.max_new_tokens}
    write_certificate(certificate, folder, {**about, **asked, "computed in": reference.dtype})
    yield from table(certificate)
    yield f"{folder / TEXT_FILE}: {verdict(certificate)}"
    if certificate.failed:
        yield f"{len(certificate.failed)} questions could not be asked; {folder / TEXT_FILE} names them"
    if not certificate.passed:
        raise SystemExit(FAILED_STATUS)


def unmerged_source(check: Check, adapter: Path, base: Path, template: str | None) -> ModelSource:
    """The model that an adapter folder and its base are, in the number type of the check.

    That the base is the right one has been seen before.

    Raises:
        UserError: as `find_source`; pictures for a language model, or a VL-BART of whose features nothing is known.
    """
    from dora_vl.backbones.families import sees_pictures
    from dora_vl.evaluation.open_model import Wanted, find_source
    from dora_vl.run.base import VLBART

    source = find_source(Wanted(adapter=adapter, base=str(base), any_base=True, template=template))
    if source.kind == VLBART:
        known = source.recipe["features"]
        if not known.get(check.task) and not (check.task == "" and any(known.values())):
            raise UserError(
                f"--check asks about pictures, and nothing says how the features of {check.task or adapter} were "
                "computed (data_prep.features did not make them); leave it out"
            )
    if (
        source.kind != VLBART
        and not sees_pictures(source.place, source.revision)
        and any(one.images or one.videos for one in check.questions)
    ):
        raise UserError(f"{check.file} shows pictures or videos, and {base} is a language model, which takes none")
    own = source.dtype if source.recipe.get("quantisation") else "float32"
    return replace(source, dtype=check.dtype or own)


def as_model(source: ModelSource, folder: Path) -> ModelSource:
    """A model's folder, asked just as the adapter that it was made from."""
    from dora_vl.evaluation.open_model import Wanted
    from dora_vl.run.base import VLBART

    recipe = {name: value for name, value in source.recipe.items() if name != "quantisation"}
    wanted = Wanted(model=str(folder), template=source.wanted.template)
    if source.kind == VLBART:  # its tasks and towers stand in the adapter's folder alone
        wanted = replace(source.wanted, model=str(folder))
    return replace(source, place=str(folder), revision=None, recipe=recipe, wanted=wanted)
