"""What a launch sets in the process: a step's memory stays for the next, a run alone takes no other run's port."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from dora_vl.run import launch
from dora_vl.run.launch import stand_alone_environment


def test_one_rank_takes_a_free_port_and_keeps_what_the_launcher_said(monkeypatch: pytest.MonkeyPatch):
    launched = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    stand_alone_environment()
    port = os.environ["MASTER_PORT"]
    assert {**launched, "MASTER_PORT": port} == {name: os.environ[name] for name in launched}
    assert int(port) != 29500
    monkeypatch.setenv("WORLD_SIZE", "2")
    stand_alone_environment()  # two ranks meet at the launcher's port
    assert os.environ["MASTER_PORT"] == port


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked at in /proc")
def test_leaving_waits_for_a_worker_of_gloo_that_still_works(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    stand_alone_environment()
    torch.distributed.init_process_group("gloo")
    kept = torch.distributed.group.WORLD  # as DeepSpeed and FSDP keep it: destroying it ends no thread
    torch.distributed.all_reduce(torch.ones(3))
    looked: list[str] = []

    def states() -> Iterator[str]:
        looked.append("RRSRSS"[len(looked)])
        yield from ("S", looked[-1])

    monkeypatch.setattr(launch, "_gloo_states", states)
    launch.leave_process_group()
    assert "".join(looked) == "RRSRSS"
    assert kept is not None
    assert not torch.distributed.is_initialized()
