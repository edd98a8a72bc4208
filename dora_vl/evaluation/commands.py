"""`dora-vl evaluate`: an adapter, a model without one, or a file of predictions, scored on benchmarks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

from dora_vl.data.check import add_columns, columns_of
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder
from dora_vl.errors import UserError, aligned, one_line, positive, shown
from dora_vl.evaluation.ask_command import add_model_options
from dora_vl.evaluation.baselines import Exchange, compared, digest, exchanged, right_text
from dora_vl.evaluation.benchmarks import EvaluationSet, find_benchmark, read_set
from dora_vl.evaluation.predictions import METRICS, Predictions, read_rows, refuse_anothers, write_metrics
from dora_vl.evaluation.questions import as_question, with_middle_frame
from dora_vl.evaluation.scores.benchmark import Scorer, correct_index, join
from dora_vl.evaluation.scores.exact import CLOZE, final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import RESAMPLES, Scored, intervals, paired_differences
from dora_vl.files import file_sha256, whole_file, write_json_lines

if TYPE_CHECKING:
    from dora_vl.evaluation.ask import Asker, By

TASKS: Mapping[str, str] = {"vqav2_karpathy": "vqav2"}
"""Benchmark -> the task that a VL-BART is asked it as, where the names differ."""
WAYS: Mapping[str, By] = {"generation": "generation", "likelihood": "letters", CLOZE: CLOZE}
"""`--answer-by` -> how a model is asked."""
DESCRIPTION = """\
Scores a model on published benchmarks, or one of your own, as official scripts do, with 95 % intervals.

  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope,gqa --images data --to runs/my/evaluation
  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope --against runs/other/adapter
  dora-vl evaluate --model OWNER/NAME --benchmarks pope --images data --to runs/base
  dora-vl evaluate --benchmarks yc2c --predictions my_captions.jsonl
  dora-vl evaluate --adapter runs/demo/adapter --benchmarks exact_match=runs/demo/data/test.json \\
      --images runs/demo/assets/easy_vqa --answer-after ", so "
  dora-vl evaluate --adapter runs/commonsense/adapter --benchmarks ARC-Easy,piqa --answer-by cloze --records cloze
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
        choices=("generation", "likelihood", CLOZE),
        default="generation",
        help="likelihood: of choices the likeliest letter; cloze: the likeliest ending, as lm-eval scores commonsense "
        "sets (default: generation)",
    )
    parser.add_argument(
        "--no-exchange",
        action="store_true",
        help="leaves out asking at most 200 questions again about others' pictures, which shows whether they count",
    )
    add_columns(parser)
    add_model_options(parser)
    parser.add_argument("--all-metrics", action="store_true", help="the table shows parts of sets too")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Answers once all benchmarks are read, scores, writes; yields the lines to print in a launch's first process."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    sets = _sets(options) if is_alone or options.predictions else []  # before a model's libraries, which take a while
    if options.predictions is not None:
        if options.against is not None and options.against.is_dir():
            raise UserError("--predictions is compared with another predictions file; --against names a folder")
        to = options.to or options.predictions.parent / "evaluation"
        refuse_anothers(to / METRICS)
        against = None if options.against is None else _from_file(options.against, sets[0], options)
        yield from finish(sets, _from_file(options.predictions, sets[0], options), against, options, to)
        return
    from dora_vl.adapters.files import WEIGHTS_FILE
    from dora_vl.evaluation.ask import check_pictures, joined_launch
    from dora_vl.run.launch import cause_speaks_first, is_first_rank

    with cause_speaks_first(), joined_launch():  # all processes of a launch ask; the first scores
        sets = sets or _sets(options)
        if options.to is None and options.adapter is None:
            raise UserError("say with --to where the results go; beside --model there is no run they belong to")
        to = options.to or options.adapter.parent / "evaluation"
        refuse_anothers(to / METRICS)
        for dataset in sets:
            images = (path for example in dataset.examples for path in example.images)
            check_pictures(images, options.images, of=dataset.name, setting="--images")
        predictions, exchanges = _ask(
            sets, options.adapter, options.model, options, to, exchange=not options.no_exchange
        )
        against, folder = None, options.against
        if folder is not None and not folder.is_dir():
            against = _from_file(folder, sets[0], options)
        elif folder is not None:
            is_adapter = (folder / WEIGHTS_FILE).is_file() and not (folder / "config.json").is_file()
            adapter, model = (folder, None) if is_adapter else (None, str(folder))
            against, _ = _ask(sets, adapter, model, options, to / "against", exchange=False)
        if is_first_rank():
            yield from finish(sets, predictions, against, options, to, exchanges)


