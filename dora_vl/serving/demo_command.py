"""`dora-vl demo`: a web page on which a base is trained, and adapters and their base answer side by side."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from dora_vl.errors import MissingExtra, UserError
from dora_vl.evaluation.ask_command import add_model_options
from dora_vl.serving.options import (
    ANSWERS,
    LOCAL,
    MEDIA,
    ServerSettings,
    adapters_by_name,
    add_address,
    add_options,
    address_of,
    listening,
)

DESCRIPTION = """\
Opens a page in the browser with two tabs. Train: drop pictures and a table, see what training will see, start, follow,
stop and resume it, read its test. Ask: an adapter and its base answer the same question about a picture or a video
side by side, with a slider for the adapter's strength.

  dora-vl demo
  dora-vl demo --adapter runs/demo/adapter
  dora-vl demo --adapter runs/a/adapter --adapter second=runs/b/adapter --port 8080

An adapter is the folder of a run, or of PEFT, and is called as its run unless NAME= says otherwise. All adapters are
over one base, which is loaded once; nothing is merged. The page listens on this machine only unless --host says
otherwise, answers to the names of --allow-host besides, asks for a key where --api-key gives one, and asks no other
host for anything. Who may train may read folders of this machine and fill its disk: Train is there only where others
cannot come, or with --train. docs/serving.md says more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    add_model_options(parser)
    add_address(parser, port=7860)
    parser.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="whether visitors may train (default: only where neither --host nor --allow-host lets others in)",
    )
    add_options(parser, ANSWERS, MEDIA)


def run(options: argparse.Namespace) -> Iterator[str]:
    """Opens the models that are named and serves the page until Ctrl-C; yields a line when it is ready."""
    trains = options.host in LOCAL and not options.allow_host if options.train is None else options.train
    if not (options.adapter or trains):
        raise UserError("give --adapter DIR, the adapter folder of a run, or --train, with which visitors may train")
    adapters = adapters_by_name(options.adapter)
    missing = [name for name in ("gradio", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"the page needs {' and '.join(missing)}", "web")
    with (
        contextlib.ExitStack() as at_end,
        listening(options.host, options.port) as listener,
        tempfile.TemporaryDirectory(prefix="dora-vl-page-") as folder,
    ):
        keep_gradio_quiet(Path(folder))
        from dora_vl.serving.access import Uploads, access_rules, http_config
        from dora_vl.serving.model import open_served
        from dora_vl.serving.side_by_side import OpenModels

        rules, settings = access_rules(options), ServerSettings.of(options)
        named = {"base_name": "the base", "template": options.template, "any_base": options.any_base}
        models = OpenModels(partial(open_served, **named), settings)
        at_end.callback(models.close)
        if adapters:
            models.open(adapters, options.base)  # before Gradio, which takes seconds: it may refuse
        from dora_vl.serving.page import Page, QuietServer, build_page_app

        most = settings.media_bytes * 4  # so that the page itself can say that a file is too large
        app = build_page_app(Page(models, Uploads(Path(folder), most * 8), trains=trains), rules, upload_bytes=most)
        yield f"{', '.join(models.names) or 'train'} at {address_of(options.host, listener)} (Ctrl-C ends)"
        QuietServer(http_config(app, lifespan="on", timeout_graceful_shutdown=1)).run(sockets=[listener])


def keep_gradio_quiet(uploads: Path) -> None:
    """Tells Gradio, before it is imported, where uploads go, and to report to nobody."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(uploads),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SSR_MODE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
