"""Rows of talk and of questions: `messages` with roles, prompt/completion, `texts`, instructions, columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Answer, Example, clip_fields
from dora_vl.data.media import RowPictures, row_pictures
from dora_vl.data.readers.left_out import is_nothing, refuse_beside
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
SYSTEMS = ("system", "system_prompt")
"""Columns that hold the system's words beside any format."""


class MessageReader:
    """Reads the messages of one row; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Mapping[str, object], sample_id: str) -> None:
        self.sample_id = sample_id
        self._beside = row_pictures(row, sample_id)
        self._next_beside = 0
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
        left = self._beside.names[self._next_beside :]
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
            if payload is None:
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
        taken = self._beside.names[self._next_beside : self._next_beside + text.count(IMAGE_PLACEHOLDER)]
        self._pictures.names += taken
        self._next_beside += len(taken)
        clips = self._videos_beside[self._next_video : self._next_video + text.count(VIDEO_PLACEHOLDER)]
        self._videos += clips
        self._next_video += len(clips)


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
    for name in SYSTEMS:
        if is_nothing(row.get(name)):
            continue
        said = _text(row[name], name, sample_id)
        own = turns[0].text.strip() if turns and turns[0].role == "system" else None
        if own == said.strip():
            continue
        if own:
            raise BadSample(
                sample_id, f"its {name!r} differs from the system turn that it has too; leave one of them out"
            )
        turns = (Turn("system", said), *(turns if own is None else turns[1:]))
    return turns


def _earlier_rounds(row: Mapping[str, object], sample_id: str) -> tuple[Turn, ...]:
    """`history`, pairs of a question and its answer (ms-swift), as turns."""
    history = row.get("history")
    turns: list[Turn] = []
    for pair in history if isinstance(history, list) else [] if is_nothing(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise BadSample(sample_id, f"'history' must hold pairs of a question and an answer, got {shown(pair)}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return tuple(turns)


QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answer", "answers", "response", "label", "output")
CAPTIONS = ("caption", "captions", "text", "txt")


def first_of(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The first of these columns that the row holds something in."""
    return next((name for name in names if row.get(name) is not None), None)


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
    if row.get("history"):
        raise BadSample(sample_id, "it has a 'history' of earlier rounds; write the whole talk as 'messages'")
    scored = row.get("answer")
    return _with_media(row, sample_id, turns=turns, answer=scored if isinstance(scored, str) else "")


def read_columns(row: Mapping[str, object], sample_id: str) -> Example:
    """A question and an answer in columns of their own; of several answers the most frequent, the first of equals.

    `history` holds earlier rounds. Choices or a context that the question does not say itself are refused: which words
    put them to a model is the benchmark's business.
    """
    question, answer = first_of(row, QUESTIONS), first_of(row, ANSWERS)
    if question is None or answer is None:
        raise BadSample(sample_id, f"it needs one of {', '.join(QUESTIONS)} and one of {', '.join(ANSWERS)}")
    asked = _text(row[question], question, sample_id)
    refuse_beside(row, question, asked, sample_id)
    said, earlier = _answer(row[answer], answer, sample_id), _earlier_rounds(row, sample_id)
    if earlier:
        return _with_media(row, sample_id, turns=(*earlier, Turn("user", asked), Turn("assistant", said)))
    return _with_media(row, sample_id, question=asked, answer=said)


def read_caption(row: Mapping[str, object], sample_id: str) -> Example:
    """A picture with a caption and no question."""
    column = first_of(row, CAPTIONS)
    return _with_media(row, sample_id, answer=_answer(row[column], column, sample_id) if column else "")


def _with_media(
    row: Mapping[str, object], sample_id: str, *, turns: tuple[Turn, ...] = (), question: str = "", answer: str = ""
) -> Example:
    pictures = row_pictures(row, sample_id)
    if not turns and not all(is_nothing(row.get(name)) for name in SYSTEMS):
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


def _answer(value: object, name: str, sample_id: str) -> str:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [_text(one.get("answer") if isinstance(one, Mapping) else one, name, sample_id) for one in listed]
    counted = Counter(text for text in texts if text.strip())
    return counted.most_common(1)[0][0] if counted else ""


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
