"""Reading a file of records, JSON list or JSON lines, without ever holding it in memory.

Only the standard library at import, so that data preparation can use it alone.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import NoReturn

from dora_vl.data.columns import FORMATS, USUAL, Columns, ColumnsError, Resolved, Row, is_nothing
from dora_vl.data.example import (
    LETTER,
    Answer,
    Example,
    clip_fields,
    correct_choice,
    from_record,
    listed_choices,
    with_letters,
)
from dora_vl.data.pictures import RowPictures, row_pictures
from dora_vl.data.text_file import NotUtf8, Progress, opened, refuse_half_pairs
from dora_vl.data.turns import (
    IMAGE_PLACEHOLDER,
    INPUT_CHARACTERS,
    SPEAKERS,
    VIDEO_PLACEHOLDER,
    Clip,
    Role,
    Turn,
    raw_turns,
    read_clip,
    row_clips,
    spoken_turns,
)
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, BadSample, UserError, shown

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 26
"""A value that is still open after 64 Mi characters is a missing quote or bracket, not a sample."""

_ROWS_IN_AN_OBJECT = re.compile(r'\{\s*"(data|rows|samples|examples)"\s*:\s*\[\s*\{')

_WHITESPACE = " \t\r\n"


def stream_records(
    path: Path, *, key: str | None = None, progress: Progress | None = None
) -> Iterator[dict[str, object]]:
    """Yields the objects of a JSON list, or of JSON lines, in order.

    `json`'s own scanner over a growing buffer: as fast as `ijson` on yajl to within a fifth (144,000 against 175,000
    rows of 1.1 kB a second), without the dependency, and an error has its line.

    Args:
        path: the file.
        key: the file is one object, and the list is what it holds under this name.
        progress: called with the number of bytes at each piece that is read.

    Raises:
        UserError: not UTF-8, malformed or cut off, an entry that is no object, or nothing under `key`.
    """
    with opened(path, "records") as file:
        source = _Source(path, file, progress)
        if key is not None:
            yield from _list_under(source, key)
        elif source.next_character() == "[":
            yield from _list_entries(source)
            source.expect_end("list")
        elif (name := source.name_of_list()) is not None:
            yield from _list_under(source, name, alone=True)
        else:
            while source.next_character():
                yield source.take_object()


def stream_values(path: Path, wanted: str) -> Iterator[tuple[int, object]]:
    """Yields the entries of a JSON list, or the values of JSON lines or of one JSON text, with the line of each.

    Args:
        wanted: what the file should be, for the message.

    Raises:
        UserError: no such file, not UTF-8, malformed or cut off, or half of a surrogate pair in a text.
    """
    with opened(path, wanted) as file:
        source = _Source(path, file)
        if source.next_character() == "[":
            yield from _numbered_entries(source)
            source.expect_end("list")
        elif (name := source.name_of_list()) is not None:
            yield from ((source.line(), row) for row in _list_under(source, name, alone=True))
        else:
            while source.next_character():
                yield source.line(), source.take_text_value()


def stream_members(path: Path, *, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields the members, name and object, of a file that is one JSON object of objects; see `stream_records`.

    Raises:
        UserError: not UTF-8, malformed or cut off, or a member that is no object.
    """
    with opened(path, "records") as file:
        source = _Source(path, file, progress)
        for name in _member_names(source):
            yield name, source.take_object()


def _list_under(source: _Source, key: str, *, alone: bool = False) -> Iterator[dict[str, object]]:
    """Yields what the list holds; where it must stand `alone`, other lists and objects are not passed over."""
    names: list[str] = []
    for name in _member_names(source):
        names.append(name)
        if name != key:
            value = source.take_value()
            if alone and value and isinstance(value, list | dict):
                source.fail(
                    f"beside {key!r} stands {shown(name)}; write the rows that are meant as a list of their own"
                )
        elif source.next_character() != "[":
            source.fail(f"{key!r} must hold a list")
        else:
            yield from _list_entries(source)
    if key not in names:
        source.fail(f"there is no {key!r}, only {', '.join(map(shown, names[:8])) or 'nothing'}")


