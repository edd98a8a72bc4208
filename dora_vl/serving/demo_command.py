"""`dora-vl demo`: a web page on which adapters and their base answer side by side."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dora_vl.errors import UserError, shown
from dora_vl.evaluation.asking import add_model_options
from dora_vl.serving.door import (
    add_address,
    add_answers,
    add_media,
    admission,
    engine_settings,
    listening,
    media_limits,
)

if TYPE_CHECKING:
    import socket


DESCRIPTION = """\
Opens a page in the browser: a picture, several, a video or the webcam on the left, an adapter's and the base's answers
to the same question side by side on the right, turn after turn, and a dial for how much of an adapter is applied.

  dora-vl demo --adapter runs/demo/adapter
  dora-vl demo --adapter runs/a/adapter --adapter second=runs/b/adapter --port 8080

An adapter is the folder of a run, or of PEFT, and is called as its run unless NAME= says otherwise. All adapters are
over one base, which is loaded once; nothing is merged. The page listens on this machine alone unless --host says
otherwise, answers to the names of --allow-host besides, asks for a key where --api-key gives one, asks no other host
for anything, reads no file but what was uploaded, and keeps none. docs/serving.md says more.
"""
NEEDED = ("gradio", "uvicorn")
ADAPTER_FOLDER = "adapter"
CHECKPOINT = re.compile(r"checkpoint-\d+")
BASE_NAME = "the base"
ROOM_FOR_A_MESSAGE = 4
"""So many times the largest file may be sent, so that the page itself can say that it is too large."""
UPLOADS_AT_ONCE = 8
"""So many of those may lie there until they are read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR", help="may be given several times"
    )
    add_model_options(parser)
    add_address(parser, port=7860)
    add_answers(parser.add_argument_group("answers"))
    add_media(parser.add_argument_group("limits of what is shown"))


def run(options: argparse.Namespace) -> Iterator[str]:
    """Opens the model and serves the page until Ctrl-C; yields a line when it is ready.

    Raises:
        UserError: an option, a folder or a package is wrong; nothing listens then.
    """
    adapters = chosen_adapters(options.adapter)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"the page needs {' and '.join(missing)}: pip install 'dora-vl[web]'")
    with (
        contextlib.suppress(KeyboardInterrupt),
        _leaving_at_sigterm(),
        listening(options.host, options.port) as listener,
        tempfile.TemporaryDirectory(prefix="dora-vl-page-") as folder,
    ):
        yield from _serve(options, adapters, listener, Path(folder))


def _serve(
    options: argparse.Namespace, adapters: Mapping[str, Path], listener: socket.socket, folder: Path
) -> Iterator[str]:
    from dora_vl.serving.page import Uploads, build_page_app, keep_gradio_quiet, serve_page

    admitted = admission(options)
    keep_gradio_quiet(folder)
    from dora_vl.serving.engine import Engine
    from dora_vl.serving.model import open_served
    from dora_vl.serving.requests import RequestMedia

    named = {"base_name": BASE_NAME, "template": options.template, "any_base": options.any_base}
    model = open_served(options.base, adapters, **named)
    from dora_vl.serving.page import Page, PageSettings
    from dora_vl.serving.page_parts import example_questions
    from dora_vl.serving.side_by_side import SideBySide

    media = RequestMedia(media_limits(options), model.assistant.prompts.videos_of_one_length)
    examples = next(filter(None, map(example_questions, adapters.values())), ())
    most = media.limits.bytes * ROOM_FOR_A_MESSAGE
    uploads = Uploads(folder, most * UPLOADS_AT_ONCE)
    settings = PageSettings(uploads=uploads, new_tokens=options.max_new_tokens, temperature=options.temperature)
    with Engine(model, engine_settings(options)) as engine, contextlib.closing(media):
        page = Page(SideBySide(engine, media), settings, examples)
        app = build_page_app(page, admitted, upload_bytes=most, waiting=options.waiting)
        host, port = listener.getsockname()[:2]
        yield f"{', '.join(model.names)} at http://{host}:{port} (Ctrl-C ends)"
        serve_page(app, listener)


def chosen_adapters(given: Sequence[str]) -> Mapping[str, Path]:
    """The adapters' folders by name: as stated, else as their run is called.

    Raises:
        UserError: none is given, one is no folder, or two have one name.
    """
    if not given:
        raise UserError("give --adapter DIR, the adapter folder of a run, such as runs/demo/adapter")
    adapters: dict[str, Path] = {}
    for one in given:
        stated, sign, rest = one.partition("=")
        named = bool(sign and stated and rest) and not Path(one).is_dir()
        folder = Path(rest if named else one)
        if not folder.is_dir():
            raise UserError(f"--adapter {shown(one)}: {folder} is not a folder; give the adapter folder of a run")
        name = stated if named else name_of(folder)
        if name in adapters:
            raise UserError(f"two adapters are called {shown(name)}; write --adapter NAME={folder}")
        adapters[name] = folder
    return adapters


def name_of(folder: Path) -> str:
    """What an adapter is called: as its run's folder, with the checkpoint where it is one's."""
    parts = list(folder.resolve().parts)
    parts = parts[:-1] if parts[-1] == ADAPTER_FOLDER else parts
    if CHECKPOINT.fullmatch(parts[-1]) and len(parts) > 1:
        return f"{parts[-2]}-{parts[-1].removeprefix('checkpoint-')}"
    return parts[-1]


@contextlib.contextmanager
def _leaving_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as an exit does, so that the uploads' folder goes then too."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
