"""What one rank holds between steps, and what the engine needs during one: arithmetic over a model's parameters.

N ranks; a trained parameter is held as p bytes, its gradient as g, Adam's two moments as 8 bytes. From ZeRO-1 on
DeepSpeed keeps a float32 copy of what trains, 4 bytes, also of parameters that are float32 themselves.

    engine        weights      trained    moments   copy    gradients kept
    one process   all          p          8         -       g
    DDP           all          p          8         -       g, and the buckets' copy g
    ZeRO-0        all          p          8         -       g, and the buckets' copy g (N > 1)
    ZeRO-1        all          p          8/N       4/N     g, and g/N while the step flattens them
    ZeRO-2        all          p          8/N       4/N     g/N, twice while the step flattens them; reduce buckets
    ZeRO-3        all/N        p/N       8/N       4/N     g/N, the same; bucket; weights gathered for their layers
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dora_vl.training.memory import ADAM_STATES, FLOAT32_BYTES, LiveBytes, parameter_count

# A training step that computes nothing: the model's own code on the meta device, its memory and products counted.
#
# Numbers that a model decides by are whole (ids, masks, grids, places), and there are few of them: they stay real, on
# the CPU. Weights, activations and gradients have shapes and number types alone. So the model's forward, the loss,
# autograd
# and a checkpoint's recomputation run as they are, whatever the architecture, and a 32B takes seconds and no memory.


aten = torch.ops.aten
META = torch.device("meta")
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
TAKES = {aten.nonzero.default, aten._local_scalar_dense.default, aten._to_copy.default}
"""What asks a tensor for its values."""
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_PRODUCTS = {ATTENTION: 4, aten._scaled_dot_product_flash_attention_for_cpu_backward: 10}
"""FLOP for each query, key and number of a head: two products forward, five backward (the scores are made again)."""


class ImaginedOperations(LiveBytes):
    """While it is on, operations on the meta device take place in thought; their memory and products are counted.

    Whether a weight is sound and the like is answered as it is in a healthy run: all is true, nothing is found.

    Attributes:
        flop: floating-point operations of the matrix products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on shapes; on whole numbers it is the real one."""
        if func in TAKES and isinstance(args[0], Tensor) and (answer := _answered(func, args[0], kwargs)) is not None:
            return answer
        if func in RANGES and kwargs.get("device") == META and kwargs.get("dtype") in (None, torch.int64):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        imagined = any(one.is_meta for one in tensors)
        if imagined and not all(one.is_meta for one in tensors):
            if func in INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = tree_map(_without_values, (args, kwargs))
        result = func(*args, **kwargs)
        if imagined:
            self.flop += _flop(func, args, kwargs, result)
        return result


def _answered(func: Any, tensor: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """What a healthy run's values would say; None: the operation needs no answer."""
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        if tensor.is_meta and device is not None and device.type == "cpu":
            return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        if not tensor.is_meta and device == META and not tensor.is_floating_point():
            return func(tensor, **{**kwargs, "device": torch.device("cpu")})
        return None
    if not tensor.is_meta:
        return None
    if func is aten.nonzero.default:
        return torch.empty((0, tensor.dim()), dtype=torch.int64)
    return True if tensor.dtype == torch.bool else 1


def _places(indices: Any) -> list[Any]:
    """Indices with each real mask as the places that it chooses, so that the result's shape is known."""
    found: list[Any] = []
    for one in indices:
        is_mask = isinstance(one, Tensor) and one.dtype == torch.bool and not one.is_meta
        found += one.nonzero(as_tuple=True) if is_mask else [one]
    return found


def _without_values(one: Any) -> Any:
    if not isinstance(one, Tensor) or one.is_meta:
        return one
    return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=META)


def _flop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet in ATTENTION_PRODUCTS:
        query, key = (args[1], args[2]) if packet is not ATTENTION else (args[0], args[1])
        return ATTENTION_PRODUCTS[packet] * query.numel() * key.shape[-2]
    counted = flop_registry.get(packet)
    return 0 if counted is None else counted(*args, **kwargs, out_val=result)


