"""What one optimizer step sends over the wire, and how long it takes by a share of the GPUs' peak and the links' speed.

Bytes that each of N ranks sends, by ring collectives (an all-gather or a reduce-scatter of S bytes sends (N-1)/N S, an
all-reduce twice that), with a micro-batches a step, G bytes of gradients of what trains, P bytes of what trains and W
bytes of all weights that ZeRO-3 splits:

    DDP, ZeRO-0    2 (N-1)/N G                        the gradients of what trains, once
    ZeRO-1           (N-1)/N (G + P)                  gradients to their owner once, what trains back to all
    ZeRO-2           (N-1)/N (a G + P)                gradients to their owner at each micro-batch
    ZeRO-3           (N-1)/N (a G + a (2 W - R))      weights, frozen ones too, gathered forward and backward; R bytes
                                                      stay whole between the two (`stage3_max_reuse_distance`)
"""

from __future__ import annotations

from dataclasses import dataclass

from dora_vl.training.engine_memory import Engine

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
