"""A process that can be ended: its limits, its end with whoever waits, and that nothing it sends is run."""

import io
import os
import pickle
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dora_vl import limited_process
from dora_vl.backbones import template_trial
from dora_vl.backbones.template_trial import check_ends
from dora_vl.data.pictures import TooManyPixels, decode_picture, load_picture
from dora_vl.errors import UserError
from dora_vl.limited_process import Budget, JobFailed, LimitedProcess
from tests.data.hostile import jpeg_of_scans, saved

MEMORY = 2**29


def of(process: LimitedProcess) -> subprocess.Popen[bytes]:
    assert process._process is not None
    return process._process


def test_pictures_come_back_as_they_are_decoded_here() -> None:
    content = saved("JPEG", (1_500, 1_100))  # in two strips
    with LimitedProcess("read_picture") as process:
        budget = Budget(seconds=20, memory=MEMORY, pixels=2_000_000)
        picture = decode_picture(process, content, budget)
        assert picture.tobytes() == load_picture(io.BytesIO(content)).tobytes()
        assert budget.pixels == 2_000_000 - 1_500 * 1_100
        assert 0 < budget.seconds < 20
        pid = of(process).pid
        with pytest.raises(JobFailed) as refused:
            decode_picture(process, content, budget)
        assert (refused.value.kind, budget.pixels) == (TooManyPixels.__name__, 350_000)
        assert decode_picture(process, saved("PNG"), budget).size == (16, 16)
        assert of(process).pid == pid


@pytest.mark.parametrize("limit", ["processor", "memory", "nobody waits"])
def test_a_job_is_ended_at_each_limit_and_the_next_is_done(limit: str) -> None:
    content, began = jpeg_of_scans(4_000, 20_000), time.monotonic()
    budget = Budget(seconds=1 if limit == "processor" else 60, memory=2**22 if limit == "memory" else MEMORY)

    class Gone(Exception):
        pass

    def go_on() -> None:
        if limit == "nobody waits" and time.monotonic() - began > 1:
            raise Gone

    budget.go_on = go_on
    with LimitedProcess("read_picture") as process:
        decode_picture(process, saved("PNG"), Budget(20, MEMORY))
        ended = of(process)
        with pytest.raises(Gone if limit == "nobody waits" else JobFailed):
            decode_picture(process, content, budget)
        assert time.monotonic() - began < 30
        if limit != "memory":
            assert ended.poll() is not None
        assert decode_picture(process, saved("PNG"), Budget(20, MEMORY)).size == (16, 16)


SENDS = """
import pickle, sys
from multiprocessing.connection import Connection
with Connection(int(sys.argv[1])) as parent:
    parent.recv_bytes(), parent.recv_bytes()
    for part in PARTS: parent.send_bytes(part)
    parent.recv_bytes()
"""


class Opens:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, Any]:
        return os.mkdir, (str(self.path),)


def test_what_a_process_sends_is_not_run_and_cannot_fill_the_memory(tmp_path, monkeypatch) -> None:
    """As of a decoder that was taken over."""
    pickled = pickle.dumps(Opens(tmp_path / "made"))
    first = b'{"size": [9, 9]}'
    for parts in ([pickled, b""], [b"[1]", b""], [first, b"", b'{"size": [9000, 9000]}', b""], [first, bytes(2**25)]):
        monkeypatch.setattr(limited_process, "CHILD", SENDS.replace("PARTS", repr(parts)))
        with (
            LimitedProcess("read_picture") as process,
            pytest.raises((JobFailed, ValueError, AttributeError, TypeError)),
        ):
            decode_picture(process, b"", Budget(0.3, MEMORY, pixels=1_000_000))
    assert not (tmp_path / "made").exists()


def test_no_file_of_the_current_folder_is_taken_for_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dora-vl check-data` is run where files from elsewhere lie."""
    monkeypatch.chdir(tmp_path)
    for name in ("PIL", "numpy", "resource"):
        (tmp_path / f"{name}.py").write_text("import os; os.mkdir('made'); raise ImportError")
    with LimitedProcess("read_picture") as process:
        assert decode_picture(process, saved("PNG"), Budget(20, MEMORY)).size == (16, 16)
    assert not (tmp_path / "made").exists()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"


def test_a_template_that_does_not_end_or_fills_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"eos_token": "</s>"}
    monkeypatch.setattr(template_trial, "SECONDS", 1)
    monkeypatch.setattr(template_trial, "MEMORY", 2**28)
    in_a_picture = MARKED + "{% for m in messages if m.content is not string %}" + ENDLESS + "{% endfor %}"
    for template in (in_a_picture, HUGE, {"default": "a", "other": ENDLESS}):
        with pytest.raises(UserError):
            check_ends(template, tokens, "model")
    for template in (MARKED, "{{ raise_exception('no') }}", "{% what", "{{ messages[9].content }}"):
        check_ends(template, tokens, "model")  # what is wrong with it is for whoever renders it
