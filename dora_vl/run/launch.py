"""What a process does as one rank of a launch: its number, its share of the cores and of the weights, its shutdown.

Weights are in shards over the ranks by DeepSpeed's ZeRO-3 or by FSDP2, and whole where something reads or writes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dora_vl.errors import LostRank, UserError, is_communication, one_line

if TYPE_CHECKING:
    from transformers import TrainingArguments


FIRST_RANK_SECONDS = 15.0  # on a busy machine the first has taken more than five
Item = TypeVar("Item")


@functools.cache
def threads_of_this_rank() -> int | None:
    """Returns this rank's share of the cores on a CPU under a launcher; None leaves torch's or the user's choice.

    Launchers set OMP_NUM_THREADS=1, which leaves cores idle where the CPU does the computing. To be asked before
    accelerate starts, which sets LOCAL_WORLD_SIZE itself; a later run in this process has the first one's answer.
    """
    ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if torch.cuda.is_available() or ranks is None:
        return None
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    return max(1, cores // int(ranks))


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
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**single, **{name: os.environ[name] for name in single if name in os.environ}})
    os.environ["MASTER_PORT"] = str(port)


def several_ranks() -> bool:
    """Returns True where a launcher started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def start_cpu_communication(*, limit: int = 1800) -> None:
    """Starts DeepSpeed's process group on a CPU, before accelerate starts one that DeepSpeed does not see.

    `limit` is how many seconds a collective may take. DeepSpeed's shared-memory collectives are left out: they need a
    C++ compiler and half a minute, gloo does the same here, and DeepSpeed only leaves them out for an accelerator that
    lacks them.
    """
    if torch.cuda.is_available():
        return
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class GlooOnly(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(GlooOnly())
    timeout = timedelta(seconds=limit)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout)


def keep_freed_memory() -> bool:
    """Keeps the memory that one step frees for the next, on a CPU with the GNU C library; returns False elsewhere.

    By default, the allocator hands a step's activations back to the system and the next step faults every page in
    again: 8 % of a DoRA step of a 135M-parameter language model on two cores. For the training loop only.
    """
    if torch.cuda.is_available() or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_threshold, 2**31 - 1))


def is_first_launched() -> bool:
    """Returns True on the first rank or without a launcher, before there is a process group to ask."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """Logs progress on the first rank, and only warnings on the others."""
    level = logging.INFO if is_first_launched() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request, to the hub


@contextlib.contextmanager
def first_rank_reports_first() -> Iterator[None]:
    """Lets the rank with the most specific error report first; the launcher stops the others as soon as that rank ends.

    A mistake that all ranks find is the first rank's to report. A rank whose communication broke waits for the one that
    broke it, and says what it knows where no launcher has ended it meanwhile.
    """
    try:
        yield
    except UserError:
        if not is_first_launched():
            time.sleep(FIRST_RANK_SECONDS)
        raise
    except Exception as error:
        if not (several_ranks() and is_communication(error)):
            raise
        time.sleep(2 * FIRST_RANK_SECONDS)
        raise LostRank(
            f"rank {os.environ.get('RANK', '0')}: another rank ended, or did not join within training.ddp_timeout "
            f"({one_line(str(error), 200)}); start again, a training run with --resume last"
        ) from None


def is_first_rank() -> bool:
    """Returns True in the process that writes the run's results."""
    return rank_and_ranks()[0] == 0


def rank_and_ranks() -> tuple[int, int]:
    """Returns this process's number and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather_from_ranks(value: Item) -> list[Item]:
    """Returns the values of all ranks in order; every rank must call it."""
    _, ranks = rank_and_ranks()
    values = [value] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def wait_for_everyone() -> None:
    """Waits until every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def on_first_rank(action: Callable[[], None]) -> None:
    """Runs an action on the first rank while the others wait; an error it raises is raised on all."""
    rank, ranks = rank_and_ranks()
    error: UserError | None = None
    if rank == 0:
        try:
            action()
        except UserError as mistake:
            error = mistake
    if ranks > 1:
        message = [None if error is None else str(error)]
        torch.distributed.broadcast_object_list(message, src=0)
        error = error or (None if message[0] is None else UserError(message[0]))
    if error is not None:
        raise error


