"""`dora-vl evaluate`: an adapter, a model without one, or a file of predictions, scored on benchmarks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from dora_vl.data.check import add_columns, columns_of
from dora_vl.data.pictures import MediaFolder
from dora_vl.errors import UserError, align_columns, number_between, positive_int, short_repr
from dora_vl.evaluation.ask_command import add_model_options
from dora_vl.evaluation.baselines import ASKED_AGAIN
from dora_vl.evaluation.benchmarks import find_benchmark, read_set
from dora_vl.evaluation.predictions import read_foreign_predictions
from dora_vl.evaluation.questions import as_asked, with_middle_frame
from dora_vl.evaluation.scores.benchmark import match_predictions
from dora_vl.evaluation.scores.exact import CLOZE
from dora_vl.evaluation.test_sets import (
    ResultFolder,
    Tested,
    TestSet,
    refuse_unscored,
    scored,
    submission_file,
    with_baselines,
    with_differences,
)
from dora_vl.files import METRICS, SETS, file_sha256, json_or_nothing

if TYPE_CHECKING:
    from dora_vl.evaluation.predictor import Predictor

ANSWERS_OF = "answers_of"
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
    """Adds the command's options."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    add = parser.add_argument
    add("--benchmarks", required=True, help="NAME, NAME:SPLIT, NAME=FILE or FILE.yaml, commas between")
    answers = parser.add_mutually_exclusive_group(required=True)
    answers.add_argument("--adapter", type=Path, help="adapter folder of a run, or of PEFT")
    answers.add_argument("--model", help="folder or hub id of a model that is asked without an adapter")
    answers.add_argument("--predictions", type=Path, help="scores this file instead of asking a model (one benchmark)")
    add("--against", type=Path, help="another adapter, model or predictions file: paired difference")
    add("--records", type=Path, default=Path("records"), help="folder of records (default: records)")
    add("--images", type=Path, default=Path(), help="root of the pictures (default: here)")
    add("--follow-links", action="store_true", help="read pictures that are links out of that folder")
    add("--to", type=Path, help="results (default: `evaluation` beside the adapter or predictions)")
    add("--mode", action="append", default=[], help="NAME=VERSION, such as vqav2=before_2021")
    add("--limit", type=positive_int, help="only the first N examples of each benchmark")
    add("--batch-size", type=positive_int, default=32, help="questions at once (default: 32)")
    add("--max-new-tokens", type=positive_int, help="longest answer (default: the benchmark's own)")
    add("--frames", type=positive_int, help="frames of a video that are shown (default: benchmark's own)")
    add("--workers", type=number_between(int, 0), default=0, help="processes that read pictures ahead (default: 0)")
    add("--answer-after", help="exact_match: scores what follows the last of this text in an answer")
    add(
        "--answer-by",
        choices=("generation", "likelihood", CLOZE),
        default="generation",
        help="likelihood: of choices the likeliest letter; cloze: the likeliest ending, as lm-eval scores commonsense "
        "sets (default: generation)",
    )
    add(
        "--no-exchange",
        action="store_true",
        help="leaves out asking at most 200 questions again about others' pictures, which shows whether they count",
    )
    add_columns(parser)
    add_model_options(parser)
    add("--all-metrics", action="store_true", help="the table shows parts of sets too")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Asks, scores and writes; yields the lines to print in a launch's first process."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    sets = _sets(options) if is_alone or options.predictions else []  # before a model's libraries, which take a while
    if options.predictions is not None:
        if options.against is not None and options.against.is_dir():
            raise UserError("--predictions is compared with another predictions file; --against names a folder")
        to = options.to or options.predictions.parent / "evaluation"
        refuse_foreign_metrics(to / METRICS)
        tested = with_baselines(_from_file(options.predictions, sets[0], options), None)
        against = None if options.against is None else _from_file(options.against, sets[0], options)
        sha256 = {"predictions": file_sha256(options.predictions)}
        results = open_results(to, sets, str(options.predictions), sha256, options)
        yield from report_results([tested], None if against is None else [against], results, options)
        return
    from dora_vl.adapters.files import WEIGHTS_FILE
    from dora_vl.evaluation.predict import joined_launch
    from dora_vl.evaluation.predictor import check_pictures
    from dora_vl.run.launch import first_rank_reports_first, is_first_rank

    with first_rank_reports_first(), joined_launch():  # all processes of a launch ask; the first scores
        sets = sets or _sets(options)
        if options.to is None and options.adapter is None:
            raise UserError("--model needs --to, the folder for the results")
        to = options.to or options.adapter.parent / "evaluation"
        refuse_foreign_metrics(to / METRICS)
        for test in sets:
            images = (path for example in test.examples for path in example.images)
            check_pictures(images, options.images, of=test.name, setting="--images")
        tested, results = _evaluate_model(
            sets, options.adapter, options.model, options, to, exchange=not options.no_exchange
        )
        against, folder = None, options.against
        if folder is not None and not folder.is_dir():
            against = [_from_file(folder, sets[0], options)]
        elif folder is not None:
            is_adapter = (folder / WEIGHTS_FILE).is_file() and not (folder / "config.json").is_file()
            adapter, model = (folder, None) if is_adapter else (None, str(folder))
            against, _ = _evaluate_model(sets, adapter, model, options, to / "against", exchange=False)
        if is_first_rank():
            yield from report_results(tested, against, results, options)


