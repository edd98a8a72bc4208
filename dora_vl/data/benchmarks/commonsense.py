"""Eight commonsense sets in LLM-Adapters' form (Hu et al., 2023), their mix commonsense_170k, and their cloze form."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import Raw, Row, Split
from dora_vl.data.example import Answer, Example
from dora_vl.data.text_file import stream_records, text_lines
from dora_vl.errors import UserError, short_repr, short_text

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

    A record's `question` is the instruction as it is; its answer is what is scored ("answer4"), `extra["output"]`
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
            rows, convert = partial(_numbered, path), partial(_commonsense_row, task=task, split=name)
            published = None if sample else size
            yield Split(task, name, (path,), rows, convert, published, ids_by_place=True, notes=notes)
    if not any_file:
        raise UserError(f"{folder}: neither <set>/train.json, such as openbookqa/train.json, nor {MIX}.json is in it")


def _numbered(path: Path) -> Iterator[Raw]:
    for number, row in enumerate(stream_records(path), start=1):
        yield {**row, "row": number}


def _commonsense_row(raw: Raw, *, task: str, split: str) -> Example:
    row = Row(raw)
    row.id = f"{task}-{split}-{row.integer('row')}"
    instruction, answer, output = (row.non_empty(column) for column in ("instruction", "answer", "output"))
    labels = labels_of(instruction)
    if labels and answer not in labels:
        message = f"its answer is {short_repr(answer)}, but its format allows {short_text('/'.join(labels), 100)}"
        raise row.error(message)
    added = row.optional(row.text, "input")
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
    """Returns the options' texts, "Answer1: dry palms Answer2: ..." -> ("dry palms", ...), or none."""
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


# -- the same sets in lm-eval's cloze form: a context, and endings whose likelihoods are compared. A row is known by its
# columns, whoever published it. A record's `question` is the context and its answer what follows, after a space;
# `extra` holds all `contexts` and `endings`, a pair a choice. Of WinoGrande the contexts differ and the ending is
# the same (partial evaluation, as the set's paper has it), of all others the ending. The wording is that of
# lm-evaluation-harness 0.4.13, `lm_eval/tasks/{hellaswag,super_glue/boolq,winogrande,piqa,arc,openbookqa,siqa}`.

NAMES = {re.sub(r"\W|_", "", name).lower(): name for name in SIZES} | {
    "siqa": "social_i_qa",
    "socialiqa": "social_i_qa",
}
SPLITS = {"train": "train", "dev": "validation", "val": "validation"}
"""A file's name tells its split by one of these words; a name without any is the test."""
BLANK = "_"
_log = logging.getLogger(__name__)


def cloze(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Yields every `.json` and `.jsonl` file of rows in `folder`, of the set and the split that its path names.

    Forms: the publishers' own (ARC and OpenBookQA of AllenAI with `question.stem`, `choices` and `answerKey`; BoolQ
    with `passage`; WinoGrande with `sentence`; PIQA and Social IQa with their `-labels.lst`; HellaSwag with `ctx_a`),
    the columns of the same sets on the hub, LLM-Adapters' instructions (whose BoolQ lacks the passage: such a file is
    left out, with a warning), and llm-foundry's `query`, `choices`, `gold`. Licences: each set's own.

    Quirks: LLM-Adapters' HellaSwag does not say where the sentence to be continued begins, so its first letter stays
    small.
    """
    seen: dict[tuple[str, str], Path] = {}
    for path in sorted(path for ending in ("json", "jsonl") for path in folder.rglob(f"*.{ending}")):
        task, name = _set_of(path.relative_to(folder))
        if task is None:
            continue
        if task == "boolq" and "instruction" in next(stream_records(path), {}):
            _log.warning("%s: left out: its rows lack BoolQ's passage; add the publisher's or the hub's file", path)
            continue
        if (first := seen.setdefault((task, name), path)) != path:
            raise UserError(f"{first} and {path} are both {task}, {name}; leave one of them in {folder}")
        labels = path.with_name(f"{path.stem}-labels.lst")
        labels = labels if labels.is_file() else None
        inputs = (path,) if labels is None else (path, labels)
        convert = partial(cloze_row, task=task, split=name)
        yield Split(task, name, inputs, partial(_labelled, path, labels), convert, ids_by_place=True)
    if not seen:
        raise UserError(f"{folder}: no .json or .jsonl file in it is of a set; names hold one of {', '.join(NAMES)}")


def _set_of(path: Path) -> tuple[str | None, str]:
    """Returns the set that the path names, the file's own name first, and the split."""
    for part in reversed(path.parts):
        plain = re.sub(r"\W|_", "", part).lower()
        if task := next((name for key, name in NAMES.items() if key in plain), None):
            split = next(
                (split for word, split in SPLITS.items() if re.search(rf"\b{word}|_{word}", path.stem.lower())), "test"
            )
            return task, split
    return None, ""


def _labelled(path: Path, labels: Path | None) -> Iterator[Raw]:
    if labels is None:
        yield from _numbered(path)
        return
    lines = [line.strip() for _, line in text_lines(labels, "a label a line")]
    rows = list(_numbered(path))
    if len(rows) != len(lines):
        raise UserError(f"{labels}: {len(lines):,} labels for the {len(rows):,} rows of {path}; fetch both again")
    yield from ({**row, "label": line} for row, line in zip(rows, lines, strict=True))


