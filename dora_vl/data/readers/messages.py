"""Rows of talk and of questions: `messages` with roles, prompt/completion, `texts`, instructions, columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from string import ascii_lowercase, ascii_uppercase

from dora_vl.data.examples import Answer, Example, clip_fields
from dora_vl.data.media import RowPictures, row_pictures
from dora_vl.data.readers.columns import is_nothing
from dora_vl.data.right_choice import LETTER, correct_choice, listed_choices, with_letters
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Role, Turn, read_clip, row_clips
from dora_vl.errors import EMPTY_ANSWER, BadSample, shown

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
