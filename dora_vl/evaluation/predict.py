"""Has a model answer the examples of a test set, by all processes of a launch, into a file that grows and resumes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from dora_vl.backbones.generation import NOT_FINITE_SCORES
from dora_vl.data.example import Example
from dora_vl.errors import UserError, one_line, short_names, short_text
from dora_vl.evaluation.baselines import EXCHANGED, ComparisonAnswers, digest, exchange_pictures_of, readable_answers
from dora_vl.evaluation.predictions import (
    PREDICTIONS,
    Prediction,
    Predictions,
    cut_broken_tail,
    line_of,
    read_predictions,
)
from dora_vl.evaluation.predictor import Decoding, MediaReader, Predictor
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet, scored, with_baselines
from dora_vl.files import METRICS, json_or_nothing, whole_file, write_json
from dora_vl.run.folder import LOSS_LOG, read_log
from dora_vl.run.launch import (
    gather_from_ranks,
    is_first_rank,
    leave_process_group,
    on_first_rank,
    rank_and_ranks,
    threads_of_this_rank,
    wait_for_everyone,
)

log = logging.getLogger(__name__)

MADE_WITH, PART = "predictions.settings.json", "predictions.part-{}.jsonl"
WARNED_FAILURES = 20  # more are counted, and named in metrics.json
LONGEST_SHARE = timedelta(days=2)  # how long a process that is done waits for the others


class PredictionsFile(AbstractContextManager["PredictionsFile"]):
    """Writes a folder's `predictions.jsonl` line by line; every process of a launch opens it.

    One process appends to the file itself, several append to a part each, which the first joins. What an earlier run
    answered stays while the settings of its set are the same; lines of other sets stay as they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / PREDICTIONS
        self._rank, self._ranks = rank_and_ranks()
        self._stream: IO[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, settings: Mapping[str, object]) -> dict[str, Prediction]:
        """Returns by id what an earlier run answered of a set under these settings."""
        on_first_rank(lambda: self._keep(name, json.loads(json.dumps(dict(settings)))))
        own = self._path if self._ranks == 1 else self._folder / PART.format(self._rank)
        self._stream = own.open("a", encoding="utf-8")
        return read_predictions(self._path).get(name, {})

    def _keep(self, name: str, settings: Mapping[str, object]) -> None:
        has_parts, everything = any(self._folder.glob(PART.format("*"))), self._joined()
        made_with = json_or_nothing(self._folder / MADE_WITH)
        if made_with.get(name) == settings and self._path.is_file() and not has_parts:
            return
        if made_with.get(name) != settings and everything.pop(name, None) is not None:
            log.info("%s: answers to %s were made with other settings; they are asked again", self._path, name)
        self._write(everything)  # before the settings change, so that the two never disagree
        write_json(self._folder / MADE_WITH, {**made_with, name: settings})

    def add(self, name: str, predictions: Iterable[Prediction]) -> None:
        """Appends lines of a set and hands them to the operating system, so that a killed process loses none."""
        assert self._stream is not None
        self._stream.writelines(line_of(replace(prediction, set=name)) for prediction in predictions)
        self._stream.flush()

    def end(self, name: str, order: Sequence[str]) -> dict[str, Prediction]:
        """Joins the answers of all processes, by id; the file then holds them in this order."""
        self.__exit__()
        wait_for_everyone()
        on_first_rank(lambda: self._sort(name, order))
        return read_predictions(self._path).get(name, {})

    def _sort(self, name: str, order: Sequence[str]) -> None:
        everything = self._joined()
        answered = everything.get(name, {})
        everything[name] = {key: answered[key] for key in dict.fromkeys([*order, *answered]) if key in answered}
        self._write(everything)

    def _joined(self) -> dict[str, dict[str, Prediction]]:
        """Reads the predictions of the file and of all parts, by set and id."""
        everything: dict[str, dict[str, Prediction]] = {}
        for path in (self._path, *sorted(self._folder.glob(PART.format("*")))):
            if path.is_file():
                cut_broken_tail(path)
                for name, predictions in read_predictions(path).items():
                    everything.setdefault(name, {}).update(predictions)
        return everything

    def _write(self, everything: Mapping[str, Mapping[str, Prediction]]) -> None:
        with whole_file(self._path) as stream:
            stream.writelines(map(line_of, chain.from_iterable(of_set.values() for of_set in everything.values())))
        for part in self._folder.glob(PART.format("*")):
            part.unlink()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def ask(
    model: Predictor,
    name: str,
    examples: Sequence[Example],
    test_set: TestSet,
    *,
    folder: Path,
    settings: Mapping[str, object],
) -> Predictions:
    """Answers every example that the folder has no prediction for; every process of a launch gets all answers.

    What could not be asked gets no line in the file, so that the next run asks it again; so are answers that were made
    with other `settings`. `test_set` says how it is asked.

    Raises:
        UserError: the model's scores were not finite for some questions; the others are answered first, unless
            `batch_size` questions fail one after another.
    """
    started = time.monotonic()
    order = [example.id for example in examples]
    with PredictionsFile(folder) as file:
        done = file.begin(name, settings)
        todo = [example for example in examples if example.id not in done]
        before = len(examples) - len(todo)
        if before:
            log.info("%d of %d questions were answered by an earlier run", before, len(examples))
        rank, ranks = rank_and_ranks()
        media, decoding = test_set.media, test_set.decoding
        assert media is not None
        assert decoding is not None
        failed, cut = _ask(model, todo[rank::ranks], media, decoding, partial(file.add, name))
        done = file.end(name, order)
    parts = gather_from_ranks((failed, cut, time.monotonic() - started))
    if cut_texts := {key: tokens for _, of_rank, _ in parts for key, tokens in of_rank.items()}:
        first, tokens = next(iter(cut_texts.items()))
        log.warning("%d texts were cut, such as that of %s by %d tokens", len(cut_texts), short_text(first), tokens)
    return Predictions(
        answered=[done[key] for key in order if key in done],
        failed={key: reason for of_rank, _, _ in parts for key, reason in of_rank.items()},
        answered_before=before,
        seconds=max(seconds for _, _, seconds in parts),
        cut_texts=len(cut_texts),
    )


