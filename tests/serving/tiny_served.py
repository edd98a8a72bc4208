"""Tiny models with adapters away from where adapters start, their answers alone, and a server over them."""

import base64
import contextlib
import io
import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.serve import running as running_app
from dora_vl.adapters.adapter import content_hash
from dora_vl.adapters.folder import save_adapter
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora, trained_parts
from dora_vl.data.turns import Turn
from dora_vl.evaluation.assistant import Assistant, prompt_batch, prompt_sample
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import NOTHING, Engine
from dora_vl.serving.model import ServedModel, open_served
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.scheduler import Event, Failed, Finished, SubmittedRequest, TextPiece
from dora_vl.serving.server import Server, build_app

RED, WIDE = Image.new("RGB", (21, 15), "red"), Image.new("RGB", (60, 17), (20, 40, 220))
LANGUAGE = ("*language_model*.q_proj", "*language_model*.down_proj")
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "one": {"rank": 2, "alpha": 5.0, "targets": LANGUAGE},
    "two": {"rank": 5, "alpha": 3.0, "rank_scaling": "sqrt", "targets": LANGUAGE[:1]},
    "three": {"rank": 3, "alpha": 7.0, "method": "lora", "targets": ("*language_model*.v_proj", *LANGUAGE)},
    "four": {"rank": 4, "alpha": 2.0, "targets": LANGUAGE[1:], "magnitude_targets": ("*language_model*.o_proj",)},
}
"""Adapters that differ in rank, scale, method and in the layers that they adapt."""


def spread(folder: Path) -> Path:
    """Larger weights, so that a random model's answers differ from question to question."""
    weights = load_file(folder / "model.safetensors")
    scaled = {name: tensor * (8 if tensor.dim() == 2 else 1) for name, tensor in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def write_adapter(base: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """An adapter folder whose B is not zero, whose magnitudes moved, and whose further weights are other ones."""
    causal = AutoConfig.from_pretrained(base).model_type == "llama"
    model: nn.Module = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_pretrained(base)
    apply_dora(model, DoRAConfig(dropout=0.0, **settings))
    draw = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        if layer.lora_B is not None:
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw))
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.rand(layer.magnitude.shape, generator=draw) + 0.5)
    for part in trained_parts(model):
        for parameter in part.parameters.values() if not part.adapts else ():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * parameter.std())
    save_adapter(model, folder, base_model=str(base))
    return folder


def with_recipe(adapter: Path, base: Path, **changed: Any) -> Path:
    """The folder as a run leaves it, which says how the model is asked."""
    path = adapter / "recipe.json"
    recipe = {"base": str(base), "revision": None, "base_sha256": content_hash(base), "dtype": "float32"}
    recipe |= {"template": "tokenizer", "image_aspect": None, "quantisation": None, "max_tokens": 256, **changed}
    path.write_text(json.dumps({**json.loads(path.read_text()), **recipe}))
    return adapter


def write_adapters(base: Path, folder: Path, adapters: Mapping[str, Mapping[str, Any]] = ADAPTERS) -> dict[str, Path]:
    return {
        name: write_adapter(base, folder / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(adapters.items(), 1)
    }


def served(base: Path, adapters: Mapping[str, Path], *, template: str | None = None) -> ServedModel:
    return open_served(str(base), adapters, base_name="base", template=template)


def alone(base: Path, adapter: Path | None, *, template: str | None = None) -> Assistant:
    """The adapter by itself on its base, as everything else here asks it; without one, the base."""
    request = ModelRequest(adapter=adapter) if adapter else ModelRequest(model=str(base))
    opened = open_model(ModelRequest(**{**vars(request), "template": template})).adapted
    assert isinstance(opened, Assistant)
    return opened


def answer_alone(assistant: Assistant, turns: Sequence[Turn], seen: PromptMedia = NOTHING, *, tokens: int = 8) -> str:
    batch = prompt_batch(assistant.encoder, [prompt_sample(assistant.encoder, turns, seen)])
    return assistant.answers(batch, max_new_tokens=tokens)[0]


def answers(
    engine: Engine,
    questions: Sequence[tuple[str, list[Turn], PromptMedia]],
    strengths: Sequence[float] = (),
    **sampling: Any,
) -> list[str]:
    settings = Sampling(**{"max_new_tokens": 8, **sampling})
    prepared = [
        engine.prepare(name, turns, settings, seen, strength=strength)
        for (name, turns, seen), strength in zip(questions, strengths or [1.0] * len(questions), strict=True)
    ]
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in prepared]
    for request, events in zip(prepared, queues, strict=True):
        engine.submit(request, events.put)
    ends = [last(events) for events in queues]
    assert all(isinstance(end, Finished) for end in ends), ends
    return [end.text for end in ends if isinstance(end, Finished)]


def last(events: queue.SimpleQueue[Event]) -> Finished | Failed:
    """The last event of a request, whose text is that of all its pieces."""
    pieces = ""
    while isinstance(event := events.get(timeout=120), TextPiece):
        pieces += event.text
    assert isinstance(event, Failed) or event.text == pieces
    return event


def batches_of(engine: Engine, monkeypatch: Any) -> list[list[tuple[str, float] | None]]:
    batches: list[list[tuple[str, float] | None]] = []
    begin = engine._decoder.begin

    def noted(batch: Sequence[SubmittedRequest]) -> Any:
        batches.append([request.prepared.applied for request in batch])
        return begin(batch)

    monkeypatch.setattr(engine._decoder, "begin", noted)
    return batches


def data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def picture_part(picture: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


@contextlib.contextmanager
def running(model: ServedModel, settings: ServerSettings | None = None, **named: Any) -> Iterator[str]:
    with (
        Engine(model, settings) as engine,
        Server(engine, **named) as answering,
        running_app(build_app(answering)) as address,
    ):
        yield address
