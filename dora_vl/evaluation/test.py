"""A run's test: its questions asked after training, the answers scored and drawn; and some asked while it trains."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.backbones.base import Backbone
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.formats import PROMPTS
from dora_vl.data.columns import Columns
from dora_vl.data.example import Answer, Example, iterate_examples
from dora_vl.data.objects import asks_for_boxes, boxes_in
from dora_vl.data.table import ExampleTable
from dora_vl.data.video import VideoReader
from dora_vl.errors import SettingError, UserError, short_repr
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.baselines import UNTRAINED, ComparisonAnswers, draw_sample, right_text
from dora_vl.evaluation.forgetting import compare_abilities, forgetting_lines, try_measure
from dora_vl.evaluation.plots import loss_unit, series, write_contact_sheet, write_loss_curve
from dora_vl.evaluation.predict import ask_again, evaluate
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.predictor import AnswerMethod, Decoding, MediaReader, Predictor, check_pictures, media_reader
from dora_vl.evaluation.questions import ANSWER as SAID
from dora_vl.evaluation.questions import (
    OUTPUT,
    choice_text,
    endings_of,
    expected,
    has_truth,
    last_round,
    likeliest_ending,
    read_questions,
    right_ending,
    text_asked,
    unread,
)
from dora_vl.evaluation.scores.benchmark import NO_ANSWER, Scorer
from dora_vl.evaluation.scores.exact import PATTERNS, cloze_score, commonsense_score, extracted, final_answer
from dora_vl.evaluation.scores.exact import SCORINGS as BY_NAME
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import in_units
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet, refuse_unscored
from dora_vl.files import METRICS, file_sha256, json_or_nothing
from dora_vl.run.base import VideoReading, check_videos, image_folder, video_folder, video_sampling
from dora_vl.run.folder import ADAPTER, LOSS_LOG, SETTINGS, Watch, WatchedQuestion, evenly, read_log, run_folder_of
from dora_vl.run.settings import EvaluationConfig, RunConfig

log = logging.getLogger(__name__)

LOSS_CURVE, CONTACT_SHEET = "loss_curve.png", "contact_sheet.png"
TITLE_CHARACTERS = 100
ANSWER_METHODS: Mapping[str, AnswerMethod] = {"generation": "generation", "likelihood": "outputs", "cloze": "cloze"}
SCORINGS: Mapping[str, str] = {
    "likelihood": "likelihood of the whole output, among those of `Answer format`, not divided by its length",
    "cloze": "likelihood of the endings after their contexts; normalised: divided by their characters",
}
"""`metrics.json` describes by these texts how sets were scored other than by generation."""


def evaluate_and_draw(
    sets: Sequence[TestSet],
    model: Predictor,
    run_folder: Path,
    *,
    header: Mapping[str, object],
    exchange: bool = False,
    untrained: ComparisonAnswers | None = None,
    sheet: MediaReader | None = None,
) -> None:
    """Tests a run by its sets, and draws its loss and, where `sheet` reads the pictures, some of its answers."""

    def announce(tested: Tested) -> None:
        if (scored := tested.scored) is not None:
            for name, value in scored.metrics.items():
                log.info("%s %-16s %s of %d", tested.test.name, name, in_units(name, value), scored.items_of(name))
        if bare := tested.test.not_scored:
            message = "%s: %d of %d questions have no right answer and are in no score; %s names them"
            log.info(message, tested.test.name, len(bare), len(tested.test.examples), run_folder / METRICS)
        for remark in tested.remarks:
            log.info("%s: %s", tested.test.name, remark)

    results = ResultFolder(folder=run_folder, header=header)
    done = evaluate(sets, model, results, exchange=exchange, untrained=untrained, announce=announce)
    accuracies = [tested for tested in done if tested.is_accuracy]
    draw(accuracies if len(accuracies) == 1 else done, run_folder=run_folder, media=sheet)
    refuse_unscored(done)


def adapter_settings(run_folder: Path, strength: float = 1.0) -> dict[str, object]:
    """Returns what a run's answers depend on: its adapter's weights and their strength."""
    weights = run_folder / ADAPTER / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the test needs the finished adapter")
    return {"adapter_sha256": file_sha256(weights), **({} if strength == 1 else {"strength": strength})}


def _set_of_file(evaluation: EvaluationConfig, media: MediaReader, columns: Columns) -> TestSet:
    """Makes the set of `evaluation.file`."""
    file, after = Path(str(evaluation.file)), evaluation.answer_after
    examples, unreadable = read_questions(file, evaluation.limit, columns)
    examples += unread(unreadable)
    bare = _without_truth(examples)
    depends_on = {"questions_sha256": file_sha256(file), "max_new_tokens": evaluation.max_new_tokens}
    if any(example.videos for example in examples):
        depends_on["frames"] = repr(media.videos.sampling)
    return TestSet(
        name=file.stem,
        examples=examples,
        unreadable=unreadable,
        not_scored=bare,
        decoding=Decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens),
        media=media,
        score=_scorer_of(file, examples, after) if len(bare) < len(examples) else None,
        truth=lambda example: final_answer(right_text(example), after),
        compared=lambda example, text: final_answer(text, after),
        settings=depends_on,
        about={"file": evaluation.file, "answer_after": after},
    )


def _scorer_of(file: Path, examples: Sequence[Example], answer_after: str | None) -> Scorer:
    """Returns what compares answers: equality, or the overlap of boxes, whose questions stand by themselves."""
    if not any(map(asks_for_boxes, examples)):
        return partial(exact_match, answer_after=answer_after)
    for example in examples:
        boxes = [box for answer in example.answers for of_place in boxes_in(answer.text) for box in of_place]
        if example.answers and (not boxes or any(box.in_pixels for box in boxes)):
            what = "in pixels; write fractions of the picture" if boxes else "none; test questions about places apart"
            raise UserError(f"{file}: others' right answers hold boxes, those of {short_repr(example.id)} are {what}")
    return BY_NAME["box"]


def _without_truth(examples: Sequence[Example]) -> dict[str, str]:
    """Says by id why examples are in no score: they have no answer, or one to avoid."""
    return {example.id: NO_ANSWER for example in examples if not has_truth([example])}


def test_adapter(
    base: Assistant, with_adapter: Callable[[], Backbone[Any]], config: RunConfig, *, metrics: Mapping[str, object]
) -> None:
    """Tests a run's saved adapter, which `with_adapter` puts on the base, and measures what the base has lost by it.

    It resumes a `predictions.jsonl` made with the same adapter file and questions. Some of the questions are asked of
    the base first, for a score to compare with. `metrics.json` also holds the `metrics` of the training.
    """
    evaluation, folder = config.evaluation, run_folder_of(config.training)
    texts = None if evaluation.other_texts is None else Path(evaluation.other_texts)
    untrained, sheet, lost = None, None, dict[str, Any]()
    with VideoReader() as reader:
        if evaluation.files:
            sets = commonsense_sets(evaluation, base.encoder)
        else:
            sheet = media_of_run(config, base, of_test=True, reader=reader)
            sets = [_set_of_file(evaluation, sheet, config.data.column_settings)]
        if evaluation.untrained and not evaluation.files:
            of_base = _answered_by({"base": config.model.base}, sets[0])
            scored = [example for example in of_base.asked if example.id not in of_base.not_scored]
            untrained = ask_again(base, of_base, UNTRAINED, draw_sample(scored), folder=folder)
        if evaluation.forgetting:
            log.info("measuring what the model has forgotten")
        before = try_measure(base, texts) if evaluation.forgetting else None
        assistant = replace(base, backbone=with_adapter())
        if before is not None:
            lost = compare_abilities(before, try_measure(assistant, texts, before))
            metrics = {**metrics, "forgetting": lost}
        of_adapter = adapter_settings(folder, evaluation.strength)
        evaluate_and_draw(
            [_answered_by(of_adapter, test_set) for test_set in sets],
            assistant,
            folder,
            header=metrics,
            exchange=evaluation.exchange_pictures,
            untrained=untrained,
            sheet=sheet,
        )
    for name, line in forgetting_lines(lost).items():
        log.info("%s: %s", name, line)


def _answered_by(model: Mapping[str, object], test_set: TestSet) -> TestSet:
    """Returns the set with what its answers depend on of a model."""
    return replace(test_set, settings={**model, **test_set.settings})


def media_of_run(
    config: RunConfig, assistant: Assistant, *, of_test: bool, reader: VideoReader | None = None
) -> MediaReader:
    """Makes the reader of a run's media, those of `evaluation.file` or else of its own samples."""
    data = config.data
    folder = image_folder(data, config.evaluation.image_folder if of_test else None)
    same = data.video_frames if assistant.encoder.videos_of_one_length else None
    root = folder if of_test and config.evaluation.image_folder else video_folder(data)
    videos = VideoReading(folder=root, sampling=video_sampling(data), frames=same, reader=reader or VideoReader())
    return MediaReader(folder=folder, videos=videos)


