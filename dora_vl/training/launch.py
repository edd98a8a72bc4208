"""This process among those of a launch: its share of the cores, its rank, its shutdown."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration

from dora_vl.errors import UserError

SECONDS_FOR_THE_FIRST_RANK = 15.0  # on a busy machine the first has taken more than five
SHARED_MEMORY_COLLECTIVES = "deepspeed_shm_comm"
GLOO_WORKER, MOST_SECONDS_TO_REST = "pt_gloo", 10.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
NEVER, LARGEST_INT = -1, 2**31 - 1


def threads_of_this_rank() -> int | None:
    """On a CPU under a launcher, this rank's share of the cores; None leaves torch's or the user's choice.

    Launchers set OMP_NUM_THREADS=1, which leaves cores idle where the CPU does the computing. To be asked before
    accelerate starts: it overwrites LOCAL_WORLD_SIZE, which it does not find under the deepspeed launcher.
    """
    ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if torch.cuda.is_available() or ranks is None:
        return None
    return max(1, available_cores() // int(ranks))


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)


def stand_alone_environment() -> None:
    """Gives a process that is the only rank a free port, and its names where no launcher gave any.

    Without names DeepSpeed would look for MPI; with the launcher's port, the same for every launch, a second run on
    the machine would end because the first has it.
    """
    if several_ranks():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, **{name: os.environ[name] for name in alone if name in os.environ}})
    os.environ["MASTER_PORT"] = str(port)


def several_ranks() -> bool:
    """Whether a launcher started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def start_cpu_communication(*, limit: int = 1800) -> None:
    """On a CPU, starts DeepSpeed's process group over gloo before accelerate starts one that DeepSpeed does not see.

    `limit` is how many seconds a collective may take; DeepSpeed's own is half an hour.

    Its shared-memory collectives are left out: they need a C++ compiler and half a minute, gloo does the same
    here, and DeepSpeed has no setting for it.
    """
    if torch.cuda.is_available():
        return
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_COLLECTIVES] = False
    timeout = timedelta(seconds=limit)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout)


def keep_freed_memory() -> bool:
    """On a CPU with the GNU C library, keeps the memory that one step frees for the next; returns whether it does.

    Left alone, the allocator hands a step's activations back to the system and the next step faults every page in
    again: 30,000 faults and 8 % of a DoRA step of a 135M-parameter language model on two cores. For the training loop,
    where the peak comes back at every step; a process that only loads or converts keeps the system's habit.
    """
    if torch.cuda.is_available() or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_MMAP_THRESHOLD, LARGEST_INT))


def launched_first() -> bool:
    """Whether the launcher made this process the first rank, or none did; before there is a process group to ask."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """The first rank tells how the run goes, the others only what is wrong."""
    level = logging.INFO if launched_first() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """A mistake that all ranks find is reported once: the others wait before they report theirs.

    The launcher ends them as soon as the first rank has; what a later rank alone has found is reported after the wait.
    """
    try:
        yield
    except UserError:
        if not launched_first():
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        raise


def is_first_rank() -> bool:
    """Whether this process writes the run's results."""
    return rank_and_ranks()[0] == 0


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def wait_for_everyone() -> None:
    """Goes on when every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def on_first_rank(action: Callable[[], None]) -> None:
    """Does something on the first rank while the others wait; its mistake, if it finds one, is raised on all.

    Raises:
        UserError: on every rank, what `action` raised on the first.
    """
    rank, ranks = rank_and_ranks()
    mistake: list[str | None] = [None]
    if rank == 0:
        try:
            action()
        except UserError as error:
            mistake = [str(error)]
    if ranks > 1:
        torch.distributed.broadcast_object_list(mistake, src=0)
    if mistake[0] is not None:
        raise UserError(mistake[0])


def leave_process_group() -> None:
    """Ends communication with the other ranks, if there was any, and waits until gloo's threads rest.

    DeepSpeed and FSDP keep the group and with it gloo's workers. One that lets go of a tensor while the interpreter is
    already ending aborts the process ("terminate called without an active exception"): after a whole run, its status
    said that it had failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        _wait_until_gloo_rests()


def _wait_until_gloo_rests() -> None:
    """Returns when each worker of gloo has slept twice in a row while this thread slept too, so not for the GIL."""
    end, rested = time.monotonic() + MOST_SECONDS_TO_REST, 0
    while rested < 2 and time.monotonic() < end:
        time.sleep(0.01)
        rested = rested + 1 if all(state == "S" for state in _gloo_states()) else 0


def _gloo_states() -> Iterator[str]:
    """The state letter of each of gloo's workers in this process (proc(5)); nothing where there is no `/proc`."""
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            name, _, rest = path.read_text().partition("(")[2].rpartition(") ")
            if name.startswith(GLOO_WORKER):
                yield rest[0]


# The processes of a run, and whether other ones may go on with it: they must take the same samples in each step.


logger = logging.getLogger(__name__)

DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "optim": "adamw_torch_fused"}
"""transformers' own, where a run does not say."""
BY_ELEMENT = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers whose state has a number for each weight, whatever cuts the weights into parts (`training.optim`)."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run: how many, and DeepSpeed's ZeRO stage; None without DeepSpeed."""

    ranks: int
    zero_stage: int | None

    def __str__(self) -> str:
        engine = "without DeepSpeed" if self.zero_stage is None else f"with ZeRO-{self.zero_stage}"
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} {engine}"


@dataclass(frozen=True)
class Shape:
    """A run's settings and processes, as far as they say who does what of a step."""

    settings: Mapping[str, Any]
    launch: Launch

    def of_training(self, name: str) -> Any:
        """A field of `training:`, or its default."""
        value = self.settings.get("training", {}).get(name)
        return DEFAULTS.get(name) if value is None else value

    @property
    def mixes_tasks(self) -> bool:
        """Whether `data.batch_size` says how many samples a step has (VL-BART)."""
        return self.settings.get("data", {}).get("batch_size") is not None

    @property
    def micro_batch(self) -> int:
        """Samples of a rank's micro-batch."""
        return int(self.of_training("per_device_train_batch_size"))

    @property
    def step_samples(self) -> int:
        """Samples of a step; 0 where the data's settings say it, which are compared themselves."""
        accumulation = int(self.of_training("gradient_accumulation_steps"))
        return 0 if self.mixes_tasks else self.micro_batch * accumulation * self.launch.ranks


def check_shape(checkpoint: Path, then: Shape, now: Shape) -> None:
    """Refuses processes that cannot go on with what others did, and says it where others go on.

    Raises:
        UserError: a step would take another number of samples, or an epoch would, or the optimizer's state cannot be
            dealt out anew.
    """
    if then.step_samples != now.step_samples:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, whose steps took {then.step_samples:,} samples; those "
            f"of this run ({now.launch}) take {now.step_samples:,}: {_what_to_set(then.step_samples, now)}"
        )
    if (then.launch, then.micro_batch) == (now.launch, now.micro_batch):
        return
    _check_epoch(checkpoint, then, now)
    _check_optimizer(checkpoint, then, now)
    logger.info("resume: written by %s, goes on on %s%s", then.launch, now.launch, _of_the_loss(then, now))


def _what_to_set(samples: int, now: Shape) -> str:
    ranks = now.launch.ranks
    if samples % (now.micro_batch * ranks) == 0:
        return f"set training.gradient_accumulation_steps to {samples // (now.micro_batch * ranks)}"
    if samples % ranks == 0:
        return (
            "set training.per_device_train_batch_size and training.gradient_accumulation_steps so that their product "
            f"is {samples // ranks}"
        )
    return f"start as many ranks as divide {samples}"


def _check_epoch(checkpoint: Path, then: Shape, now: Shape) -> None:
    together = [one.micro_batch * one.launch.ranks for one in (then, now)]
    drops = then.of_training("dataloader_drop_last") or now.of_training("dataloader_drop_last")
    if drops and together[0] != together[1] and not now.mixes_tasks:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, this run is {now.launch}, and "
            "training.dataloader_drop_last leaves others of an epoch's samples out for each: start it as then"
        )


def _check_optimizer(checkpoint: Path, then: Shape, now: Shape) -> None:
    optimizer, partitioned = str(now.of_training("optim")), (bool(one.launch.zero_stage) for one in (then, now))
    if any(partitioned) and then.launch != now.launch and optimizer not in BY_ELEMENT:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, this run is {now.launch}, and the state of "
            f"training.optim {optimizer} cannot be dealt out anew: start it as then"
        )


def _of_the_loss(then: Shape, now: Shape) -> str:
    normalised = now.settings.get("optim", {}).get("loss_normalisation")
    if then.micro_batch == now.micro_batch or now.mixes_tasks or normalised != "micro_batch":
        return ""
    return (
        f"; the loss is the mean of micro-batches (optim.loss_normalisation), which were of {then.micro_batch} samples "
        f"and are of {now.micro_batch}"
    )


# Locks that a killed build of a C++ extension leaves: whoever needs that extension next waits for ever.


OLD_SECONDS = 600.0
"""Longer than any of DeepSpeed's or torch's extensions takes to build."""


def report_old_build_locks() -> list[Path]:
    """Names locks in torch's folder of built extensions that no living build can hold; returns them.

    Torch's builder makes an empty file `lock`, and waits without a word while there is one; DeepSpeed builds its CPU
    optimizer (offloading) and other operations that way.
    """
    found = [path for path in _locks() if _age(path) > OLD_SECONDS]
    for path in found:
        logger.warning(
            "%s is %.0f minutes old: a build of a C++ extension that was killed leaves such a file, and whatever needs "
            "the extension waits for ever; remove the file if no other process builds there",
            path,
            _age(path) / 60,
        )
    return found


def _locks() -> list[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return sorted(Path(given).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))  # below py311_cpu, py311_cu126


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # its build has ended meanwhile
        return 0.0