def _member_names(source: _Source) -> Iterator[str]:
    """Yields each name of an object that is the whole file; who asks takes the value before the next one."""
    source.expect("{", "an object")
    closed = source.next_character() == "}"
    while not closed:
        name = source.take_value()
        if not isinstance(name, str):
            source.fail("expected a name in quotes")
        source.expect(":", f"':' after {shown(name)}")
        yield name
        closed = source.next_character() != ","
        if not closed:
            source.take_character()
    source.expect("}", "',' or '}' after a member of the object")
    source.expect_end("object")


def _list_entries(source: _Source) -> Iterator[dict[str, object]]:
    source.take_character()
    if source.next_character() != "]":
        yield source.take_object()
        while source.next_character() == ",":
            source.take_character()
            yield source.take_object()
    source.expect("]", "',' or ']' after an entry of the list")


def _numbered_entries(source: _Source) -> Iterator[tuple[int, object]]:
    source.take_character()
    if source.next_character() != "]":
        yield source.line(), source.take_text_value()
        while source.next_character() == ",":
            source.take_character()
            source.next_character()
            yield source.line(), source.take_text_value()
    source.expect("]", "',' or ']' after an entry of the list")


class _Source:
    """The unread part of a file: a buffer, a position in it, and the line the buffer starts at."""

    def __init__(self, path: Path, file: io.BufferedIOBase, progress: Progress | None = None) -> None:
        self._path = path
        self._progress = progress
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line, self._counted = 1, 0
        self._ended = False
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)

    def next_character(self) -> str:
        """The next character that is not whitespace, left unread; empty at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if character not in _WHITESPACE:
                    return character
                self._position += 1
            if self._ended:
                return ""
            self._refill(CHUNK_BYTES)

    def name_of_list(self) -> str | None:
        """The name of the rows' list, where the file is one object that begins with it."""
        found = _ROWS_IN_AN_OBJECT.match(self._buffer, self._position)
        return found and found[1]

    def line(self) -> int:
        """The line of the current position, from 1."""
        self._line += self._buffer.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def take_character(self) -> None:
        self._position += 1

    def expect(self, character: str, what: str) -> None:
        """Takes the next character, which must be this one."""
        if self.next_character() != character:
            self.fail(f"expected {what}")
        self._position += 1

    def expect_end(self, what: str) -> None:
        """Nothing but whitespace may be left."""
        if self.next_character():
            self.fail(f"there is text after the end of the {what}")

    def take_object(self) -> dict[str, object]:
        """Reads one object."""
        value, end = self._decoded()
        if not isinstance(value, dict):
            self.fail(f"a record must be an object, found {type(value).__name__}")
        self._position = end
        return value

    def take_value(self) -> object:
        """Reads one value of any kind."""
        value, self._position = self._decoded()
        return value

    def take_text_value(self) -> object:
        """Reads one value of any kind whose text can be printed and written.

        Raises:
            UserError: it holds half of a surrogate pair.
        """
        value, end = self._decoded()
        if any(self._buffer.find(half, self._position, end) >= 0 for half in ("\\ud", "\\uD")):
            refuse_half_pairs(value, f"{self._path}, line {self.line()}")
        self._position = end
        return value

    def _decoded(self) -> tuple[object, int]:
        """The next value and where it ends, growing the buffer until it holds all of it."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._position)
                if end < len(self._buffer) or self._ended:  # a number could go on
                    return value, end
            except RecursionError:
                self.fail("its values are nested too deeply")
            except json.JSONDecodeError as error:
                if self._ended or len(self._buffer) - self._position > MAX_RECORD_CHARACTERS:
                    self._position = error.pos
                    self.fail(error.msg)
            except ValueError as error:  # a number of too many digits
                self.fail(str(error))
            self._refill(max(CHUNK_BYTES, len(self._buffer) - self._position))

    def fail(self, what: str) -> NoReturn:
        """Raises with the line of the current position."""
        line = self.line()
        if self._ended and self._position >= len(self._buffer.rstrip(_WHITESPACE)):
            what = f"the file ends too early ({what}); it may be cut off, fetch or write it again"
        raise UserError(f"{self._path}, line {line}: not the JSON list or JSON lines expected: {what}")

    def _refill(self, size: int) -> None:
        self.line()
        chunk = self._file.read(size)
        self._ended = not chunk
        if self._progress is not None:
            self._progress(len(chunk))
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            offset = self._file.tell() - len(chunk) - pending + error.start
            raise NotUtf8(f"{self._path}, byte {offset}: not UTF-8 ({error.reason}); convert the file") from None
        self._buffer = self._buffer[self._position :] + text
        self._position = self._counted = 0


# Rows of talk and of questions: `messages` with roles, prompt/completion, `texts`, instructions, columns.


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
VIDEO_PAYLOADS = ("video", "video_url", "url", "path")
TALKS = ("conversations", "messages", "prompt", "completion")
"""Fields that may hold a list of turns."""
MARKS = ("loss", "weight")
"""How ms-swift and OpenAI's files say of an answer whether it is trained."""
NOT_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "audio")
"""What a turn may hold beside its words, and no template here writes."""


