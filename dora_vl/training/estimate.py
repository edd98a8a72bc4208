"""Computes memory, traffic and time of a run on any number of ranks, from its settings.

The model is made from only its config, on torch's meta device, so a 32B takes seconds and no memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dora_vl.backbones.families.table import LLAVA
from dora_vl.core import adapted_layers, apply_dora
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.files import write_json
from dora_vl.run.arguments import check_training_section, read_deepspeed
from dora_vl.run.settings import RunConfig
from dora_vl.run.settings_parser import read_run
from dora_vl.training.extras.replay import chats_in_epoch
from dora_vl.training.memory import (
    MemoryEstimate,
    ShardingLayout,
    activations_of,
    bytes_of,
    engine_of,
    held_by,
    process_bytes,
)
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.show import read_first_batch, shown_settings
from dora_vl.training.train_command import pipeline_of

TERA, GIGA, GIB = 1e12, 1e9, 2**30
FORWARD, BACKWARD, TRAINED_BACKWARD = 2, 2, 4
"""A token takes this many FLOP a weight: forward, backward through a frozen weight, and through a trained one."""
ATTENTION_FORWARD, ATTENTION_BACKWARD = 4, 10
"""Attention takes this many FLOP a query, key and hidden number: two products forward, five backward (with scores)."""


@dataclass(frozen=True)
class Samples:
    """Describes a micro-batch: its samples' number, and the tokens and labelled tokens of each.

    A row of compared or drawn answers holds all of a sample's. The reference's pass before each step sees the share
    `reference` of them; where the model draws answers itself (`drawn`), each token passes forward once more.
    """

    count: int
    tokens: int
    labelled: int
    reference: float = 0.0
    drawn: bool = False


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step."""

    gradients: int
    trained: int
    weights: int

    @property
    def total(self) -> int:
        """Returns the bytes of all collectives."""
        return self.gradients + self.trained + self.weights


