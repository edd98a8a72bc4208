"""The Trainer of a run: transformers', with our order, parameter groups and checkpoints that hold only what trains."""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dora_vl.adapters.adapter import versions
from dora_vl.adapters.files import STATE_FILE, WRITING, drop_old_checkpoints
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.base import Backbone, attention_of
from dora_vl.core import adapted_layers, trained_parts
from dora_vl.data.batches import weigh_over_step
from dora_vl.data.samples import BadSampleLedger
from dora_vl.errors import UserError
from dora_vl.files import replace_folder
from dora_vl.run.arguments import launch_of, zero_stage
from dora_vl.run.folder import ADAPTER, FAULTS, full_disk_reported, run_folder_of, settings_of
from dora_vl.run.launch import gather_to_read, gather_to_write, is_first_rank, shard
from dora_vl.training.callbacks import (
    EarlyStopping,
    Epochs,
    LossLog,
    RunProgress,
    StepLimit,
    StopOnSignal,
    WatchQuestions,
)
from dora_vl.training.checkpoint import (
    OptimizerLayout,
    RunningState,
    layout_of,
    load_random_states,
    load_state,
    load_values,
    save_random_states,
    save_state,
)
from dora_vl.training.checkpoint_files import STATE, StateFiles, write_manifest
from dora_vl.training.faults import StepFaults, check_trained_weights
from dora_vl.training.largest_batch import LargestBatch, cost_of
from dora_vl.training.memory import MemoryEstimate, Table, activations_of, bytes_of, engine_of, held_by, process_bytes
from dora_vl.training.parts import LearningRates, parameter_groups, rates_of, trained_table, with_decay
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.progress import BatchStatistics, Progress, ValidationLoss, random_state_kept
from dora_vl.training.training_data import TrainingData

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class OrderedTrainer(Trainer):
    """Takes a pipeline's samples in the data's order, or the Trainer's where the data has none."""

    def __init__(self, data: TrainingData, **options: Any) -> None:
        super().__init__(train_dataset=data.train, data_collator=cast(Any, data.collate), **options)
        self._sampler = data.sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler


class AdapterTrainer(OrderedTrainer):
    """Trains what `core.trained_parts` lists of an adapted backbone, and saves it at every checkpoint."""

    optimizer_layout: OptimizerLayout
    """Locates what trains in the optimizer; set once training begins."""
    closing: ExitStack
    """Restores signal handlers and the terminal, also after an error in training."""

    def __init__(
        self, pipeline: Pipeline, arguments: TrainingArguments, backbone: Backbone[Any], data: TrainingData
    ) -> None:
        config = pipeline.config
        self.run_folder = self._checkpoint_parent = run_folder_of(config.training)
        self._settings, self._saved_step = settings_of(config), None
        self._adapted, self._writes = backbone.model, arguments.process_index == 0
        attention = {"attn_implementation": attention_of(backbone.model)}
        self.base, self.recipe = config.model.base, {**pipeline.recipe(arguments), **attention} if self._writes else {}

        parts = trained_parts(backbone.model)
        self.rates = rates_of(config.optim, arguments.learning_rate, parts)
        self.parts = with_decay(parts, config.optim.weight_decay_on)
        ledger = BadSampleLedger(
            max_bad_share=config.data.max_bad_share,
            total_samples=data.samples,
            source=data.source,
            read_in_a_pass=data.read_in_a_pass or _read_in_a_pass(data.samples, arguments),
        )
        self.statistics = BatchStatistics(ledger)
        self.validation = None
        if data.validation is not None:
            together = arguments.per_device_eval_batch_size * arguments.world_size
            self.validation = ValidationLoss(data, source=str(config.data.held_out), together=together)
        self.progress = Progress(
            self.statistics,
            None if self.validation is None else self.validation.statistics,
            data,
            skips_seen=not arguments.ignore_data_skip,
        )
        self.rollouts = pipeline.rollouts(backbone, arguments, data)
        self.stop, self.closing = StopOnSignal(), ExitStack()
        self.closing.callback(self.stop.restore)
        self.closing.callback(faulthandler.cancel_dump_traceback_later)
        self.faults = StepFaults(self.run_folder / FAULTS, config.optim.not_finite, scaled=arguments.fp16)
        self._loss = pipeline.loss(backbone)
        patience = config.optim.early_stopping
        super().__init__(
            data,
            model=self._loss,
            args=arguments,
            eval_dataset=None if self.validation is None else self.validation.dataset,
            callbacks=[self.stop, self.faults, StepLimit(), *([] if patience is None else [EarlyStopping(patience)])],
        )
        # The model is in shards already, whose gradients meet by themselves.
        self.is_distributed_loading_by_transformers = bool(config.training.get("fsdp"))
        self._loss_shifts_labels = pipeline.labels_shift  # else a step's token count has the label at position 0 too

    def _run_epoch(self, *options: Any, **named: Any) -> None:
        # The Trainer asks whether it is done after a step only: a whole run that is resumed would take one more.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*options, **named)

    # ---- batches and loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Returns the step's micro-batches, with their bookkeeping taken out and counted."""
        began = time.monotonic()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.statistics.waited += time.monotonic() - began
        self.faults.begin_step([tuple(dict.fromkeys(batch.get("sample_ids", ()))) for batch in batches])
        if self.rollouts is not None:
            try:
                batches, items, numbers = self.rollouts.draw_batches(batches, step=self.state.global_step)
            except UserError as error:
                raise self._after_keeping(error) from error
            self.statistics.note(numbers)
        return [self.statistics.take(batch) for batch in weigh_over_step(batches, device)], items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the Trainer's loss, and notes the loss of a training step and its other numbers."""
        items: Any = num_items_in_batch
        loss, output = cast(Any, super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items))
        if model.training:
            self.faults.note_loss(loss)
            self.statistics.note(output)
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.faults.note_norm(norm)
        return self.faults.norm if norm is None else norm

    def _after_keeping(self, error: UserError) -> UserError:
        """Writes a checkpoint of the steps before a failed one, and returns its error with that said."""
        if not (step := self.state.global_step):
            return error
        self._save_checkpoint(cast(nn.Module, self.model_wrapped), None)
        return UserError(f"{error}; checkpoint-{step} holds the {step} steps before: --resume last goes on from there")

    # ---- validation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *options: Any, **named: Any) -> Any:
        """Computes the mean loss of a validation batch, with its bookkeeping taken out and counted."""
        validation = cast(ValidationLoss, self.validation)
        taken, samples = validation.take(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            # No number of items: the loss is this batch's own mean, and the Trainer multiplies it by nothing.
            loss = cast(Tensor, self.compute_loss(model, self._prepare_inputs(taken))).detach()
        validation.add(loss, samples)
        return loss, None, None

    def evaluation_loop(self, *options: Any, **named: Any) -> Any:
        """Computes the validation loss as a mean over usable samples, where the Trainer takes one over batches."""
        with random_state_kept(self.args.device):  # a stop that leaves a validation out shall change no later dropout
            output: Any = super().evaluation_loop(*options, **named)
        output.metrics.update(cast(ValidationLoss, self.validation).finish(self.args.device))
        return output

    def validate_at_once(self) -> None:
        """Validates as at an epoch's end, which also counts for the best checkpoint."""
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        self._name_best()

    # ---- the optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes a group for each trained part; the class and its options are those of `training.optim`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(self.parts, self.rates, weight_decay=self.args.weight_decay)
            self.optimizer = kind(groups, **options)
            if not self._drops_gradients_itself:
                self.optimizer.register_step_pre_hook(self.faults.drop_gradients)
        return self.optimizer

    @property
    def _drops_gradients_itself(self) -> bool:
        """Returns True under ZeRO 1 to 3, whose optimizers skip a step with a gradient that is not finite."""
        return self.is_deepspeed_enabled and zero_stage(deepspeed_config()) > 0

    # ---- checkpoints: written under another name, renamed when every rank is done

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._saved_step == self.state.global_step:  # asked for at the step's and again at the epoch's end
            return
        self._saved_step = self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        check_trained_weights(self.parts, step=self.state.global_step, folder=self.run_folder)
        with full_disk_reported(self.run_folder, name):
            self._write_checkpoint(model, trial, self.run_folder / WRITING / name)

    def _write_checkpoint(self, model: nn.Module, trial: Any, written: Path) -> None:
        """Writes a checkpoint into another folder, its manifest last, and then renames it."""
        self._checkpoint_parent = written.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_parent = self.run_folder
        self.accelerator.wait_for_everyone()
        self.progress.write(written, self.args.device, writes=self.args.should_save)
        self._name_best(written)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / STATE_FILE))
            write_manifest(written, self._settings, launch_of(self.args))
            replace_folder(written, self.run_folder / written.name)
            written.parent.rmdir()
            best = self.state.best_model_checkpoint
            also = [Path(best)] if best else []
            drop_old_checkpoints(self.run_folder, keep=self.args.save_total_limit, also_keep=also)
        self.accelerator.wait_for_everyone()

    def _name_best(self, written: Path | None = None) -> None:
        """Records, on every rank, the best checkpoint by its final name, not by the one that is being `written`."""
        if step := self.state.best_global_step:
            best = self.run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            folder = written if written is not None and written.name == best.name else best
            self.state.best_model_checkpoint = str(best) if folder.is_dir() else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter folder, `<output_dir>/adapter`; the frozen base is never written."""
        if output_dir is not None:  # a checkpoint's, whose weights were checked before the first of its files
            self._save_adapter(Path(output_dir))
            return
        check_trained_weights(self.parts, step=self.state.global_step, folder=self.run_folder)
        with full_disk_reported(self.run_folder, ADAPTER):
            self._save_adapter(self.run_folder)

    def _save_adapter(self, folder: Path) -> None:
        save_adapter(
            self._adapted,
            folder / ADAPTER,
            base_model=self.base,
            recipe=self.recipe or None,
            gather=gather_to_read,
            write=self._writes,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir), self._running, self.args)

    def _save_scaler(self, output_dir: str) -> None:
        """Writes nothing: the scale is in the state."""

    def _save_rng_state(self, output_dir: str) -> None:
        kept = self._loss.kept()
        save_random_states(Path(output_dir), self.args.process_index, self.args.device, kept)

    @property
    def _running(self) -> RunningState:
        engine = cast("DeepSpeedEngine", self.model_wrapped) if self.is_deepspeed_enabled else None
        return RunningState(self.optimizer_layout, self.lr_scheduler, self.accelerator.scaler, engine)

    # ---- resuming

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # else the Trainer has done it
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        optimizer = cast(Any, self.optimizer).optimizer
        trained = {name: parameter for part in self.parts for name, parameter in part.parameters.items()}
        self.optimizer_layout = layout_of(optimizer, trained, self.args.device)
        if self.is_deepspeed_enabled:
            self.faults.see_before_clipping(cast("DeepSpeedEngine", self.model_wrapped))
        if self._drops_gradients_itself:
            # ZeRO 1 and 2 look for overflow in half precision alone unless told; 3 always does.
            optimizer.check_grad_overflow = True
        if resume_from_checkpoint is not None:
            load_state(Path(resume_from_checkpoint), self._running)
            # The checkpoint's TrainerState has brought back its own intervals of logging, validation and saving.
            self.state.compute_steps(self.args, max_steps)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The folder has frozen tensors too, which the state does not hold.
        load_adapter(self._adapted, Path(resume_from_checkpoint) / ADAPTER, gather=gather_to_write)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank, step = self.args.process_index, self.state.global_step
            kept = load_random_states(Path(checkpoint), rank, self.args.device, seed=self.args.seed, step=step)
            self._loss.keep(kept)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if (best / STATE).is_dir():
            load_values(self.optimizer_layout, StateFiles(best))
            for _, layer in adapted_layers(self._adapted):
                layer.forget_norms()
        else:  # a checkpoint of `save_only_model`
            self._load_from_checkpoint(str(best))


def build_trainer(pipeline: Pipeline, arguments: TrainingArguments, backbone: Backbone[Any]) -> AdapterTrainer:
    """Builds the Trainer of an adapted backbone with its data and callbacks."""
    config, data = pipeline.config, pipeline.data(backbone, arguments)
    if config.training.get("fsdp"):
        shard(backbone.model, arguments.device)
    trainer = AdapterTrainer(pipeline, arguments, backbone, data)
    compares = config.objective.has_reference or config.data.replay > 0
    plan = plan_of(backbone, trainer.rates, arguments, tokens=data.batch_tokens, compares=compares)
    logger.info("what trains, and what it takes:\n%s", "\n".join(map(str, plan.values())))
    device = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else "cpu"
    machine = {"versions": versions(), "device": device, "ranks": arguments.world_size}
    written = {name: asdict(table) for name, table in plan.items()} | machine

    callbacks = trainer.callback_handler.callbacks
    # Our log line first, since transformers puts its trackers there, and in a file alone.
    callbacks.insert(0, LossLog(trainer.run_folder, trainer.statistics, written))
    trainer.remove_callback(PrinterCallback)
    watch = pipeline.watch(backbone, arguments) if config.watch else None
    if watch is not None:
        trainer.add_callback(WatchQuestions(watch, trainer.run_folder))
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm and is_first_rank():
        progress = RunProgress(Console(file=sys.stderr))
        trainer.closing.callback(progress.close)
        trainer.add_callback(progress)
    # Last: the validation that it may begin with is shown, asked and logged by those before.
    trainer.add_callback(Epochs(data.set_epoch, trainer.validate_at_once))
    on_gpu = arguments.device.type == "cuda"
    try_largest = on_gpu if config.try_largest_batch is None else config.try_largest_batch
    if try_largest:
        cost = cost_of(activations_of(backbone.model), recomputed=bool(arguments.gradient_checkpointing))
        # Before a clock runs or a question is asked.
        callbacks.insert(0, LargestBatch(trainer, data=data, cost=cost))
    return trainer


def plan_of(
    backbone: Backbone[Any], rates: LearningRates, arguments: TrainingArguments, *, tokens: int, compares: bool = False
) -> dict[str, Table]:
    """Makes the tables of what trains and of a micro-batch's memory; `compares`: the first values are held as well."""
    model = backbone.model
    engine = engine_of(
        deepspeed_config() if arguments.deepspeed is not None else None,
        ranks=arguments.world_size,
        hidden_width=int(model.config.get_text_config().hidden_size),
        fsdp=getattr(model, "_is_fsdp_managed_module", False),
    )
    held, others = held_by(model, engine, half_precision=arguments.bf16 or arguments.fp16), 0
    if arguments.device.type == "cpu":  # the log's memory there is the process's, not that of tensors alone
        others = max(0, process_bytes() - sum(held.weights.values()) - held.trained)
    estimate = MemoryEstimate(
        engine,
        held,
        activations_of(model).of(tokens=tokens, labelled=tokens, recomputed=bool(arguments.gradient_checkpointing)),
        accumulates=arguments.gradient_accumulation_steps > 1,
        reference=bytes_of(weight for weight in model.parameters() if weight.requires_grad) * compares,
        others=others,
    )
    return {"trained": trained_table(model, trained_parts(model), rates), "memory": estimate.table()}


def _read_in_a_pass(samples: int, arguments: TrainingArguments) -> int:
    """Returns how many samples the ranks read in an epoch: accelerate repeats some to fill the last batches."""
    if arguments.world_size == 1:
        return samples
    together = arguments.per_device_train_batch_size * arguments.world_size
    in_batches = samples - samples % together
    return in_batches if arguments.dataloader_drop_last or in_batches == samples else in_batches + together
