"""The memory benchmark counts what is alive, whoever keeps it."""

from __future__ import annotations

import torch

from benchmarks.dora_memory import LiveBytes


def test_live_bytes_follows_what_is_made_until_it_dies():
    older = torch.ones(50)
    with LiveBytes() as live:
        older.add_(1)
        assert (live.now, live.peak) == (0, 0), "made before, changed in place"
        tensor = torch.ones(1000)
        view = tensor.view(10, 100)
        del tensor
        assert live.now == 4000, "its view keeps it"
        view = view.half()
        assert (live.now, live.peak) == (2000, 6000)
        live.restart_peak()
        del view
        assert (live.now, live.peak) == (0, 2000)
