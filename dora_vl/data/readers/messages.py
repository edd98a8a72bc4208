"""`messages` with roles, as OpenAI, TRL, LLaMA-Factory and ms-swift write them: text, or parts of text and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.clips import Clip, read_clip, row_clips
from dora_vl.data.examples import Example, clip_fields
from dora_vl.data.readers.row_pictures import RowPictures, row_pictures
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Role, Turn
from dora_vl.errors import BadSample, shown

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
            self._take_beside(content)
            return Turn(role, content)
        if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
            raise BadSample(self.sample_id, f"the content of turn {number} is neither text nor parts: {shown(content)}")
        return Turn(role, "".join(self._part(part, number) for part in content))

    def _part(self, part: object, number: int) -> str:
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind in TEXT_PARTS and isinstance(text := part.get("text"), str):
            self._take_beside(text)
            return text
        if isinstance(part, Mapping) and kind in PICTURE_PARTS:
            payload = next((value for key in PAYLOADS if (value := part.get(key)) is not None), None)
            if payload is None:
                self._take_beside(IMAGE_PLACEHOLDER)
            else:
                self._pictures.add(payload, f"part of turn {number}")
            return IMAGE_PLACEHOLDER
        if isinstance(part, Mapping) and kind in VIDEO_PARTS:
            if all(part.get(key) is None for key in VIDEO_PAYLOADS):
                self._take_beside(VIDEO_PLACEHOLDER)
            else:
                self._videos.append(read_clip(part, f"part of turn {number}", self.sample_id))
            return VIDEO_PLACEHOLDER
        raise BadSample(self.sample_id, f"turn {number} has a part that is no text, picture or video: {shown(part)}")

    def _take_beside(self, text: str) -> None:
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
    return reader.example(reader.turns(row.get(key)))
