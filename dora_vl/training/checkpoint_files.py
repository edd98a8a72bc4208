"""A checkpoint's state as files that hold data alone: tensors in safetensors, all else in JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_vl.adapters.adapter import file_hash, versions
from dora_vl.adapters.folder import RECIPE_FILE, read_json
from dora_vl.errors import UserError, shown
from dora_vl.training.launch import Launch, Shape, check_shape
from dora_vl.training.run_folder import ADAPTER

# What a checkpoint is: its files, the settings and the ranks that wrote it; a resume compares them.


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE, STATE_NUMBERS = "state", "state.json"
"""The folder of a checkpoint that holds what a resumed run needs beside the adapter, and its file of numbers."""
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl")
MAY_CHANGE = (
    "resume",
    "overwrite",
    "test_only",
    "watch",
    "try_largest_batch",
    "variant",
    "evaluation.*",
    "optim.not_finite",
    "adapter.initial",
    "data.closed_answers*",  # compared as the lists themselves
    "data.workers",
    "data.feature_cache",
    "data.follow_links",
    "data.max_bad_share",
    "training.output_dir",
    "training.save_*",
    "training.logging_*",
    "training.report_to",
    "training.run_name",
    "training.disable_tqdm",
    "training.dataloader_num_workers",  # dataloader_drop_last is another number of samples
    "training.dataloader_pin_memory",
    "training.dataloader_persistent_workers",
    "training.dataloader_prefetch_factor",
    "training.eval_*",
    "training.per_device_eval_batch_size",
    "training.load_best_model_at_end",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.use_cpu",
    "training.ddp_timeout",
    "training.deepspeed",  # compared as the engine
    "training.per_device_train_batch_size",  # the samples of a step are compared
    "training.gradient_accumulation_steps",
)
"""Settings that change nothing of what the steps to come compute, or what is compared elsewhere."""
TOLD = ("training.max_steps", "training.num_train_epochs")
"""Settings that people change to train longer; the schedule of the learning rate moves with them."""
MOST_SAID = 2
"""Changed settings that a message spells out."""
NEXT_STEP = "copy the checkpoint again, or resume from another one of the run"
_NOT_THERE = "not set"


def write_manifest(checkpoint: Path, settings: Mapping[str, Any], launch: Launch) -> None:
    """Describes a checkpoint whose files are all there; to be called last, before the folder gets its name.

    Args:
        checkpoint: the folder.
        settings: the run's, as `run_folder.settings_of` gives them.
        launch: the processes that wrote it.
    """
    files = {str(path.relative_to(checkpoint)): _described(path) for path in _files_in(checkpoint)}
    content = {
        "settings": settings,
        "launch": dataclasses.asdict(launch),
        "versions": versions(),
        "files": files,
    }
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_manifest(checkpoint: Path, settings: Mapping[str, Any], launch: Launch) -> None:
    """Compares a checkpoint with its own account and with the run that would resume from it.

    Raises:
        UserError: it holds pickles; a file is missing or changed; its steps took another number of samples; or settings
            differ that change the result.
    """
    _refuse_pickles(checkpoint)
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"resume: {path} is missing; {NEXT_STEP}")
    written = _read(path)
    _check_files(checkpoint, written["files"])
    check_shape(checkpoint, Shape(written["settings"], Launch(**written["launch"])), Shape(settings, launch))
    _check_settings(checkpoint, written["settings"], settings)


def check_base(checkpoint: Path, base: str, sha256: str | None) -> None:
    """Compares the base with the one that a checkpoint's adapter was trained on, where both contents are known.

    Args:
        checkpoint: the folder.
        base: the run's, for the message.
        sha256: its content hash.

    Raises:
        UserError: they differ.
    """
    recipe = checkpoint / ADAPTER / RECIPE_FILE
    then = read_json(recipe).get("base_sha256") if recipe.is_file() else None
    if then and sha256 and then != sha256:
        raise UserError(
            f"resume: {checkpoint} was trained on another base than what {base} holds now (content hash {then[:12]}, "
            f"is {sha256[:12]}). Put the base back, or begin a new run from its weights with --adapter.initial "
            f"{checkpoint / ADAPTER}"
        )


def _refuse_pickles(checkpoint: Path) -> None:
    """Earlier versions left DeepSpeed's and torch's own files, which run what is in them as they are read."""
    pickles = sorted(path for path in checkpoint.rglob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(
            f"resume: {pickles[0]} is a pickle of an earlier version, and reading one can run code: it is not read. "
            f"The adapter beside it is whole: begin a new run from it with --adapter.initial {checkpoint / 'adapter'}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return {name: written[name] for name in ("settings", "launch", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; resume from another checkpoint of the run") from error


def _files_in(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_files(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, one in files.items():
        if (size := _size(checkpoint / name)) is None:
            raise UserError(f"resume: {checkpoint / name} is missing; {NEXT_STEP}")
        if size != one["bytes"]:
            raise UserError(f"resume: {checkpoint / name} has {size:,} bytes instead of {one['bytes']:,}; {NEXT_STEP}")
        if _described(checkpoint / name)["sha256"] != one["sha256"]:
            raise UserError(f"resume: {checkpoint / name} was changed after it was written; {NEXT_STEP}")


def _check_settings(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, here = dict(_flat(then)), dict(_flat(now))
    changed = [name for name in sorted(before.keys() | here.keys()) if _value(before, name) != _value(here, name)]
    said = {
        name: f"{name} was {shown(_value(before, name))}, is {shown(_value(here, name))}"
        for name in changed
        if not any(fnmatch(name, pattern) for pattern in MAY_CHANGE)
    }
    for name in TOLD:
        if name in said:
            logger.info("resume: %s", said.pop(name))
    if said:
        named = "; ".join(list(said.values())[:MOST_SAID])
        more = f" and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else ""
        raise UserError(
            f"resume: {checkpoint} was written with other settings: {named}{more}. Put them back, or "
            f"begin a new run from its weights with --adapter.initial {checkpoint / 'adapter'}"
        )


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its full name; lists are values."""
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _value(flat: Mapping[str, Any], name: str) -> Any:
    """A setting that only one of two runs names, as an empty mapping and null are too."""
    value = flat.get(name)
    return _NOT_THERE if value is None or value == {} else value


