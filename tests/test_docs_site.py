"""The pages of docs/: all are in the site's navigation, none leads out of it, and reading it fetches nothing.

Every function on design.md's paths, of a row and of an answer, is where the page says.
"""

import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "configs/README.md")]
PROGRAM = Path(sys.executable).parent / "zensical"
FETCHED = re.compile(
    r"""(?:src|href)="(?:https?:)?//[^"]+\.(?:js|css|woff2?|png|svg)[^"]*"|url\(["']?(?:https?:)?//[^)]*\)"""
)


def named(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else []
    return [page for part in parts for page in named(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named(settings["nav"])) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_no_link_leads_out_of_the_site_or_nowhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page in BESIDE or "](../" not in text, "a page of the site links inside docs/ alone: write paths as code"
    for name in re.findall(r"\]\(([\w/.\-]+?)(?:#[\w\-]*)?\)", text):
        assert (page.parent / name).is_file(), name


@pytest.mark.skipif(not PROGRAM.is_file(), reason="pip install '.[docs]'")
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    for name in ("docs", "dora_vl", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run([PROGRAM, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    site = tmp_path / "build" / "site"
    assert "factored_norms_squared" in (site / "how_dora_works.html").read_text(encoding="utf-8")
    assert "row_norms_squared(direction)" in re.sub("<[^>]*>", "", (site / "how_dora_works.html").read_text("utf-8"))
    assert "targets" in (site / "api.html").read_text(encoding="utf-8")
    for file in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert FETCHED.findall(file.read_text(encoding="utf-8")) == [], file.name


FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("dora_vl", "tests", "benchmarks", "tasks", "data_prep", "configs", "docs")
PACKAGES = tuple(path.name for path in (ROOT / "dora_vl").iterdir() if path.is_dir())
PATH = re.compile(
    rf"(?<![\w/.\-])((?:{'|'.join(FOLDERS)})/[\w/.\-]*|(?:{'|'.join(PACKAGES)})/(?:[a-z_]+/)*(?:[a-z_]+\.py)?)(?![\w/])"
)
NAME = re.compile(rf"(?<![\w/.\-])(?:{'|'.join(FOLDERS)})(?:\.[A-Za-z_]\w*)+")


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_files_and_names_of_the_code_are_there(page: Path) -> None:
    """Those of `code` in the text: `dora_vl/core/`, `core/linear.py`, `dora_vl.core.DoRAConfig`."""
    code = "\n".join(re.findall(r"`([^`\n]+)`", FENCES.sub("", page.read_text(encoding="utf-8"))))
    missing = [
        path for path in PATH.findall(code) if not ((ROOT / path).exists() or (ROOT / "dora_vl" / path).exists())
    ]
    assert missing == []
    for name in NAME.findall(code):
        if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file():
            pkgutil.resolve_name(name)


WAYS = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Where things are added")[0]
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+){2,})`", WAYS)))


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_there(name: str) -> None:
    pkgutil.resolve_name(f"dora_vl.{name}")
