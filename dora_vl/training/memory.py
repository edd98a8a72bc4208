"""Computes the memory of one rank: what it holds between steps, and what a step adds.

One estimate serves the table before a run, `dora-vl estimate` and the choice of the largest micro-batch. It leaves out
what CUDA, NCCL and the allocator's blocks take (1 to 2 GiB of a GPU), the vision part's activations, and experts beyond
one MLP a layer.

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

from dora_vl.backbones.base import head_of
from dora_vl.core import adapted_layers
from dora_vl.core.quantised import is_quantised
from dora_vl.errors import align_columns
from dora_vl.heads.next_token import CHUNK, in_chunks
from dora_vl.run.launch import blocks_of

FLOAT32_BYTES, GIB = 4, 2**30
MOST_REUSED = 1_000_000_000


@dataclass(frozen=True)
class Table:
    """Holds a table that is logged before the first step, and kept in the run's folder."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return "\n".join(align_columns([self.header, *self.rows], left=1))


def parameter_count(parameter: nn.Parameter) -> int:
    """Counts the numbers of a parameter; under ZeRO-3 those of all shards."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Returns the bytes of whole parameters."""
    return sum(parameter_count(parameter) * parameter.element_size() for parameter in parameters)


def weight_count(model: nn.Module) -> int:
    """Counts the numbers of all parameters; a quantised weight counts unpacked."""
    layers: list[Any] = [module for module in model.modules() if is_quantised(module)]
    unpacked = {id(next(layer.parameters())): layer.in_features * layer.out_features for layer in layers}
    return sum(unpacked.get(id(parameter), parameter_count(parameter)) for parameter in model.parameters())


def process_bytes() -> int:
    """Returns the bytes that this process holds in the machine's memory."""
    return psutil.Process().memory_info().rss


