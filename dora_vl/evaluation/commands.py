"""`dora-vl evaluate`: an adapter, a model without one, or a file of predictions, scored on benchmarks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

from dora_vl.data.pictures import MediaFolder
from dora_vl.errors import UserError, positive, shown
from dora_vl.evaluation.ask_command import add_model_options
from dora_vl.evaluation.baselines import Exchange, digest, exchanged
from dora_vl.evaluation.benchmarks import EvaluationSet, find_benchmark, read_set
from dora_vl.evaluation.finish import finish
from dora_vl.evaluation.predictions import METRICS, Predictions, read_rows, refuse_anothers
from dora_vl.evaluation.questions import as_question, with_middle_frame
from dora_vl.evaluation.scores.benchmark import join
from dora_vl.files import file_sha256

if TYPE_CHECKING:
    from dora_vl.data.example import Example
    from dora_vl.evaluation.ask import Asker

TASKS: Mapping[str, str] = {"vqav2_karpathy": "vqav2"}
"""Benchmark -> the task that a VL-BART is asked it as, where the names differ."""
DESCRIPTION = """\
Scores a model on published benchmarks, or one of your own, as official scripts do, with 95 % intervals.

  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope,gqa --images data --to runs/my/evaluation
  dora-vl evaluate --adapter runs/my/adapter --benchmarks pope --against runs/other/adapter
  dora-vl evaluate --model OWNER/NAME --benchmarks pope --images data --to runs/base
  dora-vl evaluate --benchmarks yc2c --predictions my_captions.jsonl
  dora-vl evaluate --adapter runs/demo/adapter --benchmarks exact_match=runs/demo/data/test.json \\
      --images runs/demo/assets/easy_vqa --answer-after ", so "
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
        choices=("generation", "likelihood"),
        default="generation",
        help="likelihood: of choices the likeliest letter (default: generation)",
    )
    parser.add_argument(
        "--no-exchange",
        action="store_true",
        help="leaves out asking at most 200 questions again about others' pictures, which shows whether they count",
    )
    add_model_options(parser)
    parser.add_argument("--all-metrics", action="store_true", help="the table shows parts of sets too")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Answers, scores, writes; yields the table's lines in the first process of a launch.

    Nothing is asked before all benchmarks are read.
    """
    if options.predictions is not None:
        sets = _sets(options)
        if options.against is not None and options.against.is_dir():
            raise UserError("--predictions is compared with another predictions file; --against names a folder")
        to = options.to or options.predictions.parent / "evaluation"
        refuse_anothers(to / METRICS)
        against = None if options.against is None else _from_file(options.against, sets[0], options)
        yield from finish(sets, _from_file(options.predictions, sets[0], options), against, options, to)
        return
    from dora_vl.adapters.files import WEIGHTS_FILE
    from dora_vl.evaluation.ask import check_pictures, joined_launch
    from dora_vl.run.launch import first_rank_speaks, is_first_rank

    with first_rank_speaks(), joined_launch():  # all processes of a launch ask; the first scores
        sets = _sets(options)
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
    modes: dict[str, str] = {}
    for text in options.mode:
        name, _, modes[name] = text.partition("=")
        if not modes[name]:
            raise UserError(f"--mode {text}: write it as NAME=VERSION, such as vqav2=before_2021")
    names = [find_benchmark(request.partition("=")[0]).name for request in requests]
    if not requests or len(set(names)) < len(names):
        raise UserError(f"--benchmarks {shown(options.benchmarks)} must name at least one benchmark, each once")
    if strange := sorted(modes.keys() - set(names)):
        raise UserError(f"--mode names {strange[0]}, which --benchmarks does not")
    if sum(source is not None for source in (options.adapter, options.model, options.predictions)) != 1:
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
        read_set(request, options.records, mode=modes.get(name), limit=options.limit)
        for request, name in zip(requests, names, strict=True)
    ]
    if options.answer_by == "likelihood" and (
        without := [dataset.name for dataset in sets if not dataset.benchmark.chooses]
    ):
        raise UserError(
            f"--answer-by likelihood compares the letters of choices, and {without[0]} has none; leave it out"
        )
    return sets


def _from_file(path: Path, dataset: EvaluationSet, options: argparse.Namespace) -> dict[str, Predictions]:
    """A file's answers; one to a record that cannot be read is none, as nothing says what would be right."""
    unlimited = dataset if options.limit is None else read_set(dataset.request, options.records, mode=None, limit=None)
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
            "none; a run of tasks/commonsense.py is tested by itself, with --test_only true"
        )
    if options.answer_by == "likelihood" and source.kind == VLBART:
        raise UserError(f"{adapter}: a VL-BART answers each task as it was trained; leave --answer-by out")
    sha256, recipe = hashes(source), source.recipe
    pictures = MediaFolder(options.images, options.follow_links, as_published=bool(recipe.get("as_published")))
    made_with = {f"{name}_sha256": value for name, value in sha256.items()}
    ask_set = partial(_ask_set, open_model(source).adapted, options=options, pictures=pictures)
    predictions: dict[str, Predictions] = {}
    exchanges: dict[str, Exchange] = {}
    for dataset in sets:
        examples = [example for example in dataset.examples if example.id not in dataset.unreadable]
        mine = ask_set(dataset, examples, to / dataset.name, made_with)
        predictions[dataset.name] = replace(mine, failed={**dataset.unreadable, **mine.failed}, sha256=sha256)
        if exchange and dataset.scorer is not None:
            sample = exchanged(dataset.scored, mine.answers, together=dataset.benchmark.together)
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
    frames, by_likelihood = options.frames or benchmark.frames, options.answer_by == "likelihood"
    decoding = Decoding(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or benchmark.max_new_tokens,
        workers=options.workers,
        by="letters" if by_likelihood else "generation",
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
            settings["answers"] = "likelihood"
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
