"""What a run takes of each GPU, from its settings: the model is made on the meta device, one step is imagined."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.families import LLAVA
from dora_vl.backbones.frozen_outputs import find_parts
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.core import apply_dora
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.run.arguments import check_training_section, read_deepspeed
from dora_vl.training.imagined_step import META, StepBytes, imagine_step
from dora_vl.training.memory import Engine, Held, Traffic, bytes_of, engine_of, held_by, traffic_of
from dora_vl.training.pipeline import Pipeline


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
        engine = _engine(deepspeed or self.section.get("deepspeed"), ranks=ranks, hidden_width=self.hidden_width)
        held = held_by(self.model, engine, half_precision=self.half_precision)
        checkpointing = bool(self.section.get("gradient_checkpointing") or self.section.get("activation_checkpointing"))
        step, other = (self.recomputed, self.plain) if checkpointing else (self.plain, self.recomputed)
        micro_batches = int(self.section.get("gradient_accumulation_steps", 1))
        traffic = traffic_of(
            engine,
            trained=bytes_of(parameter for parameter in self.model.parameters() if parameter.requires_grad),
            split=bytes_of(self.model.parameters()),
            stay_whole=held.gathered,
            micro_batches=micro_batches,
        )
        return Estimate(engine, self.samples, held, step, other, checkpointing, traffic, step.flop * micro_batches)


def _engine(deepspeed: Any, *, ranks: int, hidden_width: int) -> Engine:
    return engine_of(None if deepspeed is None else read_deepspeed(deepspeed), ranks=ranks, hidden_width=hidden_width)


def imagine_run(pipeline: Pipeline, *, tokens: int | None = None, labelled: int | None = None) -> ImaginedRun:
    """The model of a run's settings, and its micro-batch; no weight is read.

    Args:
        pipeline: of the run.
        tokens: of a sample, pictures among them; None: `data.max_tokens`, the longest.
        labelled: of these; None: all that are not a picture's.
    """
    section = check_training_section(pipeline.config.training)
    settings: Any = pipeline.config
    if settings.model.quantisation is not None:
        raise UserError("model.quantisation: of a quantised base no estimate is made; leave model.quantisation out")
    backbone = pipeline.skeleton()
    backbone.model.to(getattr(torch, settings.model.dtype))
    # Dropout keeps nothing on a GPU: its mask is drawn again from a seed.
    apply_dora(backbone.model, replace(pipeline.dora_config(backbone), init="kaiming", dropout=0.0))
    width = int(backbone.model.config.get_text_config().hidden_size)
    _engine(section.get("deepspeed"), ranks=1, hidden_width=width)  # its file may be wrong, which shows at once

    tokens = int(settings.data.max_tokens if tokens is None else tokens)
    pictures = backbone.model.config.image_seq_length if backbone.model.config.model_type == LLAVA else 0
    if tokens < pictures + 2:
        raise UserError(f"{tokens} tokens a sample: a picture of this model alone takes {pictures}; raise --tokens")
    words = tokens - pictures - 1
    rows = int(section.get("per_device_train_batch_size", 8))
    samples = Samples(rows, tokens, words if labelled is None else min(labelled, words))

    loss = pipeline.loss(backbone).train()
    head: nn.Module = backbone.model.get_output_embeddings()
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