def refuse_marked_turns(fields: Mapping[str, object], sample_id: str) -> None:
    """Refuses what would be lost of a turn: what it holds beside its words, and a mark that it is not to be trained.

    Raises:
        BadSample: with the turn and the mark. Marks of the user's turns say nothing.
    """
    for name in TALKS:
        turns = fields.get(name)
        for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
            if isinstance(turn, dict) and len(turn) > 2:
                _refuse_marked(turn, number, sample_id)


def _refuse_marked(turn: Mapping[str, object], number: int, sample_id: str) -> None:
    unsaid = next((name for name in NOT_SAID if not is_nothing(turn.get(name))), None)
    if unsaid is not None:
        told = "which would not be trained; write it into the answer's text, or leave out the row"
        raise BadSample(sample_id, f"turn {number} has {unsaid!r}, {told}")
    speaker = turn.get("from") if turn.get("role") is None else turn["role"]
    mark = next((name for name in MARKS if _is_untrained(name, turn.get(name))), None)
    if mark is not None and speaker not in ("user", "human", "system", "developer"):
        told = "but every answer is trained; leave out the mark, or the row"
        raise BadSample(sample_id, f"turn {number} has {mark!r} {shown(turn[mark])}, {told}")


def _is_untrained(name: str, mark: object) -> bool:
    if not isinstance(mark, int | float) or mark != mark:  # what pandas writes for nothing
        return False
    return mark == 0 if name == "loss" else mark != 1


_TAGS = re.compile(r"<(?:img>(.*?)</img>|bbox>|ref-object>|audio>(?!.*</audio>))", re.DOTALL)
"""A picture that its text names (Qwen), and places of ms-swift's for what stands in other columns."""


def has_tags(texts: Iterable[str]) -> bool:
    """Whether a text holds a picture's path in `<img>`, or another medium's place."""
    return any(map(_TAGS.search, texts))


def with_tagged_pictures(example: Example) -> Example:
    """The example with `<image>` for each `<img>path</img>` of its text, and these pictures in their order.

    Raises:
        BadSample: there are other pictures too, or places of boxes or sounds.
    """
    texts = [turn.text for turn in example.turns] or [example.question]
    if not has_tags(texts):
        return example
    pictures = RowPictures(example.id)
    for match in (match for text in texts for match in _TAGS.finditer(text)):
        if match[1] is None:
            told = "which nothing here fills; write what it stands for into the text"
            raise BadSample(example.id, f"its text has {match[0]}, {told}")
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


