"""The clips show what their questions ask for, and the same seed makes them again."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.moving_shapes import COLORS, FRAMES, KINDS, Settings, examples_of, main, make
from dora_vl.data.example import iterate_examples
from dora_vl.data.video import Uniform
from tests.data.video_files import read_frames

pytest.importorskip("av", reason="pip install '.[video]'")
SMALL = Settings(pretrain=3, adapt=3, test=2, seed=5)


def colored(pixels: np.ndarray, color: str) -> np.ndarray:
    """Where the picture has about this colour: y and x of its pixels."""
    return np.argwhere(np.abs(pixels.astype(int) - COLORS[color]).sum(-1) < 120)


def test_a_real_clip_shows_what_is_said_of_it(tmp_path: Path) -> None:
    make(tmp_path, SMALL, workers=1)
    for number in range(3):
        shown, examples = examples_of("adapt", number, SMALL.seed)
        assert examples[0].video is not None
        frames = read_frames(tmp_path, examples[0].video, Uniform(FRAMES), backends=("pyav",))
        pictures = [np.asarray(picture) for picture in frames.pictures]
        firsts = [next(time for time, rgb in enumerate(pictures) if len(colored(rgb, mover.color))) for mover in shown]
        assert firsts == sorted(set(firsts))
        for mover, first in zip(shown, firsts, strict=True):
            y, x = colored(pictures[-1], mover.color).mean(0) - colored(pictures[first], mover.color).mean(0)
            way = max({"right": x, "left": -x, "down": y, "up": -y}.items(), key=lambda item: item[1])
            assert way[0] == mover.direction
            assert way[1] > 20


def test_questions_have_one_right_choice_and_cover_all_kinds() -> None:
    for number in range(40):
        shown, examples = examples_of("test", number, 0)
        assert len({mover.color for mover in shown}) == len({mover.shape for mover in shown}) == len(shown)
        for example in examples[1:]:
            assert len(set(example.choices)) == 4
            assert example.choices[example.extra["correct"]] == example.answers[0].text
        spoken = next(example for example in examples if example.extra["kind"] == "spoken")
        meant = next(mover for mover in shown if mover.color in spoken.subtitles[0].text)
        assert spoken.answers[0].text == meant.shape
        expected = set(KINDS) - (set() if len(shown) > 1 else {"order"})
        assert {example.extra["kind"] for example in examples[1:]} == expected
    counts = Counter(row.extra["correct"] for n in range(300) for row in examples_of("adapt", n, 0)[1] if row.choices)
    assert max(counts.values()) < 1.15 * min(counts.values()), "a place among the choices is right more often"


def test_a_seed_makes_the_same_files(tmp_path: Path) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        make(tmp_path / name, Settings(pretrain=1, adapt=1, test=1, seed=seed), workers=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one")["clips/test-00000.mp4"] != digest(tmp_path / "three")["clips/test-00000.mp4"]
    shown, _ = examples_of("pretrain", 0, 5)
    assert len(list(iterate_examples(tmp_path / "one/records/moving_shapes/pretrain.jsonl"))) == 2 * len(shown)
    assert len(list(iterate_examples(tmp_path / "one/records/moving_shapes_caption/test.jsonl"))) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["--to", str(tmp_path / "four"), "--test", "0"])
    assert stopped.value.code == 2
