"""Shapes in annotations are checked at each call where jaxtyping was asked to (`make test-all`), else only words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKED = """
import pytest, torch, jaxtyping
with jaxtyping.install_import_hook("dora_vl", "beartype.beartype"):
    from dora_vl.core.functional import row_norms_squared
assert row_norms_squared(torch.ones(2, 3)).tolist() == [3.0, 3.0]
with pytest.raises(jaxtyping.TypeCheckError):
    row_norms_squared(torch.ones(3))
"""


def test_a_wrong_shape_is_refused_where_jaxtyping_was_asked_to() -> None:
    subprocess.run([sys.executable, "-c", CHECKED], check=True, cwd=Path(__file__).parents[1])