def cloze_row(raw: Raw, *, task: str, split: str) -> Example:
    """Returns one question."""
    row = Row(raw)
    row.id = f"{task}-{split}-{row.integer('row')}"
    read = next((read for column, read in FORMS.items() if column in raw), None)
    if read is None:
        raise row.error(f"none of the columns {', '.join(FORMS)}, by which a form is known; it has {', '.join(raw)}")
    question, endings, correct = read(row, task)
    if not 0 <= correct < len(endings):
        raise row.error(f"its right answer is number {correct + 1} of {len(endings)}")
    contexts = (_context(task, question),) * len(endings)
    if task == "winogrande":
        before, _, after = question.partition(BLANK)
        if not after.strip():
            raise row.error("its sentence has no blank (_) with words after it")
        contexts, endings = tuple(before + option for option in endings), (after.strip(),) * len(endings)
    extra = {"task": task, "correct": correct, "contexts": list(contexts), "endings": list(endings)}
    return Example(id=row.id, question=contexts[correct], answers=(Answer(text=endings[correct]),), extra=extra)


def _context(task: str, question: str) -> str:
    if task == "social_i_qa":
        return f"Q: {question}\nA:"
    before = "" if task in ("boolq", "hellaswag", "openbookqa") else "Question: "  # BoolQ's comes after its passage
    return before + question + ("" if task in ("hellaswag", "openbookqa") else "\nAnswer:")


# The forms. Each gives the question, the endings and the right one's number; BoolQ's question holds its passage.

Read = tuple[str, tuple[str, ...], int]


def _hellaswag(row: Row, task: str) -> Read:
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    question = _clean(f"{row.non_empty('activity_label')}: {context}")
    return question, tuple(map(_clean, row.texts("endings"))), row.integer("label")


def _clean(text: str) -> str:
    """Removes the marks of WikiHow's pages."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: Row, task: str) -> Read:
    answer = row.value("label" if row.get("label") is not None else "answer", "true or false", bool, int)
    return f"{row.non_empty('passage')}\nQuestion: {row.non_empty('question')}?", ("no", "yes"), int(answer)


def _columns(row: Row, task: str, *, asked: Sequence[str], endings: Sequence[str], right: str, first: int) -> Read:
    return " ".join(map(row.non_empty, asked)), tuple(map(row.non_empty, endings)), row.integer(right) - first


def _lettered(row: Row, task: str) -> Read:
    stem = row.get("question") if row.get("question") is not None else row.get("question_stem")
    inner = Row(stem, sample_id=row.id) if isinstance(stem, Mapping) else row
    options = inner.get("choices")
    if isinstance(options, Mapping):
        columns = Row(options, sample_id=row.id)
        letters, texts = columns.texts("label"), columns.texts("text")
    else:
        letters, texts = ([option.non_empty(name) for option in inner.rows("choices")] for name in ("label", "text"))
    question = next(
        inner.non_empty(name) for name in ("stem", "question_stem", "question") if inner.get(name) is not None
    )
    return question, tuple(texts), letters.index(row.one_of("answerKey", letters))


def _instruction(row: Row, task: str) -> Read:
    instruction = row.non_empty("instruction")
    labels = labels_of(instruction)
    options = options_of(instruction, labels)
    if not options:
        raise row.error("its instruction names no options")
    question = re.sub(r"^Please[^:]*:\s*", "", instruction.partition(f"{labels[0].capitalize()}:")[0]).strip()
    return question, options, labels.index(row.one_of("answer", labels))


def _foundry(row: Row, task: str) -> Read:
    query, choices, gold = row.non_empty("query"), tuple(row.texts("choices")), row.integer("gold")
    if task == "social_i_qa":
        match = re.fullmatch(r"Context: (.*)\nQuestion: (.*)\nChoices:\n(.*)\nAnswer:", query, re.DOTALL)
        if match is None:
            raise row.error("its query is not Context, Question, Choices and Answer, a line each")
        choices = tuple(re.sub(r"^[A-Z]\. ", "", line) for line in match[3].split("\n"))
        return f"{match[1]} {match[2]}", choices, gold
    if task == "boolq":
        return query.removeprefix("Passage: "), choices, gold
    return query.removeprefix("Question: ").strip(), choices, gold


def _foundry_blank(row: Row, task: str) -> Read:
    contexts = row.texts("context_options")
    same = 0
    while all(len(text) > same and text[same] == contexts[0][same] for text in contexts):
        same += 1
    same = contexts[0].rfind(" ", 0, same) + 1
    return (
        f"{contexts[0][:same]}{BLANK} {row.non_empty('continuation')}",
        tuple(text[same:] for text in contexts),
        row.integer("gold"),
    )


FORMS = {
    "ctx_a": _hellaswag,
    "passage": _boolq,
    "sentence": partial(_columns, asked=["sentence"], endings=["option1", "option2"], right="answer", first=1),
    "goal": partial(_columns, asked=["goal"], endings=["sol1", "sol2"], right="label", first=0),
    "answerA": partial(
        _columns, asked=["context", "question"], endings=["answerA", "answerB", "answerC"], right="label", first=1
    ),
    "answerKey": _lettered,
    "instruction": _instruction,
    "query": _foundry,
    "context_options": _foundry_blank,
}
"""Maps a column to the function that reads the rows which have it."""
