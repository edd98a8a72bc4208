"""What a run takes of each GPU, from its settings: the model is made on the meta device, one step is imagined."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.core import apply_dora
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError, positive
from dora_vl.training.arguments import check_training_section, read_deepspeed
from dora_vl.training.imagined_step import META, StepBytes, imagine_step
from dora_vl.training.memory import Engine, Held, Table, Traffic, bytes_of, engine_of, held_by, traffic_of
from dora_vl.training.pipeline import Pipeline

DESCRIPTION = """\
Says what a run will take of each GPU: bytes by part, bytes that an optimizer step sends, and its time from a share of
the GPUs' peak and the links' speed. The model is made from its config alone, on torch's meta device: no weight is read.

  dora-vl estimate llava/llava15 --variant 7b_dora --shape llava-1.5-7b --gpus 8
  dora-vl estimate my_run.yaml --gpus 64 --machines 8 --mfu 0.4 --training.deepspeed zero2

What this command does not know is a setting of the run, --section.key value, as for the script itself. docs/cluster.md
says what is counted and how.
"""
TAKES_SETTINGS = True
GPUS_A_MACHINE = 8
WAYS = {True: "recomputed (gradient_checkpointing)", False: "without recomputing"}
STAGES = ("zero0", "zero2", "zero3")
TERA, GIGA, GIB = 1e12, 1e9, 2**30


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
        return self.held.at_most(self.engine, step.phases)

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

    def on(self, ranks: int, deepspeed: str | None = None) -> Estimate:
        """The estimate for so many ranks, with the run's engine or another one."""
        engine = _engine(deepspeed or self.section.get("deepspeed"), ranks=ranks, hidden_width=self.hidden_width)
        held = held_by(self.model, engine, half_precision=self.half_precision)
        checkpointing = bool(self.section.get("gradient_checkpointing") or self.section.get("activation_checkpointing"))
        step, other = (self.recomputed, self.plain) if checkpointing else (self.plain, self.recomputed)
        micro_batches = int(self.section.get("gradient_accumulation_steps", 1))
        traffic = traffic_of(
            engine,
            trained=bytes_of(one for one in self.model.parameters() if one.requires_grad),
            split=bytes_of(self.model.parameters()),
            stay_whole=held.gathered,
            micro_batches=micro_batches,
        )
        return Estimate(engine, self.samples, held, step, other, checkpointing, traffic, step.flop * micro_batches)


def imagine_run(pipeline: Pipeline, *, tokens: int | None = None, labelled: int | None = None) -> ImaginedRun:
    """The model of a run's settings, and its micro-batch; no weight is read.

    Args:
        pipeline: of the run.
        tokens: of a sample, pictures among them; None: `data.max_tokens`, the longest.
        labelled: of these; None: all that are not a picture's.

    Raises:
        UserError: settings that are wrong, or of which nothing can be said here.
    """
    section = check_training_section(pipeline.config.training)
    backbone = _adapted_skeleton(pipeline)
    width = int(backbone.model.config.get_text_config().hidden_size)
    _engine(section.get("deepspeed"), ranks=1, hidden_width=width)  # its file may be wrong, which shows at once
    samples = _samples(pipeline, backbone, int(section.get("per_device_train_batch_size", 8)), tokens, labelled)
    plain, recomputed = _steps(pipeline, backbone, samples, section)
    half = pipeline.config.adapter.method == "full" and bool(section.get("bf16") or section.get("fp16"))
    return ImaginedRun(backbone.model, width, section, half, samples, plain, recomputed)


def _engine(deepspeed: Any, *, ranks: int, hidden_width: int) -> Engine:
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

    def seconds(self, traffic: Traffic, flop: int) -> tuple[float, float]:
        """An optimizer step's products, and its traffic over the slowest link, which a ring crosses once."""
        slowest = min(self.bandwidth, self.network) if self.machines > 1 else self.bandwidth
        return flop / (self.flop_per_second * self.utilisation), traffic.total / slowest


def as_record(estimate: Estimate) -> dict[str, Any]:
    """For JSON, without the single phases of the steps."""
    record = {**dataclasses.asdict(estimate), "total": estimate.total}
    for step in (record["step"], record["other"]):
        step["most"] = max(phase["most"] for phase in step.pop("phases"))
    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; a run's own settings may stand between them."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--machines", type=positive, metavar="M", help="that hold them (default: 8 GPUs in each)")
    parser.add_argument("--shape", metavar="NAME", help="a published model's sizes, in place of model.base")
    parser.add_argument("--tokens", type=positive, metavar="T", help="of a sample (default: data.max_tokens)")
    parser.add_argument("--labelled", type=positive, metavar="T", help="of these (default: all but the picture's)")
    parser.add_argument("--mfu", type=_share, default=0.4, metavar="F", help="share of the peak (default: 0.4)")
    parser.add_argument("--tflops", type=_amount, default=312.0, help="a GPU's peak (default: 312, an A100's)")
    parser.add_argument("--bandwidth", type=_amount, default=230.0, metavar="GB/s", help="between GPUs (default: 230)")
    parser.add_argument("--network", type=_amount, default=100.0, metavar="GB/s", help="of a machine (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the numbers to this file")


def _amount(text: str, most: float = 1e9) -> float:
    number = float(text)
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most:g}")
    return number