def _sets(options: argparse.Namespace) -> list[TestSet]:
    """Reads the benchmarks, after checking that the options go together."""
    requests = [request for request in options.benchmarks.split(",") if request]
    named = {find_benchmark(request.partition("=")[0]).name: request for request in requests}
    modes = _modes(options, named)
    if not requests or len(named) < len(requests):
        raise UserError(f"--benchmarks {short_repr(options.benchmarks)} must name at least one benchmark, each once")
    if options.against is not None and not options.against.exists():
        raise UserError(f"--against {options.against}: no such adapter, model or predictions file")
    for name in ("predictions", "against"):
        path: Path | None = getattr(options, name)
        if len(requests) > 1 and path is not None and not path.is_dir():
            raise UserError(f"--{name} holds one benchmark's answers; --benchmarks names {len(requests)}")
    sets = [_read_set(options, request, options.limit, modes.get(name)) for name, request in named.items()]
    without = [test.name for test in sets if not test.benchmark.chooses]
    if options.answer_by == "likelihood" and without:
        message = f"--answer-by likelihood compares the letters of choices, and {without[0]} has none; leave it out"
        raise UserError(message)
    return sets


def _read_set(options: argparse.Namespace, request: str, limit: int | None, mode: str | None = None) -> TestSet:
    columns, after = columns_of(options), options.answer_after
    return read_set(request, options.records, mode=mode, limit=limit, columns=columns, answer_after=after)


def _modes(options: argparse.Namespace, names: Collection[str]) -> dict[str, str]:
    """Returns the version of a benchmark's score by its name, where one is stated."""
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


def _from_file(path: Path, test: TestSet, options: argparse.Namespace) -> Tested:
    """Scores a file's answers; answers to records that cannot be read are left out."""
    request = options.benchmarks.strip(",")  # a file answers one benchmark
    examples = test.examples if options.limit is None else _read_set(options, request, None).examples
    predictions = read_foreign_predictions(path)
    if any(prediction.set for prediction in predictions):  # our own file: a question's id may be in several sets
        own = [prediction for prediction in predictions if prediction.set == test.name]
        predictions = own or [prediction for prediction in predictions if not prediction.set.endswith(ASKED_AGAIN)]
        if len(several := {prediction.set for prediction in predictions}) > 1:
            raise UserError(f"{path}: holds answers to {', '.join(sorted(several))}, and none to {test.name}")
    questions = Path(str(test.about["file"]))
    joined = match_predictions(test.benchmark, examples, predictions, path=path, questions=questions)
    readable = {*joined.strangers, *({example.id for example in test.examples} - test.unreadable.keys())}
    return scored(test, replace(joined, answered=[answer for answer in joined.answered if answer.id in readable]))


