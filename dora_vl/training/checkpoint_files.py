"""Writes and checks a checkpoint's manifest, and reads and writes its state in files that hold only data."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_vl.adapters.adapter import file_hash, versions
from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.errors import SettingError, UserError, short_repr
from dora_vl.files import read_json, write_json
from dora_vl.run.folder import ADAPTER
from dora_vl.run.launch import Launch
from dora_vl.run.settings_parser import flattened

logger = logging.getLogger(__name__)
cannot_resume = partial(SettingError, "resume")

MANIFEST = "manifest.json"
STATE, STATE_NUMBERS = "state", "state.json"
"""This folder of a checkpoint holds what a resumed run needs beside the adapter, its numbers in this file."""
MAY_CHANGE = tuple(
    f"{section}{name}"
    for section, names in {
        "": "resume overwrite test_only watch try_largest_batch variant evaluation.* adapter.initial",
        "optim.": "not_finite early_stopping",
        "data.": "workers feature_cache follow_links max_bad_share closed_answers*",  # compared as the lists themselves
        "training.": "output_dir save_* logging_* report_to run_name disable_tqdm use_cpu ddp_timeout eval_* "
        "per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better deepspeed "
        "per_device_train_batch_size gradient_accumulation_steps",  # compared as the engine and the samples of a step
        "training.dataloader_": "num_workers pin_memory persistent_workers prefetch_factor",  # drop_last: other samples
    }.items()
    for name in names.split()
)
"""These settings do not change what the remaining steps compute, or are compared elsewhere."""
MAY_GROW = ("training.max_steps", "training.num_train_epochs")
"""People change these settings to train longer; the schedule of the learning rate moves with them."""
NEXT_STEP = "copy the checkpoint again, or resume from another one of the run"
DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "optim": "adamw_torch_fused"}
"""transformers gives these values to fields that a run does not set."""
BY_ELEMENT = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""These optimizers have one state number per weight, so that weights can be split anywhere (`training.optim`)."""
FILE_BYTES = 1 << 30
"""A file of tensors is closed at this size, so that a writer never holds much more than that."""


def write_manifest(checkpoint: Path, settings: Mapping[str, Any], launch: Launch) -> None:
    """Writes the manifest of a complete checkpoint; call it last, before the folder gets its name."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {str(path.relative_to(checkpoint)): (path.stat().st_size, file_hash(path)) for path in paths}
    content = {
        "settings": settings,
        "launch": dataclasses.asdict(launch),
        "versions": versions(),
        "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in files.items()},
    }
    write_json(checkpoint / MANIFEST, content)


def check_manifest(checkpoint: Path, settings: Mapping[str, Any], launch: Launch) -> None:
    """Compares a checkpoint with its manifest and with the run that would resume from it."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise cannot_resume(f": {path} is missing; {NEXT_STEP}")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        then, files, wrote = written["settings"], written["files"], Launch(**written["launch"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; resume from another checkpoint of the run") from error
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise cannot_resume(f": {file} is missing; {NEXT_STEP}")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise cannot_resume(f": {file} has {size:,} bytes instead of {expected['bytes']:,}; {NEXT_STEP}")
        if file_hash(file) != expected["sha256"]:
            raise cannot_resume(f": {file} was changed after it was written; {NEXT_STEP}")
    _check_shape(checkpoint, then, wrote, settings, launch)
    _check_settings(checkpoint, then, settings)


def check_same_base(checkpoint: Path, base: str, sha256: str | None) -> None:
    """Compares the base's content hash with that of the checkpoint's adapter, where both are known."""
    recipe = checkpoint / ADAPTER / RECIPE_FILE
    then = read_json(recipe).get("base_sha256") if recipe.is_file() else None
    if then and sha256 and then != sha256:
        raise cannot_resume(
            f": {checkpoint} was trained on another base than what {base} holds now (content hash {then[:12]}, "
            f"is {sha256[:12]}). Put the base back, or begin a new run from its weights with --adapter.initial "
            f"{checkpoint / ADAPTER}"
        )


