"""A run's test: its questions asked after training, the answers scored and drawn; and some asked while it trains."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import nn

from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.templates import PROMPTS
from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.example import Answer, Example, iterate_examples
from dora_vl.data.samples import Examples
from dora_vl.data.video import VideoReader
from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.ask import (
    Asker,
    Assistant,
    By,
    Decoding,
    EncoderPrompts,
    MediaReader,
    ask,
    check_pictures,
    media_reader,
)
from dora_vl.evaluation.baselines import Exchange, compared, digest, exchanged, right_text
from dora_vl.evaluation.pictures import write_contact_sheet, write_loss_curve
from dora_vl.evaluation.predictions import BY_SCORING, PREDICTIONS, Prediction, Predictions
from dora_vl.evaluation.questions import (
    Question,
    as_question,
    endings_of,
    examples_of,
    expected,
    in_words,
    media_of,
    question_of_turns,
    read_questions,
)
from dora_vl.evaluation.scores.benchmark import Scorer
from dora_vl.evaluation.scores.exact import PATTERNS, cloze_score, commonsense_score, extracted, final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import PERCENT, Scored, intervals
from dora_vl.files import file_sha256, write_json, write_json_lines
from dora_vl.run.base import VideoReading, check_videos, image_folder, video_folder, video_sampling
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, read_log, run_folder_of
from dora_vl.run.settings import EvaluationConfig, RunConfig
from dora_vl.run.watched import Watch, WatchedQuestion, evenly

log = logging.getLogger(__name__)

EXCHANGED, LOSS_CURVE, CONTACT_SHEET = "predictions_exchanged.jsonl", "loss_curve.png", "contact_sheet.png"
SCORES = "scores.jsonl"
ACCURACY = "accuracy"
TITLE_CHARACTERS = 100
WAYS: Mapping[str, By] = {"generation": "generation", "likelihood": "outputs", "cloze": "cloze"}
LIKELIHOOD: Mapping[str, Mapping[str, str]] = {
    "likelihood": {
        "scoring": "likelihood of the whole output, among those of `Answer format`, not divided by its length"
    },
    "cloze": {"scoring": "likelihood of the endings behind their contexts; normalised: divided by their characters"},
}
"""What `metrics.json` says of a `scoring`."""


@dataclass(kw_only=True)
class TestSet:
    """A set of a run's test: what is asked, the model that answers, how that is scored, and then what came of it.

    Attributes:
        score: None: the file holds no answers.
        says: the right answer as the model says it, for the baselines; None: it has none.
        settings: what the answers of an earlier run must have been made with to stay; None: none stays.
    """

    __test__ = False

    name: str = ""
    model: Asker
    questions: Sequence[Question]
    examples: Sequence[Example]
    decoding: Decoding
    score: Scorer | None
    says: Callable[[Example], str] | None = expected
    path: Path
    settings: Mapping[str, object] | None = None
    predictions: Predictions = field(default_factory=Predictions)
    scored: Scored | None = None
    baselines: dict[str, Any] = field(default_factory=dict)

    @property
    def is_accuracy(self) -> bool:
        """Whether an answer is right or wrong."""
        return self.scored is not None and ACCURACY in self.scored.metrics

    @cached_property
    def limits(self) -> Mapping[str, tuple[float, float]]:
        """The 95 % interval of each metric."""
        return {} if self.scored is None else intervals(self.scored)

    def headline(self) -> dict[str, Any]:
        """The accuracy as a share, over all and by `extra["kind"]`."""
        assert self.scored is not None
        kinds: dict[str, list[float]] = {}
        for example in self.examples:
            if "kind" in example.extra and example.id in self.scored.per_item:
                kinds.setdefault(str(example.extra["kind"]), []).append(self.scored.per_item[example.id])
        by_kind = {
            kind: {"accuracy": sum(shares) / len(shares), "n": len(shares)} for kind, shares in sorted(kinds.items())
        }
        return {"accuracy": self.scored.metrics[ACCURACY] / PERCENT, "n": self.scored.n, "by_kind": by_kind}


def evaluate_sets(
    tests: Iterable[TestSet],
    metrics_of: Callable[[Sequence[TestSet]], dict[str, Any]],
    *,
    run_folder: Path,
    media: MediaReader,
    exchange: bool = False,
    drawn: bool = True,
    sheet: bool = False,
) -> dict[str, Any]:
    """Asks and scores every set, draws what was answered, and asks again about others' pictures, in one process.

    `metrics.json` is written after each set, so that an error in a later one does not cost its score.

    Args:
        metrics_of: what `metrics.json` holds of the sets that have been answered.
        sheet: a contact sheet can be drawn: of the one set that is scored by accuracy, else of all.
    """
    answered: list[TestSet] = []
    for test in tests:
        test.predictions = ask(test.model, test.questions, media, test.decoding, path=test.path, settings=test.settings)
        test.scored = None if test.score is None else test.score(test.examples, test.predictions.answers)
        answered.append(test)
        write_json(run_folder / METRICS, metrics_of(answered))
        write_scores(answered, run_folder / SCORES)
        if test.scored is not None:
            for name, value in test.scored.metrics.items():
                log.info("%s %-16s %.2f of %d", test.name, name, value, test.scored.items_of(name))
        empty = sum(not answer.strip() for answer in test.predictions.answers.values())
        if (failed := len(test.examples) - len(test.predictions.rows)) or empty:
            message = "%d questions could not be asked and %d answers are empty, all of them wrong; %s names the former"
            log.warning(message, failed, empty, run_folder / METRICS)
    if drawn:
        accuracies = [test for test in answered if test.is_accuracy]
        draw(accuracies if len(accuracies) == 1 else answered, run_folder=run_folder, media=media if sheet else None)
    for test in answered:
        for line in _add_baselines(test, media, run_folder / EXCHANGED, exchange=exchange):
            log.info("%s %s", test.name, line)
    metrics = metrics_of(answered)
    write_json(run_folder / METRICS, metrics)
    return metrics


def write_scores(answered: Sequence[TestSet], path: Path) -> None:
    """Each item's share of its set's headline, with the set's name before its id where there are several."""
    several = len(answered) > 1
    rows = (test.scored.rows(f"{test.name}/" if several else "") for test in answered if test.scored is not None)
    write_json_lines(path, chain.from_iterable(rows))


