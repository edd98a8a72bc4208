"""What a request shows: its pictures and videos, decoded in processes that can be ended, within one budget a request.

Requests have a process each, so that the system shares the processor between them, and one whose file takes long yields
to all others. What it holds in memory, and for how long while others wait for their turn, is limited too.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import httpx2 as httpx
from anyio import to_thread
from PIL import Image

from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.data.picture_files import MEBIBYTE, TooManyPixels, decoded
from dora_vl.data.readers import ROLES
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.data.video import Uniform, read_frames
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.predictor import Shown
from dora_vl.limited_process import LOOK_SECONDS, Budget, JobFailed, LimitedProcess
from dora_vl.serving.options import Settings
from dora_vl.serving.requests import BadRequest, Message, TextPart, TooLarge, VideoPart
from dora_vl.serving.scheduler import TooManyRequests

DECODER_MEMORY = 576 * MEBIBYTE
"""A request's process may take so many bytes; with its pixels here, four bytes each, a request stays below 1 GB."""
READING_AT_ONCE = 10
"""So many requests have their pictures decoded at a time; as many processes are kept ready, 15 MB each."""
PATIENT_SECONDS = 5.0
"""A request's pictures may take longer only while no other request waits for its turn."""


class RequestMedia:
    """Reads what requests show, from several threads.

    Args:
        same_length: whether the videos of a batch must have equally many frames.
    """

    def __init__(self, settings: Settings, *, same_length: bool = False) -> None:
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
        """One request's reading; its turn begins with its first picture and ends with this.

        Args:
            go_on: raises what ends the reading, such as that the client has gone.
        """
        with contextlib.ExitStack() as turn:
            budget = Budget(self.settings.media_seconds, DECODER_MEMORY, int(self.settings.max_mpx * 1_000_000), go_on)
            yield Reading(self.settings, budget, lambda: turn.enter_context(self._turn(budget)), self._same_length)

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
    """One request's pictures and videos, which share its budget.

    Args:
        turn: waits for the request's turn; gives the process that reads for it.
    """

    def __init__(
        self, settings: Settings, budget: Budget, turn: Callable[[], LimitedProcess], same_length: bool
    ) -> None:
        self.settings, self._budget, self._turn, self._same_length = settings, budget, turn, same_length
        self._process: LimitedProcess | None = None

    def read(self, messages: Sequence[Message]) -> tuple[list[Turn], Shown]:
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
                    text += words(part.text, where, shows_videos=video_count > 0)
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
        return turns, Shown(pictures=tuple(pictures), videos=tuple(videos))

    def refuse_many(self, pictures: int, videos: int, who: str) -> None:
        """Refuses more pictures or videos than may be shown."""
        most_of = {"pictures": self.settings.max_pictures, "videos": self.settings.max_videos}
        for (what, most), count in zip(most_of.items(), (pictures, videos), strict=True):
            if count > most:
                raise TooLarge(f"{who} {count} {what}, and {most} are allowed here")

    def picture(self, content: bytes, where: str) -> Image.Image:
        """Returns a picture's file as RGB, upright."""
        with _told(where):
            return decoded(self._its_process(), content, self._budget)

    def video(self, content: bytes, where: str) -> Video:
        """Returns the frames of a video's file that a model sees."""
        sampling = Uniform(self.settings.frames)
        with tempfile.TemporaryDirectory(prefix="dora-vl-") as folder, _told(where):
            path = Path(folder) / "video"
            path.write_bytes(content)
            video = read_frames(
                self._its_process(), path, Clip(path="video"), sampling, lambda frame: frame, self._budget
            )
        return repeated(video, self.settings.frames) if self._same_length else video

    def _its_process(self) -> LimitedProcess:
        if self._process is None:
            self._process = self._turn()
        return self._process

    def _content(self, url: str, where: str) -> bytes:
        if url[:5].lower() == "data:":
            return _from_data_url(url, where, self.settings.media_bytes)
        if not self.settings.allow_remote_media:
            raise BadRequest(where, f"{shown(url)}: this server takes data: URLs alone (--allow-remote-media)")
        try:
            return fetch(url, self.settings.media_bytes, self.settings.fetch_seconds)
        except NotFetched as error:
            raise BadRequest(where, str(error)) from None


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Says where in the request what could not be read stands."""
    try:
        yield
    except JobFailed as error:
        if error.kind == TooManyPixels.__name__:
            raise TooLarge(f"{where}: it {error}") from None
        raise BadRequest(where, f"it {error}") from None


def words(text: str, where: str, *, shows_videos: bool) -> str:
    """Returns a person's words, which may not hold what stands for a picture or a video. Raises BadRequest: they do."""
    for placeholder in (IMAGE_PLACEHOLDER, *([VIDEO_PLACEHOLDER] if shows_videos else [])):
        if placeholder in text:
            raise BadRequest(where, f"the text holds {placeholder}; pictures and videos are parts of their own")
    return text


