"""Settings: what wins, and what a wrong key is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.training.command_line import read_run, read_run_file, read_settings
from dora_vl.training.recipe import CommonsenseRunConfig, VlBartRunConfig
from tests.training.tiny_run import write_run
from tests.training.tiny_vlbart_run import write_vlbart_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")


def test_the_command_line_wins_wherever_it_stands(run_file: Path) -> None:
    before = read_run(["--adapter.rank", "7", "--training.max_steps", "9", "--config", str(run_file)])
    after = read_run([f"--config={run_file}", "--adapter.rank=7", "--training.max_steps=9"])
    assert before == after
    assert before.adapter.rank == 7
    assert before.training["max_steps"] == 9
    assert before.training["learning_rate"] == 5e-3  # the file's other settings stay


def test_the_launchers_local_rank_is_accepted(run_file: Path) -> None:
    assert read_run(["--local_rank=1", f"--config={run_file}"]) == read_run_file(run_file)


def test_a_number_is_a_number_and_a_yaml_no_is_no(run_file: Path) -> None:
    text = run_file.read_text().replace("learning_rate: 0.005", "learning_rate: 2e-4").replace("'no'", "no")
    run_file.write_text(text)
    training = read_run_file(run_file).training
    assert training["learning_rate"] == 2e-4
    assert training["save_strategy"] == "no"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mm_projector_lr", "1"], "mm_projector_lr is not a setting; did you mean optim.projector_learning_rate"),
        (["--learning_rate", "1"], "learning_rate is not a setting; did you mean training.learning_rate?"),
        (["--rank", "1"], "rank is not a setting; did you mean adapter.rank?"),
        (["--adapter.rnk", "1"], "adapter.rnk is not a setting; did you mean adapter.rank"),
        (["--training.learning_rat", "1"], "did you mean training.learning_rate?"),
        (["--training.warmup_ratio", "0.03"], "use training.warmup_steps as a number below 1, such as 0.03"),
        (["--training.evaluation_strategy", "steps"], "use training.eval_strategy"),
        (["--training.push_to_hub", "true"], "training.push_to_hub cannot be set"),
        (["--training.neftune_noise_alpha", "5"], "training.neftune_noise_alpha cannot be set: "),
        (["--training.train_sampling_strategy", "group_by_length"], "set data.group_by_modality_length: true (LLaVA)"),
        (["--training.train_sampling_strategy", "batch_rebalance"], "batch_rebalance cannot read the lengths"),
        (["--training.metric_for_best_model", "accuracy"], "is accuracy, but validation measures the loss alone"),
        (["--training.max_steps", "four"], "training.max_steps"),
        (["--adapter.rank", "four"], "adapter.rank is four; it must be a whole number"),
        (["--xyzzy", "1"], "xyzzy is not a setting; --help lists the settings"),
    ],
)
def test_a_wrong_key_is_told_the_nearest(run_file: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_run([f"--config={run_file}", *arguments])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_what_validation_measures_can_choose_the_best(run_file: Path, metric: str) -> None:
    training = read_run([f"--config={run_file}", f"--training.metric_for_best_model={metric}"]).training
    assert training["metric_for_best_model"] == metric


def test_a_wrong_key_in_the_file_is_told_the_nearest(run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace("  dtype:", "  dtyp:"))
    with pytest.raises(UserError, match=r"model.dtyp is not a setting; did you mean model.dtype"):
        read_run_file(run_file)


@pytest.mark.parametrize(
    "lines",
    [
        ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
        + [f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 10)}]" for n in range(12)]
        + ["model:", "  base: *l12"],
        ["model: &m", "  base: *m"],
        ["data: &d [[*d]]"],
    ],
    ids=["a bomb", "a mapping that holds itself", "a list that holds itself"],
)
def test_aliases_that_stand_for_endlessly_much_end_at_once(run_file: Path, lines: list[str]) -> None:
    run_file.write_text("\n".join(lines))
    started = time.process_time()
    with pytest.raises(UserError, match=r"its aliases \(\*name\) stand for more than 100,000 values"):
        read_run_file(run_file)
    with pytest.raises(UserError, match="its aliases"):
        read_run(["--config", str(run_file)])
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ("adapter:\n  alpha: 8\nadapter:\n  rank: 4", ("run.yaml", "adapter", "lines 1 and 3")),
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3", ("seed", "lines 2 and 4")),
        ("training:\n  learning_rate: 1:30", ("run.yaml", "1:30", "90")),
        ("adapter:\n  rank: 010", ("010", "8")),
        ("config: {secret}", ("config is not a setting",)),
        ("variants:\n  a:\n    config: {secret}\nvariant: a", ("config is not a setting",)),
        ("a list\nof words", ("run.yaml", "must hold settings")),
    ],
)
def test_what_yaml_reads_otherwise_than_a_person_is_refused(tmp_path: Path, lines: str, facts: tuple[str, ...]) -> None:
    (tmp_path / "secret").write_text("word: of honour")
    (tmp_path / "run.yaml").write_text(lines.replace("{secret}", str(tmp_path / "secret")))
    with pytest.raises(UserError) as error:
        read_run_file(tmp_path / "run.yaml")
    assert all(fact in str(error.value) for fact in facts)
    assert "honour" not in str(error.value)


def test_a_number_of_the_command_line_means_what_it_says(run_file: Path) -> None:
    for words in (["--training.learning_rate", "1:30"], ["--adapter.rank=1:30"]):
        with pytest.raises(UserError, match="1:30 is 90"):
            read_run([f"--config={run_file}", *words])
    run_file.write_text(run_file.read_text() + "\nevaluation: {answer_after: '1:30'}\n")
    assert read_run_file(run_file).evaluation.answer_after == "1:30"


def test_aliases_in_a_file_of_settings_are_read(run_file: Path) -> None:
    text = run_file.read_text()
    run_file.write_text(text.replace("adapter:", "adapter:\n  parts: {one: &part {targets: ['*.a']}, two: *part}", 1))
    assert read_run_file(run_file).adapter.parts["two"].targets == ("*.a",)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope.yaml"):
        read_run_file(tmp_path / "nope.yaml")


def test_help_teaches_and_print_config_prints(run_file: Path) -> None:
    command = [sys.executable, "tasks/llava_instruct.py"]
    taught = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Rows of A (columns of B)" in " ".join(taught.split())
    printed = subprocess.run(
        [*command, "--config", str(run_file), "--print_config"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "projector_learning_rate: 0.001" in printed


def test_bad_input_is_one_line_and_status_two(run_file: Path) -> None:
    result = subprocess.run(
        [sys.executable, "tasks/llava_instruct.py", "--config", str(run_file), "--rank", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "error: rank is not a setting; did you mean adapter.rank?"


@pytest.mark.parametrize("count", [0, -3])
@pytest.mark.parametrize(
    "name",
    ["data.limit", "data.validation_limit", "evaluation.limit", "evaluation.batch_size", "evaluation.max_new_tokens"],
)
def test_a_count_below_one_is_refused_and_not_an_empty_run(run_file: Path, name: str, count: int) -> None:
    with pytest.raises(UserError, match=rf"^{name} is {count}; at least 1 is needed"):
        read_run([f"--config={run_file}", f"--{name}={count}"])
    section, _, field = name.partition(".")
    assert getattr(getattr(read_run([f"--config={run_file}", f"--{name}=1"]), section), field) == 1


def test_the_limit_of_a_vlbart_and_a_commonsense_run_too(tmp_path: Path) -> None:
    file = write_vlbart_run(tmp_path / "vlbart.yaml", tmp_path, ("vqav2",))
    with pytest.raises(UserError, match=r"^evaluation\.limit is 0; at least 1 is needed, or null for all of them"):
        read_settings([f"--config={file}", "--evaluation.limit=0"], VlBartRunConfig)
    smoke = ROOT / "configs/commonsense/smoke.yaml"
    with pytest.raises(UserError, match=r"^evaluation\.limit is -1; "):
        read_settings([f"--config={smoke}", "--evaluation.limit=-1"], CommonsenseRunConfig)
