"""What a request shows: long decoding gives way to others, and no file is too large."""

from __future__ import annotations

import contextlib
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from dora_vl.serving import media
from dora_vl.serving.media import RequestMedia
from dora_vl.serving.options import Settings
from dora_vl.serving.requests import ChatRequest, TooLarge
from dora_vl.serving.scheduler import TooManyRequests
from tests.data.hostile import jpeg_of_scans
from tests.serving.tiny_served import RED, picture_part


def test_a_picture_that_takes_long_yields_and_goes_where_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG of thousands of scans, read for seconds: at the lowest priority, and no longer than others wait for it."""
    monkeypatch.setattr(media, "READING_AT_ONCE", 1)
    monkeypatch.setattr(media, "PATIENT_SECONDS", 1.0)
    quick = io.BytesIO()
    RED.save(quick, "PNG")
    with contextlib.closing(RequestMedia(Settings())) as requests, ThreadPoolExecutor(1) as threads:

        def read(content: bytes) -> Any:
            with requests.reading() as reading:
                return reading.picture(content, "its place")

        slow = threads.submit(read, jpeg_of_scans(4_000, 20_000))
        until = time.monotonic() + 60
        while not any(os.sched_getscheduler(child.pid) == os.SCHED_IDLE for child in psutil.Process().children()):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert read(quick.getvalue()).size == RED.size
        assert isinstance(slow.exception(), TooManyRequests)


def test_a_file_beyond_its_bytes_is_not_decoded() -> None:
    content = [picture_part(RED), {"type": "text", "text": "What is it?"}]
    body = ChatRequest.model_validate({"model": "one", "messages": [{"role": "user", "content": content}]})
    with (
        contextlib.closing(RequestMedia(Settings(max_media_mib=50 / 2**20))) as requests,
        requests.reading() as reading,
        pytest.raises(TooLarge),
    ):
        reading.read(body.messages)