def _attention(  # noqa: PLR0913 - torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As the kernels of GPUs and CPUs do it: no matrix of scores is kept; on meta torch would take the plain one."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def meta_device_understood() -> Iterator[None]:
    """torch has no autocast of the meta device, and asking raises."""
    asked, entered = torch.is_autocast_enabled, torch.autocast

    def enabled(*kind: Any) -> bool:
        return False if kind == ("meta",) else asked(*kind)

    def autocast(device_type: str, *options: Any, **named: Any) -> Any:
        return nullcontext() if device_type == "meta" else entered(device_type, *options, **named)

    with (
        mock.patch.object(torch, "is_autocast_enabled", enabled),
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
    ):
        yield


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
class StepBytes:
    """Bytes of one micro-batch, what was there before it not counted, and its products.

    Attributes:
        kept: what the layers keep for the backward pass.
        logits: logits and what the loss keeps of them.
        phases: the forward pass with the loss, and then gradient by gradient.
        flop: of forward and backward, a recomputation among them.
    """

    kept: int
    logits: int
    phases: tuple[Phase, ...]
    flop: int

    @property
    def working(self) -> int:
        """What the passes need beside what they keep."""
        return max(0, max(one.most for one in self.phases) - self.kept - self.logits)


def imagine_step(loss: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> StepBytes:
    """The second of two micro-batches through a model on the meta device; the first one fills caches.

    Args:
        loss: the module that is trained (`LossModel`), in training mode.
        head: its output layer, before which the logits begin.
        batch: whole numbers real, pictures on the meta device.
    """
    at_head: list[int] = []
    phases: list[Phase] = []
    came = before = 0

    def gradient_came(parameter: Tensor) -> None:
        nonlocal came
        phases.append(Phase(came, live.peak - before))
        came += parameter.numel() * parameter.element_size()
        parameter.grad = None
        live.peak = live.now

    with meta_device_understood(), ImaginedOperations() as live:
        hooks = [head.register_forward_pre_hook(lambda *_: at_head.append(live.made))]
        trained = [one for one in loss.parameters() if one.requires_grad]
        hooks += [one.register_post_accumulate_grad_hook(gradient_came) for one in trained]
        try:
            _forward(loss, batch).backward()
            before, flop = live.restart_peak(), live.flop
            at_head.clear()
            phases.clear()
            came = 0
            result = _forward(loss, batch)
            logits = live.alive_since(at_head[0])
            kept = live.now - before - logits
            result.backward()
            phases.append(Phase(came, live.peak - before))
            found = StepBytes(kept, logits, tuple(phases), live.flop - flop)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def _forward(loss: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    call: Callable[..., Mapping[str, Tensor]] = loss
    return call(**batch)["loss"]


MOST_REUSED = 1_000_000_000
REUSED_TWICE = 2
"""A layer that ran so many parameters before the end of the forward pass runs again after twice as many."""


@dataclass(frozen=True)
class Engine:
    """How a run's ranks share their work.

    Attributes:
        stage: of ZeRO; None without DeepSpeed.
        ranks: GPUs in all.
        bucket: numbers that are reduced at once.
        buckets: how many such buffers there are.
        prefetched: numbers gathered ahead under ZeRO-3.
        kept_whole: ZeRO-3 never splits parameters of fewer numbers.
        reused_within: ZeRO-3 keeps a weight gathered that is needed again after so many numbers.
        offloads_optimizer: its state and the float32 copy are in the host's memory.
        offloads_weights: so are the shards.
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

    @property
    def shards_weights(self) -> int:
        """Ranks among which each weight is split."""
        return self.ranks if self.stage == 3 else 1

    @property
    def shards_gradients(self) -> int:
        """Ranks among which each gradient is split."""
        return self.ranks if self.stage in (2, 3) else 1

    @property
    def shards_optimizer(self) -> int:
        """Ranks among which the optimizer's state is split."""
        return self.ranks if self.stage in (1, 2, 3) else 1

    @property
    def takes_gradients(self) -> bool:
        """Whether a gradient leaves its parameter as soon as it is there."""
        return self.stage in (2, 3)


def engine_of(deepspeed: Mapping[str, Any] | None, *, ranks: int, hidden_width: int) -> Engine:
    """The engine of a DeepSpeed config; `auto` sizes are transformers', from the hidden width."""
    if deepspeed is None:
        return Engine(None, ranks)
    zero = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))

    def size(name: str, automatic: int, default: int) -> int:
        value = zero.get(name, default)
        return automatic if value == "auto" else int(float(value))

    square = hidden_width**2
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
        offloads_optimizer=_offloads(zero, "offload_optimizer"),
        offloads_weights=_offloads(zero, "offload_param"),
    )


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, on its GPU unless said otherwise.

    Attributes:
        weights: frozen weights by number type, such as `bfloat16`.
        trained: what trains.
        gradients: kept until the optimizer's step.
        optimizer: Adam's moments.
        masters: the float32 copy of what trains.
        buckets: buffers in which gradients travel.
        flattened: the gradients' second copy while the optimizer steps.
        gathered: weights whole for their layers, under ZeRO-3.
        on_host: of these, what is offloaded.
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

    def at_most(self, engine: Engine, step: StepBytes) -> int:
        """On the GPU at the fullest moment: in the loss, in the backward pass, or while the optimizer steps."""
        stepping = self.flattened
        if engine.stage != 3:
            stepping += self.gradients + (self.buckets if engine.stage == 0 else 0)
        passes = max(one.most + self._of_gradients(engine, one.came) for one in step.phases)
        return self.between_steps(engine) + max(passes + self.gathered, stepping)

    def _of_gradients(self, engine: Engine, came: int) -> int:
        """What the gradients that came take: themselves, or under ZeRO-2 buckets and, from the first full one on, the
        memory of this rank's part."""
        if engine.stage == 3:  # theirs is there before
            return 0
        if engine.stage != 2:
            return came
        return (self.buckets if came else 0) + (self.gradients if came > self.buckets // engine.buckets else 0)


def held_by(model: nn.Module, engine: Engine, *, half_precision: bool = False) -> Held:
    """What a rank of this engine holds of a model whose trained parameters are decided.

    Args:
        half_precision: full training in bfloat16 or float16, with float32 masters (DeepSpeed's own switch).
    """
    frozen: dict[str, int] = defaultdict(int)
    for one in model.parameters():
        if not one.requires_grad:
            frozen[str(one.dtype).removeprefix("torch.")] += _held(one, engine)
    trained = [one for one in model.parameters() if one.requires_grad]
    numbers, gradient = sum(map(parameter_count, trained)), bytes_of(trained)
    zero = engine.stage in (1, 2, 3)
    masters = (
        numbers * FLOAT32_BYTES // engine.shards_optimizer if zero or (half_precision and engine.stage == 0) else 0
    )
    optimizer = numbers * FLOAT32_BYTES * ADAM_STATES // engine.shards_optimizer
    width = gradient // max(numbers, 1)
    weights, own = dict(frozen), sum(_held(one, engine) for one in trained)
    on_host = (optimizer + masters) * engine.offloads_optimizer
    on_host += (sum(weights.values()) + own) * engine.offloads_weights
    return Held(
        weights=weights,
        trained=own,
        gradients=gradient // engine.shards_gradients,
        optimizer=optimizer,
        masters=masters,
        buckets=_buckets(engine, numbers) * width,
        flattened=gradient // engine.shards_optimizer if zero else 0,
        gathered=_gathered(model, engine),
        on_host=on_host,
    )


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Of whole parameters."""
    return sum(parameter_count(one) * one.element_size() for one in parameters)


def _held(parameter: nn.Parameter, engine: Engine) -> int:
    """Bytes of a parameter between steps: its shard, and the whole of one that is too small to be split."""
    whole = parameter_count(parameter) * parameter.element_size()
    shard = -(-whole // engine.shards_weights)
    return shard + (whole if _is_kept_whole(parameter, engine) else 0)


def _is_kept_whole(parameter: nn.Parameter, engine: Engine) -> bool:
    return engine.stage == 3 and parameter_count(parameter) < engine.kept_whole


def _buckets(engine: Engine, trained: int) -> int:
    """Numbers in the buffers that gradients travel in."""
    if engine.stage in (None, 0):
        return trained if engine.ranks > 1 else 0
    return engine.bucket * engine.buckets if engine.takes_gradients else min(engine.bucket, trained)


def _gathered(model: nn.Module, engine: Engine) -> int:
    """Bytes of weights that are whole at once where the forward pass ends: the layers that come again soon."""
    if engine.stage != 3 or engine.ranks == 1:
        return 0
    split = [one for one in model.parameters() if not _is_kept_whole(one, engine)]
    numbers = sum(map(parameter_count, split))
    soon = min(numbers, engine.reused_within // REUSED_TWICE + engine.prefetched)
    return bytes_of(split) * soon // max(numbers, 1)


# What one optimizer step sends over the wire, and how long it takes by a share of the GPUs' peak and the links' speed.
#
# Bytes that each of N ranks sends, by ring collectives (an all-gather or a reduce-scatter of S bytes sends (N-1)/N S,
# an all-reduce twice that), with a micro-batches a step, G bytes of gradients of what trains, P bytes of what trains
# and W
# bytes of all weights that ZeRO-3 splits:
#
#     DDP, ZeRO-0    2 (N-1)/N G                        the gradients of what trains, once
#     ZeRO-1           (N-1)/N (G + P)                  gradients to their owner once, what trains back to all
#     ZeRO-2           (N-1)/N (a G + P)                gradients to their owner at each micro-batch
#     ZeRO-3           (N-1)/N (a G + a (2 W - R))      weights, frozen ones too, gathered forward and backward; R bytes
#                                                       stay whole between the two (`stage3_max_reuse_distance`)


TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Sizes:
    """Bytes that a step's traffic depends on: gradients of what trains, what trains, weights that are split, those of
    them that stay whole from the forward to the backward pass."""

    gradients: int
    trained: int
    split: int
    stay_whole: int


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


def traffic_of(engine: Engine, sizes: Sizes, *, micro_batches: int) -> Traffic:
    """The table above for one engine."""
    share = (engine.ranks - 1) / engine.ranks
    if engine.stage in (None, 0):
        return Traffic(round(2 * share * sizes.gradients), 0, 0)
    if engine.stage == 3:
        weights = share * micro_batches * (2 * sizes.split - sizes.stay_whole)
        return Traffic(round(share * micro_batches * sizes.gradients), 0, round(weights))
    times = micro_batches if engine.stage == 2 else 1
    return Traffic(round(share * times * sizes.gradients), round(share * sizes.trained), 0)


@dataclass(frozen=True)
class Cluster:
    """The machines of a run.

    Attributes:
        machines: GPUs are spread evenly over them.
        flop_per_second: peak of one GPU in the weights' number type.
        utilisation: share of it that the step's products reach, recomputed ones counted.
        bandwidth: bytes a second that a GPU sends to the others of its machine.
        network: bytes a second that a machine sends to the next.
    """

    machines: int
    flop_per_second: float
    utilisation: float
    bandwidth: float
    network: float

    @property
    def slowest(self) -> float:
        """Bytes a second of a ring's slowest link: it crosses from machine to machine once."""
        return min(self.bandwidth, self.network) if self.machines > 1 else self.bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: products, traffic, and both with and without overlap."""

    compute: float
    wire: float

    @property
    def overlapped(self) -> float:
        """Where all traffic hides behind products."""
        return max(self.compute, self.wire)

    @property
    def one_after_the_other(self) -> float:
        """Where none does."""
        return self.compute + self.wire


def step_time(cluster: Cluster, traffic: Traffic, *, flop: int) -> StepTime:
    """Of so many floating-point operations on each rank."""
    compute = flop / (cluster.flop_per_second * cluster.utilisation)
    return StepTime(compute, traffic.total / cluster.slowest)
