"""`dora-vl merge` and `dora-vl export`: an adapter merged into its base, or made ready for another server; checks it.

Without questions a merge's logits for a few drawn texts are compared with base and adapter's. With questions each model
answers greedily by itself; then both are shown the unmerged one's answers, token by token, so that their logits are
over the same text. `check.json` holds what was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, base_of, refuse_other_base, versions, write_adapter
from dora_vl.adapters.base_weights import BaseWeights, as_trained, config_in, skeleton
from dora_vl.adapters.files import CONFIG_FILE, DTYPES, WEIGHTS_FILE, refuse_to_replace
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.foreign_formats import read_foreign_adapter, reading_options
from dora_vl.adapters.merge import (
    ADAPTER,
    BASE,
    CHECK_FILE,
    export_for_vllm,
    merge_to_folder,
    refuse_target,
    refuse_unserved_base,
)
from dora_vl.backbones import register_towers
from dora_vl.backbones.base import head_of, sees_pictures
from dora_vl.backbones.families.targets import resolved_layers
from dora_vl.backbones.loading import load_pretrained
from dora_vl.core import merge_dora, strip_adapters
from dora_vl.data.example import Example, iterate_examples
from dora_vl.data.text_file import stream_values
from dora_vl.errors import UserError, one_line, short_repr
from dora_vl.evaluation.open_model import ModelRequest, ModelSource, adapter_recipe, find_source, open_model
from dora_vl.evaluation.predict import predicted
from dora_vl.evaluation.predictor import Decoding, MediaReader, check_pictures, media_reader
from dora_vl.evaluation.questions import is_question, read_question_file, read_questions
from dora_vl.files import opening, read_json, unfinished, write_json
from dora_vl.run.base import VLBART
from dora_vl.run.folder import SETTINGS, evenly

BATCH, FRAMES = 8, 8
FAILED_STATUS = 1
TEXTS, TOKENS = 3, 12
"""The logits of this many drawn texts are compared, each of this many tokens."""
ROUNDING = {False: 1e-3, True: 1e-1}
"""Rounding explains a difference up to this share of the largest logit; True is for weights below float32.

Rounding to bfloat16 gave 0.012 to 0.056 after the demos, where the same merges in float32 gave 5e-6.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Holds what is merged into what, all read."""

    adapter: Adapter
    base: Path
    open_base: Callable[[Path], BaseWeights]


def plan_merge(arguments: argparse.Namespace, *, for_vllm: bool) -> Plan:
    """Reads the adapter, finds its base, and refuses a result that may not be written there, or a base of no server."""
    adapter = read_foreign_adapter(arguments.adapter, reading_options(arguments))
    base = arguments.base or base_of(adapter)
    if for_vllm:
        refuse_to_replace(arguments.to, ())
        refuse_unserved_base(config_in(base), base)
    else:
        refuse_target(arguments.to, base)
    if not arguments.any_base:
        refuse_other_base(adapter.recipe, base, adapter.source)
    recipes = {adapter.source: adapter.recipe}
    open_base = BaseWeights if arguments.base_values == "stored" else partial(as_trained, recipes=recipes)
    return Plan(adapter=adapter, base=base, open_base=open_base)


def write_merged(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Writes the merged folder; yields the lines to print."""
    adapter, dtype = plan.adapter, getattr(torch, arguments.dtype) if arguments.dtype else None
    merged = merge_to_folder(adapter, plan.base, arguments.to, dtype=dtype, open_base=plan.open_base)
    yield (
        f"{arguments.to}: {merged.layers} layers merged, {merged.replaced} other tensors taken from the adapter, "
        f"{merged.files} files, {merged.bytes:,} bytes"
    )
    if adapter.answer_heads:
        tasks = ", ".join(adapter.recipe[CLOSED_ANSWERS])
        yield f"{arguments.to}: it has the closed answer lists of {tasks} with their heads"