def check_test(config: RunConfig) -> list[Example]:
    """Reads the examples of `evaluation.file` before a run trains: a mistake shows now and not after hours."""
    test = config.evaluation
    examples, _ = read_questions(Path(str(test.file)), test.limit, config.data.column_settings)
    _scorer_of(Path(str(test.file)), examples, test.answer_after)
    images = (path for example in examples for path in example.images)
    root = image_folder(config.data, test.image_folder).root
    check_pictures(images, root, setting="evaluation.image_folder (or data.image_folder)")
    if any(example.videos for example in examples):
        check_videos(config.data)
    return examples


# The commonsense sets, each by generation, by likelihood, or both.


def read_sets(evaluation: EvaluationConfig) -> tuple[list[Example], dict[str, str]]:
    """Reads the examples of every set, and by id (`openbookqa/17`) why a row cannot be read.

    A row's `answer` is what is looked for; where it names none, what the set's pattern finds in its output.
    """
    if unknown := sorted(set(evaluation.files) - set(PATTERNS)):
        raise UserError(f"evaluation.files: no commonsense set {unknown[0]!r}; there are {', '.join(PATTERNS)}")
    if "cloze" in evaluation.scoring and len(evaluation.scoring) > 1:
        reason = ": cloze is of records of its own; ask only it (--evaluation.scoring [cloze])"
        raise SettingError("evaluation.scoring", reason)
    examples: list[Example] = []
    unreadable: dict[str, str] = {}
    for task, file in evaluation.files.items():
        if "cloze" in evaluation.scoring:
            for record in islice(iterate_examples(Path(file)), evaluation.limit):
                extra = {**record.extra, "task": task, "kind": task}
                examples.append(replace(record, id=f"{task}/{record.id}", extra=extra))
                endings_of(examples[-1])
            continue
        of_set, failed = read_questions(Path(file), evaluation.limit)
        unreadable |= {f"{task}/{name}": reason for name, reason in failed.items()}
        for example in of_set:
            output = right_text(example)
            answer = example.extra.get(SAID) or extracted(output, task, evaluation.rule)
            extra = {**example.extra, "task": task, "kind": task, OUTPUT: output}
            answers = (Answer(text=str(answer)),) if example.answers else ()
            examples.append(replace(example, id=f"{task}/{example.id}", answers=answers, extra=extra))
    if not examples:
        raise UserError(f"{evaluation.tested}: no question can be asked; the first: {next(iter(unreadable.items()))}")
    return examples, unreadable