def leave_process_group() -> None:
    """Ends communication with the other ranks, if there was any, and waits until gloo's threads rest.

    DeepSpeed and FSDP keep the group and with it gloo's workers. One that lets go of a tensor while the interpreter is
    already ending aborts the process ("terminate called without an active exception"): after a whole run, its status
    said that it had failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        end, rested = time.monotonic() + 10.0, 0
        while rested < 2 and time.monotonic() < end:  # twice in a row, while this thread slept too: not for the GIL
            time.sleep(0.01)
            rested = rested + 1 if all(state == "S" for state in _gloo_states()) else 0


def _gloo_states() -> Iterator[str]:
    """Yields the state letter of each of gloo's threads in this process (proc(5)); none where there is no `/proc`."""
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            name, _, rest = path.read_text().partition("(")[2].rpartition(") ")
            if name.startswith("pt_gloo"):
                yield rest[0]


@dataclass(frozen=True)
class Launch:
    """The processes of a run: how many, and DeepSpeed's ZeRO stage; None without DeepSpeed."""

    ranks: int
    zero_stage: int | None

    def __str__(self) -> str:
        engine = "without DeepSpeed" if self.zero_stage is None else f"with ZeRO-{self.zero_stage}"
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} {engine}"


def end_with_launcher() -> None:
    """Has Linux send SIGTERM when the launcher of this process dies; one without a launcher outlives its shell."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # of <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether a rank holds only a part of the tensor."""
    return "ds_id" in vars(tensor) or isinstance(tensor, DTensor)  # DeepSpeed's mark, and FSDP2's type


@contextlib.contextmanager
def _gathered(tensors: Iterable[Tensor], *, write: bool) -> Iterator[list[Tensor]]:
    tensors = list(tensors)
    sharded = [tensor for tensor in tensors if "ds_id" in vars(tensor)]  # DeepSpeed's mark
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
            yield tensors
        return
    full = [tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    yield full
    for tensor, values in zip(tensors, full, strict=True):
        if write and isinstance(tensor, DTensor):
            with torch.no_grad():
                tensor.copy_(as_shards(values, tensor))


gather_to_read = partial(_gathered, write=False)
"""Gives sharded tensors whole on every rank; what is written to them is lost."""
gather_to_write = partial(_gathered, write=True)
"""Gives sharded tensors whole on every rank; what the first rank writes becomes part of the shards."""


def as_shards(full: Tensor, like: DTensor) -> DTensor:
    """Spreads the first rank's tensor in shards like another's; every rank must call it."""
    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Lists the layers that FSDP2 gathers one at a time."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards each block's weights over the ranks by FSDP2; they are whole while the block runs."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # logits, which nothing changes
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in reversed(blocks_of(model)):  # what is inside before what holds it
        fully_shard(block, mesh=mesh)
    # Whole until its backward pass: losses are found inside the forward, so that nothing would gather it for them.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "generate")  # it runs the vision part before any forward
    vars(model)["_is_fsdp_managed_module"] = True  # so that transformers' generate keeps ranks in step


def let_go_of_whole_weights(model: nn.Module) -> None:
    """Makes FSDP2 gather weights again from shards that were written to; it may still hold old ones from a pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def loading_in(dtype: torch.dtype) -> Iterator[None]:
    """Loads a model's weights in `dtype` under ZeRO-3.

    transformers shards while loading (zero.Init) in the number type of DeepSpeed's own bf16/fp16 switch, which is
    off while float32 adapters train: without this a bfloat16 base becomes float32, twice the memory, in silence.
    """
    from transformers.integrations import deepspeed as integration  # not for --help

    config = integration.deepspeed_config()
    if config is None:
        yield
        return
    before = {name: config[name] for name in ("bf16", "fp16") if name in config}
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    try:
        yield
    finally:
        for name in ("bf16", "fp16"):
            del config[name]
        config |= before


@contextlib.contextmanager
def without_sharding(arguments: TrainingArguments) -> Iterator[None]:
    """Builds models whole, on this rank only, though the run uses ZeRO-3 (whose sharding needs all ranks)."""
    from transformers.integrations import deepspeed as integration  # not for --help

    holder = vars(arguments).get("hf_deepspeed_config")  # set by transformers where DeepSpeed is used
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if holder is not None:
            integration.set_hf_deepspeed_config(holder)


def load_whole_models_again() -> None:
    """Lets models load whole after training, which transformers would go on sharding under the run's ZeRO-3."""
    from transformers.integrations import deepspeed as integration  # not for --help

    integration.unset_hf_deepspeed_config()
