"""What every test leaves behind it: no process group, and the environment of a launch as it found it."""

import gc
import os
from collections.abc import Iterator

import pytest

LAUNCH = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.environ.setdefault("USE_HUB_KERNELS", "0")  # reference models; what dora_vl opens: backbones/test_opening.py
AT_START = {name: os.environ.get(name) for name in LAUNCH}


@pytest.fixture(autouse=True)
def no_launch_left_behind() -> Iterator[None]:
    """A test that trains in this process opens a port; a later test's subprocess would inherit its number, taken."""
    yield
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in AT_START.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> None:
    """What lives before a file's tests, mostly modules, is left out of collections, which else take half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that look for leaks at the end see a heap as ever."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums in one order, for losses and weights that are compared to the bit."""
    import torch

    torch.set_num_threads(1)


FIRST = ("tests/training/", "tests/evaluation/", "tests/core/fast/", "tests/adapters/")
"""Folders of the long tests: begun last, one process would still be at them while the others have nothing left."""


def place_of(item: pytest.Item) -> int:
    """Where in `FIRST` its folder stands; behind all of them if it does not."""
    return next((position for position, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; within a folder the order stays. A slow one may take 15 minutes."""
    items.sort(key=place_of)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
