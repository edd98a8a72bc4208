"""A row of any format to an `Example`, and the one reader of a file's rows that tells what cannot be a sample.

Each format gives messages of a role and its content; one way leads from these to turns, pictures and videos.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from dora_vl.data.columns import FORMATS, USUAL, Columns, ColumnsError, Resolved, Row, is_nothing
from dora_vl.data.example import (
    LETTER,
    Answer,
    Example,
    correct_choice,
    from_record,
    listed_choices,
    turns_of,
    with_letters,
)
from dora_vl.data.pictures import picture_name
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Role, Turn, arrange
from dora_vl.errors import EMPTY_ANSWER, ON_THE_WEB, BadSample, UserError, shown

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
}
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image", "image_url", "input_image")
PAYLOADS = ("image", "image_url", "url", "path", "bytes", "data")
VIDEO_PARTS = ("video", "video_url", "input_video")
VIDEO_PAYLOADS = ("path", "video", "url", "video_url")
MARKS = ("loss", "weight")
"""How ms-swift and OpenAI's files say of an answer whether it is trained."""
NOT_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "audio")
"""What a turn may hold beside its words, and no template here writes."""
_TAGS = re.compile(r"<(?:img>(.*?)</img>|bbox>|ref-object>|audio>(?!.*</audio>))", re.DOTALL)
"""A picture that its text names (Qwen), and places of ms-swift's for what stands in other columns."""


def read_talk(messages: Sequence[object], row: Row, sample_id: str) -> Example:
    """The talk of messages, each a `Turn` or an object of role and content, as it is trained on.

    What the row says as `system` stands before them; its `images` and `videos` take the places that the messages leave.
    """
    talk = _Talk(row, sample_id)
    turns = [talk.turn(message, number) for number, message in enumerate(messages, 1)]
    if not is_nothing(row.get("system")):
        system = Turn("system", _text(row["system"], "system", sample_id))
        first = turns[0].text.strip() if turns and turns[0].role == "system" else None
        if first and first != system.text.strip():
            reason = "its 'system' differs from the system turn that it has too; leave one of them out"
            raise BadSample(sample_id, reason)
        turns = turns if first else [system, *(turns if first is None else turns[1:])]
    videos = tuple(talk.clips + talk.clips_left)
    images, arranged = arrange(sample_id, talk.all_images(), turns, videos)
    try:
        "".join([sample_id, *images, *(clip.path for clip in videos), *(turn.text for turn in arranged)]).encode()
    except UnicodeEncodeError:
        raise BadSample(sample_id, "its text holds half of a surrogate pair, which is no character") from None
    scored = row.get("scored")
    answers = (Answer(text=scored),) if isinstance(scored, str) and scored else ()
    return Example(sample_id, images, arranged, videos, answers=answers, image_bytes=talk.image_bytes)


def read_conversations(row: Row, sample_id: str) -> Example:
    """The talk of a row in LLaVA's form, whatever else it holds."""
    return read_talk(_messages(row, sample_id, "conversations"), row, sample_id)


