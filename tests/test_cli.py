"""`dora-vl`: what a person types, what is printed; status 2 with a line for wrong input, 130 and 143 for signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from dora_vl.cli import COMMANDS, main
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava


@pytest.fixture
def folders(tmp_path):
    saved(tiny_llama(), tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        wrapped = moved_peft(tiny_llama(), seed=seed)
        wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        wrapped.save_pretrained(tmp_path / name)
    return tmp_path


def failed(*words: object) -> None:
    with pytest.raises(SystemExit) as status:
        main([str(word) for word in words])
    assert status.value.code == 2


def test_help_and_a_misspelt_setting_import_nothing_heavy():
    """Covers the commands of `dora-vl` and the scripts in tasks/."""
    code = f"""
import importlib, sys
from dora_vl.cli import main
main(["--help"])
for verb in {sorted(COMMANDS)} + ["image_qa", "video_qa"]:
    try:
        importlib.import_module(f"tasks.{{verb}}").main(["--help"]) if verb.endswith("qa") else main([verb, "--help"])
    except SystemExit:
        pass
    assert not sys.modules.keys() & {{"torch", "transformers", "datasets", "deepspeed", "gradio"}}, verb
try:
    main(["train", "--adapter.rnk=1"])
except SystemExit as status:
    assert status.code == 2
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for verb in COMMANDS:
        assert f"  {verb}" in done.stdout
        assert f"dora-vl {verb}" in done.stdout


ASK, CONVERT, MERGE = "ask --model none --question q", "convert one --to x", "merge --adapter one --to x"
OF_PEFT = ["--alpha 8", "--rename model.=model.language_model."]


@pytest.mark.parametrize(
    "line",
    [
        "merg",
        f"{ASK} --image a.png --video b.mp4",
        f"{ASK} --image gone.png",
        "convert nothing --to x",
        f"{CONVERT} --rename a",
        "merge --adapter one --base other --to x",
        *(f"{verb} {option}{of}" for verb in (CONVERT, MERGE) for option in OF_PEFT for of in ("", " --from peft")),
    ],
)
def test_wrong_words_end_it_and_leave_nothing(folders, monkeypatch, line):
    """Options that PEFT's own files answer are among them: they are not passed over."""
    monkeypatch.chdir(folders)
    failed(*line.split())
    assert not Path("x").exists()


def test_convert_takes_the_file_of_tensors_for_its_folder(folders):
    main(["convert", str(folders / "one" / "adapter_model.safetensors"), "--to", str(folders / "same")])
    files = [(folders / name / "adapter_model.safetensors").read_bytes() for name in ("one", "same")]
    assert files[0] == files[1]
    (folders / "one" / "adapter_model.safetensors").rename(folders / "renamed.safetensors")
    failed("convert", folders / "renamed.safetensors", "--to", folders / "x")


@pytest.mark.parametrize("verb", ["convert", "merge"])
def test_a_folder_of_something_else_is_never_replaced(folders, verb):
    thesis = folders / "work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    words = ["convert", folders / "one"] if verb == "convert" else ["merge", "--adapter", folders / "one"]
    failed(*words, "--to", thesis.parent)
    assert thesis.read_text() == "years of work"
    source = folders / ("one" if verb == "convert" else "base")
    failed(*words, "--to", source)
    for _ in range(2):
        main([str(word) for word in (*words, "--to", folders / "result")])


