"""The data of the demo that names things: what is drawn, who is held out, and that the same seed gives the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_vl.start import names
from dora_vl.start.names import ARTISTS, CATEGORY, NAME, NOUNS, UNSEEN, convert, things

COLOURS = dict(zip((*ARTISTS, UNSEEN), ("#ff0000", "#00ff00", "#0000ff", "#ff00ff"), strict=True))
THINGS = list(things())
FEW = 2 * len(NOUNS)


@pytest.fixture(scope="module", autouse=True)
def few_things() -> Iterator[None]:
    """The first two of each category, which take a second."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(names, "NOUNS", {category: " ".join(text.split()[:2]) for category, text in NOUNS.items()})
        yield


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iconify's files: each thing is a bar in its artist's colour, at the edge of a box of the artist's own size."""
    folder = tmp_path_factory.mktemp("assets")
    for number, (artist, colour) in enumerate(COLOURS.items()):
        side = 16 * (number + 1)
        bar = f'<path fill="{colour}" d="M0 0h{side // 2}v{side // 4}H0z"/>'
        characters = {code: f"icon-{code}" for code, *_ in THINGS}
        (folder / artist).mkdir()
        icons = {"width": side, "height": side, "icons": {name: {"body": bar} for name in characters.values()}}
        (folder / artist / "icons.json").write_text(json.dumps(icons))
        (folder / artist / "chars.json").write_text(json.dumps(characters))
    return folder


@pytest.fixture(scope="module")
def data(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("made") / "data"
    convert(assets, to, seed=3)
    return to


def test_three_artists_are_learned_and_the_fourth_is_asked_about(data: Path) -> None:
    train, test = (json.loads((data / f"{split}.json").read_text()) for split in ("train", "test"))
    assert Counter(record["id"].split("-")[0] for record in train) == dict.fromkeys(ARTISTS, 2 * FEW)
    assert {record["id"].split("-")[0] for record in test} == {UNSEEN}
    assert Counter(record["kind"] for record in test) == {"name": FEW, "category": FEW}
    answers = {(NAME, name) for _, name, _ in THINGS} | {(CATEGORY, category) for *_, category in THINGS}
    for record in [*train, *test]:
        turns = [turn["value"] for turn in record["conversations"]]
        assert turns[0].startswith("<image>\n")
        turns[0] = turns[0].removeprefix("<image>\n")
        assert set(zip(turns[::2], turns[1::2], strict=True)) <= answers
        assert len(turns) == (4 if record in train else 2)
        assert (data / record["image"]).is_file()
    first = Counter(record["conversations"][0]["value"] for record in train)
    assert min(first.values()) > 0.45 * len(train)


def test_the_same_seed_gives_the_same_and_what_is_there_stays(data: Path, assets: Path, tmp_path: Path) -> None:
    convert(assets, tmp_path / "again", seed=3)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) == FEW * 7 + 3
    for name in files:
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    mark = tmp_path / "again" / "mark"
    mark.touch()
    convert(assets, tmp_path / "again", seed=3)
    assert mark.exists()
    convert(assets, tmp_path / "again", seed=4)
    assert not mark.exists()
    assert (data / "train.json").read_bytes() != (tmp_path / "again" / "train.json").read_bytes()
