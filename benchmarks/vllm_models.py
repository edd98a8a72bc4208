"""Tiny random models with adapters away from their start, what PEFT answers with them, and how vLLM is asked."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import table
from dora_vl.errors import UserError, one_line

PROMPTS = ((1, 20, 33, 47, 60, 75), (1, 100, 101, 102), (1, 200, 150, 90, 91, 92, 93, 94, 95, 96, 97))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "dora": {"r": 8, "lora_alpha": 16, "target_modules": list(ALL), "use_dora": True},
    "dora, in part": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.down_proj": 3},
    },
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": list(ALL)},
}
"""Whole packed groups and parts of them, other ranks and scales, rsLoRA, and a LoRA between."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
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


def tiny_llama(*, vocab_size: int = 320, biases: bool = False) -> LlamaForCausalLM:
    """A LLaMA of two layers and head size 32, vLLM's smallest, whose greedy tokens do not repeat themselves."""
    torch.manual_seed(3)
    config = LlamaConfig(
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
        attention_bias=biases,
        mlp_bias=biases,
        tie_word_embeddings=False,
        initializer_range=0.25,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def write_language_model(folder: Path, *, biases: bool) -> None:
    """Its folder, without a tokenizer; biases that there are, are not zero."""
    model = tiny_llama(biases=biases)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.5)
    model.save_pretrained(folder)


def open_language_model(folder: Path) -> LlamaForCausalLM:
    """In float32, for answering."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """PEFT's folder of an adapter whose B is not zero and whose magnitudes are not the norms."""
    torch.manual_seed(seed)
    model = get_peft_model(open_language_model(base), LoraConfig(task_type="CAUSAL_LM", **config))
    move(model)
    model.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Draws every B, and moves every magnitude by up to half."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.12)
        if "magnitude" in name:
            weight.mul_(torch.empty_like(weight).uniform_(0.6, 1.5))


def by_peft(base: Path, adapter: Path | None, new_tokens: int) -> list[dict[str, list[Any]]]:
    """Greedy answers of the base, or of PEFT's unmerged adapter on it."""
    model: nn.Module = open_language_model(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return [greedy(model, {"input_ids": torch.tensor([prompt])}, new_tokens) for prompt in PROMPTS]


@torch.no_grad()
def greedy(model: nn.Module, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> dict[str, list[Any]]:
    """The likeliest token, again and again, with its log probability."""
    tokens: list[int] = []
    logprobs: list[float] = []
    ids = inputs["input_ids"]
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for _ in range(new_tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **others).logits[0, -1]
        scores = logits.float().log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores[tokens[-1]]))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return {"tokens": tokens, "logprobs": logprobs}


def agreement(answers: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many tokens of each answer are the same before the first that differs, and how far off they are up to it."""
    same, off = [], [0.0]
    for answer, reference in zip(answers, expected, strict=True):
        alike = [first == second for first, second in zip(answer["tokens"], reference["tokens"], strict=True)]
        count = alike.index(False) if False in alike else len(alike)
        same.append(count)
        off += [abs(a - b) for a, b in zip(answer["logprobs"][:count], reference["logprobs"][:count], strict=True)]
    return {"same_tokens": same, "of": len(expected[0]["tokens"]), "largest_logprob_difference": max(off)}


def in_vllm(python: Path, arguments: Sequence[str | Path], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs vLLM's interpreter.

    Raises:
        UserError: it failed; with the last line that it said.
    """
    completed = subprocess.run(
        [python, *arguments], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if check and completed.returncode:
        sys.stderr.write(completed.stderr)
        raise UserError(one_line(f"vLLM ended with status {completed.returncode}"))
    return completed


def ask(folder: Path, job: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """vLLM's answers to one batch."""
    job_path, answers_path = folder / "job.json", folder / "answers.json"
    job_path.write_text(json.dumps({"new_tokens": options.tokens, "gains": True, **job}), encoding="utf-8")
    in_vllm(options.vllm_python, [Path(__file__).with_name("vllm_answers.py"), job_path, answers_path])
    return json.loads(answers_path.read_text(encoding="utf-8"))["answers"]


def unlike_the_base(expected: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """How many of each adapter's answers are other than the base's, where it is asked too: equal ones show nothing."""
    others = {name: answers for name, answers in expected.items() if name != "base"} if "base" in expected else {}
    return {
        name: sum(answer["tokens"] != base["tokens"] for answer, base in zip(answers, expected["base"], strict=True))
        for name, answers in others.items()
    }


def shown(title: str, case: Mapping[str, Any]) -> None:
    """Prints a case as a table."""
    rows = [
        (name, " ".join(map(str, figures["same_tokens"])), figures["of"], figures["largest_logprob_difference"])
        for name, figures in case["answers"].items()
    ]
    print(f"\n{title}")
    print(table(("answers of", "same tokens", "of", "largest difference of a log probability"), rows), flush=True)
