"""A run's test before it is due: tried before training, and some of its questions asked while that goes on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example, ExampleFile
from dora_vl.data.samples import Examples
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.ask import Asker, Assistant, Decoding, MediaReader, media_reader
from dora_vl.evaluation.questions import (
    Question,
    as_question,
    expected,
    has_truth,
    in_words,
    media_of,
    question_of_turns,
)
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.subtask import Subtask, check_sample, make_sample
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.run.watched import Watch, WatchedQuestion, evenly

log = logging.getLogger(__name__)

Tested = tuple[Subtask, ExampleFile, FeatureReader]
"""A VL-BART's task, its test file, and the features of what that shows."""
READ = 64
"""Examples of a file whose features are read before training, evenly over the file, at most."""
NAMED = 3


def open_test(subtask: Subtask, path: Path, *, limit: int | None) -> ExampleFile:
    """A task's test file, each example read once, so that a long run does not end at one that cannot be scored."""
    file = ExampleFile(path, limit=limit)
    if subtask.chooses:
        check_choices(file, path, most=None)
    else:
        deque(file, maxlen=0)
    return file


def check_tests(tested: Sequence[Tested], encoder: Seq2SeqEncoder, *, max_bad_share: float) -> None:
    """Tries the scorers, looks up the features of every example, and reads those of some.

    Args:
        max_bad_share: largest share of examples that cannot be asked, of all by the features' index and of those that
            were read; they are named and count as wrong in the test.
    """
    for subtask, file, reader in tested:
        examples = list(file)
        if has_truth(examples):
            check = subtask.check_scoring or (lambda examples, score=subtask.score: score(examples, {}))
            check(examples)
        bad = _reasons(examples, partial(check_sample, subtask=subtask, reader=reader))
        left = [example for example in examples if example.id not in bad]
        sample = left[:: -(-len(left) // READ)] if left else []
        make = partial(make_sample, subtask=subtask, encoder=encoder, reader=reader, target=None)
        unread = _reasons(sample, make)
        if not bad and not unread:
            continue
        counts = [f"{len(bad):,} of {len(examples):,} examples cannot be asked"] if bad else []
        counts += [f"{len(unread)} of {len(sample)} whose features were read cannot be asked"] if unread else []
        reasons = bad | unread
        names = ", ".join(f"{name:.24}" for name in list(reasons)[:NAMED])
        message = (
            f"{', '.join(path.name for path in file.paths):.60}: {', and '.join(counts)} ({names}"
            f"{', ...' if len(reasons) > NAMED else ''}); the first: {next(iter(reasons.values())):.160}. Correct "
            f"evaluation.files or {subtask.name}'s folder of features"
        )
        if not left:
            raise UserError(message)
        if max(len(bad) / len(examples), len(unread) / len(sample)) > max_bad_share:
            raise UserError(f"{message}, or raise data.max_bad_share ({max_bad_share:g})")
        log.warning("%s; they will count as wrong", message)


def _reasons(examples: Sequence[Example], check: Callable[[Example], object]) -> dict[str, str]:
    """Why examples do not pass, by id."""
    bad: dict[str, str] = {}
    for example in examples:
        try:
            check(example)
        except BadSample as error:
            bad[example.id] = error.reason
    return bad


MOST_NEW_TOKENS = 32


def watch_assistant(
    assistant: Assistant, questions: Sequence[Question], media: MediaReader, *, max_new_tokens: int, source: str
) -> Watch | None:
    """Has an assistant's model, made with `while_training`, answer questions while it trains; None without any."""
    decoding = Decoding(batch_size=max(1, len(questions)), max_new_tokens=min(max_new_tokens, MOST_NEW_TOKENS))
    return _watch([(assistant, questions, decoding)], media, source=source)


def questions_of_rows(examples: Examples, count: int) -> list[Question]:
    """So many usable examples, evenly over all, their last answers being the right ones."""
    chosen = (examples[index] for index in evenly(range(len(examples)), count))
    return [question_of_turns(example) for example in chosen if isinstance(example, Example)]  # validation names others


def watch_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    count: int,
    image_folder: str | None,
    source: str,
) -> Watch | None:
    """So many examples, of each task in turn, evenly over its file; None where no file holds one that can be read."""
    parts: list[tuple[Asker, Sequence[Question], Decoding]] = []
    for number, (subtask, file, reader) in enumerate(tested):
        questions: list[Question] = []
        for place in evenly(range(len(file)), len(range(number, count, len(tested)))):
            try:
                question = as_question(example := file[place])
            except BadSample:  # validation, or the test, counts and names it
                continue
            truth = in_words(example, expected(example))
            questions.append(replace(question, id=f"{subtask.name}/{example.id}", truth=truth))
        model = VlBartAssistant(
            backbone=backbone, encoder=encoder, subtasks=(subtask,), stored=reader, while_training=True
        )
        parts.append((model, questions, Decoding(batch_size=max(1, len(questions)), task=subtask.name)))
    media = None if image_folder is None else media_reader(Path(image_folder), frames=1)
    return _watch(parts, media, source=source)


def _watch(
    parts: Sequence[tuple[Asker, Sequence[Question], Decoding]], media: MediaReader | None, *, source: str
) -> Watch | None:
    questions = [question for _, several, _ in parts for question in several]
    shows = {question.id for question in questions if question.images or question.videos}
    reader = media or media_reader(Path(), frames=1)

    def ask_now() -> Mapping[str, str]:
        answers: dict[str, str] = {}
        for model, several, decoding in parts:
            by_id = {question.id: question.example for question in several}
            for rows in model.predict(several, reader, decoding) if several else ():
                answers |= {row.id: in_words(by_id[row.id], row.prediction) for row in rows if not row.error}
        return answers

    missing = "evaluation.image_folder names no folder of pictures"
    watched = [
        WatchedQuestion(
            id=question.id,
            question=question.text or "(describe it)",
            truth=question.truth,
            why_no_picture=missing if media is None and question.id in shows else "",
        )
        for question in questions
    ]
    shown = [] if media is None else [question for question in questions if question.id in shows]
    pictures = {question.id: partial(reader.picture, question) for question in shown}
    return Watch(questions=tuple(watched), pictures=pictures, ask=ask_now, source=source) if questions else None


def picture_of(example: Example, root: Path) -> Callable[[], Image.Image] | None:
    """What opens an example's pictures, or frames of its video, as one; None: it shows nothing."""
    return partial(media_reader(root, frames=1).picture, as_question(example)) if media_of(example) else None