FILE_BYTES = 1 << 30
"""A file of tensors is closed at this size, so that a writer never holds much more than that."""
STATE_NEXT_STEP = "copy the checkpoint again, or resume from another one of the run"


def write_state(checkpoint: Path, tensors: Iterable[tuple[str, Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Writes tensors by name below a checkpoint's `state/`, as they come.

    Args:
        tensors: on the CPU, each of its own memory.
        file_bytes: about the largest file.
    """
    folder = checkpoint / STATE
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    size, files = 0, 0
    for name, tensor in tensors:
        held[name] = tensor
        size += tensor.nbytes
        if size >= file_bytes:
            files += 1
            save_file(held, _tensor_file(folder, files))
            held, size = {}, 0
    if held or not files:
        save_file(held, _tensor_file(folder, files + 1))


def write_numbers(checkpoint: Path, numbers: Mapping[str, Any], file: str = STATE_NUMBERS) -> None:
    """Writes what is no tensor, or one rank's random state.

    Raises:
        UserError: a value is of a kind that JSON does not have.
    """
    (checkpoint / STATE).mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(numbers)  # a float's shortest digits: the same float when they are read
    except TypeError as error:
        raise UserError(f"{file}: {error}; a checkpoint holds numbers and tensors alone: set another optim") from error
    (checkpoint / STATE / file).write_text(text + "\n", encoding="utf-8")


def _tensor_file(folder: Path, number: int) -> Path:
    return folder / f"tensors-{number:05d}.safetensors"


class StateFiles:
    """A checkpoint's state, read piece by piece.

    Args:
        checkpoint: the folder.

    Raises:
        UserError: a file is missing or broken.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint / STATE
        self.numbers = self.json(STATE_NUMBERS)
        self._file_of: dict[str, Path] = {}
        for path in sorted(self._folder.glob("tensors-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise UserError(f"resume: {path} cannot be read ({error}); {STATE_NEXT_STEP}") from error

    def json(self, file: str) -> dict[str, Any]:
        """One of the JSON files below `state/`.

        Raises:
            UserError: it is missing, or no JSON object.
        """
        path = self._folder / file
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"resume: {path} is missing; {STATE_NEXT_STEP}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"resume: {path} is damaged; {STATE_NEXT_STEP}") from error
        if not isinstance(found, dict):
            raise UserError(f"resume: {path} is damaged; {STATE_NEXT_STEP}")
        return found

    def number(self, name: str, kind: type) -> Any:
        """An entry of the numbers.

        Raises:
            UserError: it is missing or of another kind.
        """
        if not isinstance(value := self.numbers.get(name), kind):
            raise self.damaged(f"{name} is missing or of another kind")
        return value

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: its file is broken.
        """
        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"resume: {path} cannot be read ({error}); {STATE_NEXT_STEP}") from error

    def damaged(self, what: str) -> UserError:
        """The error for content that cannot be used."""
        return UserError(f"resume: {self._folder} is damaged: {what}; {STATE_NEXT_STEP}")


def is_plain(value: Any) -> bool:
    """Whether JSON brings a value back as it was, sequences but for their kind."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
