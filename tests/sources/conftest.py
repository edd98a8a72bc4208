"""Property tests run as those of `tests/data` do."""

from __future__ import annotations

from tests.data.conftest import settings

settings.load_profile("shared_cores")