def _from_data_url(url: str, where: str, most: int) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise BadRequest(where, f"the data: URL {shown(url)} is not base64")
    if len(content) > most * 4 // 3 + 4:
        raise TooLarge(f"{where}: more than the {most:,} bytes allowed")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(where, f"the data: URL {shown(url)} cannot be read: {error}") from None


# -- pictures and videos from the web, without a way into the server's own network. A name is resolved once, every
# address of it must be a public one, and the connection goes to the address that was checked: a name that changes its
# mind in between gains nothing. Each redirect is a new address, checked the same way.

MOST_REDIRECTS = 3
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "3fff::/20", "5f00::/16")))
"""Python's own tables lack these special addresses: 6to4 relays, documentation, segment routing."""


class NotFetched(UserError):
    """The content of an address cannot be had, or may not."""


def fetch(url: str, most: int, seconds: float) -> bytes:
    """Returns the content of an address: so many bytes at most, in so many seconds.

    Raises:
        NotFetched: no http(s) address, one that leads to a private, loopback, link-local or other special address,
            too many redirects, too large, too slow, or no answer.
    """

    async def in_time() -> bytes:
        with anyio.fail_after(seconds):  # the client's own timeouts begin anew at every byte
            return await _fetch(url, most)

    try:
        return anyio.run(in_time)
    except TimeoutError:
        raise NotFetched(f"{shown(url)} was too slow") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise NotFetched(f"{shown(url)} cannot be read: {type(error).__name__} {shown(str(error))}") from None


async def _fetch(url: str, most: int) -> bytes:
    async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
        for _ in range(MOST_REDIRECTS + 1):
            target = httpx.URL(url)
            if target.scheme not in ("http", "https") or not target.host or target.userinfo or not url.isascii():
                raise NotFetched(f"{shown(url)}: only http:// and https:// addresses in ASCII are fetched, of no user")
            # The system's resolver knows no limit: when it takes too long, its thread is left behind.
            address = await to_thread.run_sync(public_address, target.host, abandon_on_cancel=True)
            request = client.build_request(
                "GET",
                target.copy_with(host=address),
                headers={"Host": target.netloc.decode(), "User-Agent": "dora-vl", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.host},
            )
            answer = await client.send(request, stream=True)
            async with contextlib.aclosing(answer):
                if answer.has_redirect_location:
                    url = str(target.join(answer.headers["Location"]))
                    continue
                if answer.status_code != httpx.codes.OK:
                    raise NotFetched(f"{shown(target.host)} answered with status {answer.status_code}")
                content = bytearray()
                async for chunk in answer.aiter_raw():
                    content += chunk
                    if len(content) > most:
                        raise NotFetched(f"what {shown(target.host)} sends is larger than the {most:,} bytes allowed")
                return bytes(content)
    raise NotFetched(f"{shown(url)}: more than {MOST_REDIRECTS} redirects")


def public_address(host: str) -> str:
    """Returns an IP address of a host, all of whose addresses are public."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotFetched(f"{shown(host)} cannot be resolved ({error})") from None
    addresses = [str(entry[4][0]) for entry in entries]
    for address in addresses:
        if not is_public(address):
            raise NotFetched(f"{shown(host)} is at {address}, which is no public address, and those are not fetched")
    return addresses[0]


def is_public(address: str) -> bool:
    """Tells whether an IP address belongs to the open internet, also where IPv6 only wraps an IPv4 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inside is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
        if ip.is_reserved or ip.is_site_local:  # outside of 2000::/3 Python calls most of both global
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)
