"""What a score is compared with: each question's commonest answer, pictures exchanged, and the untrained base."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from dora_vl.data.example import MIDDLE_FRAME, Clip, Example
from dora_vl.evaluation.scores.benchmark import GroupKey, Scorer
from dora_vl.evaluation.scores.scored import Scored, in_units, intervals, paired_differences
from dora_vl.files import json_or_nothing

MOST_EXCHANGED, SEED = 200, 0
LEAST_ASKED = 5
"""A question asked less often has no commonest answer of its own: that would often be the very answer it judges."""
COMMONEST, EXCHANGED, UNTRAINED = "commonest_answer", "exchanged_pictures", "untrained_base"
READABLE, WARNING, ADVICE = "readable", "warning", "advice"
COMPARISONS: Mapping[str, tuple[str, str]] = {
    EXCHANGED: ("with_their_own", "with pictures exchanged {}; of the same with their own"),
    UNTRAINED: ("with_the_adapter", "the base without the adapter {}; of the same with it"),
}
"""Maps other answers to what `metrics.json` calls the model's own score, and to the line to print."""
ASKED_AGAIN = tuple(COMPARISONS)
"""Sets whose names end with these are in `predictions.jsonl` only for a comparison."""
ADVICE_SHARE = 0.05
"""Settings to try are named if this share of the questions is readable but not learned."""
CHANGED_SHARE = 0.1
"""Answers depend on the pictures if at least this share changes with them."""
RISEN = 1.1
"""A validation loss that ends at more than this multiple of its lowest has risen."""
CHOSEN, UNLIKELY = "log_probs/chosen", -2.0
"""This field of a log line is the log-probability of chosen answers; below this they are said once in seven times."""
BY_HEART = 0.05
"""A training loss below this, in nats per token, gives each token of the training answers 95 % or more."""
DESCRIPTIONS = {
    COMMONEST: f"the test's own commonest right answer to each question that it asks {LEAST_ASKED} times or more, to "
    "all other questions together one; no model",
    EXCHANGED: f"questions drawn by seed {SEED}, at most {MOST_EXCHANGED}, each with the pictures of another of them "
    "that shows as many and not the same",
    UNTRAINED: f"questions drawn by seed {SEED}, at most {MOST_EXCHANGED}, asked of the base without the adapter",
    READABLE: "a linear probe from what the base's frozen vision part gives for a picture to the training answers, by "
    f"`dora-vl init`; one for each question that is asked {LEAST_ASKED} times or more, one for all others",
}
MediaKey = tuple[tuple[str, ...], tuple[Clip, ...]]


@dataclass(frozen=True, kw_only=True)
class ComparisonAnswers:
    """A sample of a test's examples, and by id the answers with exchanged pictures, or those of the base."""

    examples: Sequence[Example]
    answers: Mapping[str, str]


def compare_with_baselines(
    scored: Scored,
    examples: Sequence[Example],
    answers: Mapping[str, str],
    score: Scorer,
    *,
    right_answer_of: Callable[[Example], str],
    exchange: ComparisonAnswers | None,
    readable: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[str]]:
    """Returns a score's baselines for `metrics.json`, and the lines to print, a warning last.

    Args:
        right_answer_of: the right answer as a model says it; "" where the file holds none.
        readable: the answers that a linear probe reads from the base's pictures, by id; see `readable_answers`.
    """
    metric = next(iter(scored.metrics))
    entry: dict[str, Any] = {"metric": metric}
    lines: list[str] = []
    if commonest := commonest_answers(examples, right_answer_of):
        baseline, text = _baseline(score(examples, commonest), metric)
        entry[COMMONEST] = {**baseline, "how": DESCRIPTIONS[COMMONEST]}
        lines.append(f"{metric} of each question's commonest answer {text}")
    if probed := [example for example in examples if example.id in readable]:
        of_probe = score(probed, readable)
        baseline, text = _baseline(of_probe, metric)
        kinds = by_question(examples, of_probe.shares, scored.shares)
        entry[READABLE] = {**baseline, "how": DESCRIPTIONS[READABLE], "questions": kinds}
        lines.append(f"{metric} that a linear probe reads from the base's pictures {text}")
        lines += [f"{name}: {text}" for name, text in probe_lines(kinds).items()]
    if exchange is not None and not exchange.examples and any(any(_media(example)) for example in examples):
        lines.append("no pictures were exchanged: no two questions show the same number of different pictures")
    if exchange is None or not exchange.examples:
        return entry, lines
    part, line = compare_with(EXCHANGED, exchange, examples, answers, score)
    changed = sum(answers.get(name, "").strip() != text.strip() for name, text in exchange.answers.items())
    entry[EXCHANGED] = {**part, "changed": changed}
    lines.append(f"{line}; {changed:,} of these {part['n']:,} answers change")
    difference = part["difference"]
    # It may well be chance. Where no answer is right, the difference says nothing.
    if difference is not None and difference["low"] <= 0 <= difference["high"] and part["with_their_own"] > 0:
        beginning = "change with the pictures, but not for the better"
        if changed < CHANGED_SHARE * part["n"]:
            beginning = "do not seem to depend on the pictures"
        entry[WARNING] = (
            f"the answers {beginning}: over {part['n']} questions, of which {changed} get another answer, {metric} "
            f"with their own pictures minus {metric} with exchanged ones is {difference['value']:+.2f} (95 % interval "
            f"{difference['low']:+.2f} to {difference['high']:+.2f}). If the questions cannot be answered without "
            "looking, try a base whose projector is trained (or adapter.train_projector: true) or more pictures"
        )
        lines.append(entry[WARNING])
    return entry, lines