def traffic_of(engine: ShardingLayout, *, trained: int, split: int, stay_whole: int, micro_batches: int) -> Traffic:
    """Counts ring collectives: an all-gather or a reduce-scatter of S bytes sends (N-1)/N S, an all-reduce twice that.

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


@dataclass(frozen=True)
class PlannedRun:
    """A run's model on the meta device and its micro-batch, which are the same on any number of ranks.

    `section` is the settings' `training`; `others` are the bytes that a process on a CPU holds beside its tensors.
    """

    model: PreTrainedModel
    section: Mapping[str, Any]
    half_precision: bool
    samples: Samples
    others: int = 0

    @property
    def recomputes(self) -> bool:
        """Returns True where the settings ask for gradient checkpointing."""
        return bool(self.section.get("gradient_checkpointing") or self.section.get("activation_checkpointing"))

    @property
    def micro_batches(self) -> int:
        """Returns how many micro-batches a step has."""
        return int(self.section.get("gradient_accumulation_steps", 1))

    def on(self, ranks: int, deepspeed: str | None = None, *, recomputes: bool | None = None) -> MemoryEstimate:
        """Returns the estimate for a number of ranks, with the run's engine and checkpointing or others."""
        engine = self._engine(ranks, deepspeed)
        samples = self.samples
        return MemoryEstimate(
            engine,
            held_by(self.model, engine, half_precision=self.half_precision),
            activations_of(self.model).of(
                tokens=samples.count * samples.tokens,
                labelled=samples.count * samples.labelled,
                recomputed=self.recomputes if recomputes is None else recomputes,
            ),
            accumulates=self.micro_batches > 1,
            reference=self._trained_bytes * (samples.reference > 0),
            others=self.others,
        )

    @property
    def _trained_bytes(self) -> int:
        return bytes_of(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def _engine(self, ranks: int, deepspeed: str | None = None) -> ShardingLayout:
        chosen = deepspeed or self.section.get("deepspeed")
        return engine_of(
            None if chosen is None else read_deepspeed(chosen),
            ranks=ranks,
            hidden_width=int(self.model.config.get_text_config().hidden_size),
            fsdp=deepspeed is None and bool(self.section.get("fsdp")),
        )

    def traffic(self, ranks: int) -> Traffic:
        """Returns what a rank sends in a step."""
        engine = self._engine(ranks)
        return traffic_of(
            engine,
            trained=self._trained_bytes,
            split=bytes_of(self.model.parameters()),
            stay_whole=held_by(self.model, engine, half_precision=self.half_precision).gathered,
            micro_batches=self.micro_batches,
        )

    def flop(self) -> int:
        """Returns a rank's FLOP for a step in the text layers and the head; passes without gradients are included."""
        samples, text = self.samples, self.model.config.get_text_config()
        tokens, labelled = samples.count * samples.tokens, samples.count * samples.labelled
        attention = tokens * samples.tokens * text.hidden_size * text.num_hidden_layers
        forward, backward = ATTENTION_FORWARD * attention, ATTENTION_BACKWARD * attention
        embeddings = self.model.get_input_embeddings().weight
        twice = {id(layer.weight) for _, layer in adapted_layers(self.model) if layer.adapter.drops_whole_change}
        for weight in self.model.get_decoder().parameters():
            if weight.dim() > 1 and weight is not embeddings:
                products = tokens * weight.numel() * (2 if id(weight) in twice else 1)
                forward += FORWARD * products
                backward += (TRAINED_BACKWARD if weight.requires_grad else BACKWARD) * products
        head = (FORWARD + BACKWARD) * labelled * text.hidden_size * text.vocab_size
        ahead = samples.reference + samples.drawn
        passes = 1 + self.recomputes + ahead
        return int(self.micro_batches * (forward * passes + backward + head * (1 + ahead / 2)))


def plan_run(
    pipeline: Pipeline, *, tokens: int | None = None, labelled: int | None = None, counted: bool = False
) -> PlannedRun:
    """Builds a run's model without weights, and describes its micro-batch.

    `tokens` counts those of a sample, pictures included (None: `data.max_tokens`), and `labelled` those of them that
    have a label (None: all that are not a picture's); with all answers that the data compares if they are `counted`.
    """
    section = check_training_section(pipeline.config.training)
    settings: Any = pipeline.config
    if settings.model.quantisation is not None:
        raise UserError("model.quantisation: of a quantised base no estimate is made; leave model.quantisation out")
    backbone = pipeline.skeleton()
    model = backbone.model.to(getattr(torch, settings.model.dtype))
    apply_dora(model, replace(pipeline.dora_config(backbone), init="kaiming"))
    tokens = int(settings.data.max_tokens if tokens is None else tokens)
    pictures = model.config.image_seq_length if model.config.model_type == LLAVA else 0
    if tokens < pictures + 2:
        raise UserError(f"{tokens} tokens per sample: a single picture of this model takes {pictures}; raise --tokens")
    words = tokens - pictures - 1
    count = int(section.get("per_device_train_batch_size", 8))
    if labelled is None and settings.objective.kind == "reward":
        labelled = settings.objective.max_new_tokens
    samples = Samples(count, tokens, words if labelled is None else min(labelled, words))
    samples = with_answers(settings, samples, counted=counted)
    half = settings.adapter.method == "full" and bool(section.get("bf16") or section.get("fp16"))
    return PlannedRun(model, section, half, samples)


def with_answers(settings: Any, samples: Samples, *, counted: bool = False) -> Samples:
    """Returns samples with all answers that are learned from, not only the data's own.

    Compared are a chosen and a rejected one, and the others that the loss adds, unless they are `counted` already;
    drawn ones are as long as they may be. Trees hold a prompt once for its answers, and once more for another picture.
    """
    objective, prompt, answer = settings.objective, samples.tokens - samples.labelled, samples.labelled
    if objective.kind == "supervised":
        return replace(samples, reference=settings.data.replay)
    reference, looks = float(objective.has_reference), objective.exchange_pictures
    if objective.kind == "reward":
        answers, answer = objective.group, objective.max_new_tokens
    elif counted:
        return replace(samples, reference=reference)
    else:
        answers = 2 + looks + any(loss.needs_unmatched for loss in objective.losses)
    prompts = 1 + looks if settings.data.packing == "trees" else answers
    tokens, drawn = prompts * prompt + answers * answer, objective.kind == "reward" and objective.vllm is None
    return Samples(samples.count, tokens, answers * answer, reference, drawn)


@dataclass(frozen=True)
class Cluster:
    """Describes the machines that a run's GPUs are spread over evenly.

    Attributes:
        flop_per_second: peak of one GPU in the weights' number type; `utilisation`: the share that a step's products
            reach, recomputed ones counted.
        bandwidth: bytes per second that a GPU sends to the others of its machine; `network`: a machine to the next.
    """

    machines: int
    flop_per_second: float
    utilisation: float
    bandwidth: float
    network: float

    def seconds(self, traffic: Traffic, flop: int) -> tuple[float, float]:
        """Returns the seconds that a step computes, and that its traffic takes over the slowest link."""
        slowest = min(self.bandwidth, self.network) if self.machines > 1 else self.bandwidth
        return flop / (self.flop_per_second * self.utilisation), traffic.total / slowest


def teraflops(size: int = 1024) -> float:
    """Measures products of matrices in bfloat16 on this machine's device, in TFLOP a second."""
    factor = torch.ones(size, size, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    times: list[float] = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (factor @ factor)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


SHAPES: Mapping[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
"""Maps a published model's name to its `config.json`, for a run whose base is not here."""


def check_shape(shape: str | None) -> None:
    """Raises a `UserError` for a name that is in no table, before any data is read."""
    if shape is not None and shape not in SHAPES:
        raise UserError(f"--shape {shape} is not known; there are {', '.join(SHAPES)}")


def with_shape(config: Any, shape: str | None, folder: Path) -> Any:
    """Points the settings at a folder with a published model's config; without a shape they stay as they are."""
    if shape is None:
        if config.model.compose is not None and not Path(config.model.base).exists():
            named = " or ".join(SHAPES)
            raise UserError(f"model.base {config.model.base} is not composed yet; name its sizes by --shape: {named}")
        return config
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    changed: dict[str, Any] = {"base": str(folder), "revision": None, "compose": None, "source": None}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))


def estimate(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the estimate; yields the lines to print."""
    gpus = arguments.gpus or 1
    machines = arguments.machines or -(-gpus // 8)
    if gpus % machines:
        raise UserError(f"--gpus {gpus} cannot be spread evenly over {machines} machines; give --machines")
    config = read_run([f"--config={arguments.config}", *arguments.settings], program="dora-vl estimate")
    if config.task == "vlbart":
        raise UserError("estimate is for decoders; a VL-BART fits any GPU")

    check_shape(arguments.shape)
    if arguments.gpus is None:
        arguments.tflops, arguments.mfu = teraflops(), 1.0
    planned, epoch = _planned(config, arguments)
    bytes_of_a_gpu, samples = planned.on(gpus), planned.samples
    yield str(bytes_of_a_gpu.table())
    yield f"a micro-batch: {samples.count} samples of {samples.tokens} tokens, {samples.labelled} of them labelled"
    other = planned.on(gpus, recomputes=not planned.recomputes)
    yield f"with training.gradient_checkpointing: {str(not planned.recomputes).lower()} {gib(other.total)} GiB"
    by_engine = ", ".join(f"{stage} {gib(planned.on(gpus, stage).total)}" for stage in ("zero0", "zero2", "zero3"))
    yield f"GiB at the fullest moment by engine: {by_engine}"
    yield "left out: CUDA, NCCL and the allocator's blocks (1 to 2 GiB), the vision part's activations, further experts"
    bandwidth, network = arguments.bandwidth * GIGA, arguments.network * GIGA
    cluster = Cluster(machines, arguments.tflops * TERA, arguments.mfu, bandwidth, network)
    yield from step_lines(planned, gpus, cluster)
    if epoch is not None:
        steps = _steps(planned, epoch, replay=config.data.replay)
        seconds = cluster.seconds(planned.traffic(gpus), planned.flop())[0]
        took = f"at least {math.ceil(steps * seconds / 60):,} min on this machine"
        yield f"{steps:,} steps: {took}; reading pictures, writing chats and the test come on top"
    if arguments.json is not None:
        record = {**asdict(bytes_of_a_gpu), "traffic": asdict(planned.traffic(gpus)), "samples": asdict(samples)}
        write_json(arguments.json, {**record, "total": bytes_of_a_gpu.total, "flop": planned.flop()})
        yield f"{arguments.json}"


def _planned(config: RunConfig, arguments: argparse.Namespace) -> tuple[PlannedRun, int | None]:
    """Plans the run; for this machine by its first batch, and with the samples of an epoch."""

    tokens, labelled, epoch = arguments.tokens, arguments.labelled, None
    if arguments.gpus is None:
        tokens, labelled, epoch = first_batch_tokens(config)
    with tempfile.TemporaryDirectory() as folder:
        config = with_shape(config, arguments.shape, Path(folder))
        logging.getLogger("transformers").setLevel(logging.ERROR)
        planned = plan_run(pipeline_of(config), tokens=tokens, labelled=labelled, counted=epoch is not None)
    if epoch is not None and not torch.cuda.is_available():  # as a run's log counts there
        planned = replace(planned, others=process_bytes())
    return planned, epoch


def first_batch_tokens(config: RunConfig) -> tuple[int, int, int]:
    """Returns a sample's tokens and labelled tokens in the first micro-batch, and the samples of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        first = read_first_batch(pipeline_of(shown_settings(config, Path(folder))))
    samples = max(1, len(first.names))
    tokens = first.batch["input_ids"].numel()  # padding is computed too
    labelled = int((first.batch["labels"] != IGNORED_LABEL).sum())
    return math.ceil(tokens / samples), math.ceil(labelled / samples), first.epoch_samples


def _steps(planned: PlannedRun, samples: int, *, replay: float) -> int:
    """Returns at least how many optimizer steps an epoch's samples, and the base's chats beside them, take."""
    if (most := planned.section.get("max_steps", -1)) > 0:
        return int(most)
    micro_batches = math.ceil((samples + chats_in_epoch(replay, samples)) / planned.samples.count)
    return math.ceil(math.ceil(micro_batches / planned.micro_batches) * planned.section.get("num_train_epochs", 3))


def gib(size: int) -> str:
    """Formats bytes as GiB."""
    return f"{size / GIB:.2f}"


def step_lines(planned: PlannedRun, gpus: int, cluster: Cluster) -> Iterator[str]:
    """Yields what a GPU sends and computes in an optimizer step, and how long that takes."""
    sent, flop = planned.traffic(gpus), planned.flop()
    compute, wire = cluster.seconds(sent, flop)
    yield (
        f"a step sends {gib(sent.total)} GiB from each GPU: gradients {gib(sent.gradients)}, what trains "
        f"{gib(sent.trained)}, weights {gib(sent.weights)}"
    )
    yield (
        f"a step computes {flop / TERA:.1f} TFLOP a GPU: {compute:.2f} s at {cluster.utilisation:g} of "
        f"{cluster.flop_per_second / TERA:.3g} TFLOP/s, {wire:.2f} s on the wire ({cluster.machines} machines), "
        f"{max(compute, wire):.2f} to {compute + wire:.2f} s together"
    )