def predicted(model: Predictor, examples: Sequence[Example], media: MediaReader, decoding: Decoding) -> Predictions:
    """Answers examples in this process only, in their order, without a file."""
    answered: list[Prediction] = []
    failed, _ = _ask(model, examples, media, decoding, answered.extend)
    by_id = {answer.id: answer for answer in answered}
    return Predictions(answered=[by_id[example.id] for example in examples if example.id in by_id], failed=failed)


def _ask(
    model: Predictor,
    examples: Sequence[Example],
    media: MediaReader,
    decoding: Decoding,
    keep: Callable[[list[Prediction]], object],
) -> tuple[dict[str, str], dict[str, int]]:
    """Answers examples; returns by id why some could not be asked and how many tokens of a text were cut."""
    failed: dict[str, str] = {}
    without_numbers: list[str] = []
    failing, cut = 0, dict[str, int]()
    with tqdm(total=len(examples), desc="answering", unit="question", disable=not examples) as progress:
        for predictions in model.predict(examples, media, decoding):
            for prediction in predictions:
                if not prediction.error:
                    failing = 0
                elif prediction.error == NOT_FINITE_SCORES:
                    without_numbers.append(prediction.id)
                    failing += 1
                else:
                    failed[prediction.id] = prediction.error
                    if len(failed) <= WARNED_FAILURES:
                        reason = one_line(prediction.error)
                        log.warning("question %s could not be asked: %s", short_text(prediction.id), reason)
            keep([prediction for prediction in predictions if not prediction.error])
            cut |= {prediction.id: prediction.cut_tokens for prediction in predictions if prediction.cut_tokens}
            progress.update(len(predictions))
            if failing >= min(decoding.batch_size, len(examples)):
                break
    if without_numbers:
        raise UserError(f"question {short_names(without_numbers)}: {NOT_FINITE_SCORES}")
    return failed, cut


@contextlib.contextmanager
def joined_launch() -> Iterator[None]:
    """Joins the other processes of a `torchrun` or `deepspeed` launch, each with its GPU; alone it does little."""
    threads = threads_of_this_rank()
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo", timeout=LONGEST_SHARE)  # only text is exchanged
    try:
        yield
    finally:
        leave_process_group()


def evaluate(
    sets: Sequence[TestSet],
    model: Predictor,
    results: ResultFolder,
    *,
    exchange: bool,
    untrained: ComparisonAnswers | None = None,
    announce: Callable[[Tested], object] = lambda tested: None,
) -> list[Tested]:
    """Asks and scores every set, and asks again about others' pictures; every process of a launch calls it.

    The first process scores and writes the files, anew after each set, so that an error in a later one does not cost
    its score. A set that cannot be scored is `refused`, and the others are asked all the same. `untrained` is what the
    base says, of a test of one set.
    """
    done: list[Tested] = []
    for test_set in sets:
        folder = results.folder
        predictions = ask(model, test_set.name, test_set.asked, test_set, folder=folder, settings=test_set.settings)
        tested = scored(test_set, predictions) if is_first_rank() else Tested(test=test_set, predictions=predictions)
        others = _exchanged(tested, model, folder) if exchange and test_set.score is not None else None
        done.append(tested)
        if not is_first_rank() or tested.refused is not None:
            continue
        readable = readable_answers(test_set.about.get("file"), test_set.settings.get("questions_sha256"))
        done[-1] = with_baselines(tested, others, untrained, readable, log=read_log(folder / LOSS_LOG))
        announce(done[-1])
        empty = sum(not answer.strip() for answer in predictions.answers.values())
        if (failed := len(test_set.examples) - len(predictions.answered)) or empty:
            message = "%s: %d questions could not be asked and %d answers are empty, all of them wrong; %s names them"
            log.warning(message, test_set.name, failed, empty, folder / METRICS)
        results.write(done, not_yet=[later.name for later in sets[len(done) :]])
    return done


def _exchanged(tested: Tested, model: Predictor, folder: Path) -> ComparisonAnswers:
    """Asks a sample of a set again, each example with the pictures of another."""
    test_set, answers = tested.test, tested.predictions.answers
    sample = exchange_pictures_of(test_set.scored_examples, answers, together=test_set.together)
    if not sample:
        return ComparisonAnswers(examples=(), answers={})
    return ask_again(model, test_set, EXCHANGED, sample, folder=folder)


def ask_again(
    model: Predictor, test_set: TestSet, why: str, sample: Sequence[Example], *, folder: Path
) -> ComparisonAnswers:
    """Asks some examples of a set for a comparison, whose answers are kept as a set of their own."""
    prompts = [test_set.prompt(example) for example in sample]
    depends_on = {**test_set.settings, why: digest(sample)}
    answers = ask(model, f"{test_set.name}/{why}", prompts, test_set, folder=folder, settings=depends_on).answers
    return ComparisonAnswers(examples=sample, answers=answers)
