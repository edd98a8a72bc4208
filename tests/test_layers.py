"""Who may import whom: packages stand in layers, and no import points up, nor across in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dora_vl"
LAYERS = (
    ("errors",),
    ("files",),
    ("limited_process",),
    ("core",),
    ("data",),
    ("adapters",),
    ("heads",),
    ("backbones",),
    ("run",),
    ("evaluation",),
    ("report",),
    ("training",),
    ("start", "serving"),
    ("cli",),
)
"""From the floor up. A package imports only from layers below its own, and from itself."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> Iterator[str]:
    """The first name below `dora_vl` of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "dora_vl":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dora_vl."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dora_vl."))


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_package_has_its_layer():
    packages = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert packages == set(LEVEL)


def test_no_import_points_up():
    up = {
        (own, name)
        for path in modules()
        for name in imports_of(path)
        if name in LEVEL
        and name != (own := path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        and LEVEL[name] >= LEVEL[own]
    }
    assert not up
