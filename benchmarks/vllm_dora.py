"""DoRA adapters unmerged in vLLM: its tokens beside PEFT's, of tiny random models in float32 on CPU.

    python -m benchmarks.vllm_dora --vllm-python vllm/bin/python --json benchmarks/results.jsonl

`language`: a batch mixes requests for the base, two DoRA adapters and a LoRA of a language model with biases, with a
slot for each adapter and with one for all. `llava`: a LLaVA with a projector that was trained too, as
`dora-vl export --for vllm` writes it, asked about pictures. Every token must be PEFT's; how many answers would differ
without the magnitudes, and without the adapter, is printed beside it. vLLM has an environment of its own, with dora_vl
as its plugin (docs/export.md); this module runs there too, with `--answer JOB`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.report import table, write_json
from dora_vl.errors import UserError, exit_on_user_error, one_line

ROOT = Path(__file__).parents[1]
PROMPTS = ((1, 20, 33, 47, 60, 75), (1, 100, 101, 102), (1, 200, 150, 90, 91, 92, 93, 94, 95, 96, 97))
COLOURS = ((200, 30, 30), (30, 180, 40), (20, 40, 220))
QUESTION = "USER: <image>\nSay the colour. ASSISTANT:"
LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "dora": {"r": 8, "lora_alpha": 16, "target_modules": LAYERS.split("|"), "use_dora": True},
    "dora, in part": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.down_proj": 3},
    },
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": LAYERS.split("|")},
}
"""They cover whole packed groups and parts of them, several ranks and scales, rsLoRA, and a LoRA among DoRAs."""
LLAVA_ADAPTER: Mapping[str, Any] = {
    **ADAPTERS["dora"],
    "target_modules": rf".*language_model.*\.({LAYERS})",
    "modules_to_save": ["multi_modal_projector"],
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "enable_prefix_caching": False,
    "enable_lora": True,
    "max_lora_rank": 8,
    "max_cpu_loras": 8,
}
Answers = Mapping[str, Sequence[Mapping[str, Any]]]
"""Maps an adapter's name to its answer to each prompt: tokens and log probabilities."""


@exit_on_user_error
def main() -> None:
    """Runs the cases, prints a table of each and writes the JSON; exit status 1 where a token is not PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="default: this one")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer is not None:
        answer_in_vllm(options.answer)
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES.values():
            figures |= case(Path(folder), options)
    write_json(options.json, figures)
    if not all(map(agrees, figures.values())):
        sys.exit(1)


def agrees(case: Mapping[str, Any]) -> bool:
    """Returns True where every token is PEFT's and differs without the adapter or its magnitudes."""
    return all(
        min(row["same_tokens"]) == row["of"] and 0 not in (row["unlike_base"], row["unlike_lora"])
        for row in case["answers"].values()
    )


