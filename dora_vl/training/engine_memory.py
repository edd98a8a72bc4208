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

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_vl.training.imagined_step import StepBytes
from dora_vl.training.memory_estimate import ADAM_STATES, FLOAT32_BYTES, parameter_count

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
