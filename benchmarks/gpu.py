"""Times the CUDA kernels beside the eager operations, PEFT and `torch.compile`, in ten minutes.

    python benchmarks/gpu.py                             # writes gpu.jsonl
    python benchmarks/gpu.py --minutes 3 --to /tmp/gpu   # what does not fit is named
    python benchmarks/gpu.py --device cpu --smoke        # the whole script on tiny shapes, for its test

Needs torch, triton and peft. All in bfloat16: a training step (forward, backward, AdamW) and the decoding
of one token, of linear layers and decoder blocks as in models of 1 to 8 billion parameters. Contenders take turns;
quoted are medians over rounds of the ratio to PEFT's LoRA inside one round. Memory is what a step takes above what lay
there before it. Exit status 2: no CUDA. Whether the kernels are right, `pytest tests/core/fast` says there.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it stands in its own folder

from benchmarks.contenders import Layer, activation_loss, contender, take_turns, train_step
from benchmarks.report import table, write_json
from dora_vl.core.fast.kernels import without_kernels

CONTENDERS = ("frozen", "peft_lora", "peft_dora", "ours_eager", "ours", "ours_compiled")
"""`ours_eager` is this project without its kernels, `ours_compiled` is it under `torch.compile`."""
RESULTS = Path("gpu")


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
    """Attention heads of a decoder block, a quarter of them for keys and values; 0 is one linear, hidden x inner."""
    compiled: bool = False
    """Includes `torch.compile`, which costs its compile time."""

    def label(self) -> str:
        """Names the case in tables."""
        shape = f"block {self.hidden}/{self.inner}" if self.heads else f"{self.hidden} -> {self.inner}"
        return f"{shape}, {self.tokens} tokens, rank {self.rank}, dropout {self.dropout:g}"


# The most telling first: what the budget cuts off is at the end.
CASES = (
    Case("8B block", 4096, 14336, 2048, 16, heads=32, compiled=True),
    Case("8B down", 14336, 4096, 2048, 16),
    Case("8B block, dropout", 4096, 14336, 2048, 16, dropout=0.05, heads=32),
    Case("8B up", 4096, 14336, 4096, 128),
    Case("3B block", 3072, 8192, 2048, 64, heads=24),
    Case("8B block, rank 128", 4096, 14336, 2048, 128, heads=32),
    Case("1B block", 2048, 8192, 512, 16, heads=32, compiled=True),
    Case("8B q", 4096, 4096, 2048, 16, dropout=0.05),
    Case("8B q, rank 384", 4096, 4096, 2048, 384),
    Case("8B block, long", 4096, 14336, 4096, 16, heads=32),
    Case("8B block, short", 4096, 14336, 512, 16, heads=32),
    Case("1B up", 2048, 8192, 512, 64),
    Case("8B block, rank 384", 4096, 14336, 2048, 384, dropout=0.05, heads=32),
    Case("3B block, rank 128, compiled", 3072, 8192, 4096, 128, dropout=0.05, heads=24, compiled=True),
)
SMOKE_CASES = (Case("tiny layer", 16, 24, 6, 3, dropout=0.1), Case("tiny block", 16, 24, 6, 3, heads=4, compiled=True))


@dataclass
class Budget:
    """Skips work that would not end within the time that is left.

    A piece of work is expected to take as long as the longest one of its kind so far.
    """

    seconds: float
    started: float = field(default_factory=time.monotonic)
    dearest: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def spent(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self.started

    def run(self, kind: str, name: str, work: Callable[[], Any], *, expected: float = 0.0) -> Any:
        """Runs the work and returns its result; records its name and returns None where time would not suffice."""
        if self.spent() + self.dearest.get(kind, expected) > self.seconds:
            self.left_out.append(name)
            return None
        began = self.spent()
        try:
            result = work()
        except torch.OutOfMemoryError:
            self.left_out.append(f"{name} (out of memory)")
            return None
        self.dearest[kind] = max(self.dearest.get(kind, 0.0), self.spent() - began)
        return result


def main() -> int:
    """Runs the timings, writes the results and returns the exit status."""
    options = read_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --smoke runs the script on tiny shapes", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    budget = Budget(60 * options.minutes)
    rows: list[dict[str, Any]] = []
    for row in run_cases(options, budget):
        rows.append(row)  # written after each, so that what comes later takes nothing away
        publish(options, budget, rows)
    publish(options, budget, rows)
    print(f"\n{budget.spent():.0f} s of {budget.seconds:.0f} s; left out: {', '.join(budget.left_out) or 'nothing'}")
    return 0


def publish(options: argparse.Namespace, budget: Budget, rows: list[dict[str, Any]]) -> None:
    """Writes the results so far as JSON."""
    content = {
        "options": {name: str(value) for name, value in vars(options).items() if name != "to"},
        "cases": rows,
        "left_out": budget.left_out,
        "seconds": round(budget.spent(), 1),
    }
    write_json(options.to.with_suffix(".jsonl"), content)


def read_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: whether the script runs, no figure to quote")
    parser.add_argument("--minutes", type=float, default=9.0, help="time it may take")
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender takes a turn")
    parser.add_argument("--to", type=Path, default=RESULTS, help="where the JSON goes, without the ending")
    options = parser.parse_args()
    if options.device == "cpu" and not options.smoke:
        parser.error("--device cpu goes with --smoke")
    return options


def backend_of(options: argparse.Namespace) -> str:
    """Chooses the backend of `torch.compile`; the smoke test needs no C++ compiler."""
    return "aot_eager" if options.smoke else "inductor"


def run_cases(options: argparse.Namespace, budget: Budget) -> Iterator[dict[str, Any]]:
    """Times the cases that fit in the time and prints each."""
    for case in SMOKE_CASES if options.smoke else CASES:
        kind = f"{'block' if case.heads else 'layer'}{' compiled' if case.compiled else ''}"
        expected = 0.0 if options.smoke else 90.0 if case.compiled else 20.0
        row = budget.run(kind, case.name, lambda case=case: timed(case, options), expected=expected)
        if row is not None:
            yield row


def timed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Times one case: milliseconds, ratios, bytes and kernel launches of each contender."""
    torch.manual_seed(0)
    with torch.device(options.device):
        base = Block(case) if case.heads else Layer(case.hidden, case.inner)
    base = base.to(torch.bfloat16).requires_grad_(False)
    names = [name for name in CONTENDERS if case.compiled or name != "ours_compiled"]
    steps = {name: steps_of(name, base, case, options) for name in names}
    row: dict[str, Any] = {"case": asdict(case), "label": case.label()}
    for what in ("train", "decode"):
        work = {name: pair[what] for name, pair in steps.items()}
        turns = take_turns(work, rounds=options.rounds, repeats=2 if options.smoke else 5, warm_up=3)
        row[f"{what}_ms"] = turns.milliseconds
        row[f"{what}_vs_peft_lora"] = {name: turns.ratio(name, "peft_lora") for name in names}
    if options.device == "cuda":
        row["step_mib"] = {name: step_mib(pair["train"]) for name, pair in steps.items()}
        row["launches"] = {name: launches(pair["train"]) for name, pair in steps.items()}
    heads = {"train_ms": "train ms", "train_vs_peft_lora": "x LoRA", "decode_ms": "decode ms"}
    heads |= {"decode_vs_peft_lora": "x LoRA"} | {key: key for key in ("step_mib", "launches") if key in row}
    print(f"\n{case.name}: {case.label()}")
    print(table(("contender", *heads.values()), [(name, *(row[key][name] for key in heads)) for name in names]))
    del steps
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return row


