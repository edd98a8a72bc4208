"""What one rank holds between steps, what the engine needs during one, and what a step sends: arithmetic of parameters.

N ranks; a trained parameter is held as p bytes, its gradient as g, Adam's two moments as 8 bytes. From ZeRO-1 on
DeepSpeed keeps a float32 copy of what trains, 4 bytes, also of parameters that are float32 themselves.

    engine        weights      trained    moments   copy    gradients kept
    one process   all          p          8         -       g
    DDP           all          p          8         -       g, and the buckets' copy g
    ZeRO-0        all          p          8         -       g, and the buckets' copy g (N > 1)
    ZeRO-1        all          p          8/N       4/N     g, and g/N while the step flattens them
    ZeRO-2        all          p          8/N       4/N     g/N, twice while the step flattens them; reduce buckets
    ZeRO-3        all/N        p/N       8/N       4/N     g/N, the same; bucket; weights gathered for their layers
    FSDP2         all/N        p/N       8/N       -       g/N; weights gathered for a layer, those in none for a step
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from dora_vl.core.quantised import is_quantised
from dora_vl.errors import aligned
from dora_vl.run.sharding import blocks_of

FLOAT32_BYTES, GIB = 4, 2**30
# Vectors of hidden width that a layer keeps for each token: norm inputs, q, k, v and attention output, and four of the
# gated MLP at about 2.7 times the width.
VECTORS_PER_LAYER = 17
MOST_REUSED = 1_000_000_000


@dataclass(frozen=True)
class Table:
    """What is said before the first step: for the log as text, for the run's folder as it is."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return "\n".join(aligned([self.header, *self.rows], left=1))


def parameter_count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; under ZeRO-3 the whole, not this rank's shard."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of whole parameters."""
    return sum(parameter_count(parameter) * parameter.element_size() for parameter in parameters)


def weight_count(model: nn.Module) -> int:
    """Numbers in all of a model's parameters; a quantised layer's weight counts as what it stands for, unpacked."""
    unpacked = unpacked_sizes(model)
    return sum(unpacked.get(id(parameter), parameter_count(parameter)) for parameter in model.parameters())


def unpacked_sizes(model: nn.Module) -> dict[int, int]:
    """Identity of each quantised weight -> the numbers that it stands for."""
    layers: list[Any] = [module for module in model.modules() if is_quantised(module)]
    return {id(next(layer.parameters())): layer.in_features * layer.out_features for layer in layers}


