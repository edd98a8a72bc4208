"""What a run takes of each GPU, from its settings: a training step that computes nothing, its memory counted.

The model's own code runs on the meta device. Numbers that a model decides by are whole (ids, masks, grids), and few:
they stay real, on the CPU. Weights, activations and gradients have shapes and number types alone, so a 32B takes
seconds and no memory, whatever the architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dora_vl.backbones.base import Backbone, head_of
from dora_vl.backbones.families import LLAVA
from dora_vl.backbones.frozen_outputs import find_parts
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.core import apply_dora
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.run.arguments import check_training_section, read_deepspeed
from dora_vl.training.memory import Engine, Held, Phase, Traffic, bytes_of, engine_of, held_by, traffic_of
from dora_vl.training.pipeline import Pipeline

Storage = torch.UntypedStorage
aten = torch.ops.aten
META = torch.device("meta")
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_PRODUCTS = {ATTENTION: 4, aten._scaled_dot_product_flash_attention_for_cpu_backward: 10}
"""FLOP for each query, key and number of a head: two products forward, five backward (the scores are made again)."""


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes: `now` bytes are alive, `peak` at most; `made` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._alive: dict[int, tuple[weakref.ReferenceType[Storage], int, int]] = {}

    def restart_peak(self) -> int:
        """Lets the peak begin at what is alive now, and returns that; garbage in cycles is collected before."""
        gc.collect()
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        unknown = [storage for storage in storages_of(tree_leaves(result)) if id(storage) not in self._alive]
        if unknown:
            inputs = {id(storage) for storage in storages_of(tree_leaves((args, kwargs)))}
            for storage in unknown:
                if id(storage) not in inputs:  # else a view of something older than this count, or it changed in place
                    self._follow(storage)
        return result

    def alive_since(self, count: int) -> int:
        """Bytes of what was made after the first so many storages and is alive."""
        return sum(size for _, size, number in self._alive.values() if number > count)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def _follow(self, storage: Storage) -> None:
        key, size = id(storage), storage.nbytes()

        def died(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self.made += 1
        self._alive[key] = (weakref.ref(storage, died), size, self.made)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages_of(values: Iterable[object]) -> list[Storage]:
    """The storages of the tensors among them."""
    return [value.untyped_storage() for value in values if isinstance(value, Tensor)]


class ImaginedOperations(LiveBytes):
    """Operations on the meta device run on shapes alone; their memory and products (`flop`) are counted.

    Whether a weight is sound and the like is answered as in a healthy run: all is true, nothing is found.
    """

    flop = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on shapes; on whole numbers it is the real one."""
        on_cpu = {**kwargs, "device": torch.device("cpu")}
        if func is aten._to_copy.default and (device := kwargs.get("device")) is not None:
            if args[0].is_meta and device.type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not args[0].is_meta and device == META and not args[0].is_floating_point():
                return func(*args, **on_cpu)
        if func is aten.nonzero.default and args[0].is_meta:
            return torch.empty((0, args[0].dim()), dtype=torch.int64)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func in RANGES and kwargs.get("device") == META and kwargs.get("dtype") in (None, torch.int64):
            return func(*args, **on_cpu)
        are_meta = [value.is_meta for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        imagined = any(are_meta)
        if imagined and not all(are_meta):
            if func in INDEXED:
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = tree_map(_without_values, (args, kwargs))
        result = func(*args, **kwargs)
        if imagined:
            self.flop += _flop(func, args, kwargs, result)
        return result


def _positions(indices: Any) -> list[Any]:
    """Indices with each real mask as the positions that it chooses, so that the result's shape is known."""
    positions: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return positions


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def _flop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet in ATTENTION_PRODUCTS:
        query, key = (args[1], args[2]) if packet is not ATTENTION else (args[0], args[1])
        return ATTENTION_PRODUCTS[packet] * query.numel() * key.shape[-2]
    counted = flop_registry.get(getattr(aten, packet.__name__.rstrip("_"), packet))  # in place or not
    return 0 if counted is None else counted(*args, **kwargs, out_val=result)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As GPUs do it: a byte a number is kept for the backward pass."""
    return torch.native_dropout(input, p, training)[0] if training else input


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
        key, value = (heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) for heads in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


FUSED = {functional.scaled_dot_product_attention: _attention, functional.dropout: _dropout}
"""What torch has no kernel of on the meta device -> what a GPU's kernel keeps and computes."""


class FusedOperations(TorchFunctionMode):
    """Gives the calls inside the block to `FUSED`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FUSED.get(func, func)(*args, **(kwargs or {}))


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, which would leave `FusedOperations` for what a checkpoint computes again."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


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
        return max(0, max(phase.most for phase in self.phases) - self.kept - self.logits)


def imagine_step(loss: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> StepBytes:
    """The second of two micro-batches through a model on the meta device; the first one fills caches.

    `loss` is in training mode; at its output layer `head` the logits begin. In `batch` whole numbers are real.
    """
    forward: Callable[..., Mapping[str, Tensor]] = loss
    at_head: list[int] = []
    phases: list[Phase] = []
    came = before = 0

    def gradient_came(parameter: Tensor) -> None:
        nonlocal came
        phases.append(Phase(came, live.peak - before))
        came += parameter.numel() * parameter.element_size()
        parameter.grad = None
        live.peak = live.now

    with contextlib.ExitStack() as stack:
        stack.enter_context(FusedOperations())
        live = stack.enter_context(ImaginedOperations())
        stack.callback(head.register_forward_pre_hook(lambda *_: at_head.append(live.made)).remove)
        for parameter in loss.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(gradient_came).remove)
        _backward(forward(**batch)["loss"])
        before, flop = live.restart_peak(), live.flop
        at_head.clear()
        phases.clear()
        came = 0
        result = forward(**batch)["loss"]
        logits = live.alive_since(at_head[0])
        kept = live.now - before - logits
        _backward(result)
        phases.append(Phase(came, live.peak - before))
        return StepBytes(kept, logits, tuple(phases), live.flop - flop)


# A run's step on any number of ranks.


@dataclass(frozen=True)
class Samples:
    """A micro-batch: rows, the tokens of each, and how many of them are labelled."""

    rows: int
    tokens: int
    labelled: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, and what an optimizer step sends and computes on it.

    Attributes:
        step: one micro-batch, with gradient checkpointing as the run has it (`checkpointing`); `other`: the other way.
        flop: floating-point operations of an optimizer step.
    """

    engine: Engine
    samples: Samples
    held: Held
    step: StepBytes
    other: StepBytes
    checkpointing: bool
    traffic: Traffic
    flop: int

    def peak(self, step: StepBytes) -> int:
        """Bytes at the fullest moment: within the micro-batch, or while the optimizer steps."""
        return self.held.at_most(self.engine, step.phases)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of this run."""
        return self.peak(self.step)

    def as_record(self) -> dict[str, Any]:
        """For JSON, without the single phases of the steps."""
        record = {**dataclasses.asdict(self), "total": self.total}
        for step in (record["step"], record["other"]):
            step["most"] = max(phase["most"] for phase in step.pop("phases"))
        return record


@dataclass(frozen=True)
class ImaginedRun:
    """A run's model on the meta device and one micro-batch through it, which are the same on any number of ranks.

    `section` is the settings' `training`; `plain` is the micro-batch without gradient checkpointing, `recomputed` with.
    """

    model: nn.Module
    hidden_width: int
    section: Mapping[str, Any]
    half_precision: bool
    samples: Samples
    plain: StepBytes
    recomputed: StepBytes

    def on(self, ranks: int, deepspeed: str | None = None) -> Estimate:
        """The estimate for so many ranks, with the run's engine or another one."""
        fsdp = deepspeed is None and bool(self.section.get("fsdp"))
        engine = _engine(deepspeed or self.section.get("deepspeed"), ranks, self.hidden_width, fsdp=fsdp)
        memory = held_by(self.model, engine, half_precision=self.half_precision)
        checkpointing = bool(self.section.get("gradient_checkpointing") or self.section.get("activation_checkpointing"))
        step, other = (self.recomputed, self.plain) if checkpointing else (self.plain, self.recomputed)
        micro_batches = int(self.section.get("gradient_accumulation_steps", 1))
        traffic = traffic_of(
            engine,
            trained=bytes_of(parameter for parameter in self.model.parameters() if parameter.requires_grad),
            split=bytes_of(self.model.parameters()),
            stay_whole=memory.gathered,
            micro_batches=micro_batches,
        )
        return Estimate(engine, self.samples, memory, step, other, checkpointing, traffic, step.flop * micro_batches)


def _engine(deepspeed: Any, ranks: int, hidden_width: int, *, fsdp: bool = False) -> Engine:
    read = None if deepspeed is None else read_deepspeed(deepspeed)
    return engine_of(read, ranks=ranks, hidden_width=hidden_width, fsdp=fsdp)


def imagine_run(pipeline: Pipeline, *, tokens: int | None = None, labelled: int | None = None) -> ImaginedRun:
    """The model of a run's settings, and its micro-batch; no weight is read.

    A sample has so many tokens, pictures among them (None: `data.max_tokens`), and so many of these are `labelled`
    (None: all that are not a picture's).
    """
    section = check_training_section(pipeline.config.training)
    settings: Any = pipeline.config
    if settings.model.quantisation is not None:
        raise UserError("model.quantisation: of a quantised base no estimate is made; leave model.quantisation out")
    backbone = pipeline.skeleton()
    backbone.model.to(getattr(torch, settings.model.dtype))
    apply_dora(backbone.model, replace(pipeline.dora_config(backbone), init="kaiming"))
    width = int(backbone.model.config.get_text_config().hidden_size)
    _engine(section.get("deepspeed"), 1, width)  # its file may be wrong, which shows at once

    tokens = int(settings.data.max_tokens if tokens is None else tokens)
    pictures = backbone.model.config.image_seq_length if backbone.model.config.model_type == LLAVA else 0
    if tokens < pictures + 2:
        raise UserError(f"{tokens} tokens a sample: a picture of this model alone takes {pictures}; raise --tokens")
    words = tokens - pictures - 1
    rows = int(section.get("per_device_train_batch_size", 8))
    samples = Samples(rows, tokens, words if labelled is None else min(labelled, words))

    loss = pipeline.loss(backbone).train()
    head: nn.Module = head_of(backbone.model)
    batch = _batch(backbone, samples, cached=settings.data.cache_features)
    plain = imagine_step(loss, head, batch)
    options = section.get("gradient_checkpointing_kwargs") or section.get("activation_checkpointing_kwargs")
    loss.recompute_activations(options or {"use_reentrant": False})
    recomputed = imagine_step(loss, head, batch)
    half = settings.adapter.method == "full" and bool(section.get("bf16") or section.get("fp16"))
    return ImaginedRun(backbone.model, width, section, half, samples, plain, recomputed)


def _batch(backbone: Backbone[Any], samples: Samples, *, cached: bool) -> dict[str, Any]:
    """Rows of one length, each with a picture in front where the model is a LLaVA; another model's rows are text."""
    ids = torch.full((samples.rows, samples.tokens), 1)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, samples.tokens - samples.labelled :] = 1
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    config: Any = backbone.model.config
    if config.model_type == LLAVA:
        ids[:, : config.image_seq_length] = config.image_token_id
        side = int(config.to_dict()["vision_config"]["image_size"])
        batch["pixel_values"] = torch.empty((samples.rows, 3, side, side), device=META)
        if cached:
            decoder = cast(DecoderBackbone, backbone)
            batch["pixel_values"] = batch["pixel_values"].to(backbone.model.dtype)
            seen = {name: value for name, value in batch.items() if name != "labels"}
            decoder.frozen_parts = find_parts(decoder.model, seen)
            batch["stored"] = [decoder.frozen_parts.outputs_of(decoder.model, seen)]
    return batch