class _Talk:
    """Reads one row's messages; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Row, sample_id: str) -> None:
        self._id = sample_id
        self.image_bytes: dict[str, bytes] = {}
        self._beside = [self._picture(value, "images") for value in _listed(row.get("images"))]
        self._left = list(range(len(self._beside)))
        self._images: list[str] = []
        self._tagged = 0
        self.clips: list[Clip] = []
        self.clips_left = [_read_clip(value, "videos", sample_id) for value in _listed(row.get("videos"))]

    def all_images(self) -> list[str]:
        """The pictures in and beside the messages."""
        images = [*self._images, *(self._beside[index] for index in self._left)]
        if self._tagged and len(images) > self._tagged:
            more = len(images) - self._tagged
            raise BadSample(self._id, f"its text names pictures in <img>, and it has {more} more beside it")
        return images

    def turn(self, message: object, number: int) -> Turn:
        """One turn, `<image>` where a part is a picture, `<video>` where it is a video."""
        if isinstance(message, Turn):
            return replace(message, text=self._words(message.text))
        if not isinstance(message, Mapping):
            raise BadSample(self._id, f"turn {number} must be an object of role and text, got {shown(message)}")
        who, what = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
        role = ROLES.get(speaker) if isinstance(speaker := message.get(who), str) else None
        if role is None:
            roles = "'human', 'gpt' and 'system'" if who == "from" else "system, user and assistant"
            raise BadSample(self._id, f"turn {number} has {who!r} {shown(speaker)}; only {roles} are known")
        if len(message) > 2:
            self._refuse_lost(message, role, number)
        content = message.get(what)
        if isinstance(content, str):
            return Turn(role, self._words(content))
        if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
            raise BadSample(self._id, f"{what!r} of turn {number} is neither text nor parts: {shown(content)}")
        return Turn(role, "".join(self._part(part, number) for part in content))

    def _refuse_lost(self, message: Mapping[str, object], role: Role, number: int) -> None:
        """Refuses what would be lost of a turn: what it holds beside its words, and a mark that it is not trained."""
        unsaid = next((name for name in NOT_SAID if not is_nothing(message.get(name))), None)
        if unsaid is not None:
            reason = "which would not be trained; write it into the answer's text, or leave out the row"
            raise BadSample(self._id, f"turn {number} has {unsaid!r}, {reason}")
        for name in MARKS if role == "assistant" else ():
            mark = message.get(name)
            if not isinstance(mark, int | float) or mark != mark:  # what pandas writes for nothing
                continue
            if mark == 0 if name == "loss" else mark != 1:
                reason = "but every answer is trained; leave out the mark, or the row"
                raise BadSample(self._id, f"turn {number} has {name!r} {shown(mark)}, {reason}")

    def _part(self, part: object, number: int) -> str:
        if isinstance(part, str):
            return self._words(part)
        fields = part if isinstance(part, Mapping) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind in TEXT_PARTS and isinstance(text, str):
            return self._words(text)
        if kind in PICTURE_PARTS:
            payload = next((value for key in PAYLOADS if (value := fields.get(key)) is not None), None)
            if payload is None and fields.get("index") is None:
                return self._words(IMAGE_PLACEHOLDER)
            if payload is None:
                self._take(fields["index"], number)
            else:
                self._images.append(self._picture(payload, f"part of turn {number}"))
            return IMAGE_PLACEHOLDER
        if kind in VIDEO_PARTS:
            if all(fields.get(key) is None for key in VIDEO_PAYLOADS):
                return self._words(VIDEO_PLACEHOLDER)
            self.clips.append(_read_clip(fields, f"part of turn {number}", self._id))
            return VIDEO_PLACEHOLDER
        raise BadSample(self._id, f"turn {number} has a part that is no text, picture or video: {shown(part)}")

    def _words(self, text: str) -> str:
        """The text, `<image>` for pictures that it names in tags; those beside take the places it has, in order."""
        if "<" not in text:
            return text
        for index in self._left[: text.count(IMAGE_PLACEHOLDER)]:
            self._take(index)
        count = text.count(VIDEO_PLACEHOLDER)
        self.clips += self.clips_left[:count]
        del self.clips_left[:count]
        for tag in _TAGS.finditer(text):
            if tag[1] is None:
                reason = "which nothing here fills; write what it stands for into the text"
                raise BadSample(self._id, f"its text has {tag[0]}, {reason}")
            self._images.append(self._picture(tag[1].strip(), "<img>"))
            self._tagged += 1
        return _TAGS.sub(IMAGE_PLACEHOLDER, text)

    def _take(self, index: object, number: int = 0) -> None:
        """A picture beside the messages by its index, from 0 (as TRL's)."""
        if not isinstance(index, int) or not 0 <= index < len(self._beside):
            reason = f"the index {shown(index)} of {len(self._beside)} pictures"
            raise BadSample(self._id, f"a part of turn {number} has {reason}")
        self._images.append(self._beside[index])
        if index in self._left:
            self._left.remove(index)

    def _picture(self, value: object, key: str) -> str:
        return picture_name(value, key, self._id, self.image_bytes)


def _listed(value: object) -> Sequence[object]:
    """What a column of media holds, one that is no list as a list of one; NaN is a table's empty cell."""
    if value is None or value in ("", b"", []) or value != value:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _read_clip(value: object, key: str, sample_id: str) -> Clip:
    """A path, or an object with one and times: `start_seconds`, `end_seconds`, or Qwen's `video_start`, `video_end`."""
    times: list[float | None] = [None, None]
    if isinstance(value, Mapping):
        for index, names in enumerate((("start_seconds", "video_start"), ("end_seconds", "video_end"))):
            name = next((name for name in names if value.get(name) is not None), None)
            seconds = None if name is None else value[name]
            with suppress(OverflowError):  # a whole number beyond every float
                if isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds):
                    times[index] = float(seconds)
            if name is not None and times[index] is None:
                raise BadSample(sample_id, f"{name!r} of a video must be a number of seconds, got {shown(seconds)}")
        if value.get("bytes") is not None:
            raise BadSample(sample_id, f"{key!r} holds a video's bytes; write it to a file and name that")
        value = next((value[name] for name in VIDEO_PAYLOADS if value.get(name) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise BadSample(sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")
    if value.startswith(("http://", "https://", "data:")):
        raise BadSample(sample_id, f"{key!r} is no file, {shown(value)}; fetch it and name the file", ON_THE_WEB)
    path, (start, end) = value.removeprefix("file://").replace("\\", "/"), times
    return Clip(path=path, start_seconds=start, end_seconds=end)


def _messages(row: Row, sample_id: str, key: str) -> Sequence[object]:
    """A column that must be a list."""
    messages = row.get(key)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise BadSample(sample_id, f"{key!r} must be a list of turns, got {shown(messages)}")
    return messages


def _round(question: object, answer: object) -> list[object]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _earlier_rounds(row: Row, sample_id: str) -> list[object]:
    """`history`, pairs of a question and its answer (ms-swift)."""
    history = row.get("history")
    messages: list[object] = []
    for pair in history if isinstance(history, list) else [] if is_nothing(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadSample(sample_id, f"'history' must hold pairs of a question and an answer, got {shown(pair)}")
        messages += _round(*pair)
    return messages


def _prompt_completion(row: Row, sample_id: str) -> list[object]:
    """`prompt` and `completion`, each text or a list of messages (TRL)."""
    messages = _earlier_rounds(row, sample_id)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        is_text = isinstance(row[key], str)
        messages += [{"role": role, "content": row[key]}] if is_text else _messages(row, sample_id, key)
    return messages


def _texts(row: Row, sample_id: str) -> list[object]:
    """`texts`, a list of `user` and `assistant` (The Cauldron)."""
    messages: list[object] = []
    for number, entry in enumerate(_messages(row, sample_id, "texts"), 1):
        if not isinstance(entry, Mapping):
            raise BadSample(sample_id, f"entry {number} of 'texts' must hold user and assistant, got {shown(entry)}")
        messages += _round(entry.get("user"), entry.get("assistant"))
    return messages


def _instructions(row: Row, sample_id: str) -> list[Turn]:
    """`instruction`, `input`, `output` (Alpaca, LLaMA-Factory)."""
    instruction, added, output = (_text(row.get(name), name, sample_id) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise BadSample(sample_id, "'output' is empty", EMPTY_ANSWER)
    if not is_nothing(row.get("history")):
        raise BadSample(sample_id, "it has a 'history' of earlier rounds; write the whole talk as 'messages'")
    question = f"{instruction}\n{added}" if instruction and added else instruction or added
    return [Turn("user", question, len(added)), Turn("assistant", output)]


def _question_answer(row: Row, sample_id: str) -> list[object]:
    """A question and an answer in columns of their own; of several answers the most frequent, the first of equals.

    A hint stands before the question, choices behind it (`_written_choices`).
    """
    question, answer = _text(row["question"], "question", sample_id), _answer(row["answer"], sample_id)
    if not is_nothing(row.get("choices")) and answer.strip():
        labels, choices = _choices(row["choices"], sample_id)
        if choices:
            question, answer = _written_choices(question, choices, answer, sample_id, labels)
    hint = _text(row.get("hint"), "hint", sample_id).strip()
    if not _says(question, [hint]):
        question = f"{hint}\n{question}"
    return [*_earlier_rounds(row, sample_id), *_round(question, answer)]


def _record(row: Row, sample_id: str) -> Sequence[object]:
    """A record of `dora-vl prepare`: its turns, or its question with the answer of the largest weight."""
    example = read_record(row, sample_id)
    if example.turns or not example.choices:
        return turns_of(example)
    correct = example.extra.get("correct", example.answers[0].text if example.answers else None)
    return _round(*_written_choices(example.question, example.choices, correct, sample_id))


def read_record(row: Row, sample_id: str) -> Example:
    """A row as the record that it is."""
    record = {**_without_nulls(row), "id": sample_id}
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    return from_record(record)


def _without_nulls(value: Any) -> Any:
    """Tables fill up with null what a row has not."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(content) for name, content in value.items() if content is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _written_choices(
    question: str, choices: Sequence[str], answer: object, sample_id: str, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """A question with its choices as LLaVA writes MMBench's, a letter and a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        answer: the right choice, by its label or text; without labels but letters, by its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.
    """
    if any(not choice.strip() for choice in choices) or len(choices) > len(ascii_uppercase):
        raise BadSample(sample_id, f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    names, label = [label.casefold() for label in labels], str(answer).strip(" ().:").casefold()
    in_order = names == list(ascii_lowercase[: len(names)])  # of none too
    if label in names and not in_order:
        index = names.index(label)
    else:
        index = correct_choice(answer, choices, sample_id, "either" if in_order else "only text")
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if _says(question, choices):
        if str(answer).strip() in (choice.strip() for choice in choices):
            return question, str(answer)
        if all(re.search(rf"\b{line[0]}\W", question) for line in lines):
            return question, letter
    return "\n".join([question, *lines, LETTER]), letter


def _choices(value: object, sample_id: str) -> tuple[list[str], list[str]]:
    """The labels of choices, where they have some of their own, and their texts; those that are empty are none."""
    labels: object = []
    if isinstance(value, str):
        value = listed_choices(value, sample_id)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        texts_by_label = {name: text for name, text in value.items() if not is_nothing(text)}
        labels, value = [*texts_by_label], [*texts_by_label.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise BadSample(sample_id, f"its choices must be a list of text, got {shown(value)}")
    texts = [_text(text, "choices", sample_id) for text in value]
    return [_text(label, "choices", sample_id) for label in labels], texts


def _says(question: str, texts: Sequence[str]) -> bool:
    """Whether the question's words hold all of these, as whole words; nothing is said by any."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", question) for text in texts)


def _answer(value: object, sample_id: str, name: str = "answer") -> str:
    """The most frequent of several answers, each text or an object with one; SQuAD's are a list in an object."""
    value = _in_object(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [_text(_in_object(entry), name, sample_id) for entry in listed]
    counted = Counter(text for text in texts if text.strip())
    return counted.most_common(1)[0][0] if counted else ""


def _in_object(value: object) -> object:
    """What an object says as its answer or text; anything else is that itself."""
    if not isinstance(value, Mapping):
        return value
    return next((text for key in ("answer", "text") if (text := value.get(key)) is not None), value)


def _text(value: object, name: str, sample_id: str) -> str:
    """Text, or a number as text; nothing is empty text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN: a table's empty cell
        raise BadSample(sample_id, f"{name!r} must hold text, got {shown(value)}")
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        raise BadSample(sample_id, f"{name!r} holds {shown(value)}") from None


MESSAGES: Mapping[str, Callable[[Row, str], Sequence[object]]] = {
    "conversations": partial(_messages, key="conversations"),
    "messages": partial(_messages, key="messages"),
    "texts": _texts,
    "prompt/completion": _prompt_completion,
    "instructions": _instructions,
    "records": _record,
    "question/answer": _question_answer,
    "captions": lambda row, sample_id: _round(row.get("question", ""), _answer(row["caption"], sample_id, "caption")),
}
"""What makes messages of a row's fields, by its format."""


def id_of(row: Row, number: int = 0, columns: Columns = USUAL) -> str:
    """The row's own id, else its place, from 0."""
    stated = columns.id_of(row)
    if stated is None:
        return f"record {number}"
    return stated if isinstance(stated, str) else shown(stated)


def read_row(row: Row, *, number: int = 0, columns: Columns = USUAL) -> Example:
    """One row of any format as the talk that is trained on.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return read_fields(columns.resolve(row), id_of(row, number, columns))


def read_fields(resolved: Resolved, sample_id: str) -> Example:
    """A row of known columns as the talk that is trained on; raises as `read_row` does."""
    if resolved.format is None:
        formats = "; ".join(" and ".join(form.needs) for form in FORMATS if form.needs)
        raise BadSample(
            sample_id,
            f"its keys {shown([*resolved.fields], 120)} fit no format ({formats}); data.columns says what a column is, "
            "such as {headline: question}",
        )
    fields = resolved.fields
    return read_talk(MESSAGES[resolved.format.name](fields, sample_id), fields, sample_id)


class RowReader:
    """Reads the rows of one file or folder as talks, and remembers what it has met.

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
        """The row `number`, from 0, of what the container gives; or why it cannot be a sample."""
        sample_id = id_of(record, number, self._columns)
        row = f"row {number + 1} ({sample_id})"
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
        except BadSample as error:  # anew, since a traceback keeps all that was read alive
            # Halves of surrogate pairs, which no file can hold, are spelled out.
            name, reason = (
                text.encode("utf-8", "backslashreplace").decode() for text in (error.sample_id, error.reason)
            )
            return BadSample(name, reason, error.kind)


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file of whose `rows`, as far as they were read, none can be a sample."""
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")
