"""A row of any format to an `Example`, and the one reader of a file's rows that tells what cannot be a sample."""

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
    as_conversation,
    correct_choice,
    from_record,
    listed_choices,
    with_letters,
)
from dora_vl.data.pictures import RowPictures, row_pictures
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Role, Turn
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


def _refuse_marked(turn: Mapping[str, object], number: int, sample_id: str) -> None:
    """Refuses what would be lost of a turn: what it holds beside its words, and a mark that it is not to be trained."""
    unsaid = next((name for name in NOT_SAID if not is_nothing(turn.get(name))), None)
    if unsaid is not None:
        reason = "which would not be trained; write it into the answer's text, or leave out the row"
        raise BadSample(sample_id, f"turn {number} has {unsaid!r}, {reason}")
    speaker = turn.get("from") if turn.get("role") is None else turn["role"]
    if ROLES.get(str(speaker)) != "assistant":
        return
    for name in MARKS:
        mark = turn.get(name)
        if not isinstance(mark, int | float) or mark != mark:  # what pandas writes for nothing
            continue
        if mark == 0 if name == "loss" else mark != 1:
            reason = "but every answer is trained; leave out the mark, or the row"
            raise BadSample(sample_id, f"turn {number} has {name!r} {shown(mark)}, {reason}")


_TAGS = re.compile(r"<(?:img>(.*?)</img>|bbox>|ref-object>|audio>(?!.*</audio>))", re.DOTALL)
"""A picture that its text names (Qwen), and places of ms-swift's for what stands in other columns."""


def _with_tagged_pictures(example: Example) -> Example:
    """The example with `<image>` for each `<img>path</img>` of its text, and these pictures in their order."""
    texts = [turn.text for turn in example.turns] or [example.question]
    tags = [match for text in texts if "<" in text for match in _TAGS.finditer(text)]
    if not tags:
        return example
    pictures = RowPictures(example.id)
    for match in tags:
        if match[1] is None:
            reason = "which nothing here fills; write what it stands for into the text"
            raise BadSample(example.id, f"its text has {match[0]}, {reason}")
        pictures.add(match[1].strip(), "<img>")
    if example.images:
        raise BadSample(
            example.id, f"its text names pictures in <img>, and it has {len(example.images)} more beside it"
        )
    return replace(
        example,
        question=_TAGS.sub(IMAGE_PLACEHOLDER, example.question),
        turns=tuple(replace(turn, text=_TAGS.sub(IMAGE_PLACEHOLDER, turn.text)) for turn in example.turns),
        images=tuple(pictures.names),
        image_bytes=pictures.held,
    )


def _read_clip(value: object, key: str, sample_id: str) -> Clip:
    """A path, or an object with one and times: `start_seconds`, `end_seconds`, or Qwen's `video_start`, `video_end`."""
    times: list[float | None] = [None, None]
    if isinstance(value, Mapping):
        for place, names in enumerate((("start_seconds", "video_start"), ("end_seconds", "video_end"))):
            name = next((name for name in names if value.get(name) is not None), None)
            seconds = None if name is None else value[name]
            with suppress(OverflowError):  # a whole number beyond every float
                if isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds):
                    times[place] = float(seconds)
            if name is not None and times[place] is None:
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


