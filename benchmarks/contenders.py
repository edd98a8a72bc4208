"""Whom `dora_step.py` and `dora_memory.py` compare on one model, and the options they have in common.

There are the frozen model, PEFT's LoRA and DoRA, and this project. PEFT runs with `autocast_adapter_dtype=False`, its
faster setting. B and the magnitudes stand away from their starting values, so that nobody is timed on a change that is
zero.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_vl import DoRAConfig, apply_dora, merge_dora
from dora_vl.adapters.peft_model import accelerate_peft

TRAINED = ("frozen", "peft_lora", "peft_dora", "peft_dora_accelerated", "ours")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
"""Times and bytes depend on shapes alone, so random weights of these shapes do where no folder is given."""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    rank: int
    dropout: float
    dtype: torch.dtype
    method: str = "dora"

    @property
    def alpha(self) -> int:
        """Twice the rank, the paper's choice."""
        return 2 * self.rank


@dataclass(frozen=True)
class Tokens:
    """The batch: token ids, the places that carry a label, and the labels."""

    ids: Tensor
    places: Tensor
    targets: Tensor

    @classmethod
    def random(cls, vocabulary: int, *, batch: int, length: int, labels: int, device: str) -> Tokens:
        """The last `labels` tokens of each row are predicted."""
        ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
        places = torch.arange(length - labels - 1, length - 1, device=device)
        return cls(ids, places, ids[:, places + 1].reshape(-1))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Model, settings and batch; `settings_of` and `tokens_of` read them."""
    parser.add_argument(
        "--model", default=None, help="folder of a causal language model; default: shapes of SmolLM2-135M"
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--tokens", type=int, default=96, help="tokens a row")
    parser.add_argument("--labels", type=int, default=6, help="labelled tokens a row")
    parser.add_argument("--json", default=None, help="file for the figures")


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Every rank with every dropout."""
    dtype = getattr(torch, options.dtype)
    return [Setting(rank, dropout, dtype) for rank in options.rank for dropout in options.dropout]


def tokens_of(options: argparse.Namespace, vocabulary: int, device: str) -> Tokens:
    """The batch."""
    return Tokens.random(vocabulary, batch=options.batch, length=options.tokens, labels=options.labels, device=device)


def base_model(folder: str | None, dtype: torch.dtype, device: str) -> Any:
    """A causal language model from a folder, or SmolLM2-135M's shapes with random weights."""
    torch.manual_seed(0)
    if folder is None:
        model: Any = LlamaForCausalLM(SMOLLM2_135M)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    return model.to(device, dtype)


def contender(name: str, base: Any, setting: Setting) -> Any:
    """A copy of the base, adapted by one of the names in the tables."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if name == "frozen":
        return model.requires_grad_(False)
    if name.startswith("ours"):
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}  # a single layer has but one of them
        targets = tuple(f"*.{projection}" for projection in PROJECTIONS if projection in there)
        config = DoRAConfig(rank=setting.rank, alpha=float(setting.alpha), dropout=setting.dropout, targets=targets)
        apply_dora(model, config)
    else:
        model = _with_peft(model, setting, dora=name != "peft_lora")
    _move_from_start(model)
    if name == "ours_merged":
        merge_dora(model, keep_base=False)
    if name == "peft_dora_accelerated":
        accelerate_peft(model)
    return model


def _with_peft(model: Any, setting: Setting, *, dora: bool) -> Any:
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=setting.dropout,
        target_modules=list(PROJECTIONS),
        use_dora=dora,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()


@torch.no_grad()
def _move_from_start(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            scale = 1e-3 if parameter.ndim > 1 else 1e-2 * float(parameter.float().mean())
            parameter.add_(torch.randn_like(parameter) * scale)


def loss_of(model: Any, tokens: Tokens) -> Tensor:
    """Cross-entropy at the labelled places; logits exist only there, for all contenders."""
    embeds = model.get_input_embeddings()(tokens.ids).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    chosen = hidden[:, tokens.places].flatten(0, 1)
    return F.cross_entropy(model.lm_head(chosen).float(), tokens.targets)


class SingleLayer(nn.Module):
    """A linear layer under a name that the contenders' patterns find."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"q_proj": nn.Linear(width_in, width_out)})

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return self.block["q_proj"](x)


def layer_of_shape(shape: str, dtype: torch.dtype, device: str) -> SingleLayer:
    """A layer from `INxOUT`."""
    try:
        width_in, width_out = (int(part) for part in shape.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"--layer {shape}: write INxOUT, such as 576x1536") from None
    torch.manual_seed(0)
    return SingleLayer(width_in, width_out).to(device, dtype)


def single_layer_loss(model: Any, *, tokens: int) -> Tensor:
    """The output's sum over a fixed random input that wants its gradient too."""
    weight = next(one for one in model.parameters() if one.ndim == 2)  # the layer's own comes first
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    return model(x.requires_grad_()).float().square().mean()
