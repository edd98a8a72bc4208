"""Eight commonsense sets in LLM-Adapters' form (Hu et al., 2023), and their training mix commonsense_170k.

Files, from github.com/AGI-Edgerunners/LLM-Adapters: `dataset/<set>/{train,test}.json` and
`ft-training_set/commonsense_170k.json` (170,420 rows): lists of {instruction, input, output, answer}. Licence:
Apache-2.0 for the repository, each set its own. Sets: boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy,
ARC-Challenge, openbookqa.

A record's `question` is the instruction as it stands; its answer is what is scored ("answer4"), `extra["output"]`
the training target ("the correct answer is answer4"), `choices` the options' texts with `extra["labels"]`.

Quirks: `input` is always empty; winogrande has no line break before "Answer format:"; ARC has questions of three
and five options; a few training rows repeat; the mix does not say which set a row is from, and ARC and OpenBookQA
cannot be told apart in it. `{train,test}_sample.json` in place of a full file is taken too, and the manifest says
so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import Progress, Raw, Split, filled, integer, json_rows, optional, text
from dora_vl.data.example import Answer, Example
from dora_vl.errors import BadSample, UserError, shown, shown_text

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
MIX, MIX_SIZE = "commonsense_170k", 170_420
FORMAT = "Answer format:"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Every set's training and test file that is in `folder` or in `folder/dataset`, and the mix."""
    root = folder / "dataset" if (folder / "dataset").is_dir() else folder
    found = False
    for task, sizes in SIZES.items():
        for name, size in zip(("train", "test"), sizes, strict=True):
            for file, sample in ((f"{name}.json", False), (f"{name}_sample.json", True)):
                path = root / task / file
                if path.is_file():
                    found = True
                    yield _split(task, name, path, None if sample else size, sample=sample)
                    break
    for place in (folder, folder / "ft-training_set"):
        if (place / f"{MIX}.json").is_file():
            found = True
            yield _split(MIX, "train", place / f"{MIX}.json", MIX_SIZE)
            break
    if not found:
        raise UserError(f"{folder}: neither <set>/train.json, such as openbookqa/train.json, nor {MIX}.json is in it")


def _split(task: str, name: str, path: Path, size: int | None, *, sample: bool = False) -> Split:
    return Split(
        task=task,
        name=name,
        inputs=(path,),
        rows=partial(_rows, path),
        convert=partial(convert, task=task, split=name),
        published_rows=size,
        ids_by_place=True,
        notes={"sample": True} if sample else {},
    )


def _rows(path: Path, progress: Progress) -> Iterator[Raw]:
    for number, row in enumerate(json_rows(path, progress), start=1):
        yield {**row, "row": number}


def convert(raw: Raw, *, task: str, split: str) -> Example:
    """One question."""
    sample_id = f"{task}-{split}-{integer(raw, 'row')}"
    instruction = filled(raw, "instruction", sample_id)
    answer, output = filled(raw, "answer", sample_id), filled(raw, "output", sample_id)
    labels = labels_of(instruction)
    if labels and answer not in labels:
        allowed = shown_text("/".join(labels), 100)
        raise BadSample(sample_id, f"its answer is {shown(answer)}, but its format allows {allowed}")
    choices = options_of(instruction, labels) or labels
    added = optional(raw, "input", text, sample_id)
    extra = {"task": task, "output": output, "labels": list(labels)}
    return Example(
        id=sample_id,
        question=instruction,
        answers=(Answer(text=answer),),
        choices=choices,
        extra=extra | ({"correct": labels.index(answer)} if labels else {}) | ({"input": added} if added else {}),
    )


def labels_of(instruction: str) -> tuple[str, ...]:
    """What the instruction allows as answer: "Answer format: answer1/answer2" -> ("answer1", "answer2")."""
    _, found, allowed = instruction.rpartition(FORMAT)
    return tuple(label.strip() for label in allowed.split("/") if label.strip()) if found else ()


def options_of(instruction: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The options' texts, "Answer1: dry palms Answer2: ..." -> ("dry palms", ...); none where they stand not."""
    if not labels or not all(re.fullmatch(r"[a-z]+\d", label) for label in labels):
        return ()
    body = instruction.rpartition(FORMAT)[0]
    heads = [f"{label.capitalize()}:" for label in labels]
    place = body.rfind(heads[0])
    texts: list[str] = []
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        if place < 0:
            return ()
        end = body.find(following, place) if following else len(body)
        texts.append(body[place + len(head) : end if end >= 0 else len(body)].strip())
        place = end
    return tuple(texts) if all(texts) else ()
