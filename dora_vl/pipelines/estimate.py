"""What a run takes of each GPU, from its settings: the model is made on the meta device, one step is imagined."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.core import apply_dora
from dora_vl.data.dataset import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.run.arguments import check_training_section, read_deepspeed
from dora_vl.training.engine_memory import Engine, Held, bytes_of, engine_of, held_by
from dora_vl.training.imagined_step import META, StepBytes, imagine_step
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.step_traffic import Sizes, Traffic, traffic_of


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
        held: weights, gradients, optimizer's state.
        step: of one micro-batch, with gradient checkpointing as the run has it.
        other: the same with checkpointing the other way.
        checkpointing: whether the run recomputes.
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
        return self.held.at_most(self.engine, step)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of this run."""
        return self.peak(self.step)


@dataclass(frozen=True)
class ImaginedRun:
    """A run's model on the meta device and one micro-batch through it, which are the same on any number of ranks.

    Attributes:
        section: the settings' `training`.
        plain: the micro-batch without gradient checkpointing.
        recomputed: with it.
    """

    model: nn.Module
    hidden_width: int
    section: Mapping[str, Any]
    half_precision: bool
    samples: Samples
    plain: StepBytes
    recomputed: StepBytes

    def under(self, deepspeed: str) -> ImaginedRun:
        """The same run with another engine."""
        return replace(self, section={**self.section, "deepspeed": deepspeed})

    def on(self, ranks: int) -> Estimate:
        """The estimate for so many ranks."""
        engine = _engine(self.section, ranks=ranks, hidden_width=self.hidden_width)
        held = held_by(self.model, engine, half_precision=self.half_precision)
        checkpointing = bool(self.section.get("gradient_checkpointing") or self.section.get("activation_checkpointing"))
        step, other = (self.recomputed, self.plain) if checkpointing else (self.plain, self.recomputed)
        micro_batches = int(self.section.get("gradient_accumulation_steps", 1))
        trained = bytes_of(one for one in self.model.parameters() if one.requires_grad)
        sizes = Sizes(trained, trained, split=bytes_of(self.model.parameters()), stay_whole=held.gathered)
        traffic = traffic_of(engine, sizes, micro_batches=micro_batches)
        return Estimate(engine, self.samples, held, step, other, checkpointing, traffic, step.flop * micro_batches)


def imagine_run(pipeline: Pipeline, *, tokens: int | None = None, labelled: int | None = None) -> ImaginedRun:
    """The model of a run's settings, and its micro-batch; no weight is read.

    Args:
        tokens: of a sample, pictures among them; None: `data.max_tokens`, the longest.
        labelled: of these; None: all that are not a picture's.

    Raises:
        UserError: settings that are wrong, or of which nothing can be said here.
    """
    section = check_training_section(pipeline.config.training)
    backbone = _adapted_skeleton(pipeline)
    width = int(backbone.model.config.get_text_config().hidden_size)
    _engine(section, ranks=1, hidden_width=width)  # its file may be wrong, which shows at once
    samples = _samples(pipeline, backbone, int(section.get("per_device_train_batch_size", 8)), tokens, labelled)
    plain, recomputed = _steps(pipeline, backbone, samples, section)
    half = pipeline.config.adapter.method == "full" and bool(section.get("bf16") or section.get("fp16"))
    return ImaginedRun(backbone.model, width, section, half, samples, plain, recomputed)


def _engine(section: Mapping[str, Any], *, ranks: int, hidden_width: int) -> Engine:
    deepspeed = section.get("deepspeed")
    return engine_of(None if deepspeed is None else read_deepspeed(deepspeed), ranks=ranks, hidden_width=hidden_width)


def _adapted_skeleton(pipeline: Pipeline) -> Backbone[Any]:
    """The model without its weights, in the run's number types, with what trains put in."""
    model: Any = pipeline.config.model
    if model.quantisation is not None:
        raise UserError("model.quantisation: of a quantised base no estimate is made; leave model.quantisation out")
    backbone = pipeline.skeleton()
    backbone.model.to(getattr(torch, model.dtype))
    config = pipeline.dora_config(backbone)
    # Dropout keeps nothing on a GPU: its mask is drawn again from a seed.
    apply_dora(backbone.model, replace(config, init="kaiming", dropout=0.0))
    return backbone


def _samples(
    pipeline: Pipeline, backbone: Backbone[Any], rows: int, tokens: int | None, labelled: int | None
) -> Samples:
    data: Any = pipeline.config.data
    whole = data.max_tokens if tokens is None else tokens
    pictures = backbone.tokens_per_image if isinstance(backbone, LlavaBackbone) else 0
    if whole < pictures + 2:
        raise UserError(f"{whole} tokens a sample: a picture of this model alone takes {pictures}; raise --tokens")
    most = whole - pictures - 1
    return Samples(rows, whole, most if labelled is None else min(labelled, most))


def _steps(
    pipeline: Pipeline, backbone: Backbone[Any], samples: Samples, section: Mapping[str, Any]
) -> tuple[StepBytes, StepBytes]:
    """A micro-batch without and with gradient checkpointing."""
    loss = pipeline.loss(backbone).train()
    head: nn.Module = backbone.model.get_output_embeddings()
    batch = _batch(pipeline, backbone, samples)
    plain = imagine_step(loss, head, batch)
    options = (
        section.get("gradient_checkpointing_kwargs")
        or section.get("activation_checkpointing_kwargs")
        or {"use_reentrant": False}
    )
    loss.recompute_activations(options)
    return plain, imagine_step(loss, head, batch)


def _batch(pipeline: Pipeline, backbone: Backbone[Any], samples: Samples) -> dict[str, Tensor]:
    """Rows of one length, each with a picture in front where the model is a LLaVA; another model's rows are text."""
    ids = torch.full((samples.rows, samples.tokens), 1)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, samples.tokens - samples.labelled :] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if isinstance(backbone, LlavaBackbone):
        ids[:, : backbone.tokens_per_image] = backbone.config.image_token_id
        dtype = backbone.model.dtype
        data: Any = pipeline.config.data
        if data.cache_features:
            features = (samples.rows, *backbone.feature_shape)
            batch["image_features"] = torch.empty(features, dtype=dtype, device=META)
        else:
            side = int(backbone.vision_config().to_dict()["image_size"])
            batch["pixel_values"] = torch.empty((samples.rows, 3, side, side), device=META)
    return batch


def as_record(estimate: Estimate) -> dict[str, Any]:
    """For JSON, without the single phases of the steps."""
    record = {**dataclasses.asdict(estimate), "total": estimate.total}
    for step in (record["step"], record["other"]):
        step["most"] = max(phase["most"] for phase in step.pop("phases"))
    return record
