"""Leaves out and names a step whose loss or gradient is not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.core import TrainedPart
from dora_vl.errors import Diverged, UserError, short_names
from dora_vl.files import write_json_lines
from dora_vl.run.folder import last_checkpoint, read_log
from dora_vl.run.launch import gather_from_ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 10
"""This many steps left out in a row end a run that would continue after a single one."""
NAMED_WEIGHTS, LONGEST_WEIGHT = 2, 90
"""A message names this many weights, each in at most this many characters."""


class StepFaults(TrainerCallback):
    """Watches every step's losses and gradient norm on all ranks, and writes faults to `file`, one per line.

    The weights survive a step that is not finite: its gradients are dropped before the optimizer sees them
    (`drop_gradients`, registered with a torch optimizer) or by DeepSpeed's own overflow check (ZeRO 1 to 3). Losses are
    read once per step, after all of its work was queued. `policy` is `optim.not_finite`; `scaled`: gradients overflow
    while float16 searches for a loss scale, so only losses are judged.
    """

    def __init__(self, file: Path, policy: Literal["stop", "skip"], *, scaled: bool = False) -> None:
        self.ended_by: str | None = None  # why the run ends early, for its error line
        self._file, self._policy, self._scaled = file, policy, scaled
        self._ids: Sequence[Sequence[str]] = ()
        self._losses: list[Tensor] = []
        self._norm: float | Tensor | None = None
        self._left_out_in_a_row = 0

    # ---- what the Trainer hands over during a step

    def begin_step(self, ids: Sequence[Sequence[str]]) -> None:
        """Notes the sample ids of each micro-batch on this rank."""
        self._ids, self._losses, self._norm = ids, [], None

    def note_loss(self, loss: Tensor) -> None:
        """Notes a micro-batch's loss before its backward pass."""
        self._losses.append(loss.detach())

    def note_norm(self, norm: float | Tensor | None) -> None:
        """Notes the step's gradient norm where the Trainer or DeepSpeed has it."""
        self._norm = norm if norm is not None else self._norm

    @property
    def norm(self) -> float | None:
        """Returns the step's gradient norm, before any clipping, as far as it is known."""
        return None if self._norm is None else float(self._norm)

    def note_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Computes and notes the norm of the gradients."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            norms = torch._foreach_norm(gradients)
            self._norm = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()

    def see_before_clipping(self, engine: DeepSpeedEngine) -> None:
        """Notes gradients before DeepSpeed's engine clips them: without ZeRO it keeps their norm to itself."""
        clip = engine.clip_fp32_gradients

        def seen_and_clipped() -> None:
            self.note_gradients(engine.parameters())
            clip()

        engine.clip_fp32_gradients = seen_and_clipped

    def drop_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Drops all gradients before a torch optimizer's step where one is not finite, so that nothing changes."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._norm is None:
            self.note_gradients(parameters)
        if not self._gradient_is_finite():
            for parameter in parameters:
                parameter.grad = None

    def _gradient_is_finite(self) -> bool:
        return self._scaled or self._norm is None or math.isfinite(float(self._norm))

    # ---- the verdict

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Removes lines that a resumed run may write again."""
        if state.is_world_process_zero and self._file.is_file():
            write_json_lines(self._file, [line for line in read_log(self._file) if line["step"] <= state.global_step])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agrees with all ranks on whether the step counts."""
        losses = torch.stack(self._losses).float().tolist() if self._losses else []
        broken = [ids for ids, loss in zip(self._ids, losses, strict=True) if not math.isfinite(loss)]
        of_loss, of_gradient = len(broken) > 0, not self._gradient_is_finite()
        if args.world_size > 1:
            fault = torch.tensor([of_loss, of_gradient], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(fault, torch.distributed.ReduceOp.MAX)
            of_loss, of_gradient = map(bool, fault.tolist())
        if of_loss or of_gradient:
            ids = [sample_id for rank in gather_from_ranks(broken) for micro_batch in rank for sample_id in micro_batch]
            what = "the loss is not a number" if of_loss else "the gradient is not a number, though the loss is"
            # A gradient that is a number was not dropped: an infinite loss may have one.
            done = "the step was left out" if of_gradient else "its gradient is one, and the step was taken"
            self._write(state, {"fault": "loss" if of_loss else "gradient", "left_out": of_gradient, "samples": ids})
            self._judge(what, done, ids, state, control)
            return
        self._left_out_in_a_row = 0

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Skips the validation of a run that ends early; see `progress.validation_owed`."""
        if self.ended_by is not None:
            control.should_evaluate = False

    def _judge(self, what: str, done: str, ids: Sequence[str], state: TrainerState, control: TrainerControl) -> None:
        """Warns of a step that is not finite, and ends the run where `policy` says so."""
        self._left_out_in_a_row += 1
        about = f" (samples {short_names(ids)})" if ids else ""
        fault = f"step {state.global_step}: {what}{about}; {done}"
        logger.warning("%s", fault)
        skips = self._policy == "skip"
        if skips and self._left_out_in_a_row < MOST_IN_A_ROW:
            return
        again = f"{self._left_out_in_a_row} steps one after another; " if skips else ""
        or_skip = "" if skips else "; optim.not_finite: skip leaves such steps out and goes on"
        self.ended_by = (
            f"{fault}. {again}checkpoint-{state.global_step} holds what is trained: look at the samples, or "
            f"lower training.learning_rate; --resume last goes on after this step{or_skip}"
        )
        control.should_save = control.should_training_stop = True

    def _write(self, state: TrainerState, fault: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **fault}, ensure_ascii=False) + "\n")


def steps_left_out(file: Path) -> int:
    """Counts the steps that a run left out, including those before a resume."""
    return sum(bool(line.get("left_out")) for line in read_log(file))


# Weights: a NaN in the base makes every later loss NaN, and an adapter of NaN looks like any other folder.


def check_base_weights(model: nn.Module, base: str) -> None:
    """Reads every weight of a loaded base once, not its buffers, which may be masks; every rank must call it."""
    if broken := _not_finite(model.named_parameters()):
        raise UserError(
            f"{base}: {len(broken)} of its weights hold NaN or infinity: "
            f"{short_names(broken, NAMED_WEIGHTS, LONGEST_WEIGHT)}; every loss would be NaN. Fetch or compose the base "
            "again, or set model.dtype: bfloat16 where float16 is too narrow for it"
        )


def check_trained_weights(parts: Sequence[TrainedPart], *, step: int, folder: Path) -> None:
    """Reads what trains before it is written to a run folder; every rank must call it."""
    if broken := _not_finite(pair for part in parts for pair in part.parameters.items()):
        kept = last_checkpoint(folder)
        left = f"{kept} is the last whole checkpoint" if kept else "there is no checkpoint before it"
        raise Diverged(
            f"step {step}: {len(broken)} trained weights are NaN or infinite "
            f"({short_names(broken, NAMED_WEIGHTS, LONGEST_WEIGHT)}), so nothing is saved; {left}. Lower "
            "training.learning_rate or the part's own in optim.rates, or set training.max_grad_norm"
        )


def _not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names the floating weights that hold NaN or infinity on any rank."""
    # DeepSpeed's name for this rank's share of a parameter.
    here = [name for name, weight in named if not _is_finite(vars(weight).get("ds_tensor", weight).detach())]
    return sorted({name for names in gather_from_ranks(here) for name in names})


def _is_finite(weights: Tensor) -> bool:
    # One pass without a mask as large as the weights; finite half-precision weights cannot overflow a float32 sum.
    if weights.is_meta or not weights.is_floating_point():
        return True
    if weights.dtype == torch.float64:
        return bool(weights.isfinite().all())
    return bool(weights.sum(dtype=torch.float32).isfinite()) or bool(weights.isfinite().all())