class MessageReader:
    """Reads the messages of one row; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Mapping[str, object], sample_id: str) -> None:
        self.sample_id = sample_id
        self._beside = row_pictures(row, sample_id)
        self._taken: set[int] = set()
        self._pictures = RowPictures(sample_id)
        self._videos: list[Clip] = []
        self._videos_beside = row_clips(row, sample_id)
        self._next_video = 0

    def turns(self, messages: object) -> tuple[Turn, ...]:
        """The turns of a list of messages, `<image>` where a part is a picture, `<video>` where it is a video.

        Raises:
            BadSample: no list of objects, a role that is none of `ROLES`, or content that is neither text nor parts.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise BadSample(self.sample_id, f"its messages must be a list of turns, got {shown(messages)}")
        return tuple(self._turn(message, number) for number, message in enumerate(messages, 1))

    def example(self, turns: tuple[Turn, ...]) -> Example:
        """The example of these turns, with the pictures seen in them and those beside them."""
        left = [name for place, name in enumerate(self._beside.names) if place not in self._taken]
        return Example(
            id=self.sample_id,
            turns=turns,
            images=(*self._pictures.names, *left),
            image_bytes={**self._beside.held, **self._pictures.held},
            **clip_fields((*self._videos, *self._videos_beside[self._next_video :])),
        )

    def _turn(self, message: object, number: int) -> Turn:
        if not isinstance(message, Mapping):
            raise BadSample(self.sample_id, f"turn {number} must hold 'role' and 'content', got {shown(message)}")
        role = ROLES.get(said) if isinstance(said := message.get("role"), str) else None
        if role is None:
            known = "system, user and assistant"
            raise BadSample(self.sample_id, f"turn {number} has the role {shown(said)}; only {known} are known")
        content = message.get("content")
        if isinstance(content, str):
            self.take_beside(content)
            return Turn(role, content)
        if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
            raise BadSample(self.sample_id, f"the content of turn {number} is neither text nor parts: {shown(content)}")
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
            if payload is None and part.get("index") is not None:
                self._take_place(part["index"], number)
            elif payload is None:
                self.take_beside(IMAGE_PLACEHOLDER)
            else:
                self._pictures.add(payload, f"part of turn {number}")
            return IMAGE_PLACEHOLDER
        if isinstance(part, Mapping) and kind in VIDEO_PARTS:
            if all(part.get(key) is None for key in VIDEO_PAYLOADS):
                self.take_beside(VIDEO_PLACEHOLDER)
            else:
                self._videos.append(read_clip(part, f"part of turn {number}", self.sample_id))
            return VIDEO_PLACEHOLDER
        raise BadSample(self.sample_id, f"turn {number} has a part that is no text, picture or video: {shown(part)}")

    def take_beside(self, text: str) -> None:
        """Pictures and videos that stand beside the messages take the places without one of their own, in order."""
        left = [place for place in range(len(self._beside.names)) if place not in self._taken]
        for place in left[: text.count(IMAGE_PLACEHOLDER)]:
            self._take_place(place)
        clips = self._videos_beside[self._next_video : self._next_video + text.count(VIDEO_PLACEHOLDER)]
        self._videos += clips
        self._next_video += len(clips)

    def _take_place(self, place: object, number: int = 0) -> None:
        """A picture beside the messages by its place, from 0 (TRL's `index`)."""
        if not isinstance(place, int) or not 0 <= place < len(self._beside.names):
            told = f"the index {shown(place)} of {len(self._beside.names)} pictures"
            raise BadSample(self.sample_id, f"a part of turn {number} has {told}")
        self._pictures.names.append(self._beside.names[place])
        self._taken.add(place)


def read_messages(row: Mapping[str, object], sample_id: str, key: str = "messages") -> Example:
    """One row of `messages`; pictures in parts, or in `images` beside them.

    Raises:
        BadSample: see `MessageReader`.
    """
    reader = MessageReader(row, sample_id)
    return reader.example(with_system(row, reader.turns(row.get(key)), sample_id))


def with_system(row: Mapping[str, object], turns: tuple[Turn, ...], sample_id: str) -> tuple[Turn, ...]:
    """The turns with what the row says as `system` before them.

    Raises:
        BadSample: it is no text, or the turns begin with a system turn that says something else.
    """
    if is_nothing(row.get("system")):
        return turns
    said = _text(row["system"], "system", sample_id)
    own = turns[0].text.strip() if turns and turns[0].role == "system" else None
    if own and own != said.strip():
        raise BadSample(sample_id, "its 'system' differs from the system turn that it has too; leave one of them out")
    return turns if own else (Turn("system", said), *(turns if own is None else turns[1:]))