def _check_settings(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, here = (
        {name: value for name, value in flattened(settings).items() if value not in (None, {})}
        for settings in (then, now)
    )
    changed: list[str] = []
    for name in sorted(before.keys() | here.keys()):
        was, is_now = before.get(name, "not set"), here.get(name, "not set")
        if was == is_now or any(fnmatch(name, pattern) for pattern in MAY_CHANGE):
            continue
        change = f"{name} was {short_repr(was)}, is {short_repr(is_now)}"
        if name in MAY_GROW:
            logger.info("resume: %s", change)
        else:
            changed.append(change)
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        raise cannot_resume(
            f": {checkpoint} was written with other settings: {'; '.join(changed[:2])}{more}. Put them back, or "
            f"begin a new run from its weights with --adapter.initial {checkpoint / ADAPTER}"
        )


def _check_shape(
    checkpoint: Path, then: Mapping[str, Any], wrote: Launch, settings: Mapping[str, Any], launch: Launch
) -> None:
    """Refuses a launch whose steps would not take the same samples as those of the run that it resumes."""
    before, now = (
        DEFAULTS | {name: value for name, value in run.get("training", {}).items() if value is not None}
        for run in (then, settings)
    )
    written = f": {checkpoint} was written by {wrote}"
    mixes_tasks = settings.get("data", {}).get("batch_size") is not None  # which are the samples of its step
    was, micro_batch = (int(training["per_device_train_batch_size"]) for training in (before, now))
    samples = was * int(before["gradient_accumulation_steps"]) * wrote.ranks
    here, together = micro_batch * int(now["gradient_accumulation_steps"]) * launch.ranks, micro_batch * launch.ranks
    if samples != here and not mixes_tasks:
        if samples % together == 0:
            advice = f"set training.gradient_accumulation_steps to {samples // together}"
        elif samples % launch.ranks == 0:
            advice = (
                "set training.per_device_train_batch_size and training.gradient_accumulation_steps so that their "
                f"product is {samples // launch.ranks}"
            )
        else:
            advice = f"start as many ranks as divide {samples}"
        raise cannot_resume(
            f"{written}, whose steps took {samples:,} samples; those of this run ({launch}) take {here:,}: {advice}"
        )
    if (wrote, was) == (launch, micro_batch):
        return
    drops = before.get("dataloader_drop_last") or now.get("dataloader_drop_last")
    if drops and was * wrote.ranks != together and not mixes_tasks:
        raise cannot_resume(
            f"{written}, this run is {launch}, and training.dataloader_drop_last leaves others of an epoch's samples "
            "out for each: start it as then"
        )
    partitioned = wrote.zero_stage or launch.zero_stage
    if partitioned and wrote != launch and now["optim"] not in BY_ELEMENT:
        raise cannot_resume(
            f"{written}, this run is {launch}, and the state of training.optim {now['optim']} cannot be dealt out "
            "anew: start it as then"
        )
    of_loss = ""
    by_micro_batch = settings.get("optim", {}).get("loss_normalisation") == "micro_batch" and not mixes_tasks
    if by_micro_batch and was != micro_batch:
        of_loss = (
            "; the loss is the mean of micro-batches (optim.loss_normalisation), which were of "
            f"{was} samples and are of {micro_batch}"
        )
    logger.info("resume: written by %s, goes on on %s%s", wrote, launch, of_loss)


# State: tensors in safetensors, all else in JSON.


def write_state(checkpoint: Path, tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Writes named tensors to a checkpoint's `state/` as they come; they are on the CPU and share no memory."""
    folder = checkpoint / STATE
    folder.mkdir(parents=True, exist_ok=True)
    pending: dict[str, Tensor] = {}
    size = files = 0
    for name, tensor in tensors:
        pending[name] = tensor
        size += tensor.nbytes
        if size >= file_bytes:
            files += 1
            save_file(pending, folder / f"tensors-{files:05d}.safetensors")
            pending, size = {}, 0
    if pending or not files:
        save_file(pending, folder / f"tensors-{files + 1:05d}.safetensors")


def write_numbers(checkpoint: Path, numbers: Mapping[str, Any], file: str = STATE_NUMBERS) -> None:
    """Writes numbers, or one rank's random state, as JSON."""
    (checkpoint / STATE).mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(numbers)  # a float's shortest digits: the same float when they are read
    except TypeError as error:
        raise SettingError(
            "training.optim", f": {file}: {error}; a checkpoint holds numbers and tensors alone: set another"
        ) from error
    (checkpoint / STATE / file).write_text(text + "\n", encoding="utf-8")


class StateFiles:
    """A checkpoint's state, read piece by piece."""

    def __init__(self, checkpoint: Path) -> None:
        folder = checkpoint / STATE
        self.numbers = read_json(folder / STATE_NUMBERS)
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("tensors-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def names(self) -> frozenset[str]:
        """Returns the names of all tensors."""
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, on the CPU."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def is_plain(value: Any) -> bool:
    """Returns True where a value survives JSON unchanged, except that a tuple becomes a list."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