def _evaluate_model(
    sets: Sequence[TestSet],
    adapter: Path | None,
    model: str | None,
    options: argparse.Namespace,
    to: Path,
    *,
    exchange: bool,
) -> tuple[list[Tested], ResultFolder]:
    """Asks a model every benchmark and scores it; with `exchange` also about others' pictures."""
    from dora_vl.backbones.base import sees_pictures
    from dora_vl.evaluation.open_model import ModelRequest, find_source, model_hashes, open_model
    from dora_vl.evaluation.predict import evaluate
    from dora_vl.run.base import VLBART

    about_adapter = {} if adapter is None else {"base": options.base, "any_base": options.any_base}
    source = find_source(ModelRequest(adapter=adapter, model=model, template=options.template, **about_adapter))
    shows = next(
        (test.name for test in sets if any(example.images or example.videos for example in test.examples)), None
    )
    if source.kind != VLBART and not sees_pictures(source.base, source.revision) and shows is not None:
        raise UserError(
            f"{shows} shows pictures or videos, and {adapter or source.base} is a language model, which takes "
            "none; a run on commonsense sets is tested by dora-vl train RUN.yaml --test_only true"
        )
    if options.answer_by != "generation" and source.kind == VLBART:
        raise UserError(f"{adapter}: a VL-BART answers each task as it was trained; leave --answer-by out")
    sha256, recipe = model_hashes(source), source.recipe
    pictures = MediaFolder(options.images, options.follow_links, as_published=bool(recipe.get("as_published")))
    opened = open_model(source).adapted
    prepared = [_prepare_set(opened, test, sha256, options, pictures) for test in sets]
    results = open_results(to, sets, str(adapter or model), sha256, options)
    try:
        return evaluate(prepared, opened, results, exchange=exchange), results
    finally:
        for part in prepared:
            if part.media is not None:
                part.media.close()


