"""Every command that the documentation shows is one: verb, options, recipe, variant, target and script are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dora_vl.run.reading import setting_names
from tests.documented_commands import (
    CHECKS,
    ROOT,
    Documented,
    blocks,
    commands_of,
    complaint,
    documented_files,
    missing_names,
    settings_of_tasks,
    unknown_settings,
)

COMMANDS = [command for file in documented_files() for command in commands_of(file)]


def test_there_are_commands_of_every_kind() -> None:
    assert len([command for command in COMMANDS if command.is_whole]) >= 100
    assert len([command for command in COMMANDS if not command.is_whole]) >= 50
    programs = {command.words[0] for command in COMMANDS}
    assert programs >= {"dora-vl", "python", "deepspeed", "torchrun", "make", "pip"}


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
    "deepspeed tasks/llava_instruct.py --config llava/llava15 --variant 7b": "7b",
    "deepspeed tasks/llava_instruct.py --config llava/llava15 --adapter.rnk 8": "adapter.rank",
    "deepspeed tasks/llava_instruct.py --config my.yaml --training.max_steps many": "max_steps",
    "deepspeed --num_gpu_cards 2 tasks/llava_instruct.py --config my.yaml": "num_gpu_cards",
    "torchrun --nproc_per_node 8 -m dora_vl.cli evaluate": "benchmarks",
    "python tasks/llava_instruct.py --config configs/llava/none.yaml": "configs/llava/none.yaml",
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
    assert command.line == 5
    assert WRONG[line] in (complaint(command) or "nothing")


def test_every_script_that_trains_has_its_settings() -> None:
    trained = {
        path.stem for path in (ROOT / "tasks").glob("*.py") if "train_script(" in path.read_text(encoding="utf-8")
    }
    assert trained == set(settings_of_tasks())
    assert {"dora-vl", "deepspeed", "make"} <= set(CHECKS)


def known_settings() -> set[str]:
    """Dotted names of every run's settings."""
    return {name.removesuffix(".help") for kind in settings_of_tasks().values() for name in setting_names(kind)}


@pytest.mark.parametrize("file", documented_files(), ids=lambda file: file.name)
def test_its_yaml_holds_settings(file: Path) -> None:
    known = known_settings()
    for line, text in blocks(file, "yaml"):
        content = yaml.safe_load(text)
        assert unknown_settings(content, known) == [], f"{file.name}:{line}"


@pytest.mark.parametrize("file", documented_files(), ids=lambda file: file.name)
def test_its_python_imports_what_is_there(file: Path) -> None:
    for line, code in blocks(file, "python"):
        assert missing_names(code) == [], f"{file.name}:{line}"
