"""Two hosts made of network namespaces, a rank of ZeRO-3 on each: a lost link ends both, and the run resumes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import MakeRun, assert_same_weights, logged_losses

ROOT = Path(__file__).parents[2]
LIMIT, STEPS = 15, 5


@dataclass(frozen=True)
class Hosts:
    names: tuple[str, str]
    links: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Skips where namespaces may not be made: no iproute2, or no rights."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need `ip` of iproute2")
    tag = os.getpid() % 100_000
    pair = Hosts((f"dora{tag}a", f"dora{tag}b"), (f"dv{tag}a", f"dv{tag}b"))
    try:
        for name in pair.names:
            ip("netns", "add", name)
        ip("link", "add", pair.links[0], "netns", pair.names[0], "type", "veth", "peer", pair.links[1], "netns",
           pair.names[1])  # fmt: skip
        for name, link, address in zip(pair.names, pair.links, pair.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        ip("netns", "exec", pair.names[0], "unshare", "--uts", "hostname", pair.names[0])
    except (subprocess.CalledProcessError, OSError) as error:
        remove(pair)
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', '') or error}")
    yield pair
    remove(pair)


def remove(pair: Hosts) -> None:
    for name in pair.names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(pair: Hosts, how: str, run_file: Path, *settings: str) -> list[subprocess.Popen[str]]:
    started = []
    for rank, (name, link) in enumerate(zip(pair.names, pair.links, strict=True)):
        launch = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29500}
        environment = {**os.environ, **{name: str(value) for name, value in launch.items()}}
        environment |= {"MASTER_ADDR": pair.addresses[0], "GLOO_SOCKET_IFNAME": link, "CUDA_VISIBLE_DEVICES": ""}
        # A host name each: ranks of one machine leave the last word to the first of them.
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        command += [sys.executable, "tests/run/faulty_rank.py", how, "--config", str(run_file), *settings]
        pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, **pipes))
    return started


def ended(ranks: list[subprocess.Popen[str]], *, within: float) -> list[str]:
    return [process.communicate(timeout=within)[1] for process in ranks]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_link_ends_both_hosts_and_the_run_resumes(hosts: Hosts, make_run: MakeRun, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "deepspeed": "zero3", "ddp_timeout": LIMIT}
    run_file = make_run(
        adapter={"dropout": 0.1}, training={"max_steps": STEPS, "per_device_train_batch_size": 2, **saving}
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = start(hosts, "none", run_file, f"--training.output_dir={whole}")
    errors = ended(undisturbed, within=150)
    assert [process.returncode for process in undisturbed] == [0, 0], errors[0][-3000:]

    ranks = start(hosts, f"link:{tmp_path}", run_file, f"--training.output_dir={cut}")
    until = time.monotonic() + 120
    while not (tmp_path / "here").exists():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.2)
    ip("-n", hosts.names[1], "link", "set", hosts.links[1], "down")
    (tmp_path / "cut").touch()
    began = time.monotonic()
    errors = ended(ranks, within=LIMIT + 60)
    assert time.monotonic() - began < LIMIT + 45
    assert [process.returncode for process in ranks] == [1, 1]
    assert all("Timeout (0:00:15)" in text and "go_wrong" not in text for text in errors), errors

    ip("-n", hosts.names[1], "link", "set", hosts.links[1], "up")
    resumed = start(hosts, "none", run_file, f"--training.output_dir={cut}", "--resume=last")
    errors = ended(resumed, within=150)
    assert [process.returncode for process in resumed] == [0, 0], errors[0][-3000:]
    assert logged_losses(cut) == logged_losses(whole)
    assert_same_weights(cut, whole)