def _add_baselines(test: TestSet, media: MediaReader, path: Path, *, exchange: bool) -> list[str]:
    """Completes a set's baselines; the lines about them. Answers about exchanged pictures go to `path`, or nowhere."""
    answers = test.predictions.answers
    if test.scored is None or test.score is None or test.says is None:
        return []
    others = None
    if exchange:
        sample, by_id = exchanged(test.examples, answers), {question.id: question for question in test.questions}
        questions = [
            replace(by_id[example.id], images=example.images, videos=example.videos, example=example)
            for example in sample
        ]
        settings = None if test.settings is None else {**test.settings, "exchanged": digest(sample)}
        to = None if settings is None else path
        again = ask(test.model, questions, media, test.decoding, path=to, settings=settings) if sample else None
        others = Exchange(examples=sample, answers={} if again is None else again.answers)
    test.baselines, lines = compared(test.scored, test.examples, answers, test.score, says=test.says, exchange=others)
    return lines


def evaluate_run(
    model: Asker,
    evaluation: EvaluationConfig,
    *,
    run_folder: Path,
    media: MediaReader,
    numbers: Mapping[str, object] = MappingProxyType({}),
    columns: Columns = USUAL,
) -> dict[str, Any]:
    """Answers the test questions with the trained model and writes everything that shows how the run went.

    Goes on from a `predictions.jsonl` made with the same adapter file and questions; gives what `metrics.json` holds,
    with the `numbers` of the training.
    """
    questions, unreadable = read_test(evaluation, columns)
    after = evaluation.answer_after
    settings: dict[str, object] = {
        "adapter_sha256": adapter_sha256(run_folder),
        **({} if evaluation.strength == 1 else {"strength": evaluation.strength}),
        "questions_sha256": file_sha256(Path(str(evaluation.file))),
        "max_new_tokens": evaluation.max_new_tokens,
    }
    if any(question.videos for question in questions):
        settings["frames"] = repr(media.videos.sampling)
    test = TestSet(
        model=model,
        questions=questions,
        examples=examples_of(questions, unreadable),
        decoding=Decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens),
        score=partial(exact_match, answer_after=after),
        says=lambda example: final_answer(right_text(example), after),
        path=run_folder / PREDICTIONS,
        settings=settings,
    )

    def metrics_of(_: Sequence[TestSet]) -> dict[str, Any]:
        predictions, scored = test.predictions, test.scored
        assert scored is not None
        return {
            **test.headline(),
            "interval_95": [limit / PERCENT for limit in test.limits[ACCURACY]],
            "unanswered": len(scored.failed),
            "empty_answers": sum(not answer.strip() for answer in predictions.answers.values()),
            **numbers,
            "evaluation_seconds": round(predictions.seconds, 1),
            "answers_from_earlier_run": predictions.answered_before,
            "evaluation_file": evaluation.file,
            "answer_after": after,
            "failed_questions": {**unreadable, **predictions.failed},
            "baselines": test.baselines,
        }

    exchange = evaluation.exchange_pictures
    return evaluate_sets([test], metrics_of, run_folder=run_folder, media=media, exchange=exchange, sheet=True)


