"""`--check`: the options, the questions, and the certificate of what a command has written."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import getpid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.data.records import stream_values
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.questions import Question, is_question, read_question_file, read_questions
from dora_vl.whole_numbers import positive

if TYPE_CHECKING:
    from dora_vl.data.examples import Example
    from dora_vl.evaluation.certificate import Probe, Witness
    from dora_vl.evaluation.model_source import ModelSource

CHECK_HELP = """\
With --check the unmerged model and what was written answer the same questions, those of the run's test or of a file,
and the differences are printed and written beside the weights (certificate.json, certificate.md). Exit status 1 where
more answers differ than --most-different allows."""

QUESTIONS, BATCH, LONGEST_ANSWER, FRAMES = 20, 8, 32, 8
FAILED_STATUS = 1


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that can check what it wrote."""
    group = parser.add_argument_group("checking the result")
    group.add_argument(
        "--no-check", dest="check", action="store_const", const=0, help="merge: compares no logits either"
    )
    group.add_argument(
        "--check",
        type=positive,
        nargs="?",
        const=QUESTIONS,
        metavar="N",
        help=f"asks N questions (default {QUESTIONS})",
    )
    group.add_argument(
        "--questions", type=Path, metavar="FILE", help="in any format that training reads (default: the run's test)"
    )
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="root of their pictures (default: the run's, or here)"
    )
    group.add_argument("--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json")
    group.add_argument(
        "--check-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="that the models compute in (default: float32; the run's own where its base was quantised)",
    )
    group.add_argument("--check-tokens", type=positive, default=LONGEST_ANSWER, metavar="N", help="longest answer")
    group.add_argument(
        "--most-different",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the questions whose answers may differ, 0 to 1 (default: 0)",
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is going to be asked.

    Attributes:
        file: where the questions come from.
        images: root of their pictures.
        frames: of each video that are shown.
        examples: a VL-BART's, by the questions' ids.
        task: a VL-BART's that they belong to; "" where nothing says it.
    """

    questions: list[Question]
    file: Path
    images: Path
    frames: int
    dtype: str | None
    max_new_tokens: int
    most_different: float
    examples: Mapping[str, Example] = field(default_factory=dict)
    task: str = ""


def planned_check(options: argparse.Namespace, adapter: Path) -> Check | None:
    """The questions, read and with a folder of pictures; None where no check is asked for.

    Args:
        adapter: the first adapter; a run's folder around it says what its test is.

    Raises:
        UserError: options that belong to --check without it, no questions, or no picture of theirs.
    """
    if not options.check:
        if options.questions is not None or options.images is not None or options.check_dtype is not None:
            raise UserError("--questions, --images and --check-dtype say how --check asks; add --check")
        return None
    if not 0 <= options.most_different <= 1:
        raise UserError(f"--most-different is {options.most_different}; it is a share, 0 to 1")
    from dora_vl.evaluation.asker import check_pictures
    from dora_vl.evaluation.questions import question_of_task

    run = _settings_of_run(adapter)
    task, file = ("", options.questions) if options.questions else _test_file(run, adapter)
    images = options.images or (Path() if options.questions is not None else _test_images(run))
    examples = _examples_of_vlbart(adapter, file)
    questions = _spread(_read(file) if examples is None else [*map(question_of_task, examples)], options.check)
    check_pictures(questions, images, setting="--images")
    return Check(
        questions=questions,
        file=file,
        images=images,
        frames=int(run.get("data", {}).get("video_frames") or FRAMES),
        dtype=options.check_dtype,
        max_new_tokens=options.check_tokens,
        most_different=options.most_different,
        examples={one.id: one for one in examples or ()},
        task=task,
    )


def _settings_of_run(adapter: Path) -> Mapping[str, Any]:
    """The settings of the run that an adapter folder, or a checkpoint's, lies in; empty where there is none."""
    from dora_vl.run.run_folder import SETTINGS

    for folder in adapter.resolve().parents[:2]:
        if (folder / SETTINGS).is_file():
            found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


def _test_file(run: Mapping[str, Any], adapter: Path) -> tuple[str, Path]:
    """The run's test, the first where there are several, and the task that it is of."""
    evaluation = run.get("evaluation") or {}
    files = {"": evaluation["file"]} if evaluation.get("file") else evaluation.get("files") or {}
    task, file = next(iter(files.items()), ("", None))
    if not isinstance(file, str):
        raise UserError(f"{adapter} lies in no run with a test of its own; say with --questions FILE what to ask")
    if not Path(file).is_file():
        raise UserError(f"the run's test {file} is not there any more; say with --questions FILE what to ask")
    return task, Path(file)


def _test_images(run: Mapping[str, Any]) -> Path:
    stated = (run.get("evaluation") or {}).get("image_folder") or (run.get("data") or {}).get("image_folder")
    return Path(stated or ".")


def _examples_of_vlbart(adapter: Path, file: Path) -> list[Example] | None:
    """The examples of a file as a VL-BART's tasks have them; None of an adapter of another kind."""
    from dora_vl.data.examples import iterate_examples
    from dora_vl.evaluation.model_source import read_recipe
    from dora_vl.run.adapting import VLBART

    recipe = read_recipe(adapter) if adapter.is_dir() else {}
    if recipe.get("backbone") != VLBART:
        return None
    examples = list(iterate_examples(file))
    if not examples:
        raise UserError(f"{file}: holds no questions")
    return examples


def _read(file: Path) -> list[Question]:
    """Questions of any format that training reads, or as LLaVA's evaluation takes them."""
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        _, first = next(stream_values(file, "questions"), (0, None))
        if is_question(first):
            examples = read_question_file(file)
            return [Question(id=one.id, images=one.images, turns=one.turns, truth="") for one in examples]
    questions, unreadable = read_questions(file)
    if not questions:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"{file}: not one question can be read; {shown(name)}: {reason}")
    return questions


def _spread(questions: list[Question], count: int) -> list[Question]:
    """So many of them, evenly over the file: neighbours are often about one picture."""
    if count >= len(questions):
        return questions
    return [questions[place * len(questions) // count] for place in range(count)]


def checked(
    check: Check,
    reference: ModelSource,
    others: Mapping[str, Callable[[], ModelSource]],
    folder: Path,
    about: Mapping[str, object],
) -> Iterator[str]:
    """Asks, writes the certificate into the folder, and yields the lines to print.

    Args:
        reference: the unmerged model.
        others: what opens each of the others, by name.
        about: what the certificate says was compared.

    Raises:
        SystemExit: with status 1, more answers differ than may.
    """
    from dora_vl.evaluation.certificate import certify
    from dora_vl.evaluation.certificate_files import TEXT_FILE, table, verdict, write_certificate

    scratch = folder.with_name(f".{folder.name}.checking-{getpid()}")
    scratch.mkdir(parents=True)
    probe = _probe(check)
    try:
        certificate = certify(
            ("unmerged", lambda: _opened(reference, check)),
            {name: (lambda found=find: _opened(found(), check)) for name, find in others.items()},
            probe,
            most_different=check.most_different,
            scratch=scratch,
        )
    finally:
        probe.media.close()
        shutil.rmtree(scratch, ignore_errors=True)
    asked = {"questions": str(check.file), "images": str(check.images), "longest answer": check.max_new_tokens}
    write_certificate(certificate, folder, {**about, **asked, "computed in": reference.dtype})
    yield from table(certificate)
    yield f"{folder / TEXT_FILE}: {verdict(certificate)}"
    if certificate.failed:
        yield f"{len(certificate.failed)} questions could not be asked; {folder / TEXT_FILE} names them"
    if not certificate.passed:
        raise SystemExit(FAILED_STATUS)


def _probe(check: Check) -> Probe:
    from dora_vl.evaluation.asker import MediaReader
    from dora_vl.evaluation.certificate import Probe
    from dora_vl.run.samples import VideoReading
    from dora_vl.vision.frame_sampling import Uniform

    videos = VideoReading(folder=check.images, sampling=Uniform(check.frames), frames=check.frames)
    media = MediaReader(folder=check.images, videos=videos)
    return Probe(questions=check.questions, media=media, max_new_tokens=check.max_new_tokens, batch_size=BATCH)


def _opened(source: ModelSource, check: Check) -> Witness:
    from dora_vl.evaluation.certificate import ChatWitness
    from dora_vl.evaluation.open_asker import open_source
    from dora_vl.run.adapting import VLBART

    if source.kind == VLBART:
        from dora_vl.evaluation.vlbart_witness import open_witness

        return open_witness(source, check.examples, check.task)
    opened: Any = open_source(source).adapted
    return ChatWitness(opened)


def unmerged_source(check: Check, adapter: Path, base: Path, template: str | None) -> ModelSource:
    """The model that an adapter folder and its base are, in the number type of the check.

    That the base is the right one has been seen before.

    Raises:
        UserError: as `find_source`; pictures for a language model, or a VL-BART of whose features nothing is known.
    """
    from dora_vl.evaluation.asker import Wanted
    from dora_vl.evaluation.model_source import find_source
    from dora_vl.run.adapting import CAUSAL_LM, VLBART

    source = find_source(Wanted(adapter=adapter, base=str(base), any_base=True, template=template))
    if source.kind == VLBART:
        known = source.recipe["features"]
        if not known.get(check.task) and not (check.task == "" and any(known.values())):
            raise UserError(
                f"--check asks about pictures, and nothing says how the features of {check.task or adapter} were "
                "computed (data_prep.features did not make them); leave it out"
            )
    if source.kind == CAUSAL_LM and any(one.images or one.videos for one in check.questions):
        raise UserError(f"{check.file} shows pictures or videos, and {base} is a language model, which takes none")
    own = source.dtype if source.recipe.get("quantisation") else "float32"
    return replace(source, dtype=check.dtype or own)


def as_model(source: ModelSource, folder: Path) -> ModelSource:
    """A model's folder, asked just as the adapter that it was made from."""
    from dora_vl.evaluation.asker import Wanted
    from dora_vl.run.adapting import VLBART

    recipe = {name: value for name, value in source.recipe.items() if name != "quantisation"}
    wanted = Wanted(model=str(folder), template=source.wanted.template)
    if source.kind == VLBART:  # its tasks and towers stand in the adapter's folder alone
        wanted = replace(source.wanted, model=str(folder))
    return replace(source, place=str(folder), revision=None, recipe=recipe, wanted=wanted)