def _prepare_set(
    model: Predictor, test: TestSet, sha256: Mapping[str, str], options: argparse.Namespace, pictures: MediaFolder
) -> TestSet:
    """Prepares a benchmark for a model: a VL-BART is asked by the task of its training, others by the prompt."""
    from dora_vl.evaluation.assistant import Assistant
    from dora_vl.evaluation.predictor import Decoding, media_reader

    benchmark = test.benchmark
    frames, by_likelihood = options.frames or benchmark.frames, options.answer_by != "generation"
    has_videos = any(example.videos for example in test.examples)
    decoding = Decoding(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or benchmark.max_new_tokens,
        workers=options.workers,
        answer_method="letters" if options.answer_by == "likelihood" else options.answer_by,
        task="vqav2" if test.name == "vqav2_karpathy" else test.name,
        letters=not benchmark.labels_choices,
    )
    settings: dict[str, object] = {
        **{f"{name}_sha256": value for name, value in sha256.items()},
        "questions_sha256": test.about["file_sha256"],
        "images": str(options.images.resolve()),
        "max_new_tokens": decoding.max_new_tokens,
    }
    one_length = False
    if isinstance(model, Assistant):
        prompt = benchmark.prompt
        one_length = model.encoder.videos_of_one_length
        settings["prompt"] = prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt)
        settings |= {"frames": frames} if has_videos else {}
        settings |= {"answers": options.answer_by} if by_likelihood else {}
        test = replace(test, prompt=lambda example: as_asked(with_middle_frame(example), prompt))
    asked_with = {
        "images": str(options.images),
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": options.batch_size,
        **({"frames": frames} if has_videos else {}),
        **({"answer_by": options.answer_by} if by_likelihood else {}),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    media = media_reader(pictures, frames=frames, one_length=one_length)
    about = {**test.about, "asked_with": asked_with}
    return replace(test, decoding=decoding, settings=settings, media=media, about=about)


# What the files of an earlier command hold stays while it is true.


def refuse_foreign_metrics(path: Path) -> None:
    """Refuses to replace a metrics file that was not written here, such as a training run's own."""
    if (content := json_or_nothing(path)) and ANSWERS_OF not in content:
        raise UserError(
            f"{path} was not written by `dora-vl evaluate`, perhaps by a training run; name another folder with --to"
        )


def open_results(
    to: Path, sets: Sequence[TestSet], answers_of: str, sha256: Mapping[str, str], options: argparse.Namespace
) -> ResultFolder:
    """Returns the folder of results, with sets of earlier commands whose answers and questions are still the same."""
    header = {ANSWERS_OF: answers_of, "answers_sha256": dict(sha256), "limit": options.limit}
    before, kept = json_or_nothing(to / METRICS), {}
    entries = before.get(SETS, {})
    if all(before.get(name) == value for name, value in header.items()):
        for name, entry in entries.items():
            file = Path(entry["file"])
            if file.is_file() and file_sha256(file) == entry["file_sha256"]:
                kept[name] = entry
    gone = entries.keys() - kept.keys() - {test.name for test in sets}
    return ResultFolder(folder=to, header=header, kept=kept, gone=sorted(gone))


def report_results(
    tested: Sequence[Tested], against: Sequence[Tested] | None, results: ResultFolder, options: argparse.Namespace
) -> Iterator[str]:
    """Writes all results with their differences, yields the lines to print, and last refuses what cannot be scored."""
    if against is not None:
        named = str(options.against)
        tested = [with_differences(ours, theirs, named) for ours, theirs in zip(tested, against, strict=True)]
    results.write(tested)
    for done in tested:
        yield from _remark_lines(done, results.folder)
    entries = {done.test.name: done.entry() for done in tested if done.scored is not None}
    if entries:
        yield from table(entries, details=options.all_metrics)
        yield from (f"{done.test.name}: {remark}" for done in tested for remark in done.remarks)
        path, kept = results.folder / METRICS, [name for name in results.kept if name not in entries]
        if results.gone:
            named = ", ".join(results.gone)
            yield f"{path}: {named} removed, because the answers, the questions or --limit changed"
        yield f"{path}: all numbers" + (f", those of {', '.join(kept)} from before" if kept else "")
    refuse_unscored(tested)


def table(entries: Mapping[str, Mapping[str, Any]], *, details: bool = False) -> list[str]:
    """Returns a line for each metric, the benchmark's name on the first; `details` adds parts of sets ("/")."""
    paired = any(entry["difference"] for entry in entries.values())
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    lines = [head + (["difference", "95 % interval"] if paired else [])]
    for name, entry in entries.items():
        of_set = [name, str(entry["n"]), str(len(entry["failed"]))]
        for metric, numbers in entry["metrics"].items():
            if "/" in metric and not details:
                continue
            limits, apart = numbers["interval_95"], entry["difference"].get(metric)
            interval = "" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"
            line = [of_set[0], metric, f"{numbers['value']:.2f}", interval, *of_set[1:]]
            if paired and apart is not None:
                line += [f"{apart['value']:+.2f}", f"{apart['low']:+.2f} to {apart['high']:+.2f}"]
            lines.append(line + [""] * (len(lines[0]) - len(line)))
            of_set = ["", "", ""]
    return align_columns(lines, left=2)


def _remark_lines(done: Tested, folder: Path) -> Iterator[str]:
    """Yields remarks on a benchmark beside its scores."""
    test, answered = done.test, done.predictions
    if answered.strangers:
        count, first = len(answered.strangers), short_repr(answered.strangers[0])
        yield f"{test.name}: {count} answers belong to none of its questions and are left out, first {first}"
    if done.submission is not None:
        yield f"{submission_file(done, folder)}: for {test.name}'s server or judge"
    if done.refused is not None:
        return
    if done.scored is None:
        file = test.about["file"]
        yield f"{test.name}: {file} holds no right answers, or a judge scores it; no score is computed here"
    elif test.not_scored:
        bare = list(test.not_scored)
        yield (
            f"{test.name}: {len(bare)} of {len(test.examples)} records hold no right answer and are in no "
            f"score, first {short_repr(bare[0])}; metrics.json names all"
        )
