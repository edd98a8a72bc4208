"""A tiny random LLaVA folder, tiny data, and a run's settings over both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from dora_vl.backbones.towers import Preparation, image_processor
from dora_vl.cli import main
from dora_vl.errors import SettingError, UserError
from dora_vl.run.folder import read_log
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.run import run, train

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220), "white": (250, 250, 250)}
IMAGE_PIXELS = 8
MakeRun = Callable[..., Path]
"""Type of the fixture `make_run`: `write_run` over the tiny model and data, in the test's folder."""


def write_tiny_llava(folder: Path, *, width: int = 32) -> Path:
    """A LLaVA of 20,000 random parameters: CLIP tower with 4 patches, two Llama layers, a word tokenizer.

    Args:
        width: of the language model's hidden states.
    """
    texts = ["USER: What colour is it? Say the colour. ASSISTANT: A chat between", *COLOURS]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_PIXELS,
        patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 8, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_PIXELS // 4) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    preparation = Preparation(image_size=IMAGE_PIXELS, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    LlavaProcessor(
        image_processor=image_processor(preparation, aspect="pad"),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def write_tiny_data(folder: Path, *, samples: int = 48, text_only_blocks: int = 0) -> Path:
    """LLaVA JSON with a coloured picture each; every second block of so many samples has no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    records = []
    for index in range(samples):
        colour = names[index % len(names)]
        text_only = text_only_blocks > 0 and index // text_only_blocks % 2 == 0
        question = "Say the colour." + " Say" * (index % 5) + f" {colour}" * text_only
        record = {
            "id": f"sample-{index}",
            "conversations": [
                {"from": "human", "value": question if text_only else f"<image>\n{question}"},
                {"from": "gpt", "value": colour + " it" * (index % 3)},
            ],
        }
        if not text_only:
            record["image"] = f"{colour}-{index}.png"
            shade = tuple(min(255, part + index % 3) for part in COLOURS[colour])
            Image.new("RGB", (10 + index % 3, 12), shade).save(folder / str(record["image"]))
        records.append(record)
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def write_chats(path: Path, *, chats: int = 7) -> Path:
    """Chats as a base would have written them, each longer than the one before."""
    lines = [
        [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": "It is " + "blue " * number + "."}]
        for number in range(chats)
    ]
    rows = [{"id": f"replay-{number}", "conversations": turns} for number, turns in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder: Path, *, samples: int = 24) -> Path:
    """Each picture's colour is the chosen answer, the next colour the rejected one."""
    names, path = list(COLOURS), write_tiny_data(folder, samples=samples)
    rows = []
    for record in json.loads(path.read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        wrong = names[(names.index(answer.split()[0]) + 1) % len(names)]
        question = question.removeprefix("<image>\n")
        rows.append({"prompt": question, "chosen": answer, "rejected": wrong, "image": record["image"]})
    path.write_text(json.dumps(rows))
    return path


def decoder_run(run_file: Path, *overrides: str) -> DecoderPipeline:
    return DecoderPipeline(read_run_file(run_file, *overrides))


def refused(pipeline: Pipeline) -> UserError:
    """What a run ends with before it reads a weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load", lambda: pytest.fail("weights are read"))
        with pytest.raises(UserError) as error:
            run(pipeline)
    return error.value


def refused_key(run_file: Path, *overrides: str) -> str:
    """The setting that a run is refused for, before it reads a weight."""
    error = refused(decoder_run(run_file, *overrides))
    assert isinstance(error, SettingError), error
    return error.key


def merged(adapter: Path, to: Path, *more: str) -> Path:
    """The folder of a base with an adapter merged into it, by the command."""
    main(["merge", "--adapter", str(adapter), "--to", str(to), *more])
    return to


def trained(run_file: Path, *overrides: str, name: str = "") -> Path:
    """The folder of a run in this process: the settings' own, or another one beside it."""
    folder = [f"--training.output_dir={run_file.parent / name}"] if name else []
    config = read_run_file(run_file, *folder, *overrides)
    train(DecoderPipeline(config))
    return Path(config.training["output_dir"])


def check_resume(run_file: Path, *overrides: str, step: int) -> tuple[Path, Path]:
    """A run that stopped after a checkpoint goes on to the losses and weights of the whole one, bit by bit; both."""
    whole = trained(run_file, *overrides, name="whole")
    stopped = run_file.parent / "stopped"
    shutil.copytree(whole, stopped)
    later = [path for path in stopped.glob("checkpoint-*") if int(path.name.removeprefix("checkpoint-")) > step]
    for path in (stopped / "adapter", *later):
        shutil.rmtree(path)
    trained(run_file, *overrides, "--resume=last", name="stopped")
    assert logged_losses(stopped) == logged_losses(whole)
    assert_same_weights(stopped, whole)
    return whole, stopped


def logged(run_folder: Path, field: str = "loss") -> list[dict[str, Any]]:
    """The lines of a run's log that have this field."""
    return [line for line in read_log(run_folder / "log.jsonl") if field in line]


def logged_losses(run_folder: Path) -> list[float]:
    """The training loss of each line of a run's log."""
    return [line["loss"] for line in logged(run_folder)]


def losses_of(run_folder: Path) -> torch.Tensor:
    return torch.tensor(logged_losses(run_folder))


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def skipped_by(run_folder: Path) -> dict[str, str]:
    """Reason by id of each sample that a run left out."""
    lines = map(json.loads, (run_folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["id"]: line["reason"] for line in lines}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """What stands in the adapter of a run or a checkpoint."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_weights(first: Path, other: Path, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """The adapters of two runs, to the bit unless a tolerance is given."""
    weights, expected = weights_of(first), weights_of(other)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def write_run(path: Path, base: Path, records: Path, **changes: dict[str, object]) -> Path:
    """A run's YAML over the tiny model and data; `changes` are merged into its sections."""
    sections: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": str(records), "image_folder": str(records.parent), "workers": 0, "max_tokens": 256},
        "optim": {"projector_learning_rate": 1e-3},
        "training": {
            "output_dir": str(path.parent / path.stem),
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        },
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"task": "image_text", **sections}))
    return path