class MessageReader:
    """Reads the turns of one row; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Row, sample_id: str) -> None:
        self._row = row
        self.sample_id = sample_id
        self._beside = row_pictures(row, sample_id)
        self._left = [*range(len(self._beside.names))]
        self._pictures = RowPictures(sample_id)
        self._videos: list[Clip] = []
        videos = row.get("videos")
        listed = [] if videos in (None, "", []) else videos if isinstance(videos, list | tuple) else [videos]
        self._videos_left = [_read_clip(video, "videos", sample_id) for video in listed]

    def turns(self, messages: object, key: str = "messages") -> tuple[Turn, ...]:
        """The turns of a list of messages, `<image>` where a part is a picture, `<video>` where it is a video."""
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise BadSample(self.sample_id, f"{key!r} must be a list of turns, got {shown(messages)}")
        return tuple(self._turn(message, number) for number, message in enumerate(messages, 1))

    def example(self, turns: tuple[Turn, ...], answer: str = "") -> Example:
        """The example of these turns, behind what the row says as `system`, with the pictures in and beside them."""
        if not is_nothing(self._row.get("system")):
            system = _text(self._row["system"], "system", self.sample_id)
            first = turns[0].text.strip() if turns and turns[0].role == "system" else None
            if first and first != system.strip():
                reason = "its 'system' differs from the system turn that it has too; leave one of them out"
                raise BadSample(self.sample_id, reason)
            turns = turns if first else (Turn("system", system), *(turns if first is None else turns[1:]))
        return Example(
            self.sample_id,
            images=(*self._pictures.names, *(self._beside.names[place] for place in self._left)),
            turns=turns,
            videos=(*self._videos, *self._videos_left),
            answers=(Answer(text=answer),) if answer else (),
            image_bytes={**self._beside.held, **self._pictures.held},
        )

    def _turn(self, message: object, number: int) -> Turn:
        if not isinstance(message, Mapping):
            raise BadSample(self.sample_id, f"turn {number} must be an object of role and text, got {shown(message)}")
        if len(message) > 2:
            _refuse_marked(message, number, self.sample_id)
        who, what = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
        role = ROLES.get(speaker) if isinstance(speaker := message.get(who), str) else None
        if role is None:
            roles = "'human', 'gpt' and 'system'" if who == "from" else "system, user and assistant"
            raise BadSample(self.sample_id, f"turn {number} has {who!r} {shown(speaker)}; only {roles} are known")
        content = message.get(what)
        if isinstance(content, str):
            self.take_beside(content)
            return Turn(role, content)
        if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
            raise BadSample(self.sample_id, f"{what!r} of turn {number} is neither text nor parts: {shown(content)}")
        return Turn(role, "".join(self._part(part, number) for part in content))

    def _part(self, part: object, number: int) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind in TEXT_PARTS and isinstance(text := part.get("text"), str):
            self.take_beside(text)
            return text
        if isinstance(part, Mapping) and kind in PICTURE_PARTS:
            payload = next((value for key in PAYLOADS if (value := part.get(key)) is not None), None)
            if payload is not None:
                self._pictures.add(payload, f"part of turn {number}")
            elif part.get("index") is not None:
                self._take(part["index"], number)
            else:
                self.take_beside(IMAGE_PLACEHOLDER)
            return IMAGE_PLACEHOLDER
        if isinstance(part, Mapping) and kind in VIDEO_PARTS:
            if all(part.get(key) is None for key in VIDEO_PAYLOADS):
                self.take_beside(VIDEO_PLACEHOLDER)
            else:
                self._videos.append(_read_clip(part, f"part of turn {number}", self.sample_id))
            return VIDEO_PLACEHOLDER
        raise BadSample(self.sample_id, f"turn {number} has a part that is no text, picture or video: {shown(part)}")

    def take_beside(self, text: str) -> None:
        """Pictures and videos that stand beside the messages take the places without one of their own, in order."""
        for place in self._left[: text.count(IMAGE_PLACEHOLDER)]:
            self._take(place)
        count = text.count(VIDEO_PLACEHOLDER)
        self._videos += self._videos_left[:count]
        del self._videos_left[:count]

    def _take(self, place: object, number: int = 0) -> None:
        """A picture beside the messages by its place, from 0 (TRL's `index`)."""
        if not isinstance(place, int) or not 0 <= place < len(self._beside.names):
            reason = f"the index {shown(place)} of {len(self._beside.names)} pictures"
            raise BadSample(self.sample_id, f"a part of turn {number} has {reason}")
        self._pictures.names.append(self._beside.names[place])
        self._left = [left for left in self._left if left != place]


def _earlier_rounds(row: Row, sample_id: str) -> tuple[Turn, ...]:
    """`history`, pairs of a question and its answer (ms-swift), as turns."""
    history = row.get("history")
    turns: list[Turn] = []
    for pair in history if isinstance(history, list) else [] if is_nothing(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadSample(sample_id, f"'history' must hold pairs of a question and an answer, got {shown(pair)}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return tuple(turns)


def read_conversations(row: Row, sample_id: str, key: str = "conversations") -> Example:
    """LLaVA's and ShareGPT's `from` and `value`, or roles; pictures in parts, or in `image` or `images` beside them."""
    reader = MessageReader(row, sample_id)
    return reader.example(reader.turns(row.get(key), key))


def _read_prompt_completion(row: Row, sample_id: str) -> Example:
    """`prompt` and `completion`, each text or a list of messages (TRL); `history` holds earlier rounds."""
    reader, turns = MessageReader(row, sample_id), _earlier_rounds(row, sample_id)
    for turn in turns:
        reader.take_beside(turn.text)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        turns += reader.turns([{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key], key)
    return reader.example(turns)


def _read_texts(row: Row, sample_id: str) -> Example:
    """`texts`, a list of `user` and `assistant` (The Cauldron); its pictures come before the first question."""
    texts = row["texts"]
    if not isinstance(texts, Sequence) or isinstance(texts, str | bytes) or not texts:
        raise BadSample(sample_id, f"'texts' must be a list of user and assistant, got {shown(texts)}")
    turns: list[Turn] = []
    for number, entry in enumerate(texts, 1):
        question, answer = (entry.get("user"), entry.get("assistant")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadSample(sample_id, f"entry {number} of 'texts' must hold user and assistant, got {shown(entry)}")
        turns += [Turn("user", question), Turn("assistant", answer)]
    return MessageReader(row, sample_id).example(tuple(turns))


def _read_instructions(row: Row, sample_id: str) -> Example:
    """`instruction`, `input`, `output`, and where there is one `system` (Alpaca, LLaMA-Factory).

    `answer`, the part of the output that is scored, is the example's answer where it is text (LLM-Adapters).
    """
    instruction, added, output = (_text(row.get(name), name, sample_id) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise BadSample(sample_id, "'output' is empty", EMPTY_ANSWER)
    if not is_nothing(row.get("history")):
        raise BadSample(sample_id, "it has a 'history' of earlier rounds; write the whole talk as 'messages'")
    question = f"{instruction}\n{added}" if instruction and added else instruction or added
    turns = (Turn("user", question, len(added)), Turn("assistant", output))
    scored = row.get("scored")
    return MessageReader(row, sample_id).example(turns, scored if isinstance(scored, str) else "")


def _read_columns(row: Row, sample_id: str) -> Example:
    """A question and an answer in columns of their own; of several answers the most frequent, the first of equals.

    `history` holds earlier rounds; a hint stands before the question, choices behind it (`_written_choices`).
    """
    question, answer = _text(row["question"], "question", sample_id), _answer(row["answer"], sample_id)
    if not is_nothing(row.get("choices")) and answer.strip():
        labels, choices = _choices(row["choices"], sample_id)
        question, answer = (
            _written_choices(question, choices, answer, sample_id, labels) if choices else (question, answer)
        )
    hint = _text(row.get("hint"), "hint", sample_id).strip()
    if not _says(question, [hint]):
        question = f"{hint}\n{question}"
    return _question(row, sample_id, question, answer, _earlier_rounds(row, sample_id))


def _read_caption(row: Row, sample_id: str) -> Example:
    """A picture with a caption and no question."""
    return _question(row, sample_id, "", _answer(row["caption"], sample_id, "caption"))


def _question(row: Row, sample_id: str, question: str, answer: str, earlier: tuple[Turn, ...] = ()) -> Example:
    """A question as one where it stands alone, behind a system's words or earlier rounds as turns."""
    reader = MessageReader(row, sample_id)
    if earlier or not is_nothing(row.get("system")):
        return reader.example((*earlier, Turn("user", question), Turn("assistant", answer)))
    return replace(reader.example(()), question=question, answers=(Answer(text=answer),))


def _read_record(row: Row, sample_id: str) -> Example:
    record = {**_without_nulls(row), "id": sample_id}
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    example = from_record(record)
    if not example.choices:
        return example
    correct = example.extra.get("correct", example.answers[0].text if example.answers else None)
    question, answer = _written_choices(example.question, example.choices, correct, sample_id)
    return replace(example, question=question, answers=(Answer(text=answer),))


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


READERS: Mapping[str, Callable[[Row, str], Example]] = {
    "conversations": read_conversations,
    "messages": partial(read_conversations, key="messages"),
    "texts": _read_texts,
    "prompt/completion": _read_prompt_completion,
    "instructions": _read_instructions,
    "records": _read_record,
    "question/answer": _read_columns,
    "captions": _read_caption,
}
"""What makes an example of a row's fields, by its format."""


def id_of(row: Row, number: int = 0, columns: Columns = USUAL) -> str:
    """The row's own id, else its place, from 0."""
    stated = columns.id_of(row)
    if stated is None:
        return f"record {number}"
    return stated if isinstance(stated, str) else shown(stated)


def read_row(row: Row, *, number: int = 0, columns: Columns = USUAL) -> Example:
    """One row of any format as an example.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return _read(columns.resolve(row), id_of(row, number, columns))


def _read(resolved: Resolved, sample_id: str) -> Example:
    if resolved.format is None:
        formats = "; ".join(" and ".join(form.needs) for form in FORMATS if form.needs)
        raise BadSample(
            sample_id,
            f"its keys {shown([*resolved.fields], 120)} fit no format ({formats}); data.columns says what a column is, "
            "such as {headline: question}",
        )
    return _with_tagged_pictures(READERS[resolved.format.name](resolved.fields, sample_id))


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
            return as_conversation(_read(resolved, sample_id))
        except BadSample as error:  # anew, since a traceback keeps all that was read alive
            return BadSample(_spelled(error.sample_id), _spelled(error.reason), error.kind)


def _spelled(text: str) -> str:
    """Text with its halves of surrogate pairs, which no file can hold, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file of whose `rows`, as far as they were read, none can be a sample."""
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")
