"""`--check`: whether weights that a command has written answer as the model that they came from.

The same questions are put to both models. Each answers greedily by itself; then both are shown the first one's answers,
token by token, so that their logits stand over the same text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dora_vl.adapters.adapter import versions
from dora_vl.adapters.merge import CERTIFICATES
from dora_vl.backbones.families import sees_pictures
from dora_vl.data.example import Example, iterate_examples
from dora_vl.data.text_file import stream_values
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.ask import Decoding, MediaReader, check_pictures, media_reader
from dora_vl.evaluation.open_model import ModelRequest, ModelSource, find_source, open_model, read_recipe
from dora_vl.evaluation.predict import predicted
from dora_vl.evaluation.questions import is_question, read_question_file, read_questions
from dora_vl.files import unfinished, write_json
from dora_vl.run.base import VLBART
from dora_vl.run.folder import SETTINGS

BATCH, FRAMES = 8, 8
FAILED_STATUS = 1
REFERENCE = "unmerged"
JSON_FILE, TEXT_FILE = CERTIFICATES
EQUAL_SHOWN = 20
"""Questions with equal answers that the text shows; the JSON holds all."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is going to be asked; `task` is a VL-BART's that the questions belong to, "" where nothing says it."""

    questions: list[Example]
    file: Path
    images: Path
    frames: int
    dtype: str | None
    max_new_tokens: int
    most_different: float
    task: str = ""


