"""Times a training step and a one-token decode step: frozen model, PEFT LoRA, PEFT DoRA and this project.

    python benchmarks/dora_step.py --rank 16 128 --dropout 0 0.05 --json benchmarks/results.jsonl
    python benchmarks/dora_step.py --layer 4096x11008 --rank 64 --tokens 512      # one layer by itself

The model is SmolLM2-135M's shapes with all seven projections adapted, unless `--model FOLDER` names another. A step
is forward, backward and AdamW, logits at the labelled places alone. The allocator keeps a step's memory for the next,
for all contenders, as training here does. Contenders take turns in one process; quoted are
medians over rounds of the ratios inside one round. On a CUDA machine the table adds kernel times, the share of the
card's peak (`--peak-tflops`) and peak memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.report import median, table, write_json
from dora_vl import DoRAConfig, apply_dora, merge_dora
from dora_vl.adapters.peft_model import accelerate_peft
from dora_vl.run.launch import keep_freed_memory

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
DECODED = ("frozen", "peft_lora", "peft_dora", "ours", "ours_merged")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Times every setting, prints the tables and writes the JSON."""
    options = read_options()
    keep_freed_memory()
    figures = [time_setting(setting, options) for setting in settings_of(options)]
    if options.json is not None:
        shown = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"options": shown, "settings": figures})


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--layer", default=None, help="INxOUT: one linear layer instead of a model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender takes a turn")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn; its time is their median")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="processor: for a machine that others use; set OMP_NUM_THREADS=1",
    )
    parser.add_argument("--peak-tflops", type=float, default=None, help="the card's dense peak, for the share used")
    return parser.parse_args()


def time_setting(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the JSON: ratios of training and decoding, with the milliseconds they come from."""
    if options.layer is not None:
        base: Any = layer_of_shape(options.layer, setting.dtype, DEVICE)
        loss = partial(single_layer_loss, tokens=options.batch * options.tokens)
    else:
        base = base_model(options.model, setting.dtype, DEVICE)
        loss = partial(loss_of, tokens=tokens_of(options, base.config.vocab_size, DEVICE))
    training = take_turns({name: train_step(contender(name, base, setting), loss) for name in TRAINED}, options)
    row = {"rank": setting.rank, "dropout": setting.dropout, "train_ms": training.milliseconds, **ratios(training)}
    print(f"\nrank {setting.rank}, dropout {setting.dropout}, training step, {options.dtype}")
    print(training.shown("peft_lora"))
    if options.layer is None and setting.dropout == options.dropout[0]:
        decoding = take_turns({name: decode_step(contender(name, base, setting)) for name in DECODED}, options)
        row |= {"decode_ms": decoding.milliseconds} | decode_ratios(decoding)
        print(f"\nrank {setting.rank}, one-token decode")
        print(decoding.shown("peft_lora"))
    if DEVICE == "cuda":
        row |= cuda_figures(lambda name: train_step(contender(name, base, setting), loss), base, options)
    return row


class Turns:
    """Seconds of each contender in each round."""

    def __init__(self, rounds: Sequence[dict[str, float]]) -> None:
        self.rounds = rounds

    @property
    def milliseconds(self) -> dict[str, float]:
        """Median over rounds."""
        return {name: round(1e3 * median([one[name] for one in self.rounds]), 3) for name in self.rounds[0]}

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the ratio inside one round."""
        return round(median([one[name] / one[to] for one in self.rounds]), 4)

    def shown(self, reference: str) -> str:
        """The table."""
        rows = [(name, ms, self.ratio(name, reference)) for name, ms in self.milliseconds.items()]
        return table(("contender", "ms (median)", f"x {reference}"), rows)


def ratios(training: Turns) -> dict[str, float]:
    """The JSON's keys for training."""
    return {
        "train_vs_frozen": training.ratio("ours", "frozen"),
        "train_vs_peft_lora": training.ratio("ours", "peft_lora"),
        "train_vs_peft_dora": training.ratio("ours", "peft_dora"),
        "accelerated_vs_peft_dora": training.ratio("peft_dora_accelerated", "peft_dora"),
    }


def decode_ratios(decoding: Turns) -> dict[str, float]:
    """The JSON's keys for decoding."""
    return {
        "decode_vs_peft_lora": decoding.ratio("ours", "peft_lora"),
        "decode_vs_peft_dora": decoding.ratio("ours", "peft_dora"),
        "merged_decode_vs_frozen": decoding.ratio("ours_merged", "frozen"),
    }


def take_turns(steps: dict[str, Callable[[], None]], options: argparse.Namespace) -> Turns:
    """Everybody warms up, then rounds of a few steps each."""
    for step in steps.values():
        step()
        step()
    rounds = []
    for _ in range(options.rounds):
        rounds.append(
            {name: median([seconds(step, options.clock) for _ in range(options.steps)]) for name, step in steps.items()}
        )
    return Turns(rounds)


def seconds(step: Callable[[], None], clock: str = "wall") -> float:
    """Time of one step, the card's work included."""
    now = CLOCKS[clock]
    started = now()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return now() - started


def train_step(model: Any, loss: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None

    def step() -> None:
        loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def decode_step(model: Any, *, past: int = 96) -> Callable[[], None]:
    """One token after `past` others, with their keys and values kept."""
    model.eval()
    ids = torch.arange(past, device=DEVICE).unsqueeze(0)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return step


def cuda_figures(
    step_of: Callable[[str], Callable[[], None]], base: Any, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Kernel milliseconds, peak memory and, with the card's peak, the share of it that the step uses.

    One contender at a time is on the card, so that its peak is its own; the base they are copied from is in all.
    """
    kernels, peaks, shares = {}, {}, {}
    weights = sum(one.numel() for one in base.parameters())
    operations = 4 * weights * options.batch * options.tokens  # a frozen weight: forward, and the input's gradient
    for name in TRAINED:
        step = step_of(name)
        step()
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            took = seconds(step)
        kernels[name] = sum(event.device_time_total for event in profile.key_averages()) / 1e3
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
        if options.peak_tflops is not None:
            shares[name] = operations / took / (options.peak_tflops * 1e12)
        del step
        gc.collect()
    print(table(("contender", "kernels ms", "peak MiB"), [(name, kernels[name], peaks[name]) for name in TRAINED]))
    return {"kernel_ms": kernels, "peak_mib": peaks, "mfu": shares}


# Whom this and `dora_memory.py` compare. PEFT runs with `autocast_adapter_dtype=False`, its faster setting. B and the
# magnitudes stand away from their starting values, so that nobody is timed on a change that is zero.


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


if __name__ == "__main__":
    main()