def _share(text: str) -> float:
    return _amount(text, 1.0)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the estimate; yields the lines to print.

    Raises:
        UserError: a setting or the base's config is wrong, or the GPUs cannot be spread over the machines.
    """
    from dora_vl.training.run_settings import pipeline_of, settings_and_task

    gpus, machines = arguments.gpus, arguments.machines or -(-arguments.gpus // GPUS_A_MACHINE)
    if gpus % machines:
        raise UserError(f"--gpus {gpus} cannot be spread evenly over {machines} machines; give --machines")
    words = [f"--config={arguments.config}", *arguments.settings]
    config, task = settings_and_task(words, None, program="dora-vl estimate")
    if task.startswith("vlbart"):
        raise UserError("estimate is for runs of llava_instruct and commonsense; a VL-BART fits any GPU")
    with tempfile.TemporaryDirectory() as folder:
        config = with_shape(config, arguments.shape, Path(folder))
        logging.getLogger("transformers").setLevel(logging.ERROR)
        imagined = imagine_run(pipeline_of(config, task), tokens=arguments.tokens, labelled=arguments.labelled)
    estimate = imagined.on(gpus)
    yield from memory_lines(estimate)
    by_engine = ", ".join(f"{stage} {gib(imagined.on(gpus, stage).total)}" for stage in STAGES)
    yield f"GiB at the fullest moment by engine: {by_engine}"
    bandwidth, network = arguments.bandwidth * GIGA, arguments.network * GIGA
    yield from step_lines(estimate, Cluster(machines, arguments.tflops * TERA, arguments.mfu, bandwidth, network))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(as_record(estimate), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror})") from error
        yield f"{arguments.json}"


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def memory_lines(estimate: Estimate) -> Iterator[str]:
    """Bytes of one GPU by part, the fullest moment of the run, and that with checkpointing the other way."""
    held, step, samples = estimate.held, estimate.step, estimate.samples
    parts = {f"frozen weights, {name}": size for name, size in held.weights.items()}
    parts |= {
        "trained weights": held.trained,
        "gradients": held.gradients,
        "optimizer's state": held.optimizer,
        "float32 copy of what trains": held.masters,
        "buffers for gradients": held.buckets,
        "weights gathered (ZeRO-3)": held.gathered,
        f"activations kept, {WAYS[estimate.checkpointing]}": step.kept,
        "logits and their loss": step.logits,
        "working memory of the passes": step.working,
        "moved to the host": -held.on_host,
    }
    rows = [(name, gib(size)) for name, size in parts.items() if size]
    rows.append((f"at the fullest moment, {WAYS[estimate.checkpointing]}", gib(estimate.total)))
    rows.append((f"activations kept, {WAYS[not estimate.checkpointing]}", gib(estimate.other.kept)))
    rows.append((f"at the fullest moment, {WAYS[not estimate.checkpointing]}", gib(estimate.peak(estimate.other))))
    yield str(Table((f"a GPU of {estimate.engine}", "GiB"), tuple(rows)))
    yield f"a micro-batch: {samples.rows} samples of {samples.tokens} tokens, {samples.labelled} of them labelled"


def step_lines(estimate: Estimate, cluster: Cluster) -> Iterator[str]:
    """An optimizer step: what a GPU sends, what it computes, how long it takes."""
    sent = estimate.traffic
    compute, wire = cluster.seconds(sent, estimate.flop)
    yield (
        f"a step sends {gib(sent.total)} GiB from each GPU: gradients {gib(sent.gradients)}, what trains "
        f"{gib(sent.trained)}, weights {gib(sent.weights)}"
    )
    yield (
        f"a step computes {estimate.flop / TERA:.1f} TFLOP a GPU: {compute:.2f} s at {cluster.utilisation:g} of "
        f"{cluster.flop_per_second / TERA:g} TFLOP/s, {wire:.2f} s on the wire ({cluster.machines} machines), "
        f"{max(compute, wire):.2f} to {compute + wire:.2f} s together"
    )


# Sizes of published models, for estimates where no folder of the model is at hand; from their `config.json`.


_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(width: int, inner: int, layers: int) -> dict[str, Any]:
    """LLaVA-1.5 on a Vicuna (llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf)."""
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": _CLIP,
        "text_config": text,
        "tie_word_embeddings": False,
    }


def _qwen2_5_vl(
    width: int, inner: int, layers: int, heads: int, *, key_heads: int, vision_inner: int
) -> dict[str, Any]:
    """Qwen2.5-VL (Qwen/Qwen2.5-VL-7B-Instruct, Qwen2.5-VL-32B-Instruct)."""
    rotary = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {
        "vocab_size": 152064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 128000,
        "rope_parameters": rotary,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": vision_inner,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": False,
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(4096, 11008, 32),
    "llava-1.5-13b": _llava(5120, 13824, 40),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 18944, 28, 28, key_heads=4, vision_inner=3420),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 27648, 64, 40, key_heads=8, vision_inner=3456),
}
"""Name -> what its `config.json` says of sizes."""


def with_shape(config: Any, shape: str | None, folder: Path) -> Any:
    """The settings over a folder with a published model's config; as they are where no shape is named.

    Raises:
        UserError: there is no such shape, or none is named and the base is still to be composed.
    """
    written_here = {one.name for one in dataclasses.fields(config.model)} & {"compose", "source"}
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
