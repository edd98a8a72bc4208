"""Every kind of run reads its first labels back, and ends before weights are read where they are not the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep import generated_commonsense
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.errors import UserError
from dora_vl.run.reading import read_run_file, read_settings
from dora_vl.run.settings import VlBartRunConfig
from dora_vl.training.decoder_pipeline import CommonsensePipeline, DecoderPipeline
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.run import train
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.backbones.tiny_language import write_tiny_language as write_tiny_llama
from tests.tasks.test_commonsense import settings
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run

CPU: dict[str, object] = {"use_cpu": True, "max_steps": 1}


def instruct(
    folder: Path, write: Callable[[Path], object], *, text_only: bool = False, streaming: bool = False
) -> Pipeline:
    write(folder / "base")
    data = write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    rows = [row for row in json.loads(data.read_text()) if not (text_only and "image" in row)]
    data.write_text(json.dumps(rows))
    more: dict[str, object] = {"streaming": streaming, "group_by_modality_length": not streaming}
    path = write_run(folder / "run.yaml", folder / "base", data, data=more, training=CPU)
    return DecoderPipeline(read_run_file(path))


def commonsense(folder: Path, *, train_on: str) -> Pipeline:
    write_tiny_llama(folder / "base")
    generated_commonsense.main(["--to", str(folder / "data")])
    return CommonsensePipeline(settings(folder, "run", "--data.train_on", train_on, "--training.max_steps", "1"))


def vlbart(folder: Path) -> Pipeline:
    path = write_vlbart_run(folder / "run.yaml", write_vlbart_data(folder / "data"), ("vqav2", "nlvr2", "coco_caption"))
    config = read_settings([f"--config={path}", "--training.use_cpu=true"], VlBartRunConfig)
    return VlBartPipeline(config, all_subtasks(), name="tiny")


RUNS: dict[str, tuple[Callable[[Path], Pipeline], type]] = {
    "llava": (lambda folder: instruct(folder, write_tiny_llava), Encoder),
    "a stream": (lambda folder: instruct(folder, write_tiny_llava, streaming=True), Encoder),
    "qwen2_5_vl": (lambda folder: instruct(folder, lambda base: write_tiny("qwen2_5_vl", base)), Encoder),
    "language model": (
        lambda folder: instruct(folder, lambda base: write_tiny_language("llama", base), text_only=True),
        Encoder,
    ),
    "commonsense": (lambda folder: commonsense(folder, train_on="answer"), Encoder),
    "commonsense, prompt too": (lambda folder: commonsense(folder, train_on="all"), Encoder),
    "vlbart": (vlbart, Seq2SeqEncoder),
}


def without_last_label(encode: Callable[..., Any]) -> Callable[..., Any]:
    """The same, the token that closes the last answer not trained."""

    def changed(*given: Any, **named: Any) -> Any:
        encoded = encode(*given, **named)
        if not hasattr(encoded, "labels"):
            return encoded[:-1]
        labels = encoded.labels.clone()
        labels[(labels != -100).nonzero()[-1]] = -100
        return replace(encoded, labels=labels)

    return changed


@pytest.mark.parametrize("kind", RUNS)
def test_labels_that_are_not_the_answers_end_a_run_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make, encoder = RUNS[kind]
    pipeline = make(tmp_path)
    monkeypatch.setattr(type(pipeline), "load", lambda _: pytest.fail("weights are read"))
    name = "labels" if encoder is Seq2SeqEncoder else "encode"
    right = getattr(encoder, name)
    monkeypatch.setattr(encoder, name, without_last_label(right))
    with pytest.raises(UserError):
        train(pipeline)
    monkeypatch.setattr(encoder, name, right)
    monkeypatch.setattr(type(pipeline), "load", lambda _: {}["weights are read"])
    with pytest.raises(KeyError):
        train(pipeline)
