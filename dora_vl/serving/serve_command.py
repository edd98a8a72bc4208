"""`dora-vl serve`: a base and its adapters behind OpenAI's protocol, unmerged, many requests at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dora_vl.errors import UserError, needs_extra
from dora_vl.serving.options import (
    ANSWERS,
    MEDIA,
    REQUEST,
    ServerSettings,
    adapters_by_name,
    add_address,
    add_options,
    address_of,
    listening,
)

DESCRIPTION = """\
Serves a base model and adapters over it, each under its own name, as OpenAI's clients ask. Nothing is merged: requests
for different adapters and for the base are answered in one batch, each sequence with its own adapter.

  dora-vl serve --adapter shapes=runs/demo/adapter
  dora-vl serve --model OWNER/NAME --adapter a=runs/a/adapter --adapter b=runs/b/adapter --port 8001

Then, with the openai package:

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(model="shapes", messages=[{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
      {"type": "text", "text": "What color is the shape?"}]}])

An adapter is the folder of a run, or of PEFT; the base is where the first one says, unless --model names it. Questions
to the base are written in the first adapter's prompt format. The server listens on this machine only unless --host
says otherwise, answers to the names of --allow-host besides, and asks for a key where --api-key gives one.
docs/serving.md says what cannot be served.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    parser.add_argument("--model", help="the base: a folder or hub id (default: the first adapter's)")
    parser.add_argument("--base-name", help="what clients call the base (default: its folder's name)")
    parser.add_argument("--any-base", action="store_true", help="accepts another base than an adapter was trained on")
    parser.add_argument("--template", help="prompt format of a LLaVA-1.5 or language model of which nothing says it")
    add_address(parser, port=8000)
    add_options(parser, ANSWERS, REQUEST, MEDIA)


def run(options: argparse.Namespace) -> Iterator[str]:
    """Opens the model, serves until Ctrl-C; yields a line when it is ready."""
    adapters = adapters_by_name(options.adapter)
    if options.model is None and not adapters:
        raise UserError("give --adapter DIR, or --model BASE, or both")
    with needs_extra("serve", "the server"):
        import uvicorn

        from dora_vl.serving.access import access_rules, http_config
        from dora_vl.serving.server import Server, build_app
    rules = access_rules(options)
    listener = listening(options.host, options.port)
    from dora_vl.serving.engine import Engine
    from dora_vl.serving.model import open_served

    named = {"base_name": options.base_name, "template": options.template, "any_base": options.any_base}
    served = open_served(options.model, adapters, **named)
    with listener, Engine(served, ServerSettings.of(options)) as engine, Server(engine, rules=rules) as server:
        yield f"serving {', '.join(served.names)} at {address_of(options.host, listener)}/v1 (Ctrl-C ends)"
        config = http_config(build_app(server), lifespan="off", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])
