"""Settings: what wins, and what a wrong key is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.reading import read_run, read_run_file, read_settings
from dora_vl.run.settings import CommonsenseRunConfig, VlBartRunConfig
from tests.training.tiny_run import write_run
from tests.training.tiny_vlbart_run import write_vlbart_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")


def test_the_command_line_wins_wherever_it_stands(run_file: Path) -> None:
    before = read_run(["--adapter.rank", "7", "--training.max_steps", "9", "--config", str(run_file)])
    after = read_run(["--local_rank=1", f"--config={run_file}", "--adapter.rank=7", "--training.max_steps=9"])
    assert before == after
    assert (before.adapter.rank, before.training["max_steps"]) == (7, 9)
    assert before.training["learning_rate"] == 5e-3  # the file's other settings stay


def test_a_number_is_a_number_a_yaml_no_is_no_and_an_alias_is_read(run_file: Path) -> None:
    text = run_file.read_text().replace("learning_rate: 0.005", "learning_rate: 2e-4").replace("'no'", "no")
    run_file.write_text(
        text.replace("adapter:", "adapter:\n  parts: {one: &part {targets: ['*.a']}, two: *part}", 1)
        + "\nevaluation: {answer_after: '1:30'}\n"
    )
    config = read_run_file(run_file)
    assert config.training["learning_rate"] == 2e-4
    assert config.training["save_strategy"] == "no"
    assert config.adapter.parts["two"].targets == ("*.a",)
    assert config.evaluation.answer_after == "1:30"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--mm_projector_lr 1", "optim.projector_learning_rate"),
        ("--lora_r 1", "adapter.rank"),
        ("--learning_rate 1", "training.learning_rate"),
        ("--rank 1", "adapter.rank"),
        ("--adapter.rnk 1", "adapter.rank"),
        ("--training.learning_rat 1", "training.learning_rate"),
        ("--training.warmup_ratio 0.03", "training.warmup_steps"),
        ("--training.evaluation_strategy steps", "training.eval_strategy"),
        ("--training.push_to_hub true", "training.push_to_hub"),
        ("--training.neftune_noise_alpha 5", "training.neftune_noise_alpha"),
        ("--training.train_sampling_strategy group_by_length", "data.group_by_modality_length"),
        ("--training.metric_for_best_model accuracy", "training.metric_for_best_model"),
        ("--training.max_steps four", "training.max_steps"),
        ("--training.report_to nobody", "nobody"),
        ("--training.learning_rate 1:30", "1:30 is 90"),
        ("--adapter.rank=1:30", "1:30 is 90"),
        ("--adapter.rank four", "adapter.rank is four; it must be a whole number"),
        ("--xyzzy 1", "xyzzy"),
    ],
)
def test_a_wrong_key_or_value_is_told_the_nearest(run_file: Path, words: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        read_run([f"--config={run_file}", *words.split()])
    assert named in str(error.value)


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_what_validation_measures_can_choose_the_best(run_file: Path, metric: str) -> None:
    training = read_run([f"--config={run_file}", f"--training.metric_for_best_model={metric}"]).training
    assert training["metric_for_best_model"] == metric


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("model: {dtyp: float32}", ("model.dtyp", "model.dtype")),
        ("adapter:\n  alpha: 8\nadapter:\n  rank: 4", ("run.yaml", "adapter", "lines 1 and 3")),
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3", ("seed", "lines 2 and 4")),
        ("training:\n  learning_rate: 1:30", ("run.yaml", "1:30", "90")),
        ("adapter:\n  rank: 010", ("010", "8")),
        ("config: {secret}", ("config",)),
        ("variants:\n  a:\n    config: {secret}\nvariant: a", ("config",)),
        ("a list\nof words", ("run.yaml",)),
        ("model_name_or_path: x\nlora_r: 8\ncutoff_len: 9\nfinetuning_type: lora", ("llama-factory", "adapter.rank")),
    ],
)
def test_what_yaml_reads_otherwise_than_a_person_is_refused(
    tmp_path: Path, content: str, facts: tuple[str, ...]
) -> None:
    (tmp_path / "secret").write_text("word: of honour")
    (tmp_path / "run.yaml").write_text(content.replace("{secret}", str(tmp_path / "secret")))
    started = time.process_time()
    with pytest.raises(UserError) as error:
        read_run_file(tmp_path / "run.yaml")
    assert all(fact in str(error.value) for fact in facts)
    assert "honour" not in str(error.value)
    assert time.process_time() - started < 5


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope.yaml"):
        read_run_file(tmp_path / "nope.yaml")


def test_help_teaches_print_config_prints_and_bad_input_is_status_two(run_file: Path) -> None:
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tasks/llava_instruct.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "Rows of A (columns of B)" in " ".join(ran("--help").stdout.split())
    assert "projector_learning_rate: 0.001" in ran("--config", str(run_file), "--print_config").stdout
    refused = ran("--config", str(run_file), "--rank", "1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == "error: rank is not a setting; did you mean adapter.rank?"
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("count", [0, -3])
@pytest.mark.parametrize(
    "name",
    ["data.limit", "data.validation_limit", "evaluation.limit", "evaluation.batch_size", "evaluation.max_new_tokens"],
)
def test_a_count_below_one_is_refused_and_not_an_empty_run(run_file: Path, name: str, count: int) -> None:
    with pytest.raises(UserError, match=rf"^{name} is {count}"):
        read_run([f"--config={run_file}", f"--{name}={count}"])


def test_the_limit_of_a_vlbart_and_a_commonsense_run_too(tmp_path: Path) -> None:
    file = write_vlbart_run(tmp_path / "vlbart.yaml", tmp_path, ("vqav2",))
    smoke = ROOT / "configs/commonsense/smoke.yaml"
    for config, settings in ((file, VlBartRunConfig), (smoke, CommonsenseRunConfig)):
        with pytest.raises(UserError, match=r"^evaluation\.limit is 0"):
            read_settings([f"--config={config}", "--evaluation.limit=0"], settings)
