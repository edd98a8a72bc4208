"""The test of an encoder-decoder's tasks: every example is answered, each task scored, the run's pictures drawn."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dora_vl.backbones.generation import NO_TOKEN, likeliest, says_true, with_numbers
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example, ExampleFile, whole_file
from dora_vl.data.samples import IGNORED_LABEL, Skipped
from dora_vl.errors import BadSample, one_line, shown_text
from dora_vl.evaluation.asker import Asked
from dora_vl.evaluation.baselines import Exchange, compared, exchanged
from dora_vl.evaluation.predict import refuse_without_numbers
from dora_vl.evaluation.scores.scored import Scored, intervals
from dora_vl.evaluation.seq2seq_pictures import Shown, draw, expected
from dora_vl.training.run_folder import METRICS, write_json
from dora_vl.training.seq2seq_tasks import MicroBatch, Seq2SeqCollator, Seq2SeqSample, Subtask, make_sample

TRUE, FALSE = "true", "false"
LONGEST_LABEL = 20


def answers_of(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    subtask: Subtask,
    examples: Sequence[Example],
    inputs: Sequence[Tensor],
) -> list[str | None]:
    """One batch's answers, in the way that the task has them; None where the model's scores are no numbers."""
    ids, mask, features = inputs
    if subtask.answer_by == "pair":
        return _pairs(backbone, encoder, ids, mask, features)
    if subtask.answer_by == "choice":
        labels = padded_labels(encoder, [f"a{index}" for index in range(max(len(one.choices) for one in examples))])
        scores = backbone.likelihoods(ids, mask, features, labels)
        for row, example in enumerate(examples):
            scores[row, len(example.choices) :] = float("-inf")
        return with_numbers([f"a{index}" for index in likeliest(scores).tolist()], scores)
    if subtask.answer_by == "words":
        return [
            _likeliest_words(backbone, encoder, example, [part[row : row + 1] for part in inputs])
            for row, example in enumerate(examples)
        ]
    if subtask.answer_by == "closed":
        head = backbone.answer_head(subtask.name)
        scores = head(backbone.first_hidden(ids, mask, features))
        return with_numbers(head.chosen(scores), scores)
    search = subtask.search
    new = backbone.generate(
        ids,
        mask,
        features,
        max_length=search.max_length,
        num_beams=search.beams,
        no_repeat_ngram_size=search.no_repeat_ngram,
    )
    return [None if NO_TOKEN in row.tolist() else encoder.decode(row) for row in new.cpu()]


def _likeliest_words(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, example: Example, inputs: Sequence[Tensor]
) -> str | None:
    """The label of the choice whose own words are likeliest; each example has choices of its own."""
    ids, mask, features = inputs
    scores = backbone.likelihoods(ids, mask, features, padded_labels(encoder, example.choices))
    return with_numbers([f"a{int(likeliest(scores))}"], scores)[0]


def padded_labels(encoder: Seq2SeqEncoder, texts: Sequence[str]) -> Int[Tensor, "choices answer"]:
    """Labels as rows of ids, -100 behind the shorter ones."""
    labels = [encoder.labels(text, max_tokens=LONGEST_LABEL) for text in texts]
    return pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)


def _pairs(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, ids: Tensor, mask: Tensor, features: Tensor
) -> list[str | None]:
    """After the start and `<s>`, the logits of "true" and "false" at the next place.

    Where a small vocabulary spells one of them in pieces, the likelier of the two whole labels.
    """
    true_token, false_token = encoder.first_token(TRUE), encoder.first_token(FALSE)
    if true_token is None or false_token is None:
        labels = padded_labels(encoder, (TRUE, FALSE))
        scores = backbone.likelihoods(ids, mask, features, labels)
        return with_numbers([TRUE if one == 0 else FALSE for one in likeliest(scores).tolist()], scores)
    encoded, joint = backbone.encode(ids, mask, features)
    config = backbone.config
    begun = torch.tensor([[config.decoder_start_token_id, config.bos_token_id]], device=ids.device)
    hidden = backbone.decode(begun.expand(len(ids), -1), encoded, joint)
    logits = backbone.logits(hidden[:, 1])
    chosen = says_true(logits, true_token=true_token, false_token=false_token)
    return with_numbers([TRUE if one else FALSE for one in chosen.tolist()], logits)


log = logging.getLogger(__name__)

PREDICTIONS = "predictions"
FAILED_SHOWN = 10
Tested = tuple[Subtask, ExampleFile, FeatureReader]


@runtime_checkable
class EvaluationSection(Protocol):
    """What this reads of a run's `evaluation:` section."""

    @property
    def batch_size(self) -> int:
        """Inputs at once."""
        ...

    @property
    def image_folder(self) -> str | None:
        """Root of the pictures, for a contact sheet."""
        ...

    @property
    def exchange_pictures(self) -> bool:
        """Whether a sample is asked again about others' pictures."""
        ...