def memory_gib(device: torch.device) -> float:
    """GiB of the rank that holds most; every rank must call it.

    On a GPU the most that torch had allocated since the last call, on a CPU what the process holds now.
    """
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = psutil.Process().memory_info().rss
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        most = torch.tensor(used, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        used = int(most)
    return used / GIB


@dataclass(frozen=True)
class Activations:
    """What a step keeps between forward and backward, roughly, from what it depends on."""

    tokens: int
    layers: int
    hidden_width: int
    element_bytes: int
    recomputed: bool

    @property
    def bytes(self) -> int:
        """With recomputation one vector a layer, and one layer whole."""
        vector = self.tokens * self.hidden_width * self.element_bytes
        return vector * (self.layers + VECTORS_PER_LAYER if self.recomputed else self.layers * VECTORS_PER_LAYER)


def activations_of(model: PreTrainedModel, *, tokens: int, recomputed: bool) -> Activations:
    """Those of a model's text layers, at a micro-batch of so many tokens."""
    text: Any = model.config.get_text_config()
    return Activations(
        tokens=tokens,
        layers=text.num_hidden_layers + (text.decoder_layers if text.is_encoder_decoder else 0),
        hidden_width=text.hidden_size,
        element_bytes=model.dtype.itemsize,
        recomputed=recomputed,
    )


@dataclass(frozen=True)
class Engine:
    """How a run's ranks share their work; sizes are numbers, not bytes.

    Attributes:
        stage: of ZeRO; None without DeepSpeed; 3 also where FSDP2 shares out the same (`fsdp`).
        bucket: numbers that are reduced at once, in each of so many `buckets`.
        prefetched: numbers gathered ahead under ZeRO-3.
        kept_whole: ZeRO-3 never splits parameters of fewer numbers.
        reused_within: ZeRO-3 keeps a weight gathered that is needed again after so many numbers.
        offloads_optimizer: its state and the float32 copy are in the host's memory; `offloads_weights`: so are shards.
    """

    stage: int | None
    ranks: int
    bucket: int = 0
    buckets: int = 1
    prefetched: int = 0
    kept_whole: int = 0
    reused_within: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    fsdp: bool = False

    def __str__(self) -> str:
        zero = "no DeepSpeed" if self.stage is None else f"ZeRO-{self.stage}"
        return f"{self.ranks} ({'FSDP2' if self.fsdp else zero})"

    def shares(self, first_stage: int) -> int:
        """Among how many ranks a thing is split that ZeRO splits from this stage on."""
        return self.ranks if (self.stage or 0) >= first_stage else 1


def engine_of(deepspeed: Mapping[str, Any] | None, *, ranks: int, hidden_width: int, fsdp: bool = False) -> Engine:
    """The engine of a DeepSpeed config; `auto` sizes are transformers', from the hidden width."""
    if deepspeed is None:
        return Engine(3 if fsdp else None, ranks, fsdp=fsdp)
    zero = deepspeed.get("zero_optimization", {})
    stage, square = int(zero.get("stage", 0)), hidden_width**2

    def size(name: str, automatic: int, default: int) -> int:
        value = zero.get(name, default)
        return automatic if value == "auto" else int(float(value))

    def offloads(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    return Engine(
        stage,
        ranks,
        bucket=size("reduce_bucket_size", square, 500_000_000),
        buckets=2 if stage == 2 and zero.get("overlap_comm", False) else 1,
        prefetched=size("stage3_prefetch_bucket_size", int(0.9 * square), 50_000_000),
        kept_whole=size("stage3_param_persistence_threshold", 10 * hidden_width, 100_000),
        reused_within=min(
            size("stage3_max_reuse_distance", MOST_REUSED, MOST_REUSED),
            size("stage3_max_live_parameters", MOST_REUSED, MOST_REUSED),
        ),
        offloads_optimizer=offloads("offload_optimizer"),
        offloads_weights=offloads("offload_param"),
    )


@dataclass(frozen=True)
class Phase:
    """A micro-batch from one gradient of what trains to the next.

    Attributes:
        came: bytes of gradients that came before; an engine keeps them or takes them away.
        most: bytes at the fullest moment, those gradients not counted.
    """

    came: int
    most: int


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, on its GPU unless said otherwise.

    Attributes:
        weights: frozen weights by number type, such as `bfloat16`.
        optimizer: Adam's moments; `masters`: the float32 copy of what trains.
        buckets: buffers in which gradients travel; `flattened`: their second copy while the optimizer steps.
        gathered: weights whole for their layers, under ZeRO-3.
        on_host: of all these, what is offloaded.
    """

    weights: Mapping[str, int]
    trained: int
    gradients: int
    optimizer: int
    masters: int
    buckets: int
    flattened: int
    gathered: int
    on_host: int = 0

    def between_steps(self, engine: Engine) -> int:
        """On the GPU before a step: DDP keeps its buckets, ZeRO-3 its bucket and the gradients' memory too."""
        kept = self.buckets if engine.stage in (None, 3) else 0
        kept += self.gradients if engine.stage == 3 else 0
        return sum(self.weights.values()) + self.trained + self.optimizer + self.masters + kept - self.on_host

    def at_most(self, engine: Engine, phases: Iterable[Phase]) -> int:
        """On the GPU at the fullest moment: in the loss, in the backward pass, or while the optimizer steps."""

        def of_gradients(came: int) -> int:
            if engine.stage == 3:  # their memory is there before
                return 0
            if engine.stage != 2:
                return came
            # Buckets and, from the first full one on, the memory of this rank's part.
            return (self.buckets if came else 0) + (self.gradients if came > self.buckets // engine.buckets else 0)

        stepping = self.flattened
        if engine.stage != 3:
            stepping += self.gradients + (self.buckets if engine.stage == 0 else 0)
        passes = max(phase.most + of_gradients(phase.came) for phase in phases)
        return self.between_steps(engine) + max(passes + self.gathered, stepping)


def held_by(model: nn.Module, engine: Engine, *, half_precision: bool = False) -> Held:
    """What a rank of this engine holds of a model whose trained parameters are decided.

    `half_precision` is full training in bfloat16 or float16, with float32 masters (DeepSpeed's own switch).
    """
    frozen: dict[str, int] = defaultdict(int)
    split: list[nn.Parameter] = []
    trained_bytes = 0
    for parameter in model.parameters():
        size = -(-bytes_of([parameter]) // engine.shares(3))
        if engine.stage == 3 and parameter_count(parameter) < engine.kept_whole:
            size += bytes_of([parameter])
        else:
            split.append(parameter)
        if parameter.requires_grad:
            trained_bytes += size
        else:
            frozen[str(parameter.dtype).removeprefix("torch.")] += size
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers, gradient = sum(map(parameter_count, trained)), bytes_of(trained)
    zero = None if engine.fsdp else engine.stage
    has_masters = zero in (1, 2, 3) or (half_precision and zero == 0)
    masters = numbers * FLOAT32_BYTES // engine.shares(1) if has_masters else 0
    optimizer = 2 * numbers * FLOAT32_BYTES // engine.shares(1)
    if engine.stage in (None, 0):
        in_buckets = numbers if engine.ranks > 1 else 0
    else:
        in_buckets = min(engine.bucket, numbers) if engine.stage == 1 else engine.bucket * engine.buckets
    gathered = 0
    if engine.fsdp and engine.ranks > 1:  # what is in no layer, a layer, and the next one
        layers = [bytes_of(block.parameters()) for block in blocks_of(model)]
        gathered = bytes_of(split) - sum(layers) + 2 * max(layers, default=0)
    elif engine.stage == 3 and engine.ranks > 1:
        # Where the forward pass ends, the layers that come again soon are whole: one that ran so many parameters
        # before the end runs again after twice as many.
        all_split = sum(map(parameter_count, split))
        soon = min(all_split, engine.reused_within // 2 + engine.prefetched)
        gathered = bytes_of(split) * soon // max(all_split, 1)
    return Held(
        weights=dict(frozen),
        trained=trained_bytes,
        gradients=gradient // engine.shares(2),
        optimizer=optimizer,
        masters=masters,
        buckets=in_buckets * (gradient // max(numbers, 1)),
        flattened=gradient // engine.shares(1) if zero in (1, 2, 3) else 0,
        gathered=gathered,
        on_host=(optimizer + masters) * engine.offloads_optimizer
        + (sum(frozen.values()) + trained_bytes) * engine.offloads_weights,
    )


def rough_table(memory: Held, engine: Engine, activations: Activations) -> Table:
    """What a run's log says before its first step: GiB of one rank's tensors, activations by their rough size."""
    sizes = {
        "weights": sum(memory.weights.values()) + memory.trained,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer + memory.masters,
        "buffers": memory.buckets + memory.gathered,
        "activations (rough)": activations.bytes,
        "moved to the host": -memory.on_host,
        "at the fullest moment": memory.at_most(engine, (Phase(0, activations.bytes), Phase(memory.gradients, 0))),
    }
    rows = tuple((name, f"{size / GIB:.2f}") for name, size in sizes.items() if size)
    return Table((f"estimated: tensors of a rank of {engine}", "GiB"), rows)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step."""

    gradients: int
    trained: int
    weights: int

    @property
    def total(self) -> int:
        """Over all collectives."""
        return self.gradients + self.trained + self.weights


def traffic_of(engine: Engine, *, trained: int, split: int, stay_whole: int, micro_batches: int) -> Traffic:
    """By ring collectives: an all-gather or a reduce-scatter of S bytes sends (N-1)/N S, an all-reduce twice that.

        DDP, ZeRO-0    2 (N-1)/N G                        the gradients of what trains, once
        ZeRO-1           (N-1)/N (G + P)                  gradients to their owner once, what trains back to all
        ZeRO-2           (N-1)/N (a G + P)                gradients to their owner at each of a micro-batches
        ZeRO-3           (N-1)/N (a G + a (2 W - R))      weights, frozen ones too, gathered forward and backward

    Bytes: `trained` is P and G, `split` all weights (W), `stay_whole` what stays whole from forward to backward (R).
    """
    share = (engine.ranks - 1) / engine.ranks
    if engine.stage in (None, 0):
        return Traffic(round(2 * share * trained), 0, 0)
    if engine.stage == 3:
        weights = share * micro_batches * (2 * split - stay_whole)
        return Traffic(round(share * micro_batches * trained), 0, round(weights))
    times = micro_batches if engine.stage == 2 else 1
    return Traffic(round(share * times * trained), round(share * trained), 0)