def commonsense_sets(evaluation: EvaluationConfig, encoder: Encoder) -> list[TestSet]:
    """Makes a set of the commonsense questions for every way that `evaluation.scoring` names."""
    examples, unreadable = read_sets(evaluation)
    prompt = PROMPTS[encoder.prompts.name]
    way = {"beams": evaluation.beams, "max_new_tokens": evaluation.max_new_tokens}
    depends_on = {
        "questions_sha256": {task: file_sha256(Path(file)) for task, file in evaluation.files.items()},
        "prompt": [prompt.before_output("{instruction}", context, test=True) for context in ("", "{input}")],
        **way,
    }

    def answer_of(example: Example, text: str) -> str:
        return extracted(text, str(example.extra["task"]), evaluation.rule)

    return [
        TestSet(
            name=scoring,
            examples=examples,
            decoding=Decoding(
                batch_size=evaluation.batch_size,
                max_new_tokens=evaluation.max_new_tokens,
                answer_method=ANSWER_METHODS[scoring],
            ),
            media=media_reader(Path(), frames=1),
            score=cloze_score if scoring == "cloze" else partial(commonsense_score, rule=evaluation.rule),
            truth=right_ending if scoring == "cloze" else expected,
            compared=likeliest_ending if scoring == "cloze" else answer_of,
            not_scored=_without_truth(examples),
            settings={**depends_on, "scoring": scoring},
            about={
                "files": dict(evaluation.files),
                "scoring": SCORINGS.get(scoring) or {"by": scoring, **way},
                **({"unreadable": unreadable} if unreadable else {}),
            },
        )
        for scoring in evaluation.scoring
    ]


# The pictures of a test.