def evaluate_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    run_folder: Path,
    evaluation: EvaluationSection,
    settings: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """Answers and scores each task; writes `predictions/<task>.jsonl`, `metrics.json` and pictures of the run.

    `metrics.json` is written after each task.

    Raises:
        UserError: the model's scores were no numbers for examples of a task; its other predictions are written.

    Where one task alone is scored by accuracy, its headline stands at the top as `accuracy` (a share) and `n`, with
    `by_kind` where examples name their kind, and the contact sheet shows that task; else the sheet shows all.
    """
    backbone.eval()
    started, tasks = time.monotonic(), {}
    every: list[Shown] = []
    headlines: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    for subtask, file, reader in tested:
        examples, done = answer(backbone, encoder, subtask, file, reader, batch_size=evaluation.batch_size)
        answers = done.answers
        _write(run_folder / PREDICTIONS / f"{subtask.name}.jsonl", answers)
        refuse_without_numbers(done.without_numbers)
        _tell_failed(subtask, done.failed, run_folder / METRICS)
        scored = _score(subtask, examples, answers)
        tasks[subtask.name] = _entries(subtask, scored, done, asked=len(examples))
        if scored is not None and "accuracy" in scored.metrics:
            headlines[subtask.name] = _headline(scored, examples)
        every.append(Shown(subtask.name, examples, answers, scored))
        log.info("%s: %s", subtask.name, {k: round(v, 3) for k, v in tasks[subtask.name]["metrics"].items()})
        metrics = {
            **dict(numbers),
            "tasks": tasks,
            "settings": dict(settings),
            "evaluation_seconds": round(time.monotonic() - started, 1),
            **_at_the_top(tasks, headlines),
        }
        write_json(run_folder / METRICS, metrics)  # now: an error in a later task shall not cost this one's score
    shown = [one for one in every if one.task in headlines] if len(headlines) == 1 else every
    draw(shown, run_folder=run_folder, image_folder=evaluation.image_folder)
    for (subtask, _, reader), one in zip(tested, every, strict=True):
        if one.scored is None:
            continue
        exchange = None
        if evaluation.exchange_pictures:
            sample = exchanged(one.examples, one.answers)
            _, others = answer(backbone, encoder, subtask, sample, reader, batch_size=evaluation.batch_size)
            exchange = Exchange(examples=sample, answers=others.answers)
        baselines = compared(one.scored, one.examples, one.answers, subtask.score, says=expected, exchange=exchange)
        for line in baselines.lines():
            log.info("%s: %s", subtask.name, line)
        tasks[subtask.name]["baselines"] = baselines.entry()
    write_json(run_folder / METRICS, metrics)
    return metrics


def answer(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    subtask: Subtask,
    file: ExampleFile | Sequence[Example],
    reader: FeatureReader,
    *,
    batch_size: int,
) -> tuple[list[Example], Asked]:
    """Answers every example that can be asked; all examples, and what came of them."""
    examples: list[Example] = []
    done = Asked()
    with (
        torch.inference_mode(),
        tqdm(total=len(file), desc=subtask.name, unit="question", disable=not len(file)) as progress,
    ):
        for rows in _batches(file, batch_size):
            examples.extend(rows)
            found = answer_rows(backbone, encoder, subtask, reader, rows)
            done.answers.update(found.answers)
            done.failed.update(found.failed)
            done.cut.update(found.cut)
            done.without_numbers.extend(found.without_numbers)
            progress.update(len(rows))
    if done.cut:
        name, tokens = next(iter(done.cut.items()))
        log.warning(
            "%s: %d texts were cut, such as that of %s by %d tokens",
            subtask.name,
            len(done.cut),
            shown_text(name),
            tokens,
        )
    return examples, done


