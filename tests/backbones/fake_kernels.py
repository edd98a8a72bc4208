"""The package `kernels` as transformers 5.20 to 5.25 import it; what would reach the hub is noted, then fails.

`test_opening.py` installs it where `kernels_checks.py` runs. Transformers 5.25 requires the package.
"""

from collections.abc import Callable
from contextlib import nullcontext
from enum import Flag, auto
from typing import Any, NoReturn

REQUESTS: list[str] = []
"""The functions that were called, each with the model or repository that it was called for."""


class KernelRequested(Exception):
    """A kernel was asked for."""


class Mode(Flag):
    FALLBACK = auto()
    TRAINING = auto()
    INFERENCE = auto()
    TORCH_COMPILE = auto()


class KernelizeFallback(Flag):
    ALL = auto()


class _Named:
    def __init__(self, *names: Any, **settings: Any) -> None: ...


class Device(_Named): ...


class CUDAProperties(_Named): ...


class ROCMProperties(_Named): ...


class LayerRepository(_Named):
    def load(self) -> NoReturn:
        _refuse("LayerRepository.load", "")


class FuncRepository(LayerRepository): ...


class LocalLayerRepository(LayerRepository): ...


def _refuse(function: str, wanted: str) -> NoReturn:
    REQUESTS.append(f"{function} {wanted}")
    raise KernelRequested(REQUESTS[-1])


def kernelize(model: Any, *, mode: Mode, device: Any = None, use_fallback: Any = None) -> NoReturn:
    _refuse("kernelize", type(model).__name__)


def get_kernel(repo_id: str, **settings: Any) -> NoReturn:
    _refuse("get_kernel", repo_id)


def _unchanged(*names: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda decorated: decorated


use_kernel_forward_from_hub = use_kernel_func_from_hub = use_kernelized_func = _unchanged


def replace_kernel_forward_from_hub(cls: type, layer_name: str, condition: Any = None) -> None: ...


def register_kernel_mapping(mapping: Any, inherit_mapping: bool = True) -> None: ...


def use_kernel_mapping(mapping: Any, *, inherit_mapping: bool = True) -> nullcontext[None]:
    return nullcontext()
