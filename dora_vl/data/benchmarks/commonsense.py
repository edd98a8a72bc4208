"""Eight commonsense sets in LLM-Adapters' form (Hu et al., 2023), and their training mix commonsense_170k."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import Progress, Raw, Row, Split
from dora_vl.data.example import Answer, Example
from dora_vl.data.text_file import stream_records
from dora_vl.errors import UserError, shown, shown_text

SIZES = {
    "boolq": (9_427, 3_270),
    "piqa": (16_113, 1_838),
    "social_i_qa": (33_410, 1_954),
    "hellaswag": (39_905, 10_042),
    "winogrande": (63_238, 1_267),
    "ARC-Easy": (2_251, 2_376),
    "ARC-Challenge": (1_119, 1_172),
    "openbookqa": (4_957, 500),
}
PARTS, MIX = ("train", "test"), "commonsense_170k"


def commonsense(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Yields every set's training and test file that is in `folder` or in `folder/dataset`, and the mix.

    Files, from github.com/AGI-Edgerunners/LLM-Adapters: `dataset/<set>/{train,test}.json` and
    `ft-training_set/commonsense_170k.json` (170,420 rows): lists of {instruction, input, output, answer}. Licence:
    Apache-2.0 for the repository, each set its own.

    A record's `question` is the instruction as it stands; its answer is what is scored ("answer4"), `extra["output"]`
    the training target ("the correct answer is answer4"), `choices` the options' texts with `extra["labels"]`.

    Quirks: `input` is always empty; winogrande has no line break before "Answer format:"; ARC has questions of three
    and five options; a few training rows repeat; the mix does not say which set a row is from, and ARC and OpenBookQA
    cannot be told apart in it. `{train,test}_sample.json` in place of a full file is taken too; the manifest says so.
    """
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    splits = {(task, name): size for task, sizes in SIZES.items() for name, size in zip(PARTS, sizes, strict=True)}
    any_file = False
    for (task, name), size in {**splits, (MIX, "train"): 170_420}.items():
        candidates = [root / task / f"{name}.json", root / task / f"{name}_sample.json"]
        if task == MIX:
            candidates = [folder / f"{MIX}.json", folder / "ft-training_set" / f"{MIX}.json"]
        path = next(filter(Path.is_file, candidates), None)
        if path is not None:
            any_file, sample = True, path.stem.endswith("_sample")
            notes = {"sample": True} if sample else {}
            rows, convert = partial(_rows, path), partial(commonsense_row, task=task, split=name)
            published = None if sample else size
            yield Split(task, name, (path,), rows, convert, published, ids_by_place=True, notes=notes)
    if not any_file:
        raise UserError(f"{folder}: neither <set>/train.json, such as openbookqa/train.json, nor {MIX}.json is in it")


def _rows(path: Path, progress: Progress) -> Iterator[Raw]:
    for number, row in enumerate(stream_records(path, progress), start=1):
        yield {**row, "row": number}


def commonsense_row(raw: Raw, *, task: str, split: str) -> Example:
    """Returns one question."""
    row = Row(raw)
    row.id = f"{task}-{split}-{row.integer('row')}"
    instruction, answer, output = (row.filled(column) for column in ("instruction", "answer", "output"))
    labels = labels_of(instruction)
    if labels and answer not in labels:
        raise row.bad(f"its answer is {shown(answer)}, but its format allows {shown_text('/'.join(labels), 100)}")
    added = row.maybe(row.text, "input")
    extra: dict[str, object] = {"task": task, "output": output, "labels": list(labels)}
    extra |= {"correct": labels.index(answer)} if labels else {}
    return Example(
        id=row.id,
        question=instruction,
        answers=(Answer(text=answer),),
        choices=options_of(instruction, labels) or labels,
        extra=extra | ({"input": added} if added else {}),
    )


def labels_of(instruction: str) -> tuple[str, ...]:
    """Returns what the instruction allows as answer: "Answer format: answer1/answer2" -> ("answer1", "answer2")."""
    _, separator, allowed = instruction.rpartition("Answer format:")
    return tuple(label.strip() for label in allowed.split("/") if label.strip()) if separator else ()


def options_of(instruction: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The options' texts, "Answer1: dry palms Answer2: ..." -> ("dry palms", ...); none where they are not there."""
    if not labels or not all(re.fullmatch(r"[a-z]+\d", label) for label in labels):
        return ()
    body = instruction.rpartition("Answer format:")[0]
    heads = [f"{label.capitalize()}:" for label in labels]
    begin = body.rfind(heads[0])
    texts: list[str] = []
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        if begin < 0:
            return ()
        end = body.find(following, begin) if following else len(body)
        texts.append(body[begin + len(head) : end if end >= 0 else len(body)].strip())
        begin = end
    return tuple(texts) if all(texts) else ()
