"""Which package imports which, what the core loads, and shapes in annotations, checked where jaxtyping was asked to."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dora_vl"
LAYERS = (
    ("errors", "shapes"),
    ("files", "options", "yaml_files"),
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
    """The dotted name of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = (
                [f"dora_vl.{alias.name}" for alias in node.names] if node.module == "dora_vl" else [node.module or ""]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_package_has_its_layer():
    packages = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert packages == set(LEVEL)


def test_no_import_points_up():
    up = {
        (own, name)
        for path in modules()
        for name in (module.split(".")[1] for module in imports_of(path) if module.startswith("dora_vl."))
        if name in LEVEL
        and name != (own := path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        and LEVEL[name] >= LEVEL[own]
    }
    assert not up


def test_the_core_imports_torch_safetensors_and_the_standard_library():
    """Triton in its own file, where it is there."""
    for path in (PACKAGE / "core").rglob("*.py"):
        allowed = {"torch", "safetensors", *sys.stdlib_module_names}
        allowed |= {"triton"} if path.name == "triton.py" else set()
        for name in imports_of(path):
            assert (
                name.startswith(("dora_vl.core", "dora_vl.errors", "dora_vl.shapes")) or name.split(".")[0] in allowed
            ), (path, name)


def test_the_core_loads_where_everything_else_is_missing():
    others = ("transformers", "peft", "deepspeed", "accelerate", "datasets", "timm", "bitsandbytes", "triton")
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import dora_vl.core"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_public_names_import_only_what_they_need():
    """jaxtyping, pydantic, yaml, regex and the rest of what runs need stay out, where others' trainers use the core."""
    ours = {"adapters", "core", "errors", "files", "shapes"}
    own_needs = {"torch", "numpy", "safetensors", "peft"}
    code = f"""
import sys
import peft
others = set(sys.modules)
from dora_vl import accelerate_peft, apply_dora, load_adapter, merge_dora, save_adapter
new = set(sys.modules) - others
assert {{name.split(".")[1] for name in new if name.startswith("dora_vl.")}} == {ours}, new
roots = {{name.partition(".")[0] for name in new}} - sys.stdlib_module_names - {{"dora_vl"}}
assert roots <= {own_needs}, roots
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    bare = "import sys; before = set(sys.modules); import dora_vl; print(*{n for n in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", bare], check=True, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {*sys.stdlib_module_names, "dora_vl"}


CHECKED = """
import pytest, torch, jaxtyping
with jaxtyping.install_import_hook("dora_vl", "beartype.beartype"):
    from dora_vl.core.functional import row_norms_squared
assert row_norms_squared(torch.ones(2, 3)).tolist() == [3.0, 3.0]
with pytest.raises(jaxtyping.TypeCheckError):
    row_norms_squared(torch.ones(3))
"""


def test_a_wrong_shape_is_refused_where_jaxtyping_was_asked_to() -> None:
    subprocess.run([sys.executable, "-c", CHECKED], check=True, cwd=Path(__file__).parents[1])
