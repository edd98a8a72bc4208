"""A checkpoint's state as files that hold data alone: tensors in safetensors, all else in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_vl.errors import UserError
from dora_vl.run.checkpoint_manifest import STATE, STATE_NUMBERS

FILE_BYTES = 1 << 30
"""A file of tensors is closed at this size, so that a writer never holds much more than that."""
NEXT_STEP = "copy the checkpoint again, or resume from another one of the run"


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
                raise UserError(f"resume: {path} cannot be read ({error}); {NEXT_STEP}") from error

    def json(self, file: str) -> dict[str, Any]:
        """One of the JSON files below `state/`.

        Raises:
            UserError: it is missing, or no JSON object.
        """
        path = self._folder / file
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"resume: {path} is missing; {NEXT_STEP}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"resume: {path} is damaged; {NEXT_STEP}") from error
        if not isinstance(found, dict):
            raise UserError(f"resume: {path} is damaged; {NEXT_STEP}")
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
            raise UserError(f"resume: {path} cannot be read ({error}); {NEXT_STEP}") from error

    def damaged(self, what: str) -> UserError:
        """The error for content that cannot be used."""
        return UserError(f"resume: {self._folder} is damaged: {what}; {NEXT_STEP}")


def is_plain(value: Any) -> bool:
    """Whether JSON brings a value back as it was, sequences but for their kind."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