@dataclass(frozen=True)
class Cluster:
    """The machines of a run, over which its GPUs are spread evenly.

    Attributes:
        flop_per_second: peak of one GPU in the weights' number type; `utilisation`: the share that a step's products
            reach, recomputed ones counted.
        bandwidth: bytes a second that a GPU sends to the others of its machine; `network`: a machine to the next.
    """

    machines: int
    flop_per_second: float
    utilisation: float
    bandwidth: float
    network: float

    def seconds(self, traffic: Traffic, flop: int) -> tuple[float, float]:
        """An optimizer step's products, and its traffic over the slowest link, which a ring crosses once."""
        slowest = min(self.bandwidth, self.network) if self.machines > 1 else self.bandwidth
        return flop / (self.flop_per_second * self.utilisation), traffic.total / slowest


SHAPES: Mapping[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
"""Name -> what the `config.json` of a published model says of sizes, where no folder of the model is at hand."""


def with_shape(config: Any, shape: str | None, folder: Path) -> Any:
    """The settings over a folder with a published model's config; as they are where no shape is named."""
    written_here = {field.name for field in dataclasses.fields(config.model)} & {"compose", "source"}
    if shape is None:
        if "compose" in written_here and config.model.compose is not None and not Path(config.model.base).exists():
            named = " or ".join(SHAPES)
            raise UserError(f"model.base {config.model.base} is not composed yet; name its sizes by --shape: {named}")
        return config
    if shape not in SHAPES:
        raise UserError(f"--shape {shape} is not known; there are {', '.join(SHAPES)}")
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    changed: dict[str, Any] = {"base": str(folder), "revision": None}
    changed |= dict.fromkeys(written_here)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))