def advice(entry: Mapping[str, Any], log: Sequence[Mapping[str, Any]], *, score: float) -> str | None:
    """Says what limits a training that left much to be learned, and what to try; None after others.

    Args:
        entry: the baselines that `score` was compared with.
        log: the lines of the training's `log.jsonl`.
    """
    losses, chosen = (
        [(line["step"], line[key]) for line in log if isinstance(line.get(key), float)] for key in ("eval_loss", CHOSEN)
    )
    kinds = entry[READABLE]["questions"].values() if READABLE in entry else ()
    missed = sum(max(0.0, kind[READABLE] - kind["learned"]) for kind in kinds if READABLE in kind)
    is_missed = missed > 0 and missed >= ADVICE_SHARE * entry[READABLE]["n"]
    if chosen and chosen[-1][1] < UNLIKELY and (is_missed or score < entry.get(COMMONEST, {"value": 0.0})["value"]):
        return (
            f"the chosen answers are unlikely at the end of training (log-probability {chosen[-1][1]:.1f} each): the "
            "model must learn to say them, not only to prefer them. Add sft to objective.loss, such as {dpo: 1, sft: 1}"
        )
    if not is_missed:
        return None
    beginning, rates = "the base's picture features hold more than was learned", "optim.projector_learning_rate"
    # Losses of preferences and rewards, beside which rewards are logged, may be low with nothing learned.
    of_words = [line["loss"] for line in log if "loss" in line and not any(key.startswith("rewards/") for key in line)]
    last = of_words[-(len(of_words) // 10 + 1) :]
    if last and (loss := sum(last) / len(last)) < BY_HEART:
        return (
            f"{beginning}, and the training rows are known by heart (loss {loss:.2g} at the end): add rows about other "
            "pictures (more epochs show it nothing new)"
        )
    step, lowest = min(losses, key=lambda measured: measured[1], default=(0, 0.0))
    if losses and losses[-1][1] > RISEN * lowest:
        return (
            f"{beginning}, and the validation loss was lowest at step {step} ({lowest:.3g}; at the end "
            f"{losses[-1][1]:.3g}): training.load_best_model_at_end: true keeps that step, optim.early_stopping: 2 "
            f"stops soon after it. Try a lower training.learning_rate or {rates}"
        )
    return (
        f"{beginning}: try more epochs (training.num_train_epochs), another rate (training.learning_rate, {rates}), a "
        "higher adapter.rank"
    )


def compare_with(
    name: str, other: ComparisonAnswers, examples: Sequence[Example], answers: Mapping[str, str], score: Scorer
) -> tuple[dict[str, Any], str]:
    """Compares other answers to some examples with the model's own, for `metrics.json` and as a line."""
    by_id = {example.id: example for example in examples}
    sample = [by_id[example.id] for example in other.examples]
    own, others = (
        score(sample, {example.id: texts[example.id] for example in sample if example.id in texts})
        for texts in (answers, other.answers)
    )
    metric = next(iter(own.metrics))
    baseline, text = _baseline(others, metric)
    key, line = COMPARISONS[name]
    apart = paired_differences(own, others).get(metric)
    entry = {**baseline, key: own.metrics[metric], "difference": apart and asdict(apart), "how": DESCRIPTIONS[name]}
    return entry, f"{line.format(text)} {own.metrics[metric]:.2f}"


def by_question(
    examples: Sequence[Example], readable: Mapping[str, float], learned: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Counts what is readable and what was learned of each question that is asked often, and of all others together.

    A question for which a linear probe reads no answer has no number of readable ones.
    """
    times = Counter(example.question for example in examples)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for example in examples:
        often = times[example.question] >= LEAST_ASKED
        groups[example.question if often else "other questions"].append(example.id)
    return {
        name: {
            "n": len(ids),
            **({READABLE: round(sum(readable.get(key, 0.0) for key in ids), 2)} if readable.keys() & ids else {}),
            "learned": round(sum(learned.get(key, 0.0) for key in ids), 2),
        }
        for name, ids in groups.items()
    }


def probe_summary(kind: Mapping[str, float]) -> str:
    """Tells how many answers a linear probe reads; it reads none for questions whose answers rarely repeat."""
    return f"readable {kind[READABLE]:g}" if READABLE in kind else "readable unknown (its answers rarely repeat)"


def probe_lines(questions: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Tells of each question, as `by_question` counts them, what can be read and what was learned."""
    return {
        name: f"{probe_summary(kind)}, learned {kind['learned']:g} of {kind['n']:g}" for name, kind in questions.items()
    }


def readable_answers(questions: object, questions_sha256: object) -> Mapping[str, str]:
    """Reads the probe's answers beside a test's file of questions; none if that file has changed since."""
    from dora_vl.run.folder import PROBE  # it imports torch: not for --help

    probe = json_or_nothing(Path(str(questions)).with_name(PROBE)) if questions else {}
    return probe["answers"] if probe and probe["questions_sha256"] == questions_sha256 else {}


def _baseline(scored: Scored, metric: str) -> tuple[dict[str, Any], str]:
    """Returns a baseline's value with its interval, and the same as text."""
    value, limits = scored.metrics[metric], intervals(scored).get(metric)
    text = "" if limits is None else f" (95 % interval {limits[0]:.2f} to {limits[1]:.2f})"
    return {"value": value, "interval_95": limits, "n": scored.n}, f"{in_units(metric, value)} of {scored.n:,}{text}"


def commonest_answers(examples: Sequence[Example], right_answer_of: Callable[[Example], str]) -> dict[str, str]:
    """Returns the commonest right answer to each example's question, of equally common ones the first in the file.

    Questions that fewer than `LEAST_ASKED` examples ask share one, in each task with as many endings.
    """
    answerable = [
        example for example in examples if (example.question or "task" in example.extra) and right_answer_of(example)
    ]
    times = Counter(example.question for example in answerable)
    groups: defaultdict[Hashable, list[Example]] = defaultdict(list)
    for example in answerable:
        rare = example.extra.get("task"), len(example.extra.get("endings", ()))
        often = example.question and times[example.question] >= LEAST_ASKED
        groups[example.question if often else rare].append(example)
    commonest = {name: Counter(map(right_answer_of, group)).most_common(1)[0][0] for name, group in groups.items()}
    return {example.id: commonest[name] for name, group in groups.items() for example in group}


def right_text(example: Example) -> str:
    """Returns the right answer that most people gave; "" if the file holds none."""
    return max(example.answers, key=lambda answer: answer.weight).text if example.answers else ""


def exchange_pictures_of(
    examples: Iterable[Example], answered: Container[str], *, together: GroupKey | None = None
) -> list[Example]:
    """Returns a seeded sample of the answered examples, each with the pictures and videos of the next one.

    Examples of equal `together` are scored as one, and stay together.
    """
    groups: defaultdict[Any, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.id if together is None else together(example)].append(example)
    usable = [
        group for group in groups.values() if all(example.id in answered and any(_media(example)) for example in group)
    ]
    Random(SEED).shuffle(usable)
    sample: list[Example] = []
    for group in usable:
        sample += group if len(sample) + len(group) <= MOST_EXCHANGED else []
    by_shape: defaultdict[tuple[int, int], dict[MediaKey, Example]] = defaultdict(dict)
    for example in sample:
        by_shape[len(example.images), len(example.videos)].setdefault(_media(example), example)
    other: dict[MediaKey, Example] = {}
    for alike in by_shape.values():
        following = [*alike.values()][1:] + [*alike.values()][:1]
        other |= dict(zip(alike, following, strict=True)) if len(alike) > 1 else {}
    exchanged_examples: list[Example] = []
    for example in sample:
        if shown := other.get(_media(example)):
            extra = {name: value for name, value in example.extra.items() if name != MIDDLE_FRAME}
            extra |= {MIDDLE_FRAME: shown.extra[MIDDLE_FRAME]} if MIDDLE_FRAME in shown.extra else {}
            exchanged_examples.append(replace(example, images=shown.images, videos=shown.videos, extra=extra))
    return exchanged_examples


def draw_sample(examples: Sequence[Example]) -> list[Example]:
    """Returns a seeded sample of the examples; all of them if there are few."""
    return Random(SEED).sample(examples, min(MOST_EXCHANGED, len(examples)))


def digest(examples: Sequence[Example]) -> str:
    """Hashes an exchanged sample, to recognise it."""
    pairs = [(example.id, example.images, [repr(clip) for clip in example.videos]) for example in examples]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _media(example: Example) -> MediaKey:
    return example.images, example.videos
