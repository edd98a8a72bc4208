"""Times batches whose rows use different adapters: a decode step, and a server under load.

    python -m benchmarks.serve --model runs/demo/base --json benchmarks/results.jsonl

Four DoRA adapters of random factors, their magnitudes moved, over all projections of the language model, are served
beside the base. A decode step is one token of each row after a short prompt: of the base only, of one adapter as
`load_adapter` puts it in, of one adapter through the server's layers, and of rows of four adapters and the base.
Contenders take turns; quoted are medians over rounds of ratios within a round. The load is requests in flight over
HTTP, of equally many tokens, spread over the four adapters and the base, against the same requests for one adapter;
both take turns too. The target is 0.8 of one adapter's tokens per second.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from benchmarks.contenders import take_turns
from benchmarks.report import median, table, write_json
from dora_vl.adapters.base_weights import shared_tensors
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.families.targets import language_targets
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.data.turns import Turn
from dora_vl.errors import exit_on_user_error
from dora_vl.evaluation.assistant import Assistant, inputs_on_device, prompt_batch, prompt_sample
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.access import http_config
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel, open_served
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.server import Server, build_app

NAMES = ("a", "b", "c", "d")
QUESTION = "What is the colour of the shape, and what stands beside it?"


@exit_on_user_error
def main() -> None:
    """Runs both parts, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a base, such as the one that make demo leaves")
    parser.add_argument("--template", help="its prompt format, where nothing says it")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 15, 30], help="of a decode step's batch")
    parser.add_argument("--requests", type=int, default=32, help="in flight")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender takes a turn")
    parser.add_argument("--steps", type=int, default=5, help="decode steps of a turn; its time is their median")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = open_served(options.model, {}, base_name="base", template=options.template)
        folders = write_adapters(base, Path(folder), options)
        served = open_served(options.model, folders, base_name="base", template=options.template)
        steps, load = decode_figures(served, folders["a"], options), load_figures(served, options)
    shown = {name: value for name, value in vars(options).items() if name not in ("json", "model")}
    write_json(options.json, {"options": shown, "decode_step": steps, "load": load})


@torch.no_grad()
def write_adapters(base: ServedModel, to: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Writes folders of four adapters that differ only in their numbers."""
    folders = {}
    for seed, name in enumerate(NAMES):
        model = copy.deepcopy(base.backbone.model, shared_tensors(base.backbone.model))
        targets = language_targets(model)
        apply_dora(model, DoRAConfig(targets=targets, rank=options.rank, alpha=2.0 * options.rank, dropout=0.0))
        draw = torch.Generator().manual_seed(seed)
        for _, layer in adapted_layers(model):
            assert layer.lora_B is not None
            assert layer.magnitude is not None
            layer.lora_B.copy_(0.01 * torch.randn(layer.lora_B.shape, generator=draw))
            layer.magnitude.mul_(0.9 + 0.2 * torch.rand(layer.magnitude.shape, generator=draw))
        folders[name] = to / name
        save_adapter(model, folders[name], base_model=options.model)
    return folders


def decode_figures(served: ServedModel, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times decode steps; returns milliseconds and ratios by the number of rows."""
    frozen = open_served(options.model, {}, base_name="base", template=options.template).backbone.model
    adapted = copy.deepcopy(frozen, shared_tensors(frozen))  # a second model over the same weights
    load_adapter(adapted, folder)
    figures, mixed = {}, "four and the base"
    for count in options.rows:
        steps = {
            "frozen": decode_step(frozen, served, count),
            "one, by itself": decode_step(adapted.eval(), served, count),
            "one, served": decode_step(served.backbone.model, served, count, ["a"]),
            mixed: decode_step(served.backbone.model, served, count, ["base", *NAMES]),
        }
        turns = take_turns(steps, rounds=options.rounds, repeats=options.steps)
        print(f"\n{count} rows, one decoded token of each")
        print(turns.shown("one, by itself"))
        figures[str(count)] = {
            "ms": turns.milliseconds,
            "mixed_vs_by_itself": turns.ratio(mixed, "one, by itself"),
            "mixed_vs_one_served": turns.ratio(mixed, "one, served"),
            "mixed_vs_frozen": turns.ratio(mixed, "frozen"),
        }
    return figures


def decode_step(model: Any, served: ServedModel, rows: int, names: Sequence[str] = ()) -> Callable[[], None]:
    """Makes a step that decodes one token of each row after a prompt whose keys and values are cached."""
    assistant: Assistant = served.assistant
    sample = prompt_sample(assistant.encoder, [Turn("user", QUESTION)], PromptMedia())
    inputs = inputs_on_device(prompt_batch(assistant.encoder, [sample] * rows), assistant.device)
    keys = sorted([names[number % len(names)] for number in range(rows)], key=str) if names else []

    def batch() -> contextlib.AbstractContextManager[None]:
        return served.holding([served.entry(name) for name in keys], [0] * rows) if keys else contextlib.nullcontext()

    with torch.inference_mode(), batch():
        cache = model(**inputs, use_cache=True).past_key_values

    @torch.inference_mode()
    def step() -> None:
        with batch():
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def load_figures(served: ServedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Measures the tokens per second of both loads, and their ratio."""
    served.backbone.model.generation_config.eos_token_id = None  # answers of equally many tokens
    loads = {"one adapter": ["a"], "four adapters and the base": ["base", *NAMES]}
    settings = ServerSettings(batch=options.requests, window_ms=200)
    rounds: list[dict[str, float]] = []
    with Engine(served, settings) as engine, running(build_app(Server(engine))) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)
        for _ in range(options.rounds + 1):
            rounds.append({name: under_load(client, names, options) for name, names in loads.items()})
    del rounds[0]  # whatever is done once
    speeds = {name: round(median([rates[name] for rates in rounds]), 2) for name in loads}
    single, mixed = loads
    share = round(median([each[mixed] / each[single] for each in rounds]), 4)
    print(f"\n{options.requests} requests in flight, {options.tokens} tokens each")
    print(table(("load", "tokens per second"), [*speeds.items()]))
    print(f"mixed: {share:.3f} of one adapter's")
    return {"tokens_a_second": speeds, "mixed_of_one": share}


def under_load(client: OpenAI, names: Sequence[str], options: argparse.Namespace) -> float:
    """Measures the tokens per second of all requests at once."""

    def ask(number: int) -> int:
        completion = client.chat.completions.create(
            model=names[number % len(names)],
            messages=[{"role": "user", "content": f"{QUESTION} {number}"}],
            max_tokens=options.tokens,
        )
        return completion.usage.completion_tokens if completion.usage else 0

    before = time.perf_counter()
    with ThreadPoolExecutor(options.requests) as threads:
        tokens = sum(threads.map(ask, range(options.requests)))
    return tokens / (time.perf_counter() - before)


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Runs a server in a thread and yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(http_config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


if __name__ == "__main__":
    main()