def adapter_sha256(run_folder: Path) -> str:
    """The hash of the adapter that is tested."""
    weights = run_folder / ADAPTER / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the test needs the finished adapter")
    return file_sha256(weights)


def run_test(assistant: Assistant, config: RunConfig, *, numbers: Mapping[str, object]) -> dict[str, Any]:
    """The test of a run whose adapter is saved, by the model with that adapter; see `evaluate_run`."""
    with VideoReader() as reader:
        media = media_of_run(config, assistant, of_test=True, reader=reader)
        return evaluate_run(
            assistant,
            config.evaluation,
            run_folder=run_folder_of(config.training),
            media=media,
            numbers=numbers,
            columns=config.data.contract,
        )


def media_of_run(
    config: RunConfig, assistant: Assistant, *, of_test: bool, reader: VideoReader | None = None
) -> MediaReader:
    """Reads what the questions of a run show, those of `evaluation.file` or else of its own samples."""
    data = config.data
    folder = image_folder(data, config.evaluation.image_folder if of_test else None)
    same = data.video_frames if assistant.prompts.encoder.videos_of_one_length else None
    root = folder if of_test and config.evaluation.image_folder else video_folder(data)
    videos = VideoReading(folder=root, sampling=video_sampling(data), frames=same, reader=reader or VideoReader())
    return MediaReader(folder=folder, videos=videos)


def read_test(evaluation: EvaluationConfig, columns: Columns = USUAL) -> tuple[list[Question], dict[str, str]]:
    """The questions of `evaluation.file`, and the reason for each that cannot be read, by id."""
    if evaluation.file is None:
        raise UserError("evaluation.file is not set; give a file of questions with answers")
    return read_questions(Path(evaluation.file), evaluation.limit, columns)


def check_test(config: RunConfig) -> list[Question]:
    """The questions of a run's test, before it trains: what is wrong with them shows now, not after hours."""
    questions, _ = read_test(config.evaluation, config.data.contract)
    images = (path for question in questions for path in question.images)
    root = image_folder(config.data, config.evaluation.image_folder).root
    check_pictures(images, root, setting="evaluation.image_folder (or data.image_folder)")
    if any(question.videos for question in questions):
        check_videos(config.data)
    return questions


# Of instructions: each commonsense set by generation, by likelihood, or both.