def merge(arguments: argparse.Namespace, *, for_vllm: bool = False) -> Iterator[str]:
    """Merges, or exports for vLLM, and checks unless that is switched off; yields the lines to print."""
    register_towers()
    check, target = planned_check(arguments, arguments.adapter), arguments.to
    plan = plan_merge(arguments, for_vllm=for_vllm)
    dtype = arguments.dtype or "as in the base"
    about = {"adapter": plan.adapter.source, "base": str(plan.base), "result": str(target), "weights": dtype}
    write, unmerged = write_for_vllm if for_vllm else write_merged, partial(adapter_folder, plan, arguments)
    if check is None:
        yield from write(plan, arguments)
        if arguments.check is None and not for_vllm:
            yield from check_logits(plan.adapter, plan.base, unmerged, target, about)
        return
    with unmerged() as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)

        def written() -> ModelSource:
            if not for_vllm:
                return as_model(source, target)
            base = target / BASE if (target / BASE).is_dir() else plan.base
            return unmerged_source(check, target / ADAPTER, base, arguments.template)

        yield from write(plan, arguments)
        yield from check_answers(check, source, written, target, about)


export = partial(merge, for_vllm=True)
"""Writes an adapter and its base as vLLM serves them, and checks if asked; yields the lines to print."""


@contextmanager
def adapter_folder(plan: Plan, arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields the adapter's folder; a foreign adapter is written to a temporary one."""
    if all((arguments.adapter / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        yield arguments.adapter
        return
    with unfinished(arguments.to) as scratch:
        folder = scratch / "adapter"
        write_adapter(plan.adapter, folder)
        yield folder


def write_for_vllm(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Writes the adapter, and a base with the rest folded in, as vLLM serves them; yields the lines to print."""
    model = skeleton(config_in(plan.base))
    if model is None:
        raise UserError(
            f"{plan.base} is of no class of transformers, and vLLM has none for it; dora-vl merge writes a plain folder"
        )
    head = head_of(model)
    exported = export_for_vllm(
        plan.adapter,
        plan.base,
        arguments.to,
        resolved_layers(model, "language"),
        head=next((name for name, module in model.named_modules() if module is head), None),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        open_base=plan.open_base,
    )
    adapter, rank = arguments.to / ADAPTER, exported.max_lora_rank
    if exported.folded is None:
        yield f"{exported.base} is served as it is: nothing had to be folded into it"
    else:
        merged = exported.folded
        yield f"{exported.base}: {merged.replaced} tensors and {merged.layers} layers folded in, {merged.bytes:,} bytes"
    yield f"{adapter}: {exported.layers} layers"
    yield (
        f"vllm serve {exported.base} --enable-lora --max-lora-rank {rank} --lora-modules {arguments.to.name}={adapter}"
    )
    if exported.use_dora:
        yield "vLLM by itself refuses DoRA (use_dora): install dora-vl beside it, whose plugin applies magnitudes"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Holds the questions; `task` is the VL-BART task that the questions belong to, "" where nothing says it."""

    questions: list[Example]
    file: Path
    images: Path
    frames: int
    dtype: str | None
    max_new_tokens: int
    most_different: float
    task: str = ""


def planned_check(options: argparse.Namespace, adapter: Path) -> Check | None:
    """Reads the questions of a file, or of the test of the adapter's run; None where no check is asked for."""
    if not options.check:
        if options.questions is not None or options.images is not None or options.check_dtype is not None:
            raise UserError("--questions, --images and --check-dtype say how --check asks; add --check")
        return None
    # An adapter lies in its run's folder, or in a checkpoint of it.
    settings = [folder / SETTINGS for folder in adapter.resolve().parents[:2] if (folder / SETTINGS).is_file()]
    run = read_json(settings[0]) if settings else {}
    data, evaluation = run.get("data") or {}, run.get("evaluation") or {}
    task, file, root = "", options.questions, "."
    if file is None:
        root = evaluation.get("image_folder") or data.get("image_folder") or "."
        files = {"": evaluation["file"]} if evaluation.get("file") else evaluation.get("files") or {}
        task, name = next(iter(files.items()), ("", None))
        if not isinstance(name, str):
            raise UserError(f"{adapter} lies in no run with a test of its own; say with --questions FILE what to ask")
        file = Path(name)
    is_vlbart = adapter.is_dir() and adapter_recipe(adapter).get("backbone") == VLBART
    questions = [*iterate_examples(file)] if is_vlbart else _read(file)
    if not questions:
        raise UserError(f"{file}: holds no questions")
    images = options.images or Path(root)
    questions = evenly(questions, options.check)  # neighbours are often about one picture
    check_pictures((path for question in questions for path in question.images), images, setting="--images")
    return Check(
        questions=questions,
        file=file,
        images=images,
        frames=int(data.get("video_frames") or FRAMES),
        dtype=options.check_dtype,
        max_new_tokens=options.check_tokens,
        most_different=options.most_different,
        task=task,
    )


def _read(file: Path) -> list[Example]:
    """Reads questions of any format that training reads, or as LLaVA's evaluation takes them."""
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        _, first = next(stream_values(file, "questions"), (0, None))
        if is_question(first):
            return read_question_file(file)
    return read_questions(file)[0]


def unmerged_source(check: Check, adapter: Path, base: Path, template: str | None) -> ModelSource:
    """Returns the model of an adapter folder and its base, in the check's number type."""
    source = find_source(ModelRequest(adapter=adapter, base=str(base), any_base=True, template=template))
    if source.kind == VLBART:
        features = source.recipe["features"]
        if not features.get(check.task) and not (check.task == "" and any(features.values())):
            raise UserError(
                f"--check asks about pictures, and nothing says how the features of {check.task or adapter} were "
                "computed (data_prep.features did not make them); leave it out"
            )
    elif not sees_pictures(source.base, source.revision) and any(
        question.images or question.videos for question in check.questions
    ):
        raise UserError(f"{check.file} shows pictures or videos, and {base} is a language model, which takes none")
    dtype = source.dtype if source.recipe.get("quantisation") else "float32"
    return replace(source, dtype=check.dtype or dtype)


def as_model(source: ModelSource, folder: Path) -> ModelSource:
    """Returns a model's folder, asked just as the adapter that it was made from."""
    recipe = {name: value for name, value in source.recipe.items() if name != "quantisation"}
    request = ModelRequest(model=str(folder), template=source.request.template)
    if source.kind == VLBART:  # its tasks and towers are only stated in the adapter's folder
        request = replace(source.request, model=str(folder))
    return replace(source, base=str(folder), revision=None, recipe=recipe, request=request)


def check_answers(
    check: Check, unmerged: ModelSource, find: Callable[[], ModelSource], folder: Path, about: Mapping[str, object]
) -> Iterator[str]:
    """Asks both models, writes what was found beside the weights in `folder`; yields the lines to print.

    One model is in memory at a time; `find` says where the written one is.

    Raises:
        SystemExit: with status 1, more answers differ than may.
    """
    decoding = Decoding(batch_size=BATCH, max_new_tokens=check.max_new_tokens, task=check.task)
    with (
        unfinished(folder) as scratch,
        closing(media_reader(check.images, frames=check.frames, one_length=True)) as media,
    ):
        answers, failed = _unmerged_answers(check, unmerged, media, decoding, scratch)
        _add_written_answers(answers, check, find, media, decoding, scratch)
    n, different = len(answers), sum(answer["unmerged"] != answer["written"] for answer in answers)
    tokens, agreeing = (sum(answer[name] for answer in answers) for name in ("tokens", "agreeing_tokens"))
    largest = max(answer["largest_logit_difference"] for answer in answers)
    passed = different <= check.most_different * n
    counts = f"{different} of {n} answers differ ({different / n:.1%}), {check.most_different:.1%} may"
    content = {
        **about,
        "questions": str(check.file),
        "images": str(check.images),
        "max_new_tokens": check.max_new_tokens,
        "dtype": unmerged.dtype,
        "passed": passed,
        "most_different": check.most_different,
        "n": n,
        "different_answers": different,
        "tokens": tokens,
        "agreeing_tokens": agreeing,
        "largest_logit_difference": largest,
        "failed_questions": failed,
        "answers": answers,
        "versions": versions(),
    }
    write_json(folder / CHECK_FILE, content)
    more = "weights of a wider number type lose less to rounding, and --most-different allows more"
    yield f"{folder / CHECK_FILE}: passed: {counts}" if passed else f"{folder / CHECK_FILE}: FAILED: {counts}; {more}"
    yield f"{folder / CHECK_FILE}: {agreeing} of {tokens} tokens alike, largest logit difference {largest:.2g}"
    if failed:
        yield f"{len(failed)} questions could not be asked; {folder / CHECK_FILE} names them"
    if not passed:
        raise SystemExit(FAILED_STATUS)


def _unmerged_answers(
    check: Check, unmerged: ModelSource, media: MediaReader, decoding: Decoding, scratch: Path
) -> tuple[list[dict[str, Any]], Mapping[str, str]]:
    """Asks the unmerged model, and puts the logits of each answer into `scratch`."""
    model = open_model(unmerged).adapted
    predictions = predicted(model, check.questions, media, decoding)
    if not predictions.answered:
        name, reason = next(iter(predictions.failed.items()))
        raise UserError(f"not one of {len(check.questions)} questions can be asked; {short_repr(name)}: {reason}")
    by_id = {question.id: question for question in check.questions}
    answers: list[dict[str, Any]] = []
    for number, prediction in enumerate(predictions.answered):
        torch.save(model.logits(by_id[prediction.id], prediction.prediction, media, decoding), scratch / f"{number}.pt")
        about = {name: getattr(prediction, name) for name in ("id", "question", "images", "truth")}
        answers.append({**about, "unmerged": prediction.prediction})
    return answers, predictions.failed


def _add_written_answers(
    answers: list[dict[str, Any]],
    check: Check,
    find: Callable[[], ModelSource],
    media: MediaReader,
    decoding: Decoding,
    scratch: Path,
) -> None:
    """Adds to each answer the written model's own answer, and how its logits over the first one differ."""
    model = open_model(find()).adapted
    questions = {question.id: question for question in check.questions}
    predictions = predicted(model, [questions[answer["id"]] for answer in answers], media, decoding)
    for failed, reason in predictions.failed.items():
        raise UserError(f"the written model cannot be asked what the other answers; {short_repr(failed)}: {reason}")
    for number, answer in enumerate(answers):
        logits = model.logits(questions[answer["id"]], answer["unmerged"], media, decoding)
        expected = torch.load(scratch / f"{number}.pt", weights_only=True)
        if logits.shape != expected.shape:
            raise UserError(
                f"the written model gives logits {list(logits.shape)} for the answer to {answer['id']}, the other "
                f"{list(expected.shape)}; its vocabulary or its prompt is another"
            )
        answer |= {
            "written": predictions.answers[answer["id"]],
            "tokens": len(expected),
            "agreeing_tokens": int((logits.argmax(-1) == expected.argmax(-1)).sum()),
            "largest_logit_difference": float((logits - expected).abs().max()) if len(expected) else 0.0,
        }


def check_logits(
    adapter: Adapter,
    base: Path,
    unmerged: Callable[[], AbstractContextManager[Path]],
    merged: Path,
    about: Mapping[str, object],
) -> Iterator[str]:
    """Compares a merged folder's logits for drawn texts with those of base and adapter; yields the lines to print.

    `unmerged` opens a folder of the adapter.

    Raises:
        SystemExit: with status 1, they differ by more than rounding.
    """
    beside = f"{merged}: not compared with base and adapter"
    if reason := _incomparable(adapter, base):
        yield f"{beside}, {reason}"
        return
    dtype = _narrowest(merged)
    narrow = dtype.itemsize < torch.float32.itemsize
    most = ROUNDING[narrow]
    try:
        with unmerged() as folder:
            expected = _drawn_logits(_opened(base, folder))
            logits = _drawn_logits(_opened(merged))
            share = _apart(logits, expected)
            if share > most and narrow:  # rounding may turn a router's choice, so the weights themselves are judged
                with unfinished(merged) as scratch:
                    torch.save(_opened(merged).state_dict(), scratch / "written.pt")
                    model = _opened(base, folder)
                    merge_dora(model)
                    strip_adapters(model)
                    rounded = _is_rounded(scratch / "written.pt", model, dtype)
                if rounded:
                    turned = f"rounding turns what routers choose ({share:.1e} of the largest logit)"
                    yield f"{merged}: {turned}; all weights are the trained model's, so float32 decides"
                    share, most = _apart(_drawn_logits(model), expected), ROUNDING[False]
    except UserError as error:
        yield f"{beside}: {error}"
        return
    drawn = {"passed": share <= most, "drawn_texts": TEXTS, "largest_logit_difference_share": share, "rounding": most}
    write_json(merged / CHECK_FILE, {**about, **drawn, "versions": versions()})
    apart = f"{share:.1e} of the largest, where {most:g} is rounding"
    yield f"{merged}: logits for {TEXTS} drawn texts differ from base and adapter's by {apart}"
    if not share <= most:
        yield f"{merged}: that is more than rounding, so this is not the trained model: do not use it"
        raise SystemExit(FAILED_STATUS)


def _incomparable(adapter: Adapter, base: Path) -> str:
    """Says why base and adapter cannot be compared here; "" where they can."""
    if adapter.recipe.get("quantisation"):
        return "whose base was quantised for training (--check N compares answers)"
    model = skeleton(config_in(base))
    if model is None:
        return "of whose class transformers has none"
    needed = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
    free = psutil.virtual_memory().available
    return f"which takes {needed:,} bytes in float32, and {free:,} are free" if needed > free else ""


def _narrowest(folder: Path) -> torch.dtype:
    with BaseWeights(folder) as stored:
        dtypes = {DTYPES[tensor.dtype] for tensor in stored.tensors.values() if DTYPES[tensor.dtype].is_floating_point}
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _opened(folder: Path, adapter: Path | None = None) -> Any:
    shell = skeleton(config_in(folder))
    with opening(f"{folder} cannot be opened"):
        model = load_pretrained(type(shell), folder, dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


@torch.no_grad()
def _drawn_logits(model: PreTrainedModel) -> Tensor:
    words, special = model.config.get_text_config().vocab_size, _special(model.config.to_dict())
    plain = torch.tensor([word for word in range(words // 4, words) if word not in special])
    ids = plain[torch.randint(len(plain), (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))]
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        return model(input_ids=ids, **both).logits
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"a {type(model).__name__} takes no text without pictures ({one_line(str(error))})") from error


def _apart(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a share of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _is_rounded(written: Path, merged: nn.Module, dtype: torch.dtype) -> bool:
    """Tells whether each written weight is that of a model merged in float32, rounded to the dtype."""
    tensors = torch.load(written, mmap=True, weights_only=True)
    step = 0.505 * torch.finfo(dtype).eps  # half a unit in the last place, and what float32 itself rounds
    return all(
        torch.allclose(tensors[name], weight, rtol=step, atol=step**2 * float(weight.abs().max()))
        for name, weight in merged.state_dict().items()
        if weight.is_floating_point() and weight.numel()
    )


def _special(config: Mapping[str, Any]) -> set[object]:
    """Returns ids of tokens that do not represent text."""
    ids: set[object] = set()
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            ids |= _special(value)
        elif "token" in name:
            ids.update(value if isinstance(value, list) else [value])
    return ids