def language_case(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serves a language model's three adapters, with a slot for each and with one for all."""
    base = write_model(AutoModelForCausalLM, llama_config(vocab_size=320), folder / "base")
    adapters = {
        name: write_adapter(AutoModelForCausalLM, base, folder / name, seed=10 + seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    inputs = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    expected = by_peft(AutoModelForCausalLM, base, adapters, inputs, options.tokens)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    figures = {}
    for slots in (len(adapters), 1):
        title = f"language, slots: {slots}"
        answers = by_vllm(base, adapters, prompts, options, skip_tokenizer_init=True, max_loras=slots)
        figures[title] = compared(title, answers, expected)
    return figures


def llava_case(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serves a LLaVA's exported adapter on the exported base, which has the trained projector."""
    kind, served = AutoModelForImageTextToText, folder / "served"
    base, processor = write_llava(folder / "llava")
    adapter = write_adapter(kind, base, folder / "llava adapter", seed=20, **LLAVA_ADAPTER)
    run([sys.executable, "-m", "dora_vl.cli", "export", "--for", "vllm", "--adapter", adapter, "--to", served])
    pictures = [folder / f"{number}.png" for number in range(len(COLOURS))]
    for path, colour in zip(pictures, COLOURS, strict=True):
        Image.new("RGB", (28, 28), colour).save(path)
    opened = [Image.open(path) for path in pictures]
    inputs = [dict(processor(images=picture, text=QUESTION, return_tensors="pt")) for picture in opened]
    expected = by_peft(kind, base, {"dora": adapter}, inputs, options.tokens)
    expected["base"] = by_peft(kind, served / "base", {}, inputs, options.tokens)["base"]
    prompts = [{"prompt": QUESTION, "picture": str(path)} for path in pictures]
    answers = by_vllm(served / "base", {"dora": served / "adapter"}, prompts, options, max_loras=1)
    return {"llava": compared("llava", answers, expected)}


CASES: Mapping[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "language": language_case,
    "llava": llava_case,
}


def llama_config(vocab_size: int) -> LlamaConfig:
    """Returns two layers of head size 32, vLLM's smallest, whose greedy tokens do not repeat themselves."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.25,
    )


@torch.no_grad()
def write_model(kind: Any, config: Any, folder: Path) -> Path:
    """Writes a random model without a zero bias."""
    torch.manual_seed(3)
    model = kind.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> tuple[Path, LlavaProcessor]:
    """Writes a random LLaVA with a CLIP tower and a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=64,
            initializer_range=0.3,
        ),
        text_config=llama_config(vocab_size=len(tokenizer)),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(28 // 14) ** 2,
    )
    base = write_model(AutoModelForImageTextToText, config, folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(base)
    return base, processor


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with a token for a picture."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>", "<image>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator([QUESTION], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


@torch.no_grad()
def write_adapter(kind: Any, base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """Writes PEFT's folder of an adapter whose B is not zero and whose magnitudes are not the norms."""
    from peft import LoraConfig, get_peft_model

    from dora_vl.backbones.loading import load_pretrained

    torch.manual_seed(seed)
    model: nn.Module = get_peft_model(load_pretrained(kind, base, dtype=torch.float32), LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.add_(torch.randn_like(weight) * 0.12)
        if "magnitude" in name:
            weight.mul_(torch.empty_like(weight).uniform_(0.6, 1.5))
    model.save_pretrained(str(folder))
    return folder


def by_peft(
    kind: Any, base: Path, adapters: Mapping[str, Path], inputs: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns greedy answers of the base and of PEFT's unmerged adapters, of DoRA also "without magnitudes"."""
    from peft import PeftModel

    from dora_vl.backbones.loading import load_pretrained

    models: dict[str, Path | None] = {"base": None, **adapters}
    for name, path in adapters.items():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        if config["use_dora"]:
            plain = shutil.copytree(path, path.with_name(f"{path.name} without magnitudes"))
            (plain / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}), encoding="utf-8")
            models[f"{name} without magnitudes"] = plain
    answers = {}
    for name, path in models.items():
        model: Any = load_pretrained(kind, base, dtype=torch.float32)
        model = model if path is None else PeftModel.from_pretrained(model, str(path))
        answers[name] = [greedy(model.eval(), prompt, tokens) for prompt in inputs]
    return answers


@torch.no_grad()
def greedy(model: Any, inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Decodes greedily; returns the tokens with their log probabilities."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(**inputs, **options)
    chosen = made.sequences[0, -tokens:]
    scores = torch.cat(made.logits).float().log_softmax(-1)
    return {"tokens": chosen.tolist(), "logprobs": scores.gather(1, chosen[:, None])[:, 0].tolist()}


def by_vllm(
    base: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    **engine: Any,
) -> Answers:
    """Asks the base and each adapter every prompt, in one batch that mixes them."""
    names = ["base", *adapters]
    job = {
        "model": str(base),
        "engine": {**ENGINE, **engine},
        "adapters": {name: str(path) for name, path in adapters.items()},
        "requests": [{"adapter": name, **prompt} for prompt in prompts for name in names],
        "tokens": options.tokens,
    }
    path = base.parent / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    run([options.vllm_python, "-m", "benchmarks.vllm_dora", "--answer", path])
    answers = json.loads(path.with_suffix(".answers.json").read_text(encoding="utf-8"))
    return {name: answers[number :: len(names)] for number, name in enumerate(names)}


def run(command: Sequence[str | Path]) -> None:
    """Runs a program of this checkout. Raises UserError if it fails; its output is above."""
    try:
        completed = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from error
    if completed.returncode:
        sys.stderr.write(completed.stdout + completed.stderr)
        raise UserError(one_line(f"{' '.join(map(str, command))} ended with status {completed.returncode}"))


def answer_in_vllm(path: Path) -> None:
    """Answers a job's requests in one batch, in vLLM's own environment."""
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    job = json.loads(path.read_text(encoding="utf-8"))
    model = vllm.LLM(job["model"], **job["engine"])
    adapters = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    loras = [adapters.get(request.pop("adapter")) for request in job["requests"]]
    for request in job["requests"]:
        if "picture" in request:
            request["multi_modal_data"] = {"image": Image.open(request.pop("picture")).convert("RGB")}
    outputs = model.generate(job["requests"], sampling, lora_request=loras, use_tqdm=False)
    answers = []
    for output in (request.outputs[0] for request in outputs):
        tokens = list(output.token_ids)
        chosen = zip(tokens, output.logprobs, strict=True)
        answers.append({"tokens": tokens, "logprobs": [entries[token].logprob for token, entries in chosen]})
    path.with_suffix(".answers.json").write_text(json.dumps(answers), encoding="utf-8")


def compared(title: str, answers: Answers, expected: Answers) -> dict[str, Any]:
    """Counts the tokens of each answer before the first that is not PEFT's, and how far off they are."""
    rows: dict[str, dict[str, Any]] = {}
    for name, given in answers.items():
        same, off = [], [0.0]
        for answer, reference in zip(given, expected[name], strict=True):
            alike = [first == second for first, second in zip(answer["tokens"], reference["tokens"], strict=True)]
            count = (*alike, False).index(False)
            same.append(count)
            off += [abs(a - b) for a, b in zip(answer["logprobs"][:count], reference["logprobs"][:count], strict=True)]
        rows[name] = {
            "same_tokens": same,
            "of": len(expected[name][0]["tokens"]),
            "largest_logprob_difference": max(off),
            "unlike_base": None if name == "base" else unlike(expected[name], expected["base"]),
            "unlike_lora": unlike(expected[name], expected.get(f"{name} without magnitudes")),
        }
    print(f"\n{title}")
    heads = (
        "answers of",
        "same tokens",
        "of",
        "largest difference of a log probability",
        "unlike the base",
        "and LoRA",
    )
    print(table(heads, [(name, *row.values()) for name, row in rows.items()]), flush=True)
    return {"answers": rows}


def unlike(answers: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] | None) -> int | None:
    """Returns how many answers have other tokens; None where there is nothing to compare with."""
    return None if others is None else sum(a["tokens"] != b["tokens"] for a, b in zip(answers, others, strict=True))


if __name__ == "__main__":
    main()
