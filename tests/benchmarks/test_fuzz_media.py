"""Damaged and hostile media are read or refused; and the fuzzing sees each thing that must not happen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("av", reason="pip install 'dora-vl[video]'")

from benchmarks import media_case
from benchmarks.fuzz_media import main
from benchmarks.hostile_inputs import Hostile, hostile_inputs, run_hostile
from benchmarks.hostile_pictures import OTHER_FORMATS, saved
from benchmarks.media_case import CUT, Read, judged, read, run_case
from benchmarks.media_files import PICTURES, STREAMS, whole_files
from dora_vl.data import pictures
from dora_vl.data import video as video_decoding

pytestmark = pytest.mark.timeout(240)


def test_no_damage_passes_through(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as left:
        main(["--count", "150", "--seed", "1", "--no-hostile", "--folder", str(tmp_path), "--json", str(figures)])
    printed = capsys.readouterr().out
    assert left.value.code == 0, printed
    assert printed.startswith("150 cases in ")
    found = json.loads(figures.read_text())
    assert (found["damaged"], found["failed"]) == (150, 0)
    assert found["cut"]["refused"] > 20
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_there_are_two_hundred_hostile_inputs_and_those_of_small_cost_do_no_harm(tmp_path: Path) -> None:
    cases = list(hostile_inputs(tmp_path))
    assert len(cases) > 200
    assert len({case.said for case in cases}) == len(cases)
    quick = [case for case in cases if case.must_fail][::3]
    outcomes = [run_hostile(case, tmp_path, number) for number, case in enumerate(quick)]
    assert [one.said for one in outcomes if one.failure] == []
    assert {one.status for one in outcomes} == {2}


def test_whole_files_are_read(tmp_path: Path) -> None:
    for file in whole_files():
        (tmp_path / file.name).write_bytes(file.content)
        found = read(tmp_path, file.name, video=file.kind != PICTURES)
        assert found.pixels, (file.name, found)
        assert not found.started


def test_a_truncated_file_that_is_accepted_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoding, "check_whole_video", lambda path: "gif")
    monkeypatch.setattr(media_case, "whole_files", lambda: [one for one in whole_files() if one.name == "clip.gif"])
    media_case._files.cache_clear()
    try:
        failures = {run_case(tmp_path, 0, number).failure for number in range(1, 25)}
    finally:
        media_case._files.cache_clear()
        media_case._whole_pixels.cache_clear()
    assert "a truncated file is accepted" in failures


def test_what_must_not_happen_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(Read(pixels="x"), 10.0, video=False) == ("", "")
    for found, memory, failure in (
        (Read(error="OSError in a.py:1"), 0.0, "exception: OSError"),
        (Read(seconds=11.0), 0.0, "more than 10 s"),
        (Read(), 2000.0, "MB of memory"),
        (Read(refused="x" * 501), 0.0, "a line of more than 500"),
        (Read(refused="a\x1b[2J"), 0.0, "no printable line"),
    ):
        assert failure in judged(found, memory, video=False)[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def start(*_: object, **__: object) -> None:
        subprocess.run([sys.executable, "-c", ""], check=True)
        raise MemoryError

    monkeypatch.setattr(pictures.Image, "open", start)
    found = read(tmp_path, "a.png", video=False)
    assert judged(found, 0.0, video=False)[0] == "another program is started"
    assert "subprocess.Popen" in found.started[0]


def test_another_format_that_is_accepted_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PICTURE_FORMATS", ("PNG", "PPM"))

    def put(folder: Path) -> str:
        (folder / "a").write_bytes(OTHER_FORMATS["PPM"])
        return "a"

    assert "is accepted" in run_hostile(Hostile("PPM", video=False, put=put), tmp_path, 1).failure


def test_a_hang_of_the_decoder_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_case, "VIDEO_SECONDS", 3.0)
    (tmp_path / "av.py").write_text(
        "import time\nclass error:\n    FFmpegError = OSError\ndef open(*a, **b):\n    time.sleep(99)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    clip = next(file for file in whole_files() if file.name == "plain.mp4")
    (tmp_path / clip.name).write_bytes(clip.content)
    media_case.reader.cache_clear()
    started = time.monotonic()
    try:
        assert "was not read within 3 s" in read(tmp_path, clip.name, video=True).refused
    finally:
        media_case.reader().close()
        media_case.reader.cache_clear()
    assert time.monotonic() - started < 90


def test_a_case_can_be_run_again_and_its_file_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(SystemExit) as left:
        main(["--seed", "3", "--only", "5", "--keep", str(kept), "--folder", str(tmp_path)])
    assert left.value.code == 0
    again = run_case(tmp_path, 3, 5, kept)
    assert capsys.readouterr().out.strip() == again.said
    assert [path.name for path in kept.iterdir()] == [again.target]
    assert saved("PNG")[:4] == b"\x89PNG"
    assert CUT in media_case.CHANGES
    assert any(file.kind == STREAMS for file in whole_files())