def _earlier_rounds(row: Mapping[str, object], sample_id: str) -> tuple[Turn, ...]:
    """`history`, pairs of a question and its answer (ms-swift), as turns."""
    history = row.get("history")
    turns: list[Turn] = []
    for pair in history if isinstance(history, list) else [] if is_nothing(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise BadSample(sample_id, f"'history' must hold pairs of a question and an answer, got {shown(pair)}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return tuple(turns)


def read_prompt_completion(row: Mapping[str, object], sample_id: str) -> Example:
    """`prompt` and `completion`, each text or a list of messages (TRL); `history` holds earlier rounds."""
    reader, earlier = MessageReader(row, sample_id), _earlier_rounds(row, sample_id)
    for turn in earlier:
        reader.take_beside(turn.text)
    sides = {"prompt": "user", "completion": "assistant"}
    turns = [
        reader.turns([{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key])
        for key, role in sides.items()
    ]
    return reader.example(with_system(row, (*earlier, *turns[0], *turns[1]), sample_id))


def read_texts(row: Mapping[str, object], sample_id: str) -> Example:
    """`texts`, a list of `user` and `assistant` (The Cauldron); its pictures come before the first question."""
    texts = row["texts"]
    if not isinstance(texts, Sequence) or isinstance(texts, str | bytes) or not texts:
        raise BadSample(sample_id, f"'texts' must be a list of user and assistant, got {shown(texts)}")
    turns: list[Turn] = []
    for number, entry in enumerate(texts, 1):
        sides = [entry.get(side) for side in ("user", "assistant")] if isinstance(entry, Mapping) else []
        if len(sides) != 2 or not all(isinstance(side, str) for side in sides):
            raise BadSample(sample_id, f"entry {number} of 'texts' must hold user and assistant, got {shown(entry)}")
        turns += [Turn("user", str(sides[0])), Turn("assistant", str(sides[1]))]
    return _with_media(row, sample_id, turns=tuple(turns))


def read_instructions(row: Mapping[str, object], sample_id: str) -> Example:
    """`instruction`, `input`, `output`, and where there is one `system` (Alpaca, LLaMA-Factory).

    `answer`, the part of the output that is scored, is the example's answer where it is text (LLM-Adapters).
    """
    instruction, added, output = (_text_or_none(row, name, sample_id) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise BadSample(sample_id, "'output' is empty", EMPTY_ANSWER)
    asked = f"{instruction}\n{added}" if instruction and added else instruction or added
    turns = (Turn("user", asked, len(added)), Turn("assistant", output))
    if not is_nothing(row.get("history")):
        raise BadSample(sample_id, "it has a 'history' of earlier rounds; write the whole talk as 'messages'")
    scored = row.get("scored")
    return _with_media(row, sample_id, turns=turns, answer=scored if isinstance(scored, str) else "")


def read_columns(row: Mapping[str, object], sample_id: str) -> Example:
    """A question and an answer in columns of their own; of several answers the most frequent, the first of equals.

    `history` holds earlier rounds; a hint stands before the question, choices behind it (`written_choices`).
    """
    asked, said = _text(row["question"], "question", sample_id), _answer(row["answer"], sample_id)
    if not is_nothing(row.get("choices")) and said.strip():
        labels, choices = _choices(row["choices"], sample_id)
        asked, said = written_choices(asked, choices, said, sample_id, labels) if choices else (asked, said)
    if not _says(asked, [hint := _text_or_none(row, "hint", sample_id).strip()]):
        asked = f"{hint}\n{asked}"
    if earlier := _earlier_rounds(row, sample_id):
        return _with_media(row, sample_id, turns=(*earlier, Turn("user", asked), Turn("assistant", said)))
    return _with_media(row, sample_id, question=asked, answer=said)


def written_choices(
    asked: str, choices: Sequence[str], said: object, sample_id: str, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """A question with its choices as LLaVA writes MMBench's, a letter and a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        said: the right choice, by its label or text; without labels but letters, by its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.

    Raises:
        BadSample: it is none of these, or there are more choices than letters.
    """
    if any(not choice.strip() for choice in choices) or len(choices) > len(ascii_uppercase):
        raise BadSample(sample_id, f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    known, label = [label.casefold() for label in labels], str(said).strip(" ().:").casefold()
    in_order = known == list(ascii_lowercase[: len(known)])  # of none too
    if label in known and not in_order:
        index = known.index(label)
    else:
        index = correct_choice(said, choices, sample_id, "either" if in_order else "only text")
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if _says(asked, choices):
        if str(said).strip() in (choice.strip() for choice in choices):
            return asked, str(said)
        if all(re.search(rf"\b{line[0]}\W", asked) for line in lines):
            return asked, letter
    return "\n".join([asked, *lines, LETTER]), letter


def _choices(value: object, sample_id: str) -> tuple[list[str], list[str]]:
    """The labels of choices, where they have some of their own, and their texts; those that are empty are none."""
    labels: object = []
    if isinstance(value, str):
        value = listed_choices(value, sample_id)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        kept = {name: text for name, text in value.items() if not is_nothing(text)}
        labels, value = [*kept], [*kept.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise BadSample(sample_id, f"its choices must be a list of text, got {shown(value)}")
    texts = [_text_or_none({"choices": one}, "choices", sample_id) for one in value]
    return [_text(label, "choices", sample_id) for label in labels], texts


def _says(asked: str, texts: Sequence[str]) -> bool:
    """Whether the question's words hold all of these, as whole words; nothing is said by any."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", asked) for text in texts)


def read_caption(row: Mapping[str, object], sample_id: str) -> Example:
    """A picture with a caption and no question."""
    return _with_media(row, sample_id, answer=_answer(row["caption"], sample_id, "caption"))


def _with_media(
    row: Mapping[str, object], sample_id: str, *, turns: tuple[Turn, ...] = (), question: str = "", answer: str = ""
) -> Example:
    pictures = row_pictures(row, sample_id)
    if not turns and not is_nothing(row.get("system")):
        turns, question, answer = (Turn("user", question), Turn("assistant", answer)), "", ""
    turns = with_system(row, turns, sample_id) if turns else ()
    return Example(
        id=sample_id,
        images=tuple(pictures.names),
        image_bytes=pictures.held,
        turns=turns,
        question=question,
        answers=() if turns and not answer else (Answer(text=answer),),
        **clip_fields(row_clips(row, sample_id)),
    )


def _answer(value: object, sample_id: str, name: str = "answer") -> str:
    """The most frequent of several answers, each text or an object with one; SQuAD's are a list in an object."""
    value = _in_object(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [_text_or_none({name: _in_object(one)}, name, sample_id) for one in listed]
    counted = Counter(text for text in texts if text.strip())
    return counted.most_common(1)[0][0] if counted else ""


def _in_object(value: object) -> object:
    """What an object says as its answer or text; anything else is that itself."""
    if not isinstance(value, Mapping):
        return value
    return next((said for key in ("answer", "text") if (said := value.get(key)) is not None), value)


def _text_or_none(row: Mapping[str, object], name: str, sample_id: str) -> str:
    """A field's text; empty where the row has none."""
    value = row.get(name)
    return "" if value is None else _text(value, name, sample_id)


def _text(value: object, name: str, sample_id: str) -> str:
    """Text, or a number as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN: a table's empty cell
        raise BadSample(sample_id, f"{name!r} must hold text, got {shown(value)}")
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        raise BadSample(sample_id, f"{name!r} holds {shown(value)}") from None


# Which format a row is in, by its own keys, and the one way from any of them to what a sample is made of.


LLAVA = "conversations"
"""The format whose turns are LLaVA's."""


def _roles_in_conversations(row: Row) -> bool:
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    return isinstance(first, Mapping) and first.get("role") is not None


def _read_conversations(row: Row, sample_id: str) -> Example:
    """LLaVA's and ShareGPT's: `from` and `value`, the pictures in `image` or `images`, a `system` text beside them."""
    if _roles_in_conversations(row):
        return read_messages(row, sample_id, "conversations")
    turns = with_system(row, tuple(spoken_turns(row, sample_id)), sample_id)
    pictures = row_pictures(row, sample_id)
    return Example(
        id=sample_id,
        turns=turns,
        images=tuple(pictures.names),
        image_bytes=pictures.held,
        **clip_fields(row_clips(row, sample_id)),
    )


def _read_record(row: Row, sample_id: str) -> Example:
    record = {**_without_nulls(row), "id": sample_id}
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    example = from_record(record)
    if not example.choices:
        return example
    known = example.extra.get("correct", example.answers[0].text if example.answers else None)
    asked, said = written_choices(example.question, example.choices, known, sample_id)
    return replace(example, question=asked, answers=(Answer(text=said),))


def _without_nulls(value: Row) -> dict[str, object]:
    """Tables fill up with null what a row has not."""
    return {name: _inner(inner) for name, inner in value.items() if inner is not None}


def _inner(value: object) -> object:
    if isinstance(value, Mapping):
        return _without_nulls(value)
    return [_inner(entry) for entry in value] if isinstance(value, list) else value


READERS: Mapping[str, Callable[[Row, str], Example]] = {
    "conversations": _read_conversations,
    "messages": read_messages,
    "texts": read_texts,
    "prompt/completion": read_prompt_completion,
    "instructions": read_instructions,
    "records": _read_record,
    "question/answer": read_columns,
    "captions": read_caption,
}
"""What makes an example of a row's fields, by its format."""


def id_of(row: Row, number: int = 0, columns: Columns = USUAL) -> str:
    """The row's own id, else its place, from 0."""
    own = columns.id_of(row)
    if own is None:
        return f"record {number}"
    return own if isinstance(own, str) else shown(own)


def read_row(row: Row, *, number: int = 0, columns: Columns = USUAL) -> Example:
    """One row of any format as an example.

    Args:
        row: what a container gives: JSON's values, and bytes where a table or an archive holds pictures.
        number: its place in the file, which is the id of one that has none.
        columns: what its columns are.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return _read(columns.resolve(row), id_of(row, number, columns))


def _read(resolved: Resolved, sample_id: str) -> Example:
    if resolved.format is None:
        known = "; ".join(" and ".join(form.needs) for form in FORMATS if form.needs)
        raise BadSample(
            sample_id,
            f"its keys {shown([*resolved.fields], 120)} fit no format ({known}); data.columns says what a column is, "
            "such as {headline: question}",
        )
    refuse_marked_turns(resolved.fields, sample_id)
    return with_tagged_pictures(READERS[resolved.format.name](resolved.fields, sample_id))


def turns_of(example: Example) -> tuple[Turn, ...]:
    """The talk to train on: the turns, or the question with the answer of the largest weight (the first of equals).

    Raises:
        BadSample: there is neither.
    """
    if example.turns:
        return example.turns
    if not example.answers:
        raise BadSample(example.id, "it has no answer to train on", NO_ANSWER)
    answer = max(example.answers, key=lambda one: one.weight)
    return Turn("user", example.question), Turn("assistant", answer.text)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """A sample with its turns as LLaVA's (from, value); `problem` says why the row could not be brought into this form.

    `held` are the pictures that the row itself holds, by their name in `images`; `input_characters` are the last
    question's (`turns.Turn`).
    """

    id: str
    images: tuple[str, ...] = ()
    video: tuple[Clip, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    input_characters: int = 0
    problem: str | None = None
    format: str | None = None
    held: Mapping[str, bytes] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    """The role of each of its row's columns, "" where it is left out."""

    def strings(self) -> Iterator[str]:
        """All of its text, the problem left out."""
        names = (clip.path for clip in self.video)
        return chain((self.id,), self.images, names, chain.from_iterable(self.turns))

    def size(self) -> int:
        """Characters and bytes that it holds."""
        return sum(map(len, self.strings())) + sum(map(len, self.held.values()))

    def record(self) -> dict[str, object]:
        """The row as `turns.read_conversation` takes it."""
        turns = [{"from": speaker, "value": text} for speaker, text in self.turns]
        media = {"images": list(self.images), "video": [vars(clip) for clip in self.video]}
        own = {"id": self.id, INPUT_CHARACTERS: self.input_characters, "problem": self.problem}
        return {**own, **media, "conversations": turns}

    def encodable(self) -> SampleRow:
        """Itself; a row without text where it holds half of a surrogate pair, which JSON can spell (`\\ud83d`)."""
        try:
            "".join([*self.strings(), self.problem or ""]).encode()
        except UnicodeEncodeError:
            readable_id = self.id.encode("utf-8", "backslashreplace").decode()
            problem = "its text holds half of a surrogate pair, which is no character"
            return SampleRow(id=readable_id, problem=problem, format=self.format, columns=self.columns)
        return self


class SampleRowReader:
    """Reads the rows of one file or folder, and remembers which formats it has met.

    Args:
        name: of the file, for messages.
        columns: what its columns are.
    """

    def __init__(self, name: str, columns: Columns = USUAL) -> None:
        self._name = name
        self._columns = columns
        self._first_of_format: dict[str, str] = {}

    def read(self, record: Mapping[str, object], number: int) -> SampleRow:
        """The row `number`, from 0, of what the container gives.

        Raises:
            UserError: it is in another format than an earlier one, or a column that means something is left out.
        """
        sample_id = id_of(record, number, self._columns)
        row = f"row {number + 1} ({sample_id})"
        try:
            resolved = self._columns.resolve(record)
        except ColumnsError as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        name = None if resolved.format is None else resolved.format.name
        if name is not None:
            self._check_format(name, row)
        try:
            if name == LLAVA and _is_llava(resolved.fields):
                return _llava_row(resolved, sample_id)
            return _example_row(_read(resolved, sample_id), resolved)
        except BadSample as error:
            return SampleRow(id=sample_id, problem=error.reason, format=name, columns=resolved.uses)

    def _check_format(self, name: str, row: str) -> None:
        self._first_of_format.setdefault(name, row)
        if len(self._first_of_format) > 1:
            firsts = "; ".join(f"{one}: {first}" for one, first in self._first_of_format.items())
            raise UserError(f"{self._name}: rows of mixed formats, first of each {firsts}; write one file a format")


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file of whose `rows`, as far as they were read, none can be a sample.

    Raises:
        UserError: with the reason of the first one.
    """
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")


def _is_llava(fields: Row) -> bool:
    return is_nothing(fields.get("system")) and not _roles_in_conversations(fields)


def _llava_row(resolved: Resolved, sample_id: str) -> SampleRow:
    """LLaVA's turns are kept as they stand; `turns.read_conversation` decides what they mean."""
    fields = resolved.fields
    pictures, turns = row_pictures(fields, sample_id), tuple(raw_turns(fields, sample_id))
    refuse_marked_turns(fields, sample_id)
    if has_tags([text for _, text in turns]):
        return _example_row(with_tagged_pictures(_read_conversations(fields, sample_id)), resolved)
    return SampleRow(
        id=sample_id,
        images=tuple(pictures.names),
        video=row_clips(fields, sample_id),
        turns=turns,
        format=LLAVA,
        held=pictures.held,
        columns=resolved.uses,
    )


def _example_row(example: Example, resolved: Resolved) -> SampleRow:
    turns = turns_of(example)
    return SampleRow(
        id=example.id,
        images=example.images,
        video=example.clips,
        turns=tuple((SPEAKERS[turn.role], turn.text) for turn in turns),
        input_characters=turns[-2].input_characters if len(turns) > 1 else 0,
        format=resolved.format and resolved.format.name,
        held=example.image_bytes,
        columns=resolved.uses,
    )
