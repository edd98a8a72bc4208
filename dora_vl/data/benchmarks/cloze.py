"""Eight commonsense sets in the cloze form of lm-eval: a context, and endings whose likelihoods are compared.

A row is known by its columns, whoever published it. A record's `question` is the context and its answer what follows,
after a space; `extra` holds all `contexts` and `endings`, a pair for each choice. Of WinoGrande the contexts differ and
the ending is the same (partial evaluation, as the set's paper has it), of all others the ending. The wording is that of
lm-evaluation-harness 0.4.13, `lm_eval/tasks/{hellaswag,super_glue/boolq,winogrande,piqa,arc,openbookqa,siqa}`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.commonsense import SIZES, labels_of, options_of
from dora_vl.data.benchmarks.fields import Progress, Raw, Row, Split
from dora_vl.data.example import Answer, Example
from dora_vl.data.text_file import stream_records, text_lines
from dora_vl.errors import UserError

NAMES = {re.sub(r"\W|_", "", name).lower(): name for name in SIZES} | {
    "siqa": "social_i_qa",
    "socialiqa": "social_i_qa",
}
SPLITS = {"train": "train", "dev": "validation", "val": "validation"}
"""A file's name says its split by one of these words; any other is the test."""
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
        yield Split(task, name, inputs, partial(_rows, path, labels), convert, ids_by_place=True)
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


def _rows(path: Path, labels: Path | None, progress: Progress) -> Iterator[Raw]:
    rows = enumerate(stream_records(path, progress), start=1)
    if labels is None:
        yield from ({**row, "row": number} for number, row in rows)
        return
    lines = [line.strip() for _, line in text_lines(labels, "a label a line")]
    numbered = list(rows)
    if len(numbered) != len(lines):
        raise UserError(f"{labels}: {len(lines):,} labels for the {len(numbered):,} rows of {path}; fetch both again")
    yield from ({**row, "row": number, "label": line} for (number, row), line in zip(numbered, lines, strict=True))


def cloze_row(raw: Raw, *, task: str, split: str) -> Example:
    """Returns one question."""
    row = Row(raw)
    row.id = f"{task}-{split}-{row.integer('row')}"
    read = next((read for column, read in FORMS.items() if column in raw), None)
    if read is None:
        raise row.bad(f"none of the columns {', '.join(FORMS)}, by which a form is known; it has {', '.join(raw)}")
    question, endings, correct = read(row, task)
    if not 0 <= correct < len(endings):
        raise row.bad(f"its right answer is number {correct + 1} of {len(endings)}")
    contexts = (_context(task, question),) * len(endings)
    if task == "winogrande":
        before, _, after = question.partition(BLANK)
        if not after.strip():
            raise row.bad("its sentence has no blank (_) with words behind it")
        contexts, endings = tuple(before + option for option in endings), (after.strip(),) * len(endings)
    extra = {"task": task, "correct": correct, "contexts": list(contexts), "endings": list(endings)}
    answers = (Answer(text=endings[correct]),)
    return Example(id=row.id, question=contexts[correct], answers=answers, extra=extra)


def _context(task: str, question: str) -> str:
    if task == "social_i_qa":
        return f"Q: {question}\nA:"
    before = "" if task in ("boolq", "hellaswag", "openbookqa") else "Question: "  # BoolQ's stands behind its passage
    return before + question + ("" if task in ("hellaswag", "openbookqa") else "\nAnswer:")


# The forms. Each gives the question, the endings and the right one's number; BoolQ's question holds its passage.

Read = tuple[str, tuple[str, ...], int]


def _hellaswag(row: Row, task: str) -> Read:
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    question = _clean(f"{row.filled('activity_label')}: {context}")
    return question, tuple(map(_clean, row.texts("endings"))), row.integer("label")


def _clean(text: str) -> str:
    """Without the marks of WikiHow's pages."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: Row, task: str) -> Read:
    answer = row.value("label" if row.get("label") is not None else "answer", "true or false", bool, int)
    return f"{row.filled('passage')}\nQuestion: {row.filled('question')}?", ("no", "yes"), int(answer)


def _winogrande(row: Row, task: str) -> Read:
    return row.filled("sentence"), (row.filled("option1"), row.filled("option2")), row.integer("answer") - 1


def _piqa(row: Row, task: str) -> Read:
    return row.filled("goal"), (row.filled("sol1"), row.filled("sol2")), row.integer("label")


def _social(row: Row, task: str) -> Read:
    answers = tuple(row.filled(f"answer{letter}") for letter in "ABC")
    return f"{row.filled('context')} {row.filled('question')}", answers, row.integer("label") - 1


def _lettered(row: Row, task: str) -> Read:
    stem = row.get("question") if row.get("question") is not None else row.get("question_stem")
    inner = Row(stem, sample_id=row.id) if isinstance(stem, Mapping) else row
    options = inner.get("choices")
    if isinstance(options, Mapping):
        columns = Row(options, sample_id=row.id)
        letters, texts = columns.texts("label"), columns.texts("text")
    else:
        letters, texts = ([option.filled(name) for option in inner.rows("choices")] for name in ("label", "text"))
    question = next(inner.filled(name) for name in ("stem", "question_stem", "question") if inner.get(name) is not None)
    return question, tuple(texts), letters.index(row.one_of("answerKey", letters))


def _instruction(row: Row, task: str) -> Read:
    instruction = row.filled("instruction")
    labels = labels_of(instruction)
    options = options_of(instruction, labels)
    if not options:
        raise row.bad("its instruction names no options")
    question = re.sub(r"^Please[^:]*:\s*", "", instruction.partition(f"{labels[0].capitalize()}:")[0]).strip()
    return question, options, labels.index(row.one_of("answer", labels))


def _foundry(row: Row, task: str) -> Read:
    query, choices, gold = row.filled("query"), tuple(row.texts("choices")), row.integer("gold")
    if task == "social_i_qa":
        match = re.fullmatch(r"Context: (.*)\nQuestion: (.*)\nChoices:\n(.*)\nAnswer:", query, re.DOTALL)
        if match is None:
            raise row.bad("its query is not Context, Question, Choices and Answer, a line each")
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
        f"{contexts[0][:same]}{BLANK} {row.filled('continuation')}",
        tuple(text[same:] for text in contexts),
        row.integer("gold"),
    )


FORMS = {
    "ctx_a": _hellaswag,
    "passage": _boolq,
    "sentence": _winogrande,
    "goal": _piqa,
    "answerA": _social,
    "answerKey": _lettered,
    "instruction": _instruction,
    "query": _foundry,
    "context_options": _foundry_blank,
}
"""A row that has the column is read by the function."""
