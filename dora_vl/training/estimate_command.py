"""`dora-vl estimate`: memory, traffic and time of a run, before it is started and without its weights."""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, number_between, positive_int
from dora_vl.files import write_json

if TYPE_CHECKING:
    from dora_vl.run.settings import RunConfig
    from dora_vl.training.estimate import Cluster, PlannedRun

DESCRIPTION = """\
Says what a run will take of each GPU: bytes by part, bytes that an optimizer step sends, and its time from a share of
the GPUs' peak and the links' speed. The model is made from only its config, on torch's meta device: no weight is read.

  dora-vl estimate llava/llava15 --variant 7b_dora --shape llava-1.5-7b --gpus 8
  dora-vl estimate my_run.yaml --gpus 64 --machines 8 --mfu 0.4 --training.deepspeed zero2
  dora-vl estimate my_run.yaml               on this machine: its speed is measured, the first batch is counted

What this command does not know is a setting of the run, --section.key value, as for the script itself. docs/starting.md
says what is left out.
"""
TERA, GIGA, GIB = 1e12, 1e9, 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; a run's own settings may come between them."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run, takes_settings=True)
    amount, share = number_between(float, 1e-9, 1e9), number_between(float, 1e-9, 1)
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="GPUs in all (default: one device of this machine)"
    )
    parser.add_argument("--machines", type=positive_int, metavar="M", help="that hold them (default: 8 GPUs in each)")
    parser.add_argument("--shape", metavar="NAME", help="a published model's sizes, in place of model.base")
    parser.add_argument("--tokens", type=positive_int, metavar="T", help="of a sample (default: data.max_tokens)")
    parser.add_argument("--labelled", type=positive_int, metavar="T", help="of these (default: all but the picture's)")
    parser.add_argument("--mfu", type=share, default=0.4, metavar="F", help="share of the peak (default: 0.4)")
    parser.add_argument("--tflops", type=amount, default=312.0, help="a GPU's peak (default: 312, an A100's)")
    parser.add_argument("--bandwidth", type=amount, default=230.0, metavar="GB/s", help="between GPUs (default: 230)")
    parser.add_argument("--network", type=amount, default=100.0, metavar="GB/s", help="of a machine (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the numbers to this file")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the estimate; yields the lines to print."""
    from dora_vl.run.settings_parser import read_run  # jsonargparse: not for --help

    gpus = arguments.gpus or 1
    machines = arguments.machines or -(-gpus // 8)
    if gpus % machines:
        raise UserError(f"--gpus {gpus} cannot be spread evenly over {machines} machines; give --machines")
    config = read_run([f"--config={arguments.config}", *arguments.settings], program="dora-vl estimate")
    if config.task == "vlbart":
        raise UserError("estimate is for decoders; a VL-BART fits any GPU")
    from dora_vl.training.estimate import Cluster, check_shape, teraflops

    check_shape(arguments.shape)
    if arguments.gpus is None:
        arguments.tflops, arguments.mfu = teraflops(), 1.0
    planned, epoch = _planned(config, arguments)
    estimate, samples = planned.on(gpus), planned.samples
    yield str(estimate.table())
    yield f"a micro-batch: {samples.rows} samples of {samples.tokens} tokens, {samples.labelled} of them labelled"
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
        record = {**asdict(estimate), "traffic": asdict(planned.traffic(gpus)), "samples": asdict(samples)}
        write_json(arguments.json, {**record, "total": estimate.total, "flop": planned.flop()})
        yield f"{arguments.json}"


def _planned(config: RunConfig, arguments: argparse.Namespace) -> tuple[PlannedRun, int | None]:
    """Plans the run; for this machine by its first batch, and with the samples of an epoch."""
    import torch

    from dora_vl.training.estimate import plan_run, with_shape
    from dora_vl.training.memory import process_bytes
    from dora_vl.training.train_command import pipeline_of

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
    from dora_vl.data.samples import IGNORED_LABEL
    from dora_vl.training.show_command import read_first_batch, shown_settings
    from dora_vl.training.train_command import pipeline_of

    with tempfile.TemporaryDirectory() as folder:
        first = read_first_batch(pipeline_of(shown_settings(config, Path(folder))))
    samples = max(1, len(first.names))
    tokens = first.batch["input_ids"].numel()  # padding is computed too
    labelled = int((first.batch["labels"] != IGNORED_LABEL).sum())
    return math.ceil(tokens / samples), math.ceil(labelled / samples), first.epoch_samples


def _steps(planned: PlannedRun, samples: int, *, replay: float) -> int:
    """Returns at least how many optimizer steps an epoch's samples, and the base's chats beside them, take."""
    from dora_vl.training.extras.replay import chats_in_epoch

    if (most := planned.section.get("max_steps", -1)) > 0:
        return int(most)
    micro_batches = math.ceil((samples + chats_in_epoch(replay, samples)) / planned.samples.rows)
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
