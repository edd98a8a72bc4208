"""transformers' Trainer with our parameter groups, checkpoints that hold only what trains, and our sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dora_vl.adapters.files import STATE_FILE, WRITING, complete_checkpoints, drop_old_checkpoints, replace_folder
from dora_vl.core import TrainedPart, adapted_layers
from dora_vl.data.batches import over_step
from dora_vl.run.arguments import launch_of, zero_stage
from dora_vl.run.folder import ADAPTER, full_disk_reported
from dora_vl.training.checkpoint import (
    RunningState,
    load_random_states,
    load_state,
    load_trained,
    save_random_states,
    save_state,
)
from dora_vl.training.checkpoint_files import STATE, write_manifest
from dora_vl.training.faults import StepFaults, check_trained_weights
from dora_vl.training.optim import LearningRates, parameter_groups
from dora_vl.training.optimizer_state import OptimizerPlaces, places_of
from dora_vl.training.progress import BatchStatistics, Progress
from dora_vl.training.validation import ValidationLoss, random_state_kept

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Persistence:
    """Where a run is kept, and how its adapter folder is written and read; every rank calls `save` and `load`.

    Reading it takes frozen tensors too, which a checkpoint's state does not hold. The run's `settings` are for the
    account of a checkpoint; the base's content hash is known on the rank that writes.
    """

    run_folder: Path
    save: Callable[[Path], None]
    load: Callable[[Path], object]
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_sha256: str | None = None


@dataclass(frozen=True)
class Monitors:
    """What counts training batches, what watches losses and gradients, and what sums validation batches and loss."""

    statistics: BatchStatistics
    faults: StepFaults
    validation: ValidationLoss | None = None


class AdapterTrainer(Trainer):
    """Trains `parts`, as `core.trained_parts` lists them, and saves them at every checkpoint.

    Without a `sampler` the Trainer orders the samples. Where `labels_shift`, a label at position 0 has nothing to be
    predicted from, and the token count of a step leaves it out.
    """

    places: OptimizerPlaces
    """Where the optimizer holds what trains, once it is there."""

    def __init__(
        self,
        *,
        rates: LearningRates,
        sampler: Sampler[Any] | None,
        parts: Sequence[TrainedPart],
        persistence: Persistence,
        monitors: Monitors,
        labels_shift: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rates = rates
        self.sampler = sampler
        self.parts = parts
        self.persistence = persistence
        self.statistics, self.validation, self.faults = monitors.statistics, monitors.validation, monitors.faults
        self.add_callback(self.faults)
        self.progress = Progress(self.statistics, None if self.validation is None else self.validation.statistics)
        self._checkpoint_parent = persistence.run_folder
        self._saved_step: int | None = None
        self._loss_shifts_labels = labels_shift

    def _run_epoch(self, *options: Any, **named: Any) -> None:
        # The Trainer asks whether it is done after a step only: a whole run that is resumed would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*options, **named)

    # ---- what a step sees

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The step's micro-batches, with their bookkeeping taken out and counted."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.faults.begin_step([tuple(batch.get("sample_ids", ())) for batch in batches])
        return [self.statistics.take(batch) for batch in over_step(batches, device)], items

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *options: Any, **named: Any) -> Any:
        """The Trainer's; what a step trains on is watched."""
        loss: Any = super().compute_loss(model, inputs, *options, **named)
        if model.training:
            self.faults.note_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.faults.note_norm(norm)
        return self.faults.norm if norm is None else norm

    # ---- validation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *options: Any, **named: Any) -> Any:
        """One validation batch: its mean loss, with its bookkeeping taken out and counted."""
        validation = cast(ValidationLoss, self.validation)
        taken, samples = validation.take(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            # No number of items: the loss is this batch's own mean, and the Trainer multiplies it by nothing.
            loss = cast(Tensor, self.compute_loss(model, self._prepare_inputs(taken))).detach()
        validation.add(loss, samples)
        return loss, None, None

    def evaluation_loop(self, *options: Any, **named: Any) -> Any:
        """The validation data's loss as the mean over usable samples; the Trainer's is one over batches."""
        with random_state_kept(self.args.device):  # a stop that leaves a validation out shall change no later dropout
            output: Any = super().evaluation_loop(*options, **named)
        output.metrics.update(cast(ValidationLoss, self.validation).finish(self.args.device))
        return output

    def validate_at_once(self) -> None:
        """As at an epoch's end, also for the choice of the best checkpoint, which is there by now."""
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        self._name_best(self.persistence.run_folder)

    # ---- the optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each trained part; the class and its options are those of `training.optim`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(self.parts, self.rates, weight_decay=self.args.weight_decay)
            self.optimizer = kind(groups, **options)
            if not self._drops_gradients_itself:
                self.optimizer.register_step_pre_hook(self.faults.drop_gradients)
        return self.optimizer

    def _see_gradients_before_clipping(self, engine: DeepSpeedEngine) -> None:
        """The engine clips float32 gradients without ZeRO inside its step, and keeps their norm to itself."""
        clip = engine.clip_fp32_gradients

        def seen_and_clipped() -> None:
            self.faults.note_gradients(engine.parameters())
            clip()

        engine.clip_fp32_gradients = seen_and_clipped

    @property
    def _drops_gradients_itself(self) -> bool:
        """Whether DeepSpeed's optimizer leaves a step out whose gradient is no number: ZeRO 1 to 3."""
        return self.is_deepspeed_enabled and zero_stage(deepspeed_config()) > 0

    # ---- checkpoints: written under another name, renamed when every rank is done

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._saved_step == self.state.global_step:  # asked for at the step's and again at the epoch's end
            return
        self._saved_step = self.state.global_step
        run_folder = self.persistence.run_folder
        self._check_weights()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with full_disk_reported(run_folder, name, self._last_whole):
            self._write_checkpoint(model, trial, run_folder, name)

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_folder: Path, name: str) -> None:
        """All of a checkpoint under another folder, its account last; then it gets its name."""
        self._checkpoint_parent = run_folder / WRITING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_parent = run_folder
        self.accelerator.wait_for_everyone()
        self.progress.write(run_folder / WRITING / name, self.args.device, writes=self.args.should_save)
        self._name_best(run_folder, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(run_folder / WRITING / name / STATE_FILE))
            launch = launch_of(self.args)
            write_manifest(run_folder / WRITING / name, self.persistence.settings, launch)
            replace_folder(run_folder / WRITING / name, run_folder / name)
            (run_folder / WRITING).rmdir()
            best = self.state.best_model_checkpoint
            also = [Path(best)] if best else []
            drop_old_checkpoints(run_folder, keep=self.args.save_total_limit, also_keep=also)
        self.accelerator.wait_for_everyone()

    def _name_best(self, run_folder: Path, name: str | None = None) -> None:
        """Every rank records the best checkpoint by the name it gets, not the one (`name`) it is written under."""
        step = self.state.best_global_step
        if step:
            best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            written = best if best.name != name else run_folder / WRITING / best.name
            self.state.best_model_checkpoint = str(best) if written.is_dir() else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter folder, `<output_dir>/adapter`; the frozen base is never written."""
        if output_dir is not None:  # a checkpoint's, which were checked before the first of its files
            self.persistence.save(Path(output_dir) / ADAPTER)
            return
        self._check_weights()
        with full_disk_reported(self.persistence.run_folder, ADAPTER, self._last_whole):
            self.persistence.save(self.persistence.run_folder / ADAPTER)

    def _check_weights(self) -> None:
        check_trained_weights(self.parts, step=self.state.global_step, kept=self._last_whole())

    def _last_whole(self) -> str | None:
        whole = complete_checkpoints(self.persistence.run_folder)
        return whole[-1].name if whole else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir), self._running, self.args)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: the scale is in the state."""

    def _save_rng_state(self, output_dir: str) -> None:
        save_random_states(Path(output_dir), self.args.process_index, self.args.device)

    @property
    def _running(self) -> RunningState:
        engine = cast("DeepSpeedEngine", self.model_wrapped) if self.is_deepspeed_enabled else None
        return RunningState(self.places, self.lr_scheduler, self.accelerator.scaler, engine)

    # ---- going on

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # without it, the Trainer has done it
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        optimizer = cast(Any, self.optimizer).optimizer
        trained = {name: parameter for part in self.parts for name, parameter in part.parameters.items()}
        self.places = places_of(optimizer, trained, self.args.device)
        if self.is_deepspeed_enabled:
            self._see_gradients_before_clipping(cast("DeepSpeedEngine", self.model_wrapped))
        if self._drops_gradients_itself:
            # ZeRO 1 and 2 look for overflow in half precision alone unless told; 3 always does.
            optimizer.check_grad_overflow = True
        if resume_from_checkpoint is not None:
            load_state(Path(resume_from_checkpoint), self._running)
            # How often is logged, validated and saved came back with the checkpoint's TrainerState.
            self.state.compute_steps(self.args, max_steps)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.persistence.load(Path(resume_from_checkpoint) / ADAPTER)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank, step = self.args.process_index, self.state.global_step
            load_random_states(Path(checkpoint), rank, self.args.device, seed=self.args.seed, step=step)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (best / STATE).is_dir():
            load_trained(best, self.places)
            for _, layer in adapted_layers(cast(nn.Module, self.model)):
                layer.forget_norms()
        else:  # of `save_only_model`
            self._load_from_checkpoint(str(best))