def answer_rows(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, subtask: Subtask, reader: FeatureReader, rows: Sequence[Example]
) -> Asked:
    """One batch of a task's examples; autograd should be off."""
    items = [asked(example, subtask, encoder, reader) for example in rows]
    done = Asked(failed={one.id: one.reason for one in items if isinstance(one, Skipped)})
    usable = [row for row, item in zip(rows, items, strict=True) if isinstance(item, Seq2SeqSample)]
    if usable:
        device = next(backbone.parameters()).device
        batch = Seq2SeqCollator(encoder.pad_token_id, (reader.tokens, reader.width))([MicroBatch(subtask, items)])
        inputs = [batch[name].to(device) for name in ("input_ids", "attention_mask", "features")]
        said = answers_of(backbone, encoder, subtask, usable, inputs)
        pairs = list(zip(usable, said, strict=True))
        done.answers.update({example.id: text for example, text in pairs if text is not None})
        done.without_numbers.extend(example.id for example, text in pairs if text is None)
        done.cut.update(batch["cut"])
    return done


def asked(
    example: Example, subtask: Subtask, encoder: Seq2SeqEncoder, reader: FeatureReader
) -> Seq2SeqSample | Skipped:
    """An example as it is put to the model, or why it cannot be."""
    try:
        return make_sample(example, subtask, encoder=encoder, reader=reader, target=None)
    except BadSample as error:
        return Skipped(0, example.id, error.reason)


def _batches(file: ExampleFile | Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(file), size):
        yield [file[index] for index in range(start, min(start + size, len(file)))]


def _score(subtask: Subtask, examples: Sequence[Example], answers: Mapping[str, str]) -> Scored | None:
    """The task's score; None where the publisher keeps the answers."""
    return subtask.score(examples, answers) if has_answers(examples) else None


def has_answers(examples: Sequence[Example]) -> bool:
    """Whether a file says what is right."""
    return any(example.answers or "correct" in example.extra for example in examples)


def _tell_failed(subtask: Subtask, failed: Mapping[str, str], metrics_file: Path) -> None:
    """Names what could not be asked; it counts as wrong."""
    for name, reason in list(failed.items())[:FAILED_SHOWN]:
        log.warning("%s: %s could not be asked: %s", subtask.name, shown_text(name), one_line(reason))
    if len(failed) > FAILED_SHOWN:
        log.warning("%s: %d could not be asked; %s names all", subtask.name, len(failed), metrics_file)


def _entries(subtask: Subtask, scored: Scored | None, done: Asked, *, asked: int) -> dict[str, Any]:
    """What `metrics.json` says of a task."""
    losses = {"failed": done.failed, "cut_texts": len(done.cut)}
    if scored is None:
        note = "the publisher keeps the answers of this file"
        return {"metrics": {}, "n": asked, **losses, "note": note}
    return {
        "metrics": scored.metrics,
        "intervals_95": intervals(scored),
        "n": scored.n,
        "settings": {"answer_by": subtask.answer_by, "beams": str(subtask.search.beams), **scored.settings},
        **losses,
    }


def _at_the_top(tasks: Mapping[str, Any], headlines: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The headline of the one task that has an accuracy."""
    if len(headlines) == 1:
        return next(iter(headlines.values()))
    return {"n": next(iter(tasks.values()))["n"]} if len(tasks) == 1 else {}


def _headline(scored: Scored, examples: Sequence[Example]) -> dict[str, Any]:
    return {
        "accuracy": scored.metrics["accuracy"] / 100,
        "n": scored.n,
        "by_kind": by_kind(examples, scored.per_item),
    }


def by_kind(examples: Sequence[Example], shares: Mapping[str, float]) -> dict[str, dict[str, float | int]]:
    """The mean of the examples' shares of the headline, by `extra["kind"]`."""
    kinds: dict[str, list[float]] = {}
    for example in examples:
        if "kind" in example.extra and example.id in shares:
            kinds.setdefault(str(example.extra["kind"]), []).append(shares[example.id])
    return {kind: {"accuracy": sum(right) / len(right), "n": len(right)} for kind, right in sorted(kinds.items())}


def _write(path: Path, answers: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        for name, text in answers.items():
            stream.write(json.dumps({"id": name, "answer": text}, ensure_ascii=False) + "\n")
