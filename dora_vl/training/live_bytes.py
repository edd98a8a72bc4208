"""Bytes of tensors that are alive at any moment, as seen from the operations that make them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storage = torch.UntypedStorage


class LiveBytes(TorchDispatchMode):
    """While it is on, follows every storage that an operation makes: `now` is alive, `peak` the most there was.

    `made` counts the storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._alive: dict[int, tuple[weakref.ReferenceType[Storage], int, int]] = {}

    def restart_peak(self) -> int:
        """Lets the peak begin at what is alive now, and returns that; garbage in cycles is collected before."""
        gc.collect()
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation; what it returns in a storage of its own is new."""
        result = self.run(func, args, kwargs or {})
        unknown = [one for one in storages_of(tree_leaves(result)) if id(one) not in self._alive]
        if unknown:
            given = {id(one) for one in storages_of(tree_leaves((args, kwargs)))}
            for storage in unknown:
                if id(storage) not in given:  # else a view of something older than this count, or it changed in place
                    self._follow(storage)
        return result

    def alive_since(self, made: int) -> int:
        """Bytes of what was made after the first so many storages and is alive."""
        return sum(size for _, size, number in self._alive.values() if number > made)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def follow_existing(self) -> None:
        """Counts what is there already: every tensor that Python holds, those on the meta device aside."""
        gc.collect()
        for one in gc.get_objects():
            if issubclass(type(one), Tensor) and not one.is_meta:
                for storage in storages_of([one]):
                    if id(storage) not in self._alive:
                        self._follow(storage)

    def _follow(self, storage: Storage) -> None:
        key, size = id(storage), storage.nbytes()

        def died(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self.made += 1
        self._alive[key] = (weakref.ref(storage, died), size, self.made)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages_of(values: Iterable[object]) -> list[Storage]:
    """The storages of the tensors among them."""
    return [one.untyped_storage() for one in values if isinstance(one, Tensor)]