class Block(nn.Module):
    """A decoder block of RMSNorm, grouped-query attention and SwiGLU. It has no rotary positions: all pay the same."""

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
        """Runs the block on [batch, tokens, hidden]; `past` holds earlier keys, which serve as values too."""
        normal = self.before_attention(x)
        projected = (projection(normal) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.unflatten(-1, (-1, self.width)).transpose(1, 2) for x in projected)
        if past is not None:
            k, v = torch.cat([past, k], dim=2), torch.cat([past, v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normal = self.before_mlp(x)
        return x + self.down_proj(F.silu(self.gate_proj(normal)) * self.up_proj(normal))

    def past(self, tokens: int) -> Tensor:
        """Draws keys of so many earlier tokens."""
        weight = self.k_proj.weight if isinstance(self.k_proj, nn.Linear) else next(self.parameters())
        heads = self.k_proj.out_features // self.width
        return torch.randn(1, heads, tokens, self.width, device=weight.device, dtype=weight.dtype)


def steps_of(name: str, base: nn.Module, case: Case, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Returns what is timed of a contender: a training step, and the decoding of one token."""
    model = contender(name, base, rank=case.rank, dropout=case.dropout)
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    x = torch.randn(1, case.tokens, case.hidden, device=weight.device, dtype=weight.dtype)
    token, past = x[:, :1].clone(), model.past(case.tokens) if isinstance(model, Block) else None
    if name == "ours_compiled":
        model: Any = torch.compile(model, backend=backend_of(options), dynamic=False)
    train = train_step(model, partial(activation_loss, x=x))

    @torch.no_grad()
    def decode() -> None:
        model.eval()
        model(token, past)

    def eager(step: Callable[[], None]) -> Callable[[], None]:
        def without() -> None:
            with without_kernels():
                step()

        return without if name == "ours_eager" else step

    return {"train": eager(train), "decode": eager(decode)}


def step_mib(train: Callable[[], None]) -> float:
    """Returns the peak MiB of a training step above what was allocated before it."""
    train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(train: Callable[[], None]) -> int:
    """Counts the kernels of a training step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train()
        torch.cuda.synchronize()
    on_card = (event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_card)


if __name__ == "__main__":
    sys.exit(main())
