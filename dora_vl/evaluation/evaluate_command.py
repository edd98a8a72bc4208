"""`dora-vl evaluate`: a trained adapter, or a file of predictions, scored on published benchmarks."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.data.examples import whole_file
from dora_vl.errors import UserError
from dora_vl.evaluation.answers_file import read_answers
from dora_vl.evaluation.evaluation_set import EvaluationSet, read_set
from dora_vl.evaluation.exact_match import score as exact_match
from dora_vl.evaluation.metrics_file import METRICS, Origin, refuse_anothers, write_metrics
from dora_vl.evaluation.predictions_file import file_sha256
from dora_vl.evaluation.report import Result, result, table
from dora_vl.evaluation.scored import Scored
from dora_vl.whole_numbers import positive

if TYPE_CHECKING:
    from dora_vl.evaluation.ask_model import Model

DESCRIPTION = """\
Scores a trained adapter on published benchmarks, as their official scripts do, with 95 % intervals.

  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope,gqa --images data --to runs/my/evaluation
  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope --against runs/other/adapter
  dora-vl evaluate --benchmarks yc2c --predictions my_captions.jsonl
  dora-vl evaluate --adapter runs/demo/adapter --benchmarks exact_match=runs/demo/data/test.json \\
      --images runs/demo/assets/easy_vqa --answer-after ", so "
  torchrun --nproc_per_node 8 -m dora_vl.cli evaluate ...      one process for each GPU

A benchmark is NAME (its records are looked for in records/NAME/), NAME:SPLIT or NAME=FILE. The file is records that
`dora-vl prepare` writes, or questions in LLaVA's JSON. Predictions are JSON lines with an id and an answer each. A run
that was stopped goes on where it stopped. metrics.json holds every number, also those that the table leaves out; those
of other benchmarks stay in it while they are true.
"""
SCORES = "scores.jsonl"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to one benchmark.

    Attributes:
        failed: the reason for each question that could not be asked or read, by id.
        sha256: of what gave the answers: adapter and base, or predictions.
        asked_with: the options that they were made with; empty for a predictions file.
    """

    answers: Mapping[str, str]
    failed: Mapping[str, str]
    sha256: Mapping[str, str]
    asked_with: Mapping[str, object] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--benchmarks", required=True, help="NAME, NAME:SPLIT or NAME=FILE, with commas between")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a LLaVA run")
    parser.add_argument("--predictions", type=Path, help="scores this file instead of asking a model (one benchmark)")
    parser.add_argument("--against", type=Path, help="another adapter folder or predictions file: paired difference")
    parser.add_argument("--records", type=Path, default=Path("records"), help="folder of records (default: records)")
    parser.add_argument("--images", type=Path, default=Path(), help="root of the pictures (default: here)")
    parser.add_argument("--to", type=Path, help="results (default: `evaluation` beside the adapter or predictions)")
    parser.add_argument("--mode", action="append", default=[], help="NAME=VERSION, such as vqav2=before_2021")
    parser.add_argument("--limit", type=positive, help="only the first so many examples of each benchmark")
    parser.add_argument("--batch-size", type=positive, default=32, help="questions at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest answer (default: the benchmark's own)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead (default: 0)")
    parser.add_argument("--answer-after", help="exact_match: scores what follows the last of this text in an answer")
    parser.add_argument("--base", help="where the base model is, if it moved since training")
    parser.add_argument("--any-base", action="store_true", help="accepts a base with other content than in training")
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
    answered = {sets[0].name: _from_file(options.predictions, sets[0], options.limit)}
    yield from _finish(sets, answered, _other_file(sets, options), options, to)


def _ask_and_score(options: argparse.Namespace) -> Iterator[str]:
    """All processes of a launch ask; the first scores."""
    from dora_vl.evaluation.ask import joined_launch
    from dora_vl.training.launch import first_rank_speaks, is_first_rank

    with first_rank_speaks(), joined_launch():
        sets = _sets(options)
        to = options.to or options.adapter.parent / "evaluation"
        refuse_anothers(to / METRICS)
        answered = _asked(sets, options.adapter, options, to)
        other = _other_file(sets, options)
        if other is None and options.against is not None:
            other = _asked(sets, options.against, options, to / "against")
        if is_first_rank():
            yield from _finish(sets, answered, other, options, to)


def _sets(options: argparse.Namespace) -> list[EvaluationSet]:
    requests = [one for one in options.benchmarks.split(",") if one]
    modes = dict(_pair(one) for one in options.mode)
    names = [request.partition("=")[0].partition(":")[0] for request in requests]
    if not requests or len(set(names)) < len(names):
        raise UserError(f"--benchmarks {options.benchmarks!r} must name at least one benchmark, each once")
    if strange := sorted(modes.keys() - set(names)):
        raise UserError(f"--mode names {strange[0]}, which --benchmarks does not")
    if (options.adapter is None) == (options.predictions is None):
        raise UserError("give --adapter DIR to ask a model, or --predictions FILE to score answers, one of the two")
    if options.predictions is not None and len(requests) > 1:
        raise UserError(f"--predictions holds one benchmark's answers; --benchmarks names {len(requests)}")
    if options.against is not None and not options.against.exists():
        raise UserError(f"--against {options.against}: no such adapter folder or predictions file")
    return [
        read_set(request, options.records, mode=modes.get(name), limit=options.limit)
        for request, name in zip(requests, names, strict=True)
    ]


