"""What a request shows: its pictures and videos, decoded in processes that can be ended, within one budget per request.

Requests have a process each, so that the system shares the processor between them, and one whose file takes long yields
to all others. What it holds in memory, and for how long while others wait for their turn, is limited too.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.data.conversation import ROLES
from dora_vl.data.pictures import MEBIBYTE, TooManyPixels, decode_picture
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.data.video import Uniform, read_frames
from dora_vl.errors import short_repr
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.limited_process import LOOK_SECONDS, Budget, JobFailed, LimitedProcess
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.requests import BadRequest, Message, TextPart, TooLarge, VideoPart
from dora_vl.serving.scheduler import TooManyRequests

DECODER_MEMORY = 576 * MEBIBYTE
"""A request's process may take this many bytes; with its pixels here, four bytes each, a request stays below 1 GB."""
READING_AT_ONCE = 10
"""At most this many requests have their pictures decoded at a time; as many processes are kept ready, 15 MB each."""
PATIENT_SECONDS = 5.0
"""A request's pictures may take longer only while no other request waits for its turn."""


class RequestMedia:
    """Reads what requests show, from several threads; with `same_length` all videos get equally many frames."""

    def __init__(self, settings: ServerSettings, *, same_length: bool = False) -> None:
        self.settings, self._same_length = settings, same_length
        self._ready: list[LimitedProcess] = []
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(READING_AT_ONCE)
        self._waiting = 0

    def close(self) -> None:
        """Ends the processes that wait for requests."""
        with self._lock:
            while self._ready:
                self._ready.pop().close()

    @contextlib.contextmanager
    def reading(self, go_on: Callable[[], object] = lambda: None) -> Iterator[Reading]:
        """Yields one request's reading, whose turn ends with the block; `go_on` may raise what ends it earlier."""
        with contextlib.ExitStack() as turn:
            budget = Budget(self.settings.media_seconds, DECODER_MEMORY, int(self.settings.max_mpx * 1_000_000), go_on)
            process = cache(lambda: turn.enter_context(self._turn(budget)))  # waits where something is to be decoded
            yield Reading(self.settings, budget, process, self._same_length)

    @contextlib.contextmanager
    def _turn(self, budget: Budget) -> Iterator[LimitedProcess]:
        """Waits for a turn; gives a process. While others wait, the budget's `go_on` ends what takes too long."""
        go_on = budget.go_on
        with self._lock:
            self._waiting += 1
        try:
            while not self._turns.acquire(timeout=LOOK_SECONDS):
                go_on()
        finally:
            with self._lock:
                self._waiting -= 1
        began = time.monotonic()

        def while_patient() -> None:
            go_on()
            if self._waiting and time.monotonic() - began > PATIENT_SECONDS:
                raise TooManyRequests("its pictures take long to decode, and others wait; try again later")

        budget.go_on = while_patient
        with self._lock:
            process = self._ready.pop() if self._ready else LimitedProcess("read_picture", yields=True)
        try:
            yield process
        finally:
            if not process.reusable:
                process.close()
            with self._lock:  # a second one is started at the end of each turn, when it hinders nobody
                for next_process in (process, LimitedProcess("read_picture", yields=True)):
                    if next_process.reusable and len(self._ready) < READING_AT_ONCE:
                        next_process.start()
                        self._ready.append(next_process)
            self._turns.release()


class Reading:
    """One request's pictures and videos, which share its budget; `process` waits for the one that reads them."""

    def __init__(
        self, settings: ServerSettings, budget: Budget, process: Callable[[], LimitedProcess], same_length: bool
    ) -> None:
        self.settings, self._budget, self._process, self._same_length = settings, budget, process, same_length

    def read(self, messages: Sequence[Message]) -> tuple[list[Turn], PromptMedia]:
        """Returns a request's messages as turns, and what they show."""
        parts = [part for message in messages for part in message.content]
        video_count = sum(isinstance(part, VideoPart) for part in parts)
        picture_count = sum(not isinstance(part, TextPart | VideoPart) for part in parts)
        self.refuse_many(picture_count, video_count, "the request shows")
        pictures: list[Image.Image] = []
        videos: list[Video] = []
        turns: list[Turn] = []
        for number, message in enumerate(messages):
            text = ""
            for index, part in enumerate(message.content):
                where = f"messages[{number}].content[{index}].{part.type}"
                if isinstance(part, TextPart):
                    text += check_text(part.text, where, shows_videos=video_count > 0)
                    continue
                self._budget.go_on()
                if isinstance(part, VideoPart):
                    videos.append(self.video(self._content(part.video_url.url, where), where))
                    text += f"{VIDEO_PLACEHOLDER}\n"
                else:
                    pictures.append(self.picture(self._content(part.image_url.url, where), where))
                    text += f"{IMAGE_PLACEHOLDER}\n"
            ends_with_words = isinstance(message.content[-1], TextPart)
            turns.append(Turn(ROLES[message.role], text if ends_with_words else text.removesuffix("\n")))
        return turns, PromptMedia(pictures=tuple(pictures), videos=tuple(videos))

    def refuse_many(self, pictures: int, videos: int, who: str) -> None:
        """Refuses more pictures or videos than may be shown."""
        limits = (pictures, "pictures", self.settings.max_pictures), (videos, "videos", self.settings.max_videos)
        for count, what, most in limits:
            if count > most:
                raise TooLarge(f"{who} {count} {what}, and {most} are allowed here")

    def picture(self, content: bytes, where: str) -> Image.Image:
        """Returns a picture's file as RGB, upright."""
        with _naming_location(where):
            return decode_picture(self._process(), content, self._budget)

    def video(self, content: bytes, where: str) -> Video:
        """Returns the frames of a video's file that a model sees."""
        sampling = Uniform(self.settings.frames)
        with tempfile.TemporaryDirectory(prefix="dora-vl-") as folder, _naming_location(where):
            path = Path(folder) / "video"
            path.write_bytes(content)
            video = read_frames(self._process(), path, Clip(path="video"), sampling, lambda frame: frame, self._budget)
        return repeated(video, self.settings.frames) if self._same_length else video

    def _content(self, url: str, where: str) -> bytes:
        if url[:5].lower() != "data:":
            raise BadRequest(where, f"{short_repr(url)}: addresses are not fetched; send what is there as a data: URL")
        header, comma, content = url.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise BadRequest(where, f"the data: URL {short_repr(url)} is not base64")
        if len(content) > self.settings.media_bytes * 4 // 3 + 4:
            raise TooLarge(f"{where}: more than the {self.settings.media_bytes:,} bytes allowed")
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(where, f"the data: URL {short_repr(url)} cannot be read: {error}") from None


@contextlib.contextmanager
def _naming_location(where: str) -> Iterator[None]:
    """Names the place in the request of what could not be read."""
    try:
        yield
    except JobFailed as error:
        if error.kind == TooManyPixels.__name__:
            raise TooLarge(f"{where}: it {error}") from None
        raise BadRequest(where, f"it {error}") from None


def check_text(text: str, where: str, *, shows_videos: bool) -> str:
    """Returns a user's text. Raises BadRequest: it holds a placeholder of a picture or a video."""
    for placeholder in (IMAGE_PLACEHOLDER, *([VIDEO_PLACEHOLDER] if shows_videos else [])):
        if placeholder in text:
            raise BadRequest(where, f"the text holds {placeholder}; pictures and videos are parts of their own")
    return text
