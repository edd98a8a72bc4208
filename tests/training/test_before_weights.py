"""How a run is started, and what ends it before its weights are read."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dora_vl import cli
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.errors import SettingError
from dora_vl.run.settings import RunConfig
from dora_vl.run.settings_parser import read_run
from dora_vl.training import train_command
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.run import train
from tasks import commonsense
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.backbones.tiny_language import write_tiny_language as write_tiny_llama
from tests.training.generated_commonsense import write_commonsense
from tests.training.launched import ROOT
from tests.training.test_commonsense import settings
from tests.training.tiny_run import decoder_run, json_of, refused, write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import vlbart_run, write_vlbart_data, write_vlbart_run


def test_a_missing_picture_is_told_before_torch_is_imported() -> None:
    code = """
import sys
from tasks import image_qa
try:
    image_qa.main(["--model", "none", "--image", "none.png", "--question", "q"])
except SystemExit as left:
    print(left.code, "torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 False False"


@pytest.mark.parametrize(("task", "tasks"), [("", ["commonsense", "image_text"]), ("task: llava\n", ["llava"] * 2)])
def test_scripts_and_the_command_differ_in_the_task_of_settings_that_name_none(
    task: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(f"{task}model: {{base: b}}\ndata: {{train: t}}\ntraining: {{output_dir: run}}\n")
    started: list[RunConfig] = []
    monkeypatch.setattr(train_command, "pipeline_of", lambda config: started.append(config) or sys.exit())
    words = [f"--config={tmp_path / 'run.yaml'}", "--adapter.rank", "7"]
    monkeypatch.setattr(sys, "argv", ["commonsense.py", *words])
    for start in (commonsense.main, lambda: cli.main(["train", str(tmp_path / "run.yaml"), *words[1:]])):
        with pytest.raises(SystemExit):
            start()
    assert started == [read_run(words, task="commonsense"), read_run(words)]
    assert [config.task for config in started] == tasks


def test_base_data_and_output_folder_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, records = write_tiny_llava(tmp_path / "base"), write_tiny_data(tmp_path, samples=16)
    monkeypatch.chdir(tmp_path)
    settings = f"model: {{base: {base}}}\ndata: {{train: {records.name}}}\ntraining: {{output_dir: run}}\n"
    Path("run.yaml").write_text(settings)
    cli.main(["train", "run.yaml", "--training.max_steps", "2"])
    assert json_of(tmp_path / "run" / "metrics.json")["train_steps"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


CPU = ("--training.use_cpu=true", "--training.max_steps=1")


def instruct(
    folder: Path, write: Callable[[Path], object], *overrides: str, text_only: bool = False, streaming: bool = False
) -> Pipeline:
    write(folder / "base")
    data = write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    rows = [row for row in json.loads(data.read_text()) if not (text_only and "image" in row)]
    data.write_text(json.dumps(rows))
    more: dict[str, object] = {"streaming": streaming, "group_by_modality_length": not streaming}
    path = write_run(folder / "run.yaml", folder / "base", data, data=more)
    return decoder_run(path, *CPU, *overrides)


def llava(folder: Path, *overrides: str, streaming: bool = False) -> Pipeline:
    return instruct(folder, write_tiny_llava, *overrides, streaming=streaming)


def of_commonsense(folder: Path, *overrides: str) -> Pipeline:
    write_tiny_llama(folder / "base")
    write_commonsense(folder / "data")
    return DecoderPipeline(settings(folder, "run", "--training.deepspeed=null", *CPU, *overrides))


def vlbart(folder: Path, *overrides: str) -> Pipeline:
    path = write_vlbart_run(folder / "run.yaml", write_vlbart_data(folder / "data"), ("vqav2", "nlvr2", "coco_caption"))
    return vlbart_run(path, *overrides)


RUNS: dict[str, Callable[[Path], Pipeline]] = {
    "a stream": lambda folder: llava(folder, streaming=True),
    "qwen2_5_vl": lambda folder: instruct(folder, lambda base: write_tiny("qwen2_5_vl", base)),
    "language model": lambda folder: instruct(folder, lambda base: write_tiny_language("llama", base), text_only=True),
    "commonsense, prompt too": lambda folder: of_commonsense(folder, "--data.train_on=all"),
    "vlbart": vlbart,
}


def without_last_label(encode: Callable[..., Any]) -> Callable[..., Any]:
    """The same, the token that closes the last answer not trained."""

    def changed(*args: Any, **named: Any) -> Any:
        encoded = encode(*args, **named)
        if not hasattr(encoded, "labels"):
            return encoded[0][:-1], encoded[1]  # a VL-BART's labels, and how many tokens were cut
        labels = encoded.labels.clone()
        labels[(labels != -100).nonzero()[-1]] = -100
        return replace(encoded, labels=labels)

    return changed


@pytest.mark.parametrize("kind", RUNS)
def test_labels_that_are_not_the_answers_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pipeline = RUNS[kind](tmp_path)
    encoder, name = (Seq2SeqEncoder, "labels") if kind == "vlbart" else (Encoder, "encode")
    with monkeypatch.context() as patch:
        patch.setattr(encoder, name, without_last_label(getattr(encoder, name)))
        refused(pipeline)
    monkeypatch.setattr(pipeline, "load", lambda: {}["weights are read"])
    with pytest.raises(KeyError):
        train(pipeline)


@pytest.mark.parametrize(
    ("make", "override"),
    [
        (llava, '--adapter.targets=["*.nosuch_proj"]'),
        (llava, '--adapter.parts={"eyes": {"targets": ["*.eyes.*"]}}'),
        (of_commonsense, '--adapter.targets=["*.nosuch_proj"]'),
        (vlbart, '--optim.rates={"dorra": 1e-4}'),
    ],
)
def test_parts_that_the_model_does_not_have_end_a_run(tmp_path, make, override) -> None:
    refused(make(tmp_path, override))
    assert not list(tmp_path.rglob("settings.json")), "the run has no folder yet that would be in a second try's way"


@pytest.mark.parametrize("model_type", ["florence2", "bert"])
def test_a_base_that_cannot_be_trained_ends_a_run(tmp_path: Path, model_type: str) -> None:
    refused(instruct(tmp_path, lambda base: AutoConfig.for_model(model_type).save_pretrained(base)))  # no weights
    assert not (tmp_path / "run").exists()


def test_samples_that_fill_no_micro_batch_are_not_dropped_unsaid(tmp_path: Path, caplog) -> None:
    """And the weights' number type that loses small gradients is warned of."""
    drops = ("--training.dataloader_drop_last=true", "--training.per_device_train_batch_size=25")
    error = refused(llava(tmp_path, "--model.dtype=float16", *drops))
    assert isinstance(error, SettingError)
    assert error.key == "training.dataloader_drop_last"
    assert "take bfloat16" in caplog.text


def test_a_base_of_another_task_is_refused(tmp_path: Path) -> None:
    error = refused(instruct(tmp_path, lambda base: write_tiny("qwen2_5_vl", base), "--task=llava"))
    assert (type(error), vars(error)["key"]) == (SettingError, "task")
