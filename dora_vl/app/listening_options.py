"""What the command lines of the server and of the page share: where they listen, to whom, batches, limits."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, shown
from dora_vl.whole_numbers import positive

if TYPE_CHECKING:
    from dora_vl.app.door import Admission
    from dora_vl.app.request_media import MediaLimits
    from dora_vl.app.waiting_room import EngineSettings

MIB = 2**20
KEY_VARIABLE = "DORA_VL_API_KEY"
EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::"})


def add_address(to: argparse.ArgumentParser, *, port: int) -> None:
    """Where it listens, and to whom."""
    to.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    to.add_argument("--port", type=_port, default=port, help=f"0 takes a free one (default: {port})")
    to.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that it is reached by, beside localhost and --host; may be given several times",
    )
    to.add_argument("--api-key", metavar="KEY", help=f"what clients must know (default: {KEY_VARIABLE}; else nothing)")


def add_answers(to: argparse._ArgumentGroup) -> None:
    """How questions are answered, where they do not say it themselves, and how they become batches."""
    to.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer where none is asked for (256)")
    to.add_argument("--temperature", type=_temperature, default=0.0, help="likewise (0: the likeliest token)")
    to.add_argument("--batch", type=positive, default=16, help="most requests answered together (16)")
    to.add_argument("--batch-tokens", type=positive, default=32768, help="most tokens of a batch, answers too (32768)")
    to.add_argument("--window-ms", type=seconds, default=5.0, help="how long a batch waits for more requests (5)")
    to.add_argument("--waiting", type=positive, default=64, help="most requests that wait; more are refused (64)")
    to.add_argument("--answer-seconds", type=seconds, default=300.0, help="from request to end of its answer (300)")
    to.add_argument("--max-prompt-tokens", type=positive, help="longest prompt (what the model has positions for)")


def add_media(to: argparse._ArgumentGroup) -> None:
    """What a request may show."""
    to.add_argument("--max-pictures", type=_count, default=8, help="of a request (8)")
    to.add_argument("--max-picture-mpx", type=positive, default=40, help="megapixels of a picture (40)")
    to.add_argument("--max-videos", type=_count, default=1, help="of a request (1)")
    to.add_argument("--max-media-mib", type=positive, default=32, help="of one picture or video (32)")
    to.add_argument("--frames", type=positive, default=8, help="frames of a video that the model sees (8)")
    to.add_argument("--video-seconds", type=seconds, default=20.0, help="longest time to decode a video (20)")


def admission(options: argparse.Namespace) -> Admission:
    """The options about who may come in.

    Raises:
        UserError: a name or the key is none.
    """
    from dora_vl.app.door import LOCAL, Admission, name_of

    names = {given: name_of(given.lower()) for given in options.allow_host}
    for given, name in names.items():
        if name is None:
            raise UserError(f"--allow-host {shown(given)}: give a name or an address, such as gpu.example.org")
    key = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UserError(f"--api-key or {KEY_VARIABLE}: a key is one or more ASCII characters without spaces")
    allowed = frozenset(name for name in names.values() if name)
    own = frozenset({options.host.lower()}) - EVERY_ADDRESS
    return Admission(hosts=allowed | own | {*LOCAL}, origins=allowed, key=key)


def engine_settings(options: argparse.Namespace) -> EngineSettings:
    """The options about batches."""
    from dora_vl.app.waiting_room import EngineSettings

    return EngineSettings(
        batch_rows=options.batch,
        batch_tokens=options.batch_tokens,
        window_seconds=options.window_ms / 1000,
        waiting=options.waiting,
        answer_seconds=options.answer_seconds,
        prompt_tokens=options.max_prompt_tokens,
    )


def media_limits(options: argparse.Namespace) -> MediaLimits:
    """The options about what is shown; nothing is fetched from the web."""
    from dora_vl.app.request_media import MediaLimits

    return MediaLimits(
        pictures=options.max_pictures,
        videos=options.max_videos,
        picture_pixels=options.max_picture_mpx * 1_000_000,
        bytes=options.max_media_mib * MIB,
        frames=options.frames,
        video_seconds=options.video_seconds,
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket on this address, taken before the weights are read.

    Raises:
        UserError: there is no such address here, or another program has it.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose others") from error


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is no port")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def seconds(text: str) -> float:
    """A time above 0, as a type of argparse.

    Raises:
        ArgumentTypeError: it is none; argparse names the option.
    """
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2")
    return number
