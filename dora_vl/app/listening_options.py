"""What the command lines of the server and of the page share: where they listen, batches, limits on what is shown."""

from __future__ import annotations

import argparse
import socket
from typing import TYPE_CHECKING

from dora_vl.errors import UserError
from dora_vl.whole_numbers import positive

if TYPE_CHECKING:
    from dora_vl.app.request_media import MediaLimits
    from dora_vl.app.waiting_room import EngineSettings

MIB = 2**20


def add_address(to: argparse.ArgumentParser, *, port: int) -> None:
    """Where it listens."""
    to.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    to.add_argument("--port", type=_port, default=port, help=f"0 takes a free one (default: {port})")


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