def read_sets(evaluation: EvaluationConfig) -> tuple[list[Question], dict[str, str]]:
    """The questions of every set, of its kind, and the reason for each that cannot be read, by id (`openbookqa/17`).

    A row's `answer` is what is looked for; where it names none, what the set's pattern finds in its output.
    """
    if unknown := sorted(set(evaluation.files) - set(PATTERNS)):
        raise UserError(f"evaluation.files: no commonsense set {unknown[0]!r}; there are {', '.join(PATTERNS)}")
    if "cloze" in evaluation.scoring and len(evaluation.scoring) > 1:
        raise SettingError(
            "evaluation.scoring", ": cloze is of records of its own; ask it alone (--evaluation.scoring [cloze])"
        )
    questions: list[Question] = []
    unreadable: dict[str, str] = {}
    for task, file in evaluation.files.items():
        if "cloze" in evaluation.scoring:
            for record in islice(iterate_examples(Path(file)), evaluation.limit):
                example = replace(record, id=f"{task}/{record.id}", extra={**record.extra, "task": task})
                questions.append(replace(as_question(example), kind=task))
                endings_of(questions[-1])
            continue
        of_set, failed = read_questions(Path(file), evaluation.limit)
        unreadable |= {f"{task}/{name}": reason for name, reason in failed.items()}
        for question in of_set:
            answer = question.answer or extracted(question.truth, task, evaluation.rule)
            questions.append(replace(question, id=f"{task}/{question.id}", kind=task, answer=answer))
    if not questions:
        raise UserError(f"{evaluation.tested}: no question can be asked; the first: {next(iter(unreadable.items()))}")
    return questions, unreadable