# Threads that wait leave their core to others while others need it: for runs on a CPU that is shared.
#
# OpenMP's threads spin for milliseconds while they wait for each other. Where another process takes part of the
# machine, they keep the core that their partner needs: a small model beside one busy process on two cores has 0.3 of
# its speed.
# To wait asleep costs as much where the machine is free. libgomp reads which of the two it shall do when it is loaded;
# but it spins for 100 turns instead of 300,000 while there are more OpenMP threads than cores, whatever they do (its
# manual, GOMP_SPINCOUNT). So a thread beside the work looks how many cores others keep busy, and holds idle OpenMP
# threads while these are needed. The work's own threads stay as many as they were, and so do its sums.


SECONDS_BETWEEN_LOOKS = 0.5
MARGIN = 0.3
"""Cores that others may keep busy before it counts: a system is never quite at rest."""
SAID_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@functools.cache
def give_way_when_busy() -> bool:
    """Begins to look, once in a process, until it ends; returns whether it does.

    Not with a GPU, one thread, another OpenMP than GNU's, or where the environment says how threads wait.
    """
    said = any(os.environ.get(name) for name in SAID_BY_THE_USER)
    if said or torch.cuda.is_available() or torch.get_num_threads() == 1 or not openmp_libraries():
        return False
    threading.Thread(target=_look, args=(torch.get_num_threads(),), daemon=True, name="busy cores").start()
    return True


def _look(threads: int) -> None:
    cores, load, idle = os.sched_getaffinity(0), OthersLoad(), IdleThreads()
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if threads + load.cores() > len(cores) + MARGIN:
            idle.hold()
        else:
            idle.release()


class OthersLoad:
    """How much of the cores that this process may use goes to other processes, its own workers among them."""

    def __init__(self) -> None:
        self._before = self._times()

    def cores(self) -> float:
        """Cores that others kept busy since the last look."""
        now = self._times()
        passed, all_of_them, own = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return max(0.0, all_of_them - own) / max(passed, 1e-9)

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """The clock, seconds in which the cores did something, and seconds of this process.

        What a hypervisor takes is not counted: nobody here could use it.
        """
        own_cores = os.sched_getaffinity(0)
        busy = sum(
            one.user + one.nice + one.system + one.irq + one.softirq
            for core, one in enumerate(psutil.cpu_times(percpu=True))
            if core in own_cores
        )
        return time.monotonic(), busy, time.process_time()


class IdleThreads:
    """OpenMP threads that do nothing, more than there are cores."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None

    def hold(self) -> None:
        """Has them, from a moment later on."""
        if self._over is None:
            self._over = threading.Event()
            threading.Thread(target=_stand_by, args=(self._over,), daemon=True, name="idle threads").start()

    def release(self) -> None:
        """Lets them end."""
        if self._over is not None:
            self._over.set()
            self._over = None


def _stand_by(over: threading.Event) -> None:
    """A team belongs to the thread that opened it, and ends with it."""
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of no memory: what each thread does
    for library in openmp_libraries():
        ctypes.CDLL(library).GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
    over.wait()


def openmp_libraries() -> list[str]:
    """Files of GNU's OpenMP in this process; wheels bring their own."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return sorted({file for file in files if Path(file).name.startswith("libgomp")})


# What ZeRO-3 asks of the code around it: gathering, loading in the base's number type, staying out of the way.


def gather_to_read(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes sharded parameters whole on every rank; what is written to them is lost."""
    return _gathered(parameters, modifier_rank=None)


def gather_to_write(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes sharded parameters whole on every rank; what the first rank writes becomes part of the shards."""
    return _gathered(parameters, modifier_rank=0)


def _gathered(parameters: Iterable[nn.Parameter], *, modifier_rank: int | None) -> AbstractContextManager[None]:
    sharded = [one for one in parameters if "ds_id" in vars(one)]  # DeepSpeed's own mark of a sharded parameter
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank)


@contextlib.contextmanager
def loading_in(dtype: torch.dtype) -> Iterator[None]:
    """Loads a model's weights in `dtype` under ZeRO-3.

    transformers shards while loading (zero.Init) in the number type of DeepSpeed's own bf16/fp16 switch, which is
    off while float32 adapters train: without this a bfloat16 base becomes float32, twice the memory, in silence.
    """
    config = integration.deepspeed_config()
    if config is None:
        yield
        return
    before = {name: config.get(name) for name in ("bf16", "fp16")}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["fp16"] = {"enabled": dtype == torch.float16}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del config[name]
            else:
                config[name] = value


@contextlib.contextmanager
def without_sharding(arguments: TrainingArguments) -> Iterator[None]:
    """Builds models whole, on this rank alone, though the run uses ZeRO-3 (whose sharding needs all ranks)."""
    holder = vars(arguments).get("hf_deepspeed_config")  # set by transformers where DeepSpeed is used
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if holder is not None:
            integration.set_hf_deepspeed_config(holder)


def load_whole_models_again() -> None:
    """After training, models load whole: transformers would go on sharding them under the run's ZeRO-3."""
    integration.unset_hf_deepspeed_config()
