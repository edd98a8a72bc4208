"""What the wheel holds, one package with its recipes; what `make clean` keeps and `make lower-bounds` installs."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COPIED = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
BESIDE = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"dora_vl"}
"""Folders of a checkout that no wheel holds."""


def test_the_package_imports_nothing_that_lies_beside_it() -> None:
    for path in sorted((ROOT / "dora_vl").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        modules |= {text for text in texts if re.fullmatch(r"\w+(\.\w+)+", text)}  # modules imported by their names
        assert not {name for name in modules if name.partition(".")[0] in BESIDE}, path


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_dockerfile_copies_what_it_may() -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert set(COPIED) == set(allowed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of what the Dockerfile copies."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "copied").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "copied" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "copied")
    (path,) = folder.glob("dora_vl-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site-packages"
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dora_vl"}
    assert not [name for name in names if "__pycache__" in name]
    for folder in ("dora_vl", "configs"):
        ours = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in ours.split():
            assert (name if folder == "dora_vl" else f"dora_vl/{name}") in names
    (licence,) = [name for name in names if name.endswith("/licenses/LICENSE")]
    assert b"Version 2.0, January 2004" in zipfile.ZipFile(wheel).read(licence)
    assert "dora_vl/py.typed" in names
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    extras = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode()).get_all("Provides-Extra") or []
    installed = {extra for group in re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE) for extra in group.split(",")}
    assert set() < installed <= set(extras)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tasks").glob("*.py")))
def test_the_scripts_of_a_checkout_take_the_installed_package(installed: Path, tmp_path: Path, script: str) -> None:
    """A copy, so that nothing of the checkout lies beside it."""
    (tmp_path / "tasks").mkdir()
    copy = tmp_path / "tasks" / script
    copy.write_text((ROOT / "tasks" / script).read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(installed)}  # before every other
    words = [sys.executable, str(copy), "--help"]
    printed = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "usage: " in printed


LIGHT = {
    "with PEFT of today": "peft>=0.21",
    "with the PEFT that LLaMA-Factory pins": "peft==0.18.1",
    "oldest": "peft==0.16.0",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("peft", LIGHT.values(), ids=LIGHT)
def test_the_core_runs_in_an_environment_of_another_trainer(wheel: Path, tmp_path: Path, peft: str) -> None:
    """`pip install --no-deps` beside torch, safetensors, transformers 4.57 and PEFT alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    needs = [f"torch=={version('torch')}", "safetensors", "transformers==4.57.*", peft]
    if subprocess.run([*install, *needs], check=False).returncode:
        pytest.skip(f"no index that has {needs}")
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    script = shutil.copy(ROOT / "tests" / "beside_other_trainers.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([python, script, str(tmp_path)], cwd=tmp_path, env=environment, check=True)


MADE = (
    *("runs/demo", "runs/demo-vlbart", "runs/demo-video", "runs/fresh-install", "runs/lower-bounds", "runs/newest"),
    *("build", "dist", ".cache", ".pytest_cache", ".ruff_cache"),
)
KEPT = ("runs/my/adapter", "runs/demo-of-mine", "records/pope", "configs")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_keeps_what_the_demos_did_not_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*MADE, *KEPT):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("1")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in MADE if (tmp_path / name).exists()] == []
    assert [name for name in KEPT if not (tmp_path / name / "file").is_file()] == []


def test_every_dependency_has_a_bound() -> None:
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    sections = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]\s*(?:#[^\n]*)?$", lines, re.MULTILINE | re.DOTALL)
    named = [line for section in sections for line in re.findall(r'"([^"]+)"', section)]
    bounds = lower_bounds(line for line in named if not line.startswith(("LICENSE", ".", "hatchling")))
    assert len(bounds) > 40
    assert bounds["torch"] == "2.8"


def test_the_higher_of_those_for_this_python_counts_and_none_is_an_error() -> None:
    lines = [
        "a[x]>=1.9,<3; extra == 'b'",
        "A>=1.10",
        'f>=4.1; python_version < "3.11"',
        "f>=4.2; python_version >= '3.11'",
    ]
    assert lower_bounds(lines, "3.10") == {"a": "1.10", "f": "4.1"}
    assert lower_bounds(lines, "3.13") == {"a": "1.10", "f": "4.2"}
    with pytest.raises(ValueError):  # noqa: PT011
        lower_bounds(["d<3"])