def evaluate_commonsense(
    backbone: nn.Module,
    encoder: Encoder,
    evaluation: EvaluationConfig,
    *,
    run_folder: Path,
    numbers: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """The same for commonsense sets, in every way that `evaluation.scoring` names: an entry of `metrics.json` each."""
    questions, unreadable = read_sets(evaluation)
    examples = [
        question.example
        or Example(id=question.id, answers=(Answer(text=question.answer),), extra={"task": str(question.kind)})
        for question in questions
    ]
    backbone.eval()
    prompt = PROMPTS[encoder.prompts.name]
    way = {"beams": evaluation.beams, "max_new_tokens": evaluation.max_new_tokens}
    depends_on = {
        "adapter_sha256": adapter_sha256(run_folder),
        **({} if evaluation.strength == 1 else {"strength": evaluation.strength}),
        "questions_sha256": {task: file_sha256(Path(file)) for task, file in evaluation.files.items()},
        "prompt": [prompt.before_output("{instruction}", context, test=True) for context in ("", "{input}")],
        **way,
    }
    tests = [
        TestSet(
            name=scoring,
            model=Assistant(backbone, EncoderPrompts(encoder)),
            questions=questions,
            examples=examples,
            decoding=Decoding(
                batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens, by=WAYS[scoring]
            ),
            score=cloze_score if scoring == "cloze" else partial(commonsense_score, rule=evaluation.rule),
            says=None,
            path=run_folder / BY_SCORING[scoring],
            settings={**depends_on, "scoring": scoring},
        )
        for scoring in evaluation.scoring
    ]

    def entry(test: TestSet) -> dict[str, Any]:
        scored, predictions, scoring = test.scored, test.predictions, test.name
        assert scored is not None
        if scoring in LIKELIHOOD and not predictions.rows:
            name, reason = next(iter(predictions.failed.items()))
            raise UserError(f"no question can be scored by likelihood; {name}: {reason}")
        answers = (extracted(row.prediction, str(row.kind), evaluation.rule) for row in predictions.rows)
        return {
            "accuracy": scored.metrics,
            "interval_95": {name: list(pair) for name, pair in test.limits.items()},
            "n": scored.n,
            **({} if scoring == "cloze" else {"no_answer_found": sum(not answer for answer in answers)}),
            "failed_questions": {**unreadable, **predictions.failed},
            "settings": LIKELIHOOD.get(scoring) or {"scoring": scoring, **scored.settings, **way},
            "seconds": round(predictions.seconds, 1),
        }

    def metrics_of(answered: Sequence[TestSet]) -> dict[str, Any]:
        entries = {test.name: entry(test) for test in answered}
        return {**numbers, "evaluation_files": dict(evaluation.files), **entries}

    return evaluate_sets(tests, metrics_of, run_folder=run_folder, media=media_reader(Path(), frames=1), drawn=False)


# The pictures of a test.


def draw(answered: Sequence[TestSet], *, run_folder: Path, media: MediaReader | None) -> None:
    """Writes the loss curve, and where `media` shows the pictures the contact sheet."""
    entries = read_log(run_folder / LOSS_LOG)
    if any("loss" in entry for entry in entries):
        write_loss_curve(entries, run_folder / LOSS_CURVE)
    rows: list[Prediction] = []
    shares: dict[str, float] = {}
    by_id: dict[str, Example] = {}
    for test in answered:
        name = test.name  # before each id: two sets may share them
        by_id |= {f"{name}/{example.id}": example for example in test.examples}
        for row in test.predictions.rows:
            example = by_id[f"{name}/{row.id}"]
            truth, answer = (in_words(example, text) for text in (expected(example), row.prediction))
            images = media_of(example)
            rows.append(replace(row, id=f"{name}/{row.id}", images=images, truth=truth, prediction=answer))
        if test.scored is not None and test.is_accuracy:
            shares |= {f"{name}/{item}": share for item, share in test.scored.per_item.items()}
    if media is None or not rows:
        return

    def picture(row: Prediction) -> Image.Image:
        example = by_id[row.id]  # its own clip: other questions are about other parts of the same video
        return media.picture(as_question(replace(example, images=example.images[:1])))

    titles = textwrap.wrap(", ".join(map(_title, answered)), TITLE_CHARACTERS, max_lines=2)
    subtitles = {row.id: " ".join(line.text for line in by_id[row.id].subtitles) for row in rows}
    sheet = run_folder / CONTACT_SHEET
    write_contact_sheet(rows, picture, sheet, title="\n".join(titles), shares=shares, subtitles=subtitles)


def _title(test: TestSet) -> str:
    """A set's name and score; what could not be asked counts as wrong here too, as `metrics.json` has it."""
    before, scored = f"{test.name}: " if test.name else "", test.scored
    if scored is None:
        return f"{before}{len(test.predictions.rows):,} answers, not scored"
    metric, value = next(iter(scored.metrics.items()))
    if metric != ACCURACY:
        return f"{before}{metric} {value:.1f} of {scored.n:,}"
    low, high = test.limits[ACCURACY]
    return f"{before}{value:.1f}% of {scored.n:,} right (95 % interval {low:.1f}% to {high:.1f}%)"


# Some of the questions, while training goes on.


MOST_NEW_TOKENS = 32


def watch_assistant(
    assistant: Assistant, questions: Sequence[Question], media: MediaReader, *, max_new_tokens: int, source: str
) -> Watch | None:
    """Has an assistant's model, made with `while_training`, answer questions while it trains; None without any."""
    decoding = Decoding(batch_size=max(1, len(questions)), max_new_tokens=min(max_new_tokens, MOST_NEW_TOKENS))
    return watch_questions([(assistant, questions, decoding)], media, source=source)


def questions_of_rows(examples: Examples, count: int) -> list[Question]:
    """So many usable examples, evenly over all, their last answers being the right ones."""
    chosen = (examples[index] for index in evenly(range(len(examples)), count))
    return [question_of_turns(example) for example in chosen if isinstance(example, Example)]  # validation names others


def watch_questions(
    parts: Sequence[tuple[Asker, Sequence[Question], Decoding]], media: MediaReader | None, *, source: str
) -> Watch | None:
    """Has models answer questions, each its own, while training goes on; without `media` pictures are not shown."""
    questions = [question for _, several, _ in parts for question in several]
    if not questions:
        return None
    reader = media or media_reader(Path(), frames=1)

    def ask_now() -> Mapping[str, str]:
        answers: dict[str, str] = {}
        for model, several, decoding in parts:
            by_id = {question.id: question.example for question in several}
            for rows in model.predict(several, reader, decoding) if several else ():
                answers |= {row.id: in_words(by_id[row.id], row.prediction) for row in rows if not row.error}
        return answers

    showing = {question.id: question for question in questions if question.images or question.videos}
    missing = "evaluation.image_folder names no folder of pictures"
    watched = [
        WatchedQuestion(
            id=question.id,
            question=question.text or "(describe it)",
            truth=question.truth,
            why_no_picture=missing if media is None and question.id in showing else "",
        )
        for question in questions
    ]
    pictures = {} if media is None else {name: partial(media.picture, item) for name, item in showing.items()}
    return Watch(questions=tuple(watched), pictures=pictures, ask=ask_now, source=source)