def memory_gib(device: torch.device) -> float:
    """Returns the GiB of the rank that holds most; every rank must call it.

    On a GPU that is torch's peak since the last call, on a CPU what the process holds now.
    """
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = process_bytes()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        most = torch.tensor(used, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        used = int(most)
    return used / GIB


@dataclass(frozen=True)
class Activations:
    """Describes the bytes that text layers and loss keep of a micro-batch between forward and backward.

    Attributes:
        layer: bytes of a token in one layer; `vector`: of its hidden state; `backward`: of the gradients that are there
            together with all of a layer, those of the MLP's gate and of what it multiplies.
        adapted: bytes of a token in all adapted layers together: x A^T, W x where a magnitude scales it, and the
            dropped inputs of `whole_change`.
        scores: bytes of the vocabulary's scores at a labelled position; `chunk`: positions that have them together.
    """

    layers: int
    layer: int
    vector: int
    backward: int
    adapted: int
    scores: int
    chunk: int | None

    def of(self, *, tokens: int, labelled: int, recomputed: bool) -> int:
        """Returns the bytes that `tokens` take; recomputed: a vector per layer, then scores or a layer whole."""
        together = labelled if self.chunk is None else min(labelled, self.chunk)
        scores, vectors = together * self.scores, labelled * self.vector
        if not recomputed:
            return tokens * (self.layers * self.layer + self.adapted) + vectors + scores
        a_layer = tokens * (self.layer + self.backward + self.adapted // self.layers)
        return tokens * self.layers * self.vector + vectors + max(a_layer, scores)


def activations_of(model: PreTrainedModel) -> Activations:
    """Estimates an adapted model's activations from its config: layers of attention and a gated MLP.

    A token's layer keeps two float32 vectors in each of its two norms, and in the model's type their results, q, k, v,
    the attention's result, and four vectors of the MLP. That is within 3 % of what torch keeps in a Vicuna of 7B or 13B
    and a Qwen2.5 of 32B.
    """
    text: Any = model.config.get_text_config()
    size, width = model.dtype.itemsize, int(text.hidden_size)

    def number(names: tuple[str, ...], default: int) -> int:
        return next((value for name in names if isinstance(value := getattr(text, name, None), int)), default)

    heads = number(("num_attention_heads",), 1)
    keys = width * number(("num_key_value_heads",), heads) // heads
    inner = number(("intermediate_size", "encoder_ffn_dim", "d_ff", "ffn_dim"), 4 * width)
    adapted, replaced = 0, set[tuple[str, int]]()
    for name, layer in adapted_layers(model):
        adapted += FLOAT32_BYTES * layer.adapter.rank
        adapted += 0 if layer.magnitude is None else size * layer.magnitude.numel()
        if (
            layer.adapter.drops_whole_change
        ):  # its input after dropout, and the mask; not what it shares with its siblings
            inputs = layer.matrix_shape()[1]
            adapted += size * (2 * inputs if (name.rpartition(".")[0], inputs) in replaced else inputs)
            replaced.add((name.rpartition(".")[0], inputs))
    return Activations(
        layers=text.num_hidden_layers + (text.decoder_layers if text.is_encoder_decoder else 0),
        layer=4 * FLOAT32_BYTES * width + size * (4 * width + 2 * keys + 4 * inner),
        vector=size * width,
        backward=size * 2 * inner,
        adapted=adapted,
        scores=12 * int(text.vocab_size),  # in float32, its gradient, and both as the model makes them
        chunk=CHUNK if (head := head_of(model)) is not None and in_chunks(head) else None,
    )


@dataclass(frozen=True)
class ShardingLayout:
    """Says how a run's ranks share their work; sizes are numbers, not bytes.

    Attributes:
        stage: of ZeRO; None without DeepSpeed; 3 also where FSDP2 shares out the same (`fsdp`).
        bucket: numbers that are reduced at once, in each of the `buckets`.
        prefetched: numbers gathered ahead under ZeRO-3.
        kept_whole: ZeRO-3 never splits parameters of fewer numbers.
        reused_within: ZeRO-3 keeps a weight gathered that is needed again within this many numbers.
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
        """Returns how many ranks share what ZeRO splits from this stage on."""
        return self.ranks if (self.stage or 0) >= first_stage else 1


def engine_of(
    deepspeed: Mapping[str, Any] | None, *, ranks: int, hidden_width: int, fsdp: bool = False
) -> ShardingLayout:
    """Reads the engine of a DeepSpeed config; `auto` sizes follow the hidden width, as transformers sets them."""
    if deepspeed is None:
        return ShardingLayout(3 if fsdp else None, ranks, fsdp=fsdp)
    zero = deepspeed.get("zero_optimization", {})
    stage, square = int(zero.get("stage", 0)), hidden_width**2

    def size(name: str, automatic: int, default: int) -> int:
        value = zero.get(name, default)
        return automatic if value == "auto" else int(float(value))

    def offloads(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    return ShardingLayout(
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
class Held:
    """Describes the bytes of one rank, on its GPU unless said otherwise.

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

    def between_steps(self, engine: ShardingLayout) -> int:
        """Returns the GPU's bytes before a step: DDP keeps its buckets, ZeRO-3 its bucket and the gradients' memory."""
        kept = self.buckets if engine.stage in (None, 3) else 0
        kept += self.gradients if engine.stage == 3 else 0
        return sum(self.weights.values()) + self.trained + self.optimizer + self.masters + kept - self.on_host

    def at_most(self, engine: ShardingLayout, activations: int, *, accumulates: bool) -> int:
        """Returns the GPU's bytes at the fullest moment: in the passes, or while the optimizer steps.

        Gradients replace activations during the backward pass, but an earlier micro-batch's are there from the start.
        """
        came = self.gradients + (self.buckets if engine.stage == 2 else 0)
        if engine.stage == 3:  # their memory is there before
            came = 0
        passes = self.gathered + (activations + came if accumulates else max(activations, came))
        stepping = self.flattened
        if engine.stage != 3:
            stepping += self.gradients + (self.buckets if engine.stage == 0 else 0)
        return self.between_steps(engine) + max(passes, stepping)


def held_by(model: nn.Module, engine: ShardingLayout, *, half_precision: bool = False) -> Held:
    """Counts what a rank of this engine holds of a model whose trained parameters are decided.

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
        # Where the forward pass ends, the layers that come again soon are whole: one that ran N parameters
        # before the end runs again after 2 N.
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


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimates the bytes of one rank.

    Attributes:
        activations: bytes that a micro-batch and its loss keep.
        accumulates: a step has several micro-batches.
        reference: bytes of the copy of what trains as it was when training began, whole on every rank.
        others: bytes that the process holds beside its tensors, on a CPU, where the log counts them too.
    """

    engine: ShardingLayout
    held: Held
    activations: int
    accumulates: bool = False
    reference: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """Returns the bytes at the fullest moment."""
        held = self.held.at_most(self.engine, self.activations, accumulates=self.accumulates)
        return held + self.others + self.reference

    def table(self) -> Table:
        """Lists GiB by part; parts that take nothing have no row."""
        held = self.held
        sizes = {f"frozen weights, {name}": size for name, size in held.weights.items()} | {
            "trained weights": held.trained,
            "gradients": held.gradients,
            "optimizer's state": held.optimizer,
            "float32 copy of what trains": held.masters,
            "buffers for gradients": held.buckets,
            "weights gathered": held.gathered,
            "activations and loss": self.activations,
            "the start of what trains": self.reference,
            "libraries and data of this process": self.others,
            "moved to the host": -held.on_host,
            "at the fullest moment": self.total,
        }
        rows = tuple((name, f"{size / GIB:.2f}") for name, size in sizes.items() if size)
        return Table((f"estimated: one process of {self.engine}", "GiB"), rows)
