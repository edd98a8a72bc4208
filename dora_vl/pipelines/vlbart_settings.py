"""What a VL-BART run's settings say of its tasks: names, files, features and what trains; what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_vl.backbones.vlbart import ANSWER_HEADS, DORA_TARGETS, KEPT_ROWS, also_trained
from dora_vl.backbones.vlbart_model import VlBartForConditionalGeneration
from dora_vl.core import DoRAConfig
from dora_vl.errors import UserError
from dora_vl.run.adapting import core_config
from dora_vl.run.vlbart_recipe import VlBartRunConfig
from dora_vl.tasks.closed_answers import closed
from dora_vl.tasks.subtask import Subtask, with_input_tokens
from dora_vl.vision.features import first_difference, read_settings

EVERYTHING = ("*",)
ONE_AT_A_TIME = ("per_device_train_batch_size", "per_device_eval_batch_size")


def paths_of(files: str | Sequence[str]) -> tuple[Path, ...]:
    """A task's records file or files."""
    return (Path(files),) if isinstance(files, str) else tuple(Path(file) for file in files)


def vlbart_dora_config(run: VlBartRunConfig, model: VlBartForConditionalGeneration) -> DoRAConfig:
    """What a run adapts and trains in a VL-BART."""
    adapter = run.adapter
    if adapter.method == "full":
        return core_config(adapter, model, targets=EVERYTHING)
    trained = also_trained(model.settings, biases=adapter.train_biases, norm_weights=adapter.train_norm_weights)
    if not adapter.train_projector:
        del trained["projector"]
    if run.data.closed_answers:
        trained["answer_head"] = ANSWER_HEADS
    return core_config(adapter, model, targets=DORA_TARGETS, also_train=trained, also_keep=KEPT_ROWS)


def named_settings(config: VlBartRunConfig) -> dict[str, Any]:
    """What `metrics.json` says of where a run may differ from the published ones."""
    return {
        "task_prompt": config.data.task_prompt,
        "subtitles_first": config.data.subtitles_first,
        "input_tokens": config.data.input_tokens,
        "choice_by_likelihood": config.evaluation.choice_by_likelihood,
        "mixing": config.data.mixing,
        "batch_size": config.data.batch_size,
        "weight_decay_on": config.optim.weight_decay_on,
    }


def check_same_features(trained: Mapping[str, str], tested: Mapping[str, str]) -> None:
    """Refuses test features that were computed in another way than those of training, where both say how.

    Args:
        trained: each task's folder, as `data.features` names it; `tested`: as `evaluation.features` does.

    Raises:
        UserError: a setting differs; both folders and values are named.
    """
    for task, folder in tested.items():
        before = read_settings(Path(trained[task])) if task in trained else None
        now = read_settings(Path(folder))
        if before is None or now is None or (name := first_difference(before, now)) is None:
            continue
        raise UserError(
            f"evaluation.features: {task} is to be tested on {folder}, whose {name} is {now.get(name)!r}, and is "
            f"trained on {trained[task]}, with {before.get(name)!r}; compute both with the same settings"
        )


def with_run_settings(subtask: Subtask, config: VlBartRunConfig) -> Subtask:
    """A task as the run answers it: by text, by choice or from its closed list, with the run's input length."""
    answer_by = subtask.answer_by
    if answer_by == "choice" and not config.evaluation.choice_by_likelihood:
        answer_by = "text"
    if subtask.name in config.data.closed_answers:
        subtask, answer_by = closed(subtask), "closed"
    return dataclasses.replace(with_input_tokens(subtask, config.data.input_tokens), answer_by=answer_by)


def check_names(config: VlBartRunConfig, subtasks: Mapping[str, Subtask]) -> None:
    """Refuses settings that name a task that is not in `subtasks`, one without features, or none to train."""
    data, evaluation = config.data, config.evaluation
    if not data.train:
        raise UserError("data.train names no task; give a records file for one of " + ", ".join(subtasks))
    named = {
        "data.train": data.train,
        "data.validation_files": data.validation_files,
        "evaluation.files": evaluation.files,
    }
    for section, files in named.items():
        if unknown := sorted(set(files) - set(subtasks)):
            raise UserError(f"{section}: no task {unknown[0]!r} here; there are {', '.join(subtasks)}")
        known = {**data.features, **(evaluation.features if section == "evaluation.files" else {})}
        if without := sorted(set(files) - set(known)):
            raise UserError(f"{section} names {without[0]}, but data.features has no folder for it")
