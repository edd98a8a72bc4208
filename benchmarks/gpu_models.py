"""What `gpu.py` times: one linear layer and one decoder block of 1B to 8B models, frozen or adapted by each contender.

Times and bytes hang on shapes alone, so weights are random. Adapters stand away from their start, so that nobody is
timed on a change of zero. PEFT runs with `autocast_adapter_dtype=False`, its faster setting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl import DoRAConfig, apply_dora
from dora_vl.core.fast.products import without_kernels

CONTENDERS = ("frozen", "peft_lora", "peft_dora", "ours_eager", "ours", "ours_compiled")
"""`ours_eager` is this project without its kernels, `ours_compiled` under `torch.compile`."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    name: str
    hidden: int
    inner: int
    tokens: int
    rank: int
    dropout: float = 0.0
    heads: int = 0
    """Of a decoder block, a quarter of them for keys and values; 0 is one linear layer, hidden x inner."""
    compiled: bool = False
    """Whether `torch.compile` takes part, which costs its compile time."""

    def label(self) -> str:
        """For tables and plots."""
        shape = f"block {self.hidden}/{self.inner}" if self.heads else f"{self.hidden} -> {self.inner}"
        return f"{shape}, {self.tokens} tokens, rank {self.rank}, dropout {self.dropout:g}"


class Layer(nn.Module):
    """A linear layer under a name that every contender's pattern finds."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.q_proj = nn.Linear(case.hidden, case.inner, bias=False)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """The layer; it keeps no past."""
        return self.q_proj(x)


class Block(nn.Module):
    """A decoder block: RMSNorm, grouped-query attention, SwiGLU. No rotation of positions: it is the same for all."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.width = case.hidden // case.heads
        narrow = max(1, case.heads // 4) * self.width
        self.before_attention, self.before_mlp = nn.RMSNorm(case.hidden), nn.RMSNorm(case.hidden)
        self.q_proj = nn.Linear(case.hidden, case.hidden, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(case.hidden, narrow, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(case.hidden, case.hidden, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(case.hidden, case.inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(case.inner, case.hidden, bias=False)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """[batch, tokens, hidden]; `past` are keys, taken for values too, of the tokens before."""
        normal = self.before_attention(x)
        q, k, v = (self._split(one(normal)) for one in (self.q_proj, self.k_proj, self.v_proj))
        if past is not None:
            k, v = torch.cat([past, k], dim=2), torch.cat([past, v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normal = self.before_mlp(x)
        return x + self.down_proj(F.silu(self.gate_proj(normal)) * self.up_proj(normal))

    def past(self, tokens: int) -> Tensor:
        """Keys of so many tokens."""
        weight = self.k_proj.weight if isinstance(self.k_proj, nn.Linear) else next(self.parameters())
        return torch.randn(1, self._kv_heads(), tokens, self.width, device=weight.device, dtype=weight.dtype)

    def _kv_heads(self) -> int:
        return self.k_proj.out_features // self.width

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)


def base_of(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The frozen model of a case."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Block(case) if case.heads else Layer(case)
    return model.to(dtype).requires_grad_(False)


def contender(name: str, base: nn.Module, case: Case) -> nn.Module:
    """A copy of the base, adapted."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    targets = [leaf for leaf, module in model.named_modules() if isinstance(module, nn.Linear)]
    if name.startswith("ours"):
        settings = {"rank": case.rank, "alpha": 2.0 * case.rank, "dropout": case.dropout}
        apply_dora(model, DoRAConfig(targets=tuple(targets), **settings))
    elif name != "frozen":
        model = _with_peft(model, case, targets, dora=name == "peft_dora")
    _move_from_start(model)
    return model


def _with_peft(model: Any, case: Case, targets: list[str], *, dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model  # it takes seconds, and says things where there is no GPU

    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=targets, use_dora=dora
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()


@torch.no_grad()
def _move_from_start(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = 1e-3 if parameter.ndim > 1 else 1e-2 * float(parameter.float().mean())
            parameter.add_(torch.randn_like(parameter) * size)


@dataclass(frozen=True)
class Steps:
    """What is timed of one contender."""

    train: Callable[[], None]
    """Forward, backward and an AdamW step, so that norms are due every time."""
    decode: Callable[[], None]
    """One token."""
    around: Callable[[], AbstractContextManager[Any]]
    """In which both run."""


def steps_of(name: str, model: nn.Module, case: Case, backend: str) -> Steps:
    """Steps on random activations that want their own gradient too, as inside a model."""
    weight = next(one for one in model.parameters() if one.ndim == 2)
    x = torch.randn(1, case.tokens, case.hidden, device=weight.device, dtype=weight.dtype)
    token, past = x[:, :1].clone(), model.past(case.tokens) if isinstance(model, Block) else None
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
    run: Any = torch.compile(model, backend=backend, dynamic=False) if name == "ours_compiled" else model

    def train() -> None:
        model.train()
        inputs = x.detach().requires_grad_()
        run(inputs).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def decode() -> None:
        model.eval()
        run(token, past)

    return Steps(train, decode, without_kernels if name == "ours_eager" else nullcontext)
