"""The options of both commands: adapters, address and one table of numbers. Their help does not import torch."""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError, number_between, positive_int, short_repr

LOCAL = ("localhost", "127.0.0.1", "::1")
EVERY_ADDRESS = ("", "0.0.0.0", "::")
MIB = 2**20
KEY_VARIABLE = "DORA_VL_API_KEY"


def host_name(address: str) -> str | None:
    """Returns the host of `host[:port]`; None if it is not one."""
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:/?#@\\\s]+))(?::\d*)?", address)
    return match and (match["v6"] or match["name"].removesuffix("."))


def add_address(to: argparse.ArgumentParser, *, port: int) -> None:
    """Adds the options of adapters, of the address, and of who may send requests."""
    to.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="may be given several times")
    to.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    to.add_argument(
        "--port", type=number_between(int, 0, 2**16 - 1), default=port, help=f"0 takes a free one (default: {port})"
    )
    to.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that it is reached by, beside localhost and --host; may be given several times",
    )
    to.add_argument("--api-key", metavar="KEY", help=f"what clients must know (default: {KEY_VARIABLE}; else nothing)")


def option(group: str, default: Any, kind: Callable[[str], Any], text: str) -> Any:
    """Returns a field that is an option of the command line too, under its own name."""
    return field(default=default, metadata={"group": group, "type": kind, "help": text})


ANSWERS, REQUEST, MEDIA = "answers", "limits of a request", "limits of what is shown"
positive_seconds = number_between(float, 1e-6)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Defaults of a request, sizes of a batch and limits of what a request may hold and show."""

    max_new_tokens: int = option(ANSWERS, 256, positive_int, "longest answer where a request names none")
    temperature: float = option(
        ANSWERS, 0.0, number_between(float, 0, 2), "where a request names none; 0 takes the likeliest token"
    )
    batch: int = option(ANSWERS, 16, positive_int, "most requests answered together")
    batch_tokens: int = option(ANSWERS, 32768, positive_int, "most tokens of a batch, answers too")
    window_ms: float = option(ANSWERS, 5.0, positive_seconds, "how long a batch waits for more requests")
    waiting: int = option(ANSWERS, 64, positive_int, "most requests that wait; more are refused")
    answer_seconds: float = option(ANSWERS, 300.0, positive_seconds, "from request to end of its answer")
    max_prompt_tokens: int | None = option(ANSWERS, None, positive_int, "longest prompt, else as the model takes")
    joining: bool = True
    """Requests join a batch that is being answered, where the model allows it."""

    max_body_mib: float = option(REQUEST, 64, positive_int, "largest request")
    body_seconds: float = option(REQUEST, 30.0, positive_seconds, "longest time to send one")

    max_pictures: int = option(MEDIA, 8, number_between(int, 0), "most pictures of a request")
    max_mpx: float = option(MEDIA, 80, positive_int, "most megapixels of a request's pictures and frames, together")
    max_videos: int = option(MEDIA, 1, number_between(int, 0), "most videos of a request")
    max_media_mib: float = option(MEDIA, 32, positive_int, "largest file of a picture or video")
    frames: int = option(MEDIA, 8, positive_int, "frames of a video that the model sees")
    media_seconds: float = option(MEDIA, 20.0, positive_seconds, "CPU seconds to decode what a request shows")

    @property
    def media_bytes(self) -> int:
        """The bytes that one picture's or video's file may have."""
        return int(self.max_media_mib * MIB)

    @classmethod
    def of(cls, options: argparse.Namespace) -> ServerSettings:
        """Returns the settings of a command line; what a command has no option for keeps its default."""
        names = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in vars(options).items() if name in names})


def add_options(parser: argparse.ArgumentParser, *groups: str) -> None:
    """Adds the options of some groups."""
    for group in groups:
        to = parser.add_argument_group(group)
        for entry in fields(ServerSettings):
            if entry.metadata.get("group") == group:
                shown_default = "" if entry.default is None else f" ({entry.default:g})"
                to.add_argument(
                    f"--{entry.name.replace('_', '-')}",
                    type=entry.metadata["type"],
                    default=entry.default,
                    help=entry.metadata["help"] + shown_default,
                )


def adapters_by_name(options: Sequence[str]) -> dict[str, Path]:
    """Returns the adapters' folders by name: as `NAME=DIR` states, else as their run is called."""
    adapters: dict[str, Path] = {}
    for text in options:
        prefix, sign, rest = text.partition("=")
        is_named = bool(sign and prefix and rest) and not Path(text).is_dir()
        folder = Path(rest if is_named else text)
        if not folder.is_dir():
            raise UserError(f"--adapter {short_repr(text)}: {folder} is not a folder; give the adapter folder of a run")
        name = prefix if is_named else run_name(folder)
        if name in adapters:
            raise UserError(f"two adapters are called {short_repr(name)}; write --adapter NAME={folder}")
        adapters[name] = folder
    return adapters


def run_name(folder: Path) -> str:
    """Returns an adapter's name: that of its run's folder, and the number of the checkpoint that it is from."""
    parts = list(folder.resolve().parts)
    parts = parts[:-1] if parts[-1] == "adapter" else parts
    if re.fullmatch(r"checkpoint-\d+", parts[-1]) and len(parts) > 1:
        return f"{parts[-2]}-{parts[-1].removeprefix('checkpoint-')}"
    return parts[-1]


def address_of(host: str, listener: socket.socket) -> str:
    """Returns an address that requests from this machine are let in by."""
    name = LOCAL[0] if host in EVERY_ADDRESS else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket on this address, taken before the weights are read."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose others") from error