def _sets(options: argparse.Namespace) -> list[EvaluationSet]:
    """The benchmarks, once the options go together."""
    requests = [request for request in options.benchmarks.split(",") if request]
    names = [find_benchmark(request.partition("=")[0]).name for request in requests]
    modes = _modes(options, names)
    if not requests or len(set(names)) < len(names):
        raise UserError(f"--benchmarks {shown(options.benchmarks)} must name at least one benchmark, each once")
    if [options.adapter, options.model, options.predictions].count(None) != 2:
        raise UserError(
            "give --adapter DIR or --model FOLDER to ask a model, or --predictions FILE to score answers, one of these"
        )
    if options.against is not None and not options.against.exists():
        raise UserError(f"--against {options.against}: no such adapter, model or predictions file")
    for name in ("predictions", "against"):
        path: Path | None = getattr(options, name)
        if len(requests) > 1 and path is not None and not path.is_dir():
            raise UserError(f"--{name} holds one benchmark's answers; --benchmarks names {len(requests)}")
    sets = [
        read_set(request, options.records, mode=modes.get(name), limit=options.limit, columns=columns_of(options))
        for request, name in zip(requests, names, strict=True)
    ]
    without = [dataset.name for dataset in sets if not dataset.benchmark.chooses]
    if options.answer_by == "likelihood" and without:
        raise UserError(
            f"--answer-by likelihood compares the letters of choices, and {without[0]} has none; leave it out"
        )
    return sets


def _modes(options: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Benchmark -> version of its score, where one is named."""
    modes = dict.fromkeys(names, CLOZE) if options.answer_by == CLOZE else {}
    for text in options.mode:
        name, _, modes[name] = text.partition("=")
        if not modes[name]:
            raise UserError(f"--mode {text}: write it as NAME=VERSION, such as vqav2=before_2021")
    if strange := sorted(modes.keys() - set(names)):
        raise UserError(f"--mode names {strange[0]}, which --benchmarks does not")
    if options.predictions is None and (CLOZE in modes.values()) != (options.answer_by == CLOZE):
        raise UserError(f"--mode NAME={CLOZE} scores log-likelihoods; ask for them by --answer-by {CLOZE}")
    return modes


def _from_file(path: Path, dataset: EvaluationSet, options: argparse.Namespace) -> dict[str, Predictions]:
    """A file's answers; one to a record that cannot be read is none, as nothing says what would be right."""
    unlimited = (
        dataset
        if options.limit is None
        else read_set(dataset.request, options.records, mode=None, limit=None, columns=columns_of(options))
    )
    joined = join(dataset.benchmark, unlimited.examples, read_rows(path), path=path, questions=dataset.file)
    readable = {*joined.strangers, *({example.id for example in dataset.examples} - dataset.unreadable.keys())}
    rows = [row for row in joined.rows if row.id in readable]
    return {
        dataset.name: replace(joined, rows=rows, failed=dataset.unreadable, sha256={"predictions": file_sha256(path)})
    }


def _ask(
    sets: Sequence[EvaluationSet],
    adapter: Path | None,
    model: str | None,
    options: argparse.Namespace,
    to: Path,
    *,
    exchange: bool,
) -> tuple[dict[str, Predictions], dict[str, Exchange]]:
    """Every benchmark put to one model, and where `exchange` says so a sample of it about others' pictures."""
    from dora_vl.backbones.families import sees_pictures
    from dora_vl.evaluation.open_model import ModelRequest, find_source, hashes, open_model
    from dora_vl.run.base import VLBART

    about_adapter = {} if adapter is None else {"base": options.base, "any_base": options.any_base}
    source = find_source(ModelRequest(adapter=adapter, model=model, template=options.template, **about_adapter))
    shows = next(
        (dataset.name for dataset in sets if any(example.images or example.videos for example in dataset.examples)),
        None,
    )
    if source.kind != VLBART and not sees_pictures(source.base, source.revision) and shows is not None:
        raise UserError(
            f"{shows} shows pictures or videos, and {adapter or source.base} is a language model, which takes "
            "none; a run on commonsense sets is tested by dora-vl train RUN.yaml --test_only true"
        )
    if options.answer_by != "generation" and source.kind == VLBART:
        raise UserError(f"{adapter}: a VL-BART answers each task as it was trained; leave --answer-by out")
    sha256, recipe = hashes(source), source.recipe
    pictures = MediaFolder(options.images, options.follow_links, as_published=bool(recipe.get("as_published")))
    made_with = {f"{name}_sha256": value for name, value in sha256.items()}
    ask_set = partial(_ask_set, open_model(source).adapted, options=options, pictures=pictures)
    predictions: dict[str, Predictions] = {}
    exchanges: dict[str, Exchange] = {}
    for dataset in sets:
        examples = [example for example in dataset.examples if example.id not in dataset.unreadable]
        answered = ask_set(dataset, examples, to / dataset.name, made_with)
        predictions[dataset.name] = replace(answered, failed={**dataset.unreadable, **answered.failed}, sha256=sha256)
        if exchange and dataset.scorer is not None:
            sample = exchanged(dataset.scored, answered.answers, together=dataset.benchmark.together)
            folder, extra = to / dataset.name / "exchanged", {**made_with, "exchanged": digest(sample)}
            others = ask_set(dataset, sample, folder, extra) if sample else Predictions()
            exchanges[dataset.name] = Exchange(examples=sample, answers=others.answers)
    return predictions, exchanges


def _ask_set(
    model: Asker,
    dataset: EvaluationSet,
    examples: Sequence[Example],
    folder: Path,
    depends_on: Mapping[str, object],
    *,
    options: argparse.Namespace,
    pictures: MediaFolder,
) -> Predictions:
    """Examples of a benchmark put to a model: to a VL-BART as the task that it was trained on, else by the prompt."""
    from dora_vl.evaluation.ask import Assistant, Decoding, ask_together, media_reader

    benchmark = dataset.benchmark
    frames, by_likelihood = options.frames or benchmark.frames, options.answer_by != "generation"
    decoding = Decoding(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or benchmark.max_new_tokens,
        workers=options.workers,
        by=WAYS[options.answer_by],
        task=TASKS.get(dataset.name, dataset.name),
        letters=not benchmark.labels_choices,
    )
    settings: dict[str, object] = {
        **depends_on,
        "questions_sha256": file_sha256(dataset.file),
        "images": str(options.images.resolve()),
        "max_new_tokens": decoding.max_new_tokens,
    }
    one_length, prompt = False, None
    if isinstance(model, Assistant):
        examples, prompt = [*map(with_middle_frame, examples)], benchmark.prompt
        one_length = model.prompts.encoder.videos_of_one_length
        settings["prompt"] = prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt)
        if any(example.videos for example in examples):
            settings["frames"] = frames
        if by_likelihood:
            settings["answers"] = options.answer_by
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
        **({"frames": frames} if any(example.videos for example in dataset.examples) else {}),
        **({"answer_by": options.answer_by} if by_likelihood else {}),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return replace(predictions, options=asked_with)