def _pair(text: str) -> tuple[str, str]:
    name, _, mode = text.partition("=")
    if not mode:
        raise UserError(f"--mode {text}: write it as NAME=VERSION, such as vqav2=before_2021")
    return name, mode


def _from_file(path: Path, one: EvaluationSet, limit: int | None) -> Answers:
    """A file's answers; one to a record that cannot be read is none, as nothing says what would be right."""
    answers = read_answers(path)
    asked = {example.id for example in one.examples}
    if not asked & answers.keys():
        raise UserError(f"{path} and {one.file} have no id in common; were they made from the same questions?")
    if limit is not None:  # answers to the questions left out are no mistake
        answers = {name: answer for name, answer in answers.items() if name in asked}
    answers = {name: answer for name, answer in answers.items() if name not in one.unreadable}
    return Answers(answers=answers, failed=one.unreadable, sha256={"predictions": file_sha256(path)})


def _other_file(sets: Sequence[EvaluationSet], options: argparse.Namespace) -> dict[str, Answers] | None:
    """The other model's answers where --against is a file of them."""
    if options.against is None or options.against.is_dir():
        return None
    if len(sets) > 1:
        raise UserError(f"--against {options.against} holds one benchmark's answers; --benchmarks names {len(sets)}")
    return {sets[0].name: _from_file(options.against, sets[0], options.limit)}


def _asked(sets: Sequence[EvaluationSet], adapter: Path, options: argparse.Namespace, to: Path) -> dict[str, Answers]:
    """Every benchmark put to one model."""
    from dora_vl.evaluation.ask_model import open_model

    model = open_model(adapter, base=options.base, any_base=options.any_base)
    return {one.name: _ask(model, one, options, to) for one in sets}


def _ask(model: Model, one: EvaluationSet, options: argparse.Namespace, to: Path) -> Answers:
    asked = model.ask(
        one,
        folder=to / one.name,
        pictures=options.images,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or one.benchmark.max_new_tokens,
        workers=options.workers,
    )
    return Answers(
        answers=asked.answers,
        failed=asked.failed,
        sha256={"adapter": model.adapter_sha256, "base": model.base_sha256},
        asked_with={
            "images": str(options.images),
            "max_new_tokens": options.max_new_tokens or one.benchmark.max_new_tokens,
            "batch_size": options.batch_size,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        },
    )


def _finish(
    sets: Sequence[EvaluationSet],
    answered: Mapping[str, Answers],
    other: Mapping[str, Answers] | None,
    options: argparse.Namespace,
    to: Path,
) -> Iterator[str]:
    """Scores, writes metrics, single scores and submissions; yields what there is to say."""
    results: list[Result] = []
    for one in sets:
        mine, folder = answered[one.name], to / one.name
        if one.benchmark.submission is not None:
            yield f"{_write_submission(one, mine, folder)}: for {one.name}'s server or judge"
        if one.scorer is None:
            (folder / SCORES).unlink(missing_ok=True)  # of another split, asked before
            yield f"{one.name}: {one.file} holds no answers, or a judge scores it; no score here"
            continue
        scored = _score(one, mine, options)
        against = None if other is None else _score(one, other[one.name], options)
        results.append(result(scored, name=one.name, file=one.file, failed=mine.failed, against=against))
        _write_scores(scored, folder / SCORES)
    if results:
        yield from table(results, details=options.all_metrics)
    yield from write_metrics(
        to / METRICS,
        _origin(sets[0].name, answered, other, options),
        {one.name: one.entry() for one in results},
        asked=[one.name for one in sets],
        asked_with={name: dict(mine.asked_with) for name, mine in answered.items() if mine.asked_with},
    )


def _origin(
    name: str, answered: Mapping[str, Answers], other: Mapping[str, Answers] | None, options: argparse.Namespace
) -> Origin:
    """What the numbers are of: all benchmarks of a command have the same two models."""
    return Origin(
        answers_of=str(options.adapter or options.predictions),
        answers_sha256=answered[name].sha256,
        against=None if options.against is None else str(options.against),
        against_sha256=None if other is None else other[name].sha256,
        limit=options.limit,
    )


def _score(one: EvaluationSet, mine: Answers, options: argparse.Namespace) -> Scored:
    scorer = one.scorer
    if one.name == "exact_match" and options.answer_after:
        scorer = partial(exact_match, answer_after=options.answer_after)
    if scorer is None:
        raise ValueError(f"{one.name} has no scorer")
    scored = scorer(one.examples, mine.answers)
    if one.mode:
        scored.settings.setdefault("mode", one.mode)
    return scored


def _write_submission(one: EvaluationSet, mine: Answers, folder: Path) -> Path:
    if one.benchmark.submission is None:
        raise ValueError(f"{one.name} has no server")
    name, text = one.benchmark.submission(one.examples, mine.answers)
    with whole_file(folder / name) as stream:
        stream.write(text)
    return folder / name


def _write_scores(scored: Scored, path: Path) -> None:
    with whole_file(path) as stream:
        for name, share in scored.per_item.items():
            stream.write(json.dumps({"id": name, "score": share}, ensure_ascii=False) + "\n")
