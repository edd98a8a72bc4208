"""Real published files, which are not part of the repository; tests that need them are skipped without them."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("DORA_VL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> Path:
    """A file or folder of the published data; skips the test where it is not there."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no {name} in {FOLDER}; DORA_VL_SHARED_DATA names the folder of published data")
    return path