# From predictions to scores and files. A benchmark is scored before anything of it is written, and one that cannot be
# scored takes no other one with it.


SCORES = "scores.jsonl"
LONGEST_REASON = 300


def finish(
    sets: Sequence[EvaluationSet],
    predictions: Mapping[str, Predictions],
    against: Mapping[str, Predictions] | None,
    options: argparse.Namespace,
    to: Path,
    exchanges: Mapping[str, Exchange] = MappingProxyType({}),
) -> Iterator[str]:
    """Scores, writes metrics, single scores and submissions; yields what there is to say.

    A benchmark that cannot be scored is refused at the end, when what the others have is written.
    """
    entries: dict[str, dict[str, Any]] = {}
    baselines: list[str] = []
    reasons: dict[str, str] = {}
    for dataset in sets:
        name, answered, scored, lines = dataset.name, predictions[dataset.name], None, []
        rival = None if against is None else against[name]
        try:
            write = dataset.benchmark.submissions.get(dataset.mode, dataset.benchmark.submission)
            submission = None if write is None else write(dataset.examples, answered.answers)
            if dataset.scorer is not None:  # else a judge or a server scores
                scored, entries[name], lines = _result(dataset, answered, rival, options, exchanges.get(name))
        except (UserError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            unreadable = (  # an installed package's scorer trips too
                f"{dataset.file}: a record holds something that the scorer of {name} cannot read "
                f"({type(error).__name__}: {shown(str(error), 120)}); prepare the set again"
            )
            failure = error if isinstance(error, UserError) else UserError(unreadable)
            if len(sets) == 1:
                raise failure from (None if failure is error else error)
            reasons[name] = one_line(str(failure), LONGEST_REASON)
            continue
        baselines += [f"{name}: {line}" for line in lines]
        yield from _write(dataset, scored, answered, submission, to / name)
    if entries:
        yield from table(entries, details=options.all_metrics)
        yield from baselines
    finished = [dataset.name for dataset in sets if dataset.name not in reasons]
    if finished:
        first = sets[0].name
        origin = {
            "answers_of": str(options.adapter or options.model or options.predictions),
            "answers_sha256": predictions[first].sha256,
            "against": None if options.against is None else str(options.against),
            "against_sha256": None if against is None else against[first].sha256,
            "limit": options.limit,
        }
        asked_with = {name: dict(answered.options) for name, answered in predictions.items() if answered.options}
        yield from write_metrics(to / METRICS, origin, entries, evaluated=finished, options=asked_with)
    if reasons:
        (name, reason), *_ = reasons.items()
        raise UserError(f"{len(reasons)} of {len(sets)} benchmarks not scored: {', '.join(reasons)}; {name}: {reason}")


def _score(dataset: EvaluationSet, predictions: Predictions, scorer: Scorer) -> Scored:
    answers = {name: answer for name, answer in predictions.answers.items() if name not in dataset.not_scored}
    scored = scorer(dataset.scored, answers)
    if dataset.mode:
        scored.settings.setdefault("mode", dataset.mode)
    if predictions.joined_by:
        scored.settings.setdefault("answers found by", predictions.joined_by)
    return scored


def _result(
    dataset: EvaluationSet,
    answered: Predictions,
    rival: Predictions | None,
    options: argparse.Namespace,
    exchange: Exchange | None,
) -> tuple[Scored, dict[str, Any], list[str]]:
    """A benchmark's score, what `metrics.json` holds about it, and what to say of its baselines."""
    scorer, after = dataset.scorer, options.answer_after
    assert scorer is not None
    if dataset.name == "exact_match" and after:
        scorer = partial(exact_match, answer_after=after)
    scored = _score(dataset, answered, scorer)
    benchmark = dataset.benchmark

    def says(example: Example) -> str:
        """The right answer as a model says it: a choice's label or letter, else the words that are compared."""
        if dataset.mode == CLOZE:  # it says numbers
            return ""
        if not benchmark.chooses and not benchmark.labels_choices:
            return final_answer(right_text(example), after)
        index = correct_index(example)
        return f"a{index}" if benchmark.labels_choices else ascii_uppercase[index]

    baselines, lines = compared(scored, dataset.scored, answered.answers, scorer, says=says, exchange=exchange)
    limits = intervals(scored)
    apart = {} if rival is None else paired_differences(scored, _score(dataset, rival, scorer))
    differences = {name: asdict(difference) for name, difference in apart.items()}
    entry = {
        "file": str(dataset.file),
        "file_sha256": file_sha256(dataset.file),
        "headline": next(iter(scored.metrics)),
        "n": scored.n,
        "metrics": {
            name: {
                "value": value,
                "interval_95": list(limits[name]) if name in limits else None,
                "n": scored.items_of(name),
            }
            for name, value in scored.metrics.items()
        },
        "settings": scored.settings,
        "without_answer": len(scored.failed),
        "failed": {name: answered.failed.get(name, "the predictions hold no answer") for name in scored.failed},
        **({"not_scored": dict(dataset.not_scored)} if dataset.not_scored else {}),
        "bootstrap": {"resamples": RESAMPLES, "units": len(scored.columns)},
        **({"difference": differences} if differences else {}),
        "baselines": baselines,
    }
    return scored, entry, lines


def table(entries: Mapping[str, Mapping[str, Any]], *, details: bool = False) -> list[str]:
    """One line for each metric, the benchmark's name on its first; with `details` also of parts of a set ("/")."""
    paired = any("difference" in entry for entry in entries.values())
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    rows = [head + (["difference", "95 % interval"] if paired else [])]
    for name, entry in entries.items():
        of_set = [name, str(entry["n"]), str(entry["without_answer"])]
        for metric, numbers in entry["metrics"].items():
            if "/" in metric and not details:
                continue
            limits, apart = numbers["interval_95"], entry.get("difference", {}).get(metric)
            interval = "" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"
            row = [of_set[0], metric, f"{numbers['value']:.2f}", interval, *of_set[1:]]
            if paired and apart is not None:
                row += [f"{apart['value']:+.2f}", f"{apart['low']:+.2f} to {apart['high']:+.2f}"]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
            of_set = ["", "", ""]
    return aligned(rows, left=2)


def _write(
    dataset: EvaluationSet,
    scored: Scored | None,
    answered: Predictions,
    submission: tuple[str, str] | None,
    folder: Path,
) -> Iterator[str]:
    """Writes a benchmark's submission and single scores, if it is scored here."""
    if answered.strangers:
        count, first = len(answered.strangers), shown(answered.strangers[0])
        yield f"{dataset.name}: {count} answers belong to none of its questions and are left out, first {first}"
    if submission is not None:
        name, text = submission
        with whole_file(folder / name) as stream:
            stream.write(text)
        yield f"{folder / name}: for {dataset.name}'s server or judge"
    if scored is None:
        (folder / SCORES).unlink(missing_ok=True)  # of another split, asked before
        yield f"{dataset.name}: {dataset.file} holds no answers, or a judge scores it; no score here"
        return
    if dataset.not_scored:
        bare = list(dataset.not_scored)
        yield (
            f"{dataset.name}: {len(bare)} of {len(dataset.examples)} records hold no right answer and are in no "
            f"score, first {shown(bare[0])}; metrics.json names all"
        )
    write_json_lines(folder / SCORES, scored.rows())
