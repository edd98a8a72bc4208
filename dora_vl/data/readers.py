"""Reads rows of any format as an `Example`, and a file's rows one by one, with the reason if one cannot be a sample.

Each format gives messages of a role and its content; `conversation.read_conversation` makes an `Example` of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from string import ascii_lowercase, ascii_uppercase

from dora_vl.data.column_names import KNOWN, Cell, flag_of, is_empty, lost_content, plain_name, without_nulls
from dora_vl.data.column_names import ROLES as COLUMNS
from dora_vl.data.columns import (
    JUDGED,
    PREFERENCES,
    REPLIES,
    USUAL,
    Columns,
    ColumnsError,
    Resolved,
    Row,
    lists_replies,
)
from dora_vl.data.conversation import CALLING, ROLES, UnreadKey, as_text, listed, read_conversation, with_thoughts
from dora_vl.data.example import (
    LETTER,
    Answer,
    CountedFromOne,
    Example,
    correct_choice,
    from_record,
    listed_choices,
    turns_of,
    with_letters,
    written_in_python,
)
from dora_vl.data.pictures import picture_name
from dora_vl.data.turns import CALLS, Turn, Unusable, refuse_places
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, NO_SAMPLE, BadSample, UserError, short_names, short_repr

ASKING, REPLYING = ("user", "human", "question"), ("assistant", "gpt", "answer")
"""A round may be one object with these keys (The Cauldron, ms-swift)."""


def _messages(row: Row, key: str) -> Sequence[object]:
    """Returns a column that must be a list of turns, or of rounds, each an object of a question and its answer."""
    messages = row.get(key)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Unusable(f"{key!r} must be a list of turns, got {short_repr(messages)}")
    if key not in ("prompt", "completion") and (reply := row.get("completion")):
        replies = reply if isinstance(reply, list) and {*map(type, reply)} == {dict} else [reply]
        said = ({"role": "assistant", "content": entry} for entry in replies)
        messages = [*messages, *(replies if isinstance(replies[0], Mapping) else said)]
    first = messages[0]
    if not isinstance(first, dict) or "role" in first or "from" in first:
        return messages
    turns: list[object] = []
    for number, entry in enumerate(messages, 1):
        fields = entry if isinstance(entry, Mapping) else {}
        asking, replying = ([key for key in keys if key in fields] for keys in (ASKING, REPLYING))
        if len(asking) != 1 or len(replying) != 1:
            known = "role and content, or the user's and the assistant's words"
            raise Unusable(f"entry {number} of {key!r} must hold {known}, got {short_repr(entry)}")
        more = {name: value for name, value in fields.items() if name not in (*asking, *replying)}
        question, answer = _round(fields[asking[0]], fields[replying[0]])
        turns += [{**more, **question}, answer]
    return turns


def _round(question: object, answer: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _earlier_rounds(row: Row) -> list[object]:
    """Reads `history`, pairs of a question and its answer (ms-swift)."""
    history = row.get("history")
    messages: list[object] = []
    for pair in history if isinstance(history, list) else [] if is_empty(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"'history' must hold pairs of a question and an answer, got {short_repr(pair)}")
        messages += _round(*pair)
    return messages


def _prompt_completion(row: Row) -> list[object]:
    """Reads `prompt` and `completion`, each text or a list of messages (TRL)."""
    messages = _earlier_rounds(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        messages += [{"role": role, "content": row[key]}] if isinstance(row[key], str) else _messages(row, key)
    return messages


def _instructions(row: Row) -> list[object]:
    """Reads `instruction`, `input`, `output` (Alpaca, LLaMA-Factory)."""
    instruction, added, output = (as_text(row.get(name), name) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise Unusable("'output' is empty", EMPTY_ANSWER)
    question = f"{instruction}\n{added}" if instruction and added else instruction or added
    return [*_earlier_rounds(row), Turn("user", question, len(added)), Turn("assistant", output)]


def _preferred(row: Row) -> Sequence[object]:
    """Returns the conversation that ends with the chosen, or the judged, answer, by the format that asks for it."""
    for prompt, reply, messages in (
        ("messages", "completion", partial(_messages, key="messages")),
        ("conversations", "completion", partial(_messages, key="conversations")),
        ("prompt", "completion", _prompt_completion),
        ("instruction", "output", _instructions),
        ("question", "answer", _question_answer),
    ):
        if prompt in row:
            conversation = messages({**row, reply: row["chosen"]} if "chosen" in row else row)
            _refuse_other_turns(conversation, row)
            return conversation
    chosen, rejected = (_messages(row, key) for key in ("chosen", "rejected"))
    if [*chosen[:-1]] != [*rejected[:-1]]:
        raise Unusable(OTHER_TURNS)
    return chosen


OTHER_TURNS = "its chosen and rejected conversations differ before their last answers"


def _refuse_other_turns(conversation: Sequence[object], row: Row) -> None:
    """Refuses rejected messages whose turns before the last are not those before the chosen answer."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(rejected, list) or not any(isinstance(message, Mapping) for message in rejected):
        return
    earlier = [*map(_bare, rejected[:-1])]
    before = [*map(_bare, conversation[:-1])]
    if before[len(before) - len(earlier) :] != earlier or (isinstance(chosen, list) and len(chosen) > len(rejected)):
        raise Unusable(OTHER_TURNS)