def test_merge_finds_its_base(folders):
    ids = torch.randint(32, (1, 6))
    main(["merge", "--adapter", str(folders / "one"), "--to", str(folders / "merged")])
    expected = PeftModel.from_pretrained(tiny_llama(), folders / "one").eval()(ids).logits
    logits = LlamaForCausalLM.from_pretrained(folders / "merged").eval()(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_another_base_is_refused_by_its_hash(folders):
    recipe = folders / "one" / "recipe.json"
    recipe.write_text(json.dumps({"base_sha256": "0" * 64}))
    words = ["merge", "--adapter", folders / "one", "--to", folders / "merged"]
    failed(*words)
    assert not (folders / "merged").exists()
    main([str(word) for word in (*words, "--any-base")])
    assert (folders / "merged" / "config.json").is_file()


@pytest.mark.parametrize("words", [["-m", "dora_vl.cli", "--help"], ["tasks/llava_instruct.py", "--help"]])
def test_a_reader_that_leaves_early_ends_it_quietly(words):
    program = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()  # as `| head -0` does
    message = program.stderr.read()
    assert program.wait() in (0, 141)  # argparse itself passes over an error in writing its help
    assert message == ""


ROOT = Path(__file__).parents[1]
CHILD = """
import os, signal, sys
number, point = int(sys.argv[1]), sys.argv[2]
class AtImport:
    def find_spec(self, module, path=None, target=None):
        if module == point:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, AtImport())
from dora_vl.cli import main
main(sys.argv[3:])
"""
LINES = {signal.SIGINT: "stopped by Ctrl-C", signal.SIGTERM: "stopped by SIGTERM"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps would take minutes, so that no signal comes after its end."""
    run_folder = tmp_path_factory.mktemp("interrupted")
    base, records = write_tiny_llava(run_folder / "base"), write_tiny_data(run_folder / "data")
    write_run(
        run_folder / "run.yaml", base, records, training={"use_cpu": True, "max_steps": 9_999, "output_dir": "run"}
    )
    return run_folder


def started(run_folder: Path, *words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=run_folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "module", "line"),
    [
        (signal.SIGINT, "dora_vl.run.launch", "train run.yaml"),
        (signal.SIGTERM, "numpy", "train run.yaml"),  # torch imports it where an exception is lost
        *(
            pytest.param(number, *case, marks=pytest.mark.slow)
            for number, *case in (
                (signal.SIGINT, "numpy", "train run.yaml"),
                (signal.SIGINT, "torch", "train run.yaml"),
                (signal.SIGTERM, "transformers", "train run.yaml"),
                (signal.SIGINT, "dora_vl.training.trainer", "train run.yaml"),
                (signal.SIGINT, "dora_vl.evaluation.test", "init data --model base"),
                (signal.SIGTERM, "dora_vl.training.pipeline", "estimate run.yaml"),
                (
                    signal.SIGINT,
                    "dora_vl.evaluation.open_model",
                    "ask --model base --image data/red-0.png --question q",
                ),
            )
        ),
    ],
)
def test_whatever_is_imported(run_folder: Path, number: signal.Signals, module: str, line: str) -> None:
    process = started(run_folder, "-c", CHILD, int(number), module, *line.split())
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (128 + number, LINES[number] + "\n")


LOST = """
import os, signal, sys, time
from dora_vl.errors import exit_on_user_error
class Released:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(9):
            pass
@exit_on_user_error
def main():
    Released()
    while sys.argv[2] == "waits":
        time.sleep(0.1)
main()
"""


@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize("then", ["waits", "ends"])
def test_a_signal_whose_exception_python_ignores(tmp_path: Path, number: signal.Signals, then: str) -> None:
    process = started(tmp_path, "-c", LOST, int(number), then)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.endswith(LINES[number] + "\n")
    assert "ignored in" in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize("after", ["records converted", "what trains", "at the fullest moment"])
def test_whatever_is_read(run_folder: Path, number: signal.Signals, after: str) -> None:
    """Between the last of these lines and the first step a signal may find the trainer's own handler already."""
    cache = {"HF_DATASETS_CACHE": str(run_folder / f"cache-{number}-{after[:4]}")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache.items():
            patch.setenv(name, value)
        process = started(run_folder, "-m", "dora_vl.cli", "train", "run.yaml", "--overwrite=true")
    assert process.stderr is not None
    lines: list[str] = []
    for text in process.stderr:
        lines.append(text)
        if after in text:
            process.send_signal(number)
            break
    lines += process.stderr.readlines()
    assert process.wait(300) == 128 + number, lines
    assert not any("Traceback" in text for text in lines)
    assert sum("stopped by" in text for text in lines) == 1