def draw(answered: Sequence[Tested], *, run_folder: Path, media: MediaReader | None) -> None:
    """Writes the loss curve, and where `media` shows the pictures the contact sheet."""
    entries = read_log(run_folder / LOSS_LOG)
    if series(entries, "loss")[0]:
        objective = json_or_nothing(run_folder / SETTINGS).get("objective") or {}
        write_loss_curve(entries, run_folder / LOSS_CURVE, unit=loss_unit(objective))
    shown: list[Prediction] = []
    shares: dict[str, float] = {}
    by_id: dict[str, Example] = {}
    for tested in answered:
        name = tested.test.name  # before each id: two sets may share them
        by_id |= {f"{name}/{example.id}": example for example in tested.test.examples}
        for prediction in tested.predictions.answered:
            example = by_id[f"{name}/{prediction.id}"]
            truth, answer = (choice_text(example, text) for text in (expected(example), prediction.prediction))
            images = list(example.images) or [clip.path for clip in example.videos[:1]]
            key = f"{name}/{prediction.id}"
            shown.append(replace(prediction, id=key, images=images, truth=truth, prediction=answer))
        if tested.scored is not None and tested.is_accuracy:
            shares |= {f"{name}/{item}": share for item, share in tested.scored.shares.items()}
    if media is None or not shown:
        return

    def picture(prediction: Prediction) -> Image.Image:
        example = by_id[prediction.id]  # its own clip: other questions are about other parts of the same video
        return media.picture(replace(example, images=example.images[:1]))

    titles = textwrap.wrap(", ".join(map(_title, answered)), TITLE_CHARACTERS, max_lines=2)
    subtitles = {prediction.id: " ".join(line.text for line in by_id[prediction.id].subtitles) for prediction in shown}
    sheet = run_folder / CONTACT_SHEET
    write_contact_sheet(shown, picture, sheet, title="\n".join(titles), shares=shares, subtitles=subtitles)


def _title(tested: Tested) -> str:
    """Writes a set's name and score; as in `metrics.json`, what could not be asked counts as wrong."""
    name, scored = tested.test.name, tested.scored
    if scored is None:
        return f"{name}: {len(tested.predictions.answered):,} answers, not scored"
    metric, value = scored.headline, scored.metrics[scored.headline]
    if not tested.is_accuracy:
        return f"{name}: {metric} {value:.1f} of {scored.n:,}"
    low, high = tested.intervals[metric]
    return f"{name}: {value:.1f}% of {scored.n:,} right (95 % interval {low:.1f}% to {high:.1f}%)"


# Some of the questions, while training goes on.

MOST_NEW_TOKENS = 32


def watch_run(assistant: Assistant, config: RunConfig, held_out: ExampleTable | None) -> Watch | None:
    """Watches questions of a run's validation samples, or else of its test."""
    if held_out is not None:
        drawn = (held_out[index] for index in evenly(range(len(held_out)), config.watch))
        questions = [
            last_round(example) for example in drawn if isinstance(example, Example)
        ]  # validation names others
    else:
        test = config.evaluation
        questions = evenly(read_sets(test)[0] if test.files else check_test(config), config.watch)
    media = media_of_run(config, assistant, of_test=held_out is None)
    media = replace(media, stored=None if held_out is None else held_out.stored)
    tokens = min(config.evaluation.max_new_tokens, MOST_NEW_TOKENS)
    decoding = Decoding(batch_size=max(1, len(questions)), max_new_tokens=tokens)
    source = str(config.evaluation.tested if held_out is None else config.data.held_out)
    return watch_questions([(assistant, questions, decoding)], media, source=source)


def watch_questions(
    parts: Sequence[tuple[Predictor, Sequence[Example], Decoding]], media: MediaReader | None, *, source: str
) -> Watch | None:
    """Has models answer examples, each its own, while training goes on; without `media` pictures are not shown."""
    examples = [example for _, several, _ in parts for example in several]
    if not examples:
        return None
    reader = media or media_reader(Path(), frames=1)

    def ask_now() -> Mapping[str, str]:
        answers: dict[str, str] = {}
        for model, several, decoding in parts:
            by_id = {example.id: example for example in several}
            for prediction in chain.from_iterable(model.predict(several, reader, decoding) if several else ()):
                if not prediction.error:
                    answers[prediction.id] = choice_text(by_id[prediction.id], prediction.prediction)
        return answers

    showing = {example.id: example for example in examples if example.images or example.videos}
    missing = "evaluation.image_folder names no folder of pictures"
    watched = [
        WatchedQuestion(
            id=example.id,
            question=text_asked(example) or "(describe it)",
            truth=choice_text(example, expected(example)),
            why_no_picture=missing if media is None and example.id in showing else "",
        )
        for example in examples
    ]
    pictures = {} if media is None else {name: partial(media.picture, example) for name, example in showing.items()}
    return Watch(questions=tuple(watched), pictures=pictures, ask=ask_now, source=source)