def _bare(message: object) -> object:
    """Returns a message's text, whatever its keys are called."""
    if isinstance(message, Turn):
        return {"role": message.role, "content": message.text}
    if not isinstance(message, Mapping):
        return message
    names = {"from": "role", "value": "content"}
    fields = {names.get(key, key): value for key, value in without_nulls(message).items()}
    speaker = fields.get("role")
    return {**fields, "role": ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker}


def _rejected(value: object) -> tuple[str, ...]:
    """Reads rejected answers: a text, a message, a conversation that ends with one, or a list of texts."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        texts = [*value]
    else:
        message = value[-1] if isinstance(value, list) and value else value
        fields = message if isinstance(message, Mapping) else {}
        if not is_empty(fields.get(CALLS)) or fields.get("from", fields.get("role")) in CALLING:
            raise Unusable("its rejected answer calls a tool; preferences compare only texts")
        text = fields.get("content", fields.get("value")) if fields else message
        if isinstance(text, list):  # a list of parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
        texts = [with_thoughts(as_text(text, "rejected"), fields)]
    if not all(text.strip() for text in texts):
        raise Unusable("its rejected answer is empty", EMPTY_ANSWER)
    return tuple(texts)


def _compared(example: Example, row: Row) -> Example:
    """Adds the rejected answers and the pictures that they are about; without answers the chosen one is about these."""
    stored = dict(example.image_bytes)
    names = [picture_name(value, "rejected_images", stored) for value in listed(row.get("rejected_images"))]
    others = () if names == [*example.images] else tuple(names)
    if others and len(others) != len(example.images):
        raise Unusable(f"it has {len(example.images)} pictures and {len(others)} rejected_images")
    chosen = example.turns[-1].text
    rejected = (chosen,) if is_empty(row.get("rejected")) and others else _rejected(row.get("rejected"))
    refuse_places(rejected, has_videos=bool(example.videos), kind="rejected answer")
    if not others and chosen.strip() in {text.strip() for text in rejected}:
        raise Unusable("its rejected answer is the chosen one")
    return replace(example, rejected=rejected, rejected_images=others, image_bytes=stored)


def _question_answer(row: Row) -> list[object]:
    """Reads question and answer from columns of their own; of several answers the most frequent, the first of equals.

    A hint comes before the question, choices come after it (`_written_choices`).
    """
    question, answer = as_text(row["question"], "question"), _answer_of(row)
    if not is_empty(row.get("choices")) and answer.strip():
        labels, choices = _choices(row["choices"])
        if choices and (several := _distinct_texts(row["answer"])):
            named = short_names(several)
            raise Unusable(f"its answer names several choices, {named}; write question and answer as texts instead")
        if choices:
            question, answer = _written_choices(question, choices, answer, labels)
    hint = as_text(row.get("hint"), "hint").strip()
    if not _says(question, [hint]):
        question = f"{hint}\n{question}"
    return [*_earlier_rounds(row), *_round(question, answer)]


def _record(row: Row) -> Sequence[object]:
    """Returns a record of `dora-vl prepare`: its turns, or its question with the answer of the largest weight."""
    example = read_record(row)
    if example.turns or not example.choices:
        return turns_of(example)
    correct = example.extra.get("correct", example.answers[0].text if example.answers else None)
    return _round(*_written_choices(example.question, example.choices, correct))


def read_record(row: Row) -> Example:
    """Returns a row as the record that it is, its `id` included."""
    record = without_nulls(row)
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    return from_record(record)


def _written_choices(
    question: str, choices: Sequence[str], answer: object, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """Returns a question with its choices as LLaVA writes MMBench's, a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        answer: the right choice, by its label or text; without labels but letters, by its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.
    """
    if any(not choice.strip() for choice in choices) or len(choices) > len(ascii_uppercase):
        raise Unusable(f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    lettered = _LETTERED.fullmatch(str(answer).strip())
    if lettered and lettered[2].strip() in (choice.strip() for choice in choices):
        answer = lettered[2]
    names, label = [label.casefold() for label in labels], str(answer).strip(" ().:").casefold()
    in_order = names == list(ascii_lowercase[: len(names)])  # also without names
    if label in names and not in_order:
        index = names.index(label)
    else:
        index = correct_choice(answer, choices, by_place=in_order)
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if _says(question, choices):
        if str(answer).strip() in (choice.strip() for choice in choices):
            return question, str(answer)
        if all(re.search(rf"\b{line[0]}\W", question) for line in lines):
            return question, letter
    return "\n".join([question, *lines, LETTER]), letter


def _choices(value: object) -> tuple[list[str], list[str]]:
    """Returns the choices' own labels, if any, and their texts; empty choices are none."""
    labels: object = []
    if isinstance(value, str):
        value = listed_choices(value)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        texts_by_label = {name: text for name, text in value.items() if not is_empty(text)}
        labels, value = [*texts_by_label], [*texts_by_label.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise Unusable(f"its choices must be a list of text, got {short_repr(value)}")
    texts = [as_text(text, "choices") for text in value]
    lettered = [_LETTERED.fullmatch(text.strip()) for text in texts]
    letters = [match[1].casefold() for match in lettered if match]
    if not labels and len(texts) > 1 and letters == list(ascii_lowercase[: len(texts)]):
        labels, texts = letters, [match[2] for match in lettered if match]
    return [as_text(label, "choices") for label in labels], texts


_LETTERED = re.compile(r"\(?([A-Za-z])[.):]\)?\s+(.*)", re.DOTALL)  # such as `A. cat`


def _says(question: str, texts: Sequence[str]) -> bool:
    """Tells whether the question holds all of these texts, as whole words; every question holds an empty text."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", question) for text in texts)


def _answer_of(row: Row) -> str:
    """Returns the answer that the row calls the most frequent (VQAv2, which decides between equals), else that."""
    return as_text(row.get("most_frequent"), "most_frequent").strip() or _answer(row["answer"])


def _answer(value: object, name: str = "answer") -> str:
    """Returns the most frequent of several answers, the first of equals."""
    return next(iter(_answers(value, name)), "")


def _answers(value: object, name: str = "answer") -> list[str]:
    """Returns the distinct answers, the most frequent first; each is text or an object, SQuAD's a list in an object."""
    value = _in_object(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [as_text(_in_object(entry), name) for entry in listed]
    return [text for text, _ in Counter(text for text in texts if text.strip()).most_common()]


def _several_answers(format_name: str, fields: Row) -> tuple[Answer, ...]:
    """Returns the right answers of a row that has several, the trained one first; of others nothing."""
    texts: list[str] = []
    if fields.get("turns") or not is_empty(fields.get("choices")):
        return ()  # a conversation ends with one answer, and one choice is right
    if format_name == "records":
        heaviest_first = sorted(read_record({**fields, "id": "-"}).answers, key=lambda answer: -answer.weight)
        texts = [text for text in dict.fromkeys(answer.text for answer in heaviest_first) if text.strip()]
    elif role := next((role for role in ("answer", "caption") if role in fields), None):
        texts = _answers(fields[role], role)
        if role == "answer" and len(texts) > 1:
            texts = [*dict.fromkeys([_answer_of(fields), *texts])]
    # A half of a surrogate pair, which no file can hold, is spelled out.
    written = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
    return tuple(Answer(text=text) for text in written) if len(written) > 1 else ()


ANSWER_KEYS = ("answer", "text", "start", "answer_start", "answer_id", "answer_confidence")
"""An object of an answer may hold these keys besides bookkeeping (SQuAD, VQA)."""


def _in_object(value: object) -> object:
    """Returns the answer or text in an object; anything else unchanged."""
    if not isinstance(value, Mapping):
        return value
    text = next((text for key in ANSWER_KEYS[:2] if (text := value.get(key)) is not None), None)
    for key, entry in value.items() if text is not None else ():
        if key not in ANSWER_KEYS and (loss := lost_content(key, entry)):
            raise UnreadKey(value, *loss)
    return value if text is None else text


MESSAGES: Mapping[str, Callable[[Row], Sequence[object]]] = {
    PREFERENCES: _preferred,
    JUDGED: _preferred,
    "conversations": partial(_messages, key="conversations"),
    "messages": partial(_messages, key="messages"),
    "texts": partial(_messages, key="texts"),
    "prompt/completion": _prompt_completion,
    "instructions": _instructions,
    "records": _record,
    "question/answer": _question_answer,
    "captions": lambda row: _round(row.get("question", ""), _answer(row["caption"], "caption")),
}
CONVERSATIONAL = ("conversations", "messages", "prompt/completion")
"""An answer beside the messages of these formats ends them (TRL's and ms-swift's `solution`)."""


def id_of(row: Row, number: int, columns: Columns) -> str:
    """Returns the row's own id, else its place in the file."""
    sample_id = columns.id_of(row)
    if sample_id is None:
        return f"row {number + 1}"
    return sample_id if isinstance(sample_id, str) else short_repr(sample_id)


def read_row(row: Row, *, columns: Columns = USUAL) -> Example:
    """Returns one row of any format as the conversation that is trained on.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return read_fields(columns.resolve(row), id_of(row, 0, columns))


def read_fields(resolved: Resolved, sample_id: str) -> Example:
    """Returns a row of known columns as the conversation that is trained on; raises as `read_row` does."""
    fields = resolved.fields
    if resolved.format is None:
        nulls = [name for name, value in fields.items() if value is None and plain_name(name) in KNOWN]
        if nulls:
            answering = {name for role in ("answer", "output", "completion", "caption") for name in COLUMNS[role]}
            kind = NO_SAMPLE if answering.isdisjoint(map(plain_name, nulls)) else NO_ANSWER
            raise BadSample(sample_id, f"its {short_names(nulls)} is null", kind)
        raise BadSample(sample_id, _no_format(fields))
    fields = {**fields, "id": sample_id}
    _refuse_parts_of_one_answer(resolved)
    try:
        _refuse_python_lists(fields)
        if "answer" in fields and resolved.format.name in CONVERSATIONAL:
            fields["completion"] = _answer(fields["answer"])
        example = read_conversation(MESSAGES[resolved.format.name](fields), fields)
        last = example.turns[-1]
        if resolved.format.name in (PREFERENCES, JUDGED) and (last.more or not last.is_trained):
            raise Unusable("its last answer calls a tool or is not to be trained; preferences compare only texts")
        if resolved.format.name == PREFERENCES:
            return _compared(example, fields)
        if resolved.format.name == JUDGED:
            return replace(example, is_good=_judgement(resolved))
        answers = _several_answers(resolved.format.name, fields)
        return replace(example, answers=answers) if answers else example
    except Unusable as error:
        raise BadSample(sample_id, str(error), error.kind) from None
    except UnreadKey as unread:
        held = {role: value if isinstance(value, list) else [value] for role, value in fields.items()}
        by_role = (role for role, entries in held.items() if any(entry is unread.message for entry in entries))
        role = next(by_role, resolved.format.needs[0])
        column = next((name for name, used_as in resolved.uses.items() if used_as == role), role)
        path = f"{column}.{unread.path}"
        raise ColumnsError(f"{path!r} would be left out ({unread.what});", Columns(ignored=(path,))) from None
    except RecursionError:
        raise BadSample(sample_id, "its values are nested too deeply") from None


def _no_format(fields: Row) -> str:
    """Says what a row of no format lacks, and how to name it."""
    if fields.keys() >= {"data", "annotations"}:
        return "it is Label Studio's JSON; export it as JSON-MIN or CSV"
    names = {*map(plain_name, fields)}
    if names <= {*COLUMNS["caption"]}:
        return "it is text alone, which is not trained on; a picture, a question or an answer goes with it"
    held = {role for role in ("images", "question", "answer") if not names.isdisjoint(COLUMNS[role])}
    lacks = [role for role in ("question", "answer") if role not in held]
    known = f"has {short_names(sorted(held))}, and no {' and no '.join(lacks)}" if held else "has no known column"
    free = [name for name in fields if plain_name(name) not in KNOWN]
    named = ", ".join(f"{name}: {role}" for name, role in zip(free or ["headline"], lacks, strict=False))
    remedy = f"data.columns says which column that is, such as {{{named}}}, data.ask the question of all rows"
    return f"of its columns {short_repr([*fields], 120)} none makes a question and its answer: it {known}; {remedy}"


SEVERAL = ("answers", "caption", "captions", "description")
"""A column called so may list several right answers; of other columns only a list of votes, or of objects, is one."""


def _refuse_parts_of_one_answer(resolved: Resolved) -> None:
    """Refuses a list that may be one answer, such as a page's lines: its first entry alone would be trained."""
    for role in ("answer", "caption"):
        value = resolved.fields.get(role)
        name = resolved.called.get(role, role)
        if name in SEVERAL or not is_empty(resolved.fields.get("choices")):
            continue
        if texts := _distinct_texts(value):
            column = next((column for column, used_as in resolved.uses.items() if used_as == role), role)
            problem = f"{short_repr(column)} lists {len(texts)} texts; if they are one answer, write it as one text; if"
            raise ColumnsError(f"{problem} each is a right answer by itself,", Columns({column: f"{role}s"}))


def _distinct_texts(value: object) -> list[str]:
    """Returns the texts of a list of several that all differ; votes, of which some repeat, are none."""
    entries = value if isinstance(value, list) else []
    texts = [str(text) for text in entries if not is_empty(text) and not isinstance(text, Mapping)]
    return texts if len(texts) > 1 and len({*texts}) == len(texts) else []


def _refuse_python_lists(fields: Row) -> None:
    for role in REPLIES:
        text = fields.get(role)
        if isinstance(text, Cell) and lists_replies(written_in_python(text), role, in_cell=True):
            raise Unusable(f"{role!r} is a list as Python writes it, {short_repr(text)}; write it as JSON")


def _judgement(resolved: Resolved) -> bool:
    value = resolved.fields["judged"]
    is_good = flag_of(value)
    if is_good is None and not isinstance(value, bool):
        is_good = {"desirable": True, "undesirable": False, "-1": False, "-1.0": False}.get(str(value).strip().lower())
    if is_good is None:
        column = next(column for column, role in resolved.uses.items() if role == "judged")
        message = f"{short_repr(column)} says whether the answer is good: write true or false, got {short_repr(value)}"
        raise Unusable(message)
    return is_good


class RowReader:
    """Reads the rows of one file or folder as conversations, and remembers what it has met.

    Attributes:
        format: of its rows, once one of a known format has been read.
        uses: the role of each column, "" where it is left out, of each kind of row, in order.
    """

    def __init__(self, name: str, columns: Columns = USUAL) -> None:
        self.format: str | None = None
        self.uses: list[Mapping[str, str]] = []
        self._name = name
        self._columns = columns
        self._first = ""

    def read(self, record: Row, number: int) -> Example | BadSample:
        """Returns the row `number`, from 0, of what the container gives; or why it cannot be a sample."""
        sample_id = id_of(record, number, self._columns)
        row = f"row {number + 1}"
        row += "" if sample_id == row else f" ({sample_id})"
        try:
            resolved = self._columns.resolve(record)
        except ColumnsError as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        if resolved.uses not in self.uses:
            self.uses.append(resolved.uses)
        if resolved.format is not None:
            name = resolved.format.name
            if self.format is None:
                self.format, self._first = name, row
            if name != self.format:
                firsts = f"{self.format}: {self._first}; {name}: {row}"
                raise UserError(f"{self._name}: rows of mixed formats, first of each {firsts}; write one file a format")
        try:
            return read_fields(resolved, sample_id)
        except (ColumnsError, CountedFromOne) as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        except BadSample as error:  # anew, since a traceback keeps all that was read alive
            # Halves of surrogate pairs, which no file can hold, are spelled out.
            name, reason = (
                text.encode("utf-8", "backslashreplace").decode() for text in (error.sample_id, error.reason)
            )
            return BadSample(name, reason, error.kind)


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file if none of the `rows` read so far can be a sample."""
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")