def planned_check(options: argparse.Namespace, adapter: Path) -> Check | None:
    """The questions, of a file or of the test of the run around the adapter; None where no check is asked for."""
    if not options.check:
        if options.questions is not None or options.images is not None or options.check_dtype is not None:
            raise UserError("--questions, --images and --check-dtype say how --check asks; add --check")
        return None
    if not 0 <= options.most_different <= 1:
        raise UserError(f"--most-different is {options.most_different}; it is a share, 0 to 1")
    run: dict[str, Any] = {}
    for folder in adapter.resolve().parents[:2]:  # of a run's adapter, and of a checkpoint's
        if (folder / SETTINGS).is_file():
            run = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            break
    data, evaluation = run.get("data") or {}, run.get("evaluation") or {}
    task, file, root = "", options.questions, "."
    if file is None:
        root = evaluation.get("image_folder") or data.get("image_folder") or "."
        files = {"": evaluation["file"]} if evaluation.get("file") else evaluation.get("files") or {}
        task, name = next(iter(files.items()), ("", None))
        if not isinstance(name, str):
            raise UserError(f"{adapter} lies in no run with a test of its own; say with --questions FILE what to ask")
        file = Path(name)
        if not file.is_file():
            raise UserError(f"the run's test {file} is not there any more; say with --questions FILE what to ask")
    is_vlbart = adapter.is_dir() and read_recipe(adapter).get("backbone") == VLBART
    questions = [*iterate_examples(file)] if is_vlbart else _read(file)
    if not questions:
        raise UserError(f"{file}: holds no questions")
    images = options.images or Path(root)
    count = min(options.check, len(questions))  # evenly over the file: neighbours are often about one picture
    questions = [questions[number * len(questions) // count] for number in range(count)]
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


def _read(file: Path) -> list[Example]:
    """Questions of any format that training reads, or as LLaVA's evaluation takes them."""
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        _, first = next(stream_values(file, "questions"), (0, None))
        if is_question(first):
            return read_question_file(file)
    return read_questions(file)[0]


def unmerged_source(check: Check, adapter: Path, base: Path, template: str | None) -> ModelSource:
    """The model that an adapter folder and its base, which is the right one, are, in the check's number type."""
    source = find_source(ModelRequest(adapter=adapter, base=str(base), any_base=True, template=template))
    if source.kind == VLBART:
        features = source.recipe["features"]
        if not features.get(check.task) and not (check.task == "" and any(features.values())):
            raise UserError(
                f"--check asks about pictures, and nothing says how the features of {check.task or adapter} were "
                "computed (data_prep.features did not make them); leave it out"
            )
    elif not sees_pictures(source.base, source.revision) and any(
        question.images or question.videos for question in check.questions
    ):
        raise UserError(f"{check.file} shows pictures or videos, and {base} is a language model, which takes none")
    dtype = source.dtype if source.recipe.get("quantisation") else "float32"
    return replace(source, dtype=check.dtype or dtype)


def as_model(source: ModelSource, folder: Path) -> ModelSource:
    """A model's folder, asked just as the adapter that it was made from."""
    recipe = {name: value for name, value in source.recipe.items() if name != "quantisation"}
    request = ModelRequest(model=str(folder), template=source.request.template)
    if source.kind == VLBART:  # its tasks and towers stand in the adapter's folder alone
        request = replace(source.request, model=str(folder))
    return replace(source, base=str(folder), revision=None, recipe=recipe, request=request)


def checked(
    check: Check,
    unmerged: ModelSource,
    name: str,
    find: Callable[[], ModelSource],
    folder: Path,
    about: Mapping[str, object],
) -> Iterator[str]:
    """Asks, writes the certificate with what it is `about`, and yields the lines to print; exit status 1 if it fails.

    One model is in memory at a time.
    """
    decoding = Decoding(batch_size=BATCH, max_new_tokens=check.max_new_tokens, task=check.task)
    with (
        unfinished(folder) as scratch,
        closing(media_reader(check.images, frames=check.frames, one_length=True)) as media,
    ):
        answers, failed = _asked(check, unmerged, media, decoding, scratch)
        _compare(answers, check, name, find, media, decoding, scratch)
    n, compared = len(answers), [answer[name] for answer in answers]
    different = sum(answer[REFERENCE] != answer[name]["answer"] for answer in answers)
    summary = {
        "different_answers": different,
        "tokens": sum(comparison["tokens"] for comparison in compared),
        "agreeing_tokens": sum(comparison["agreeing"] for comparison in compared),
        "largest_logit_difference": max(comparison["largest_difference"] for comparison in compared),
    }
    passed = different <= check.most_different * n
    counts = f"{different} of {n} answers differ ({different / n:.1%}), {check.most_different:.1%} may"
    more = "weights of a wider number type lose less to rounding, and --most-different allows more"
    tokens, largest = f"{summary['agreeing_tokens']} of {summary['tokens']}", summary["largest_logit_difference"]
    lines = [
        f"passed: {counts}" if passed else f"FAILED: {counts}; {more}",
        f"{tokens} tokens alike, largest logit difference {largest:.2g}",
    ]
    about = {
        **about,
        "questions": str(check.file),
        "images": str(check.images),
        "longest answer": check.max_new_tokens,
        "computed in": unmerged.dtype,
    }
    content = {
        **about,
        "reference": REFERENCE,
        "passed": passed,
        "most_different": check.most_different,
        "n": n,
        "models": {name: summary},
        "failed_questions": failed,
        "answers": answers,
        "versions": versions(),
    }
    write_json(folder / JSON_FILE, content)
    (folder / TEXT_FILE).write_text("\n".join(_text(name, lines, about, answers, failed)) + "\n", encoding="utf-8")
    yield from (f"{folder / TEXT_FILE}: {line}" for line in lines)
    if failed:
        yield f"{len(failed)} questions could not be asked; {folder / TEXT_FILE} names them"
    if not passed:
        raise SystemExit(FAILED_STATUS)


def _asked(
    check: Check, unmerged: ModelSource, media: MediaReader, decoding: Decoding, scratch: Path
) -> tuple[list[dict[str, Any]], Mapping[str, str]]:
    """The unmerged model's answers, and why others have none; its logits lie in `scratch`, by the answers' places."""
    model = open_model(unmerged).adapted
    predictions = predicted(model, check.questions, media, decoding)
    if not predictions.rows:
        name, reason = next(iter(predictions.failed.items()))
        raise UserError(f"not one of {len(check.questions)} questions can be asked; {shown(name)}: {reason}")
    by_id = {question.id: question for question in check.questions}
    answers: list[dict[str, Any]] = []
    for number, row in enumerate(predictions.rows):
        torch.save(model.logits(by_id[row.id], row.prediction, media, decoding), scratch / f"{number}.pt")
        about = {"id": row.id, "question": row.question, "images": row.images, "truth": row.truth}
        answers.append({**about, REFERENCE: row.prediction})
    return answers, predictions.failed


def _compare(
    answers: list[dict[str, Any]],
    check: Check,
    name: str,
    find: Callable[[], ModelSource],
    media: MediaReader,
    decoding: Decoding,
    scratch: Path,
) -> None:
    """Adds to each answer what the other model says to the question, and how its logits over the answer differ."""
    model = open_model(find()).adapted
    questions = {question.id: question for question in check.questions}
    predictions = predicted(model, [questions[answer["id"]] for answer in answers], media, decoding)
    for failed, reason in predictions.failed.items():
        raise UserError(f"the {name} model cannot be asked what the other answers; {shown(failed)}: {reason}")
    for number, answer in enumerate(answers):
        logits = model.logits(questions[answer["id"]], answer[REFERENCE], media, decoding)
        expected = torch.load(scratch / f"{number}.pt", weights_only=True)
        if logits.shape != expected.shape:
            raise UserError(
                f"the {name} model gives logits {list(logits.shape)} for the answer to {answer['id']}, the other "
                f"{list(expected.shape)}; its vocabulary or its prompt is another"
            )
        answer[name] = {
            "answer": predictions.answers[answer["id"]],
            "tokens": len(expected),
            "agreeing": int((logits.argmax(-1) == expected.argmax(-1)).sum()),
            "largest_difference": float((logits - expected).abs().max()) if len(expected) else 0.0,
        }


def _text(
    name: str,
    lines: Sequence[str],
    about: Mapping[str, object],
    answers: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
) -> Iterator[str]:
    """The certificate for people, in Markdown."""
    yield from (f"# {name} beside {REFERENCE}", "", *lines, "")
    yield (
        f"Each model answers greedily. Then all are shown the answers of {REFERENCE}, token by token: tokens alike are "
        "those after which both would say the same next."
    )
    rows = [
        [answer["id"], answer["question"], answer["truth"], answer[REFERENCE], answer[name]["answer"]]
        for answer in answers
    ]
    head = ["id", "question", "right answer", REFERENCE, name]
    different, equal = ([row for row in rows if (row[3] == row[4]) is same] for same in (False, True))
    yield from _table("", ["", ""], [[key, str(value)] for key, value in about.items()])
    yield from _table("Answers that differ", head, different)
    yield from _table(f"Equal answers ({min(len(equal), EQUAL_SHOWN)} of {len(equal)})", head, equal[:EQUAL_SHOWN])
    yield from _table("Not asked", ["id", "why"], [[*item] for item in failed.items()])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table under its title; nothing without rows."""
    if not rows:
        return
    yield from ("", f"## {title}", "") if title else ("",)
    for row in (head, ["---"] * len(head), *rows):
        cells = (" ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|") for text in row)
        yield f"| {' | '.join(cells)} |"
