"""Every command that the documentation shows is one: verb, options, recipe, variant, target and script are there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_vl.run.reading import setting_names
from tests.documented_commands import CHECKS, PAGES, ROOT, TASKS, Documented, blocks, commands_of, complaint

COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def test_there_are_commands_of_every_kind() -> None:
    whole = [command.is_whole for command in COMMANDS]
    assert whole.count(True) >= 100
    assert whole.count(False) >= 50
    assert {command.words[0] for command in COMMANDS} >= CHECKS.keys() - {"python3"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_program_takes_it(command: Documented) -> None:
    assert complaint(command) is None


WRONG = {
    "dora-vl merge --adapter a --to b --adaptor c": "--adaptor",
    "dora-vl merge --adapter runs/my/adapter": "required",
    "dora-vl marge --adapter a": "did you mean 'merge'",
    "dora-vl export --gguf q3_9 --adapter a --to b": "q3_9",
    "dora-vl prepare pop --from a": "no source pop",
    "dora-vl evaluate --adapter a --benchmarks pop": "pop",
    "dora-vl show batch llava/llava15 --variant 7b_dura": "7b_dura",
    "deepspeed tasks/llava_instruct.py --config llava/llava51": "llava/llava51",
    "deepspeed tasks/llava_instruct.py --config llava/llava15 --adapter.rnk 8": "adapter.rank",
    "deepspeed tasks/llava_instruct.py --config my.yaml --training.max_steps many": "max_steps",
    "deepspeed --num_gpu_cards 2 tasks/llava_instruct.py --config my.yaml": "num_gpu_cards",
    "torchrun --nproc_per_node 8 -m dora_vl.cli evaluate": "benchmarks",
    "python tasks/no_such.py": "no script tasks/no_such.py",
    "python tasks/image_qa.py --adapter a --picture b.png": "--picture",
    "python -m data_prep.no_such": "data_prep.no_such",
    "python -m data_prep.features --rot a --to b": "required",
    "python benchmarks/dora_step.py --dype float32": "--dype",
    "make demos": "no demos",
    "pip install 'dora-vl[vidio]'": "vidio",
    "dore-vl init my": "no program",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_one_is_found(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```bash\n# a remark\n{line}\n```\n", encoding="utf-8")
    (command,) = commands_of(page)
    assert WRONG[line] in (complaint(command) or "nothing")


def test_every_script_that_trains_has_its_settings() -> None:
    scripts = (ROOT / "tasks").glob("*.py")
    assert {path.stem for path in scripts if "train_script(" in path.read_text(encoding="utf-8")} == set(TASKS)


def unknown_settings(content: Mapping[str, Any], known: Iterable[str], before: str = "") -> Iterator[str]:
    """Dotted names of a YAML's keys that no run has; below a setting that is a mapping itself any key may stand."""
    known = list(known)
    for key, value in content.items():
        name = f"{before}{key}"
        if name == "variants":
            for variant in value.values():
                yield from unknown_settings(variant, known)
        elif not any(setting.startswith(f"{name}.") for setting in known):
            if name not in known:
                yield name
        elif isinstance(value, dict):
            yield from unknown_settings(value, known, f"{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_yaml_holds_settings_and_its_python_imports_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {name.removesuffix(".help") for kind in TASKS.values() for name in setting_names(kind)}
    for block in blocks(text, "yaml"):
        assert list(unknown_settings(yaml.safe_load(block), known)) == []
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("dora_vl", "data_prep", "tasks"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module
