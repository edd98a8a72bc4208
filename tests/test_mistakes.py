"""What people type and have wrong: each mistake is one line that names it and the next step, before anything slow.

Every case ends with status 2, in less than 500 characters, and leaves no file behind. No case reads a weight.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dora_vl.cli import main as dora_vl
from dora_vl.errors import LONGEST_MESSAGE
from dora_vl.run import arguments
from dora_vl.start import init
from dora_vl.training.decoder_pipeline import DecoderPipeline
from tasks import image_qa, llava_instruct, video_qa
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.setup.people import picture, write_folder, write_table
from tests.training.tiny_run import IMAGE_PIXELS, write_run, write_tiny_data, write_tiny_llava

LLAMA_FACTORY = {
    "model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "dataset": "mllm_demo",
    "template": "qwen2_vl",
    "cutoff_len": 2048,
    "output_dir": "saves/x",
}
AXOLOTL = {
    "base_model": "x/y",
    "adapter": "lora",
    "datasets": [{"path": "a.jsonl"}],
    "micro_batch_size": 2,
    "sequence_len": 512,
}


class Person:
    """Somebody at a terminal, in a folder with a model, data and settings that work."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def rows(self, *rows: object) -> str:
        """A data file of JSON lines, as an option."""
        return f"--data.train={self.write('rows.jsonl', ''.join(json.dumps(row) + chr(10) for row in rows))}"

    def data(self, name: str, content: str | bytes) -> str:
        return f"--data.train={self.write(name, content)}"

    def adapter(self, name: str) -> Path:
        """An adapter folder as a training run leaves one."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        for file in ("adapter_model.safetensors", "adapter_config.json", "recipe.json"):
            (folder / file).write_text("{}")
        return folder

    def says(self, main: Callable[..., object], *words: object) -> str:
        """The one line that a program ends with; nothing may be left of it."""
        before = self._files()
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main() if main is llava_instruct.main else main([str(word) for word in words])
        said = self._capsys.readouterr().err.splitlines()
        assert left.value.code == 2, said
        assert self._files() == before
        assert len(said[-1]) < 500
        return said[-1]

    def _files(self) -> set[str]:
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {str(path) for path in found if path.parts[0] != ".cache"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("mistakes") / "llava")


@pytest.fixture
def person(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Person:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    monkeypatch.setattr(DecoderPipeline, "load", lambda self: pytest.fail("weights are read"))
    (tmp_path / "base").symlink_to(model)
    data = write_tiny_data(tmp_path / "pictures", samples=12)
    write_run(
        tmp_path / "run.yaml", Path("base"), data.relative_to(tmp_path), training={"output_dir": "out", "use_cpu": True}
    )
    return Person(tmp_path, monkeypatch, capsys)


def row(image: str = "red-0.png", question: str = "Q?", answer: str = "red") -> dict[str, object]:
    return {"image": image, "question": question, "answer": answer}


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "a name without its section": (["--rank", "8"], ["rank is not a setting", "adapter.rank"]),
    "a misspelt name": (["--adapter.rnk", "8"], ["adapter.rnk is not a setting", "adapter.rank"]),
    "a word for a number": (["--adapter.rank", "eight"], ["adapter.rank is eight", "a whole number"]),
    "a rank of nothing": (["--adapter.rank", "0"], ["rank", "0"]),
    "another tool's name": (["--lora_rank", "8"], ["lora_rank is not a setting", "adapter.rank"]),
    "a batch size": (["--training.batch_size", "8"], ["training.batch_size", "per_device_train_batch_size"]),
    "epochs": (["--training.epochs", "3"], ["training.epochs", "training.num_train_epochs"]),
    "an old name": (["--training.warmup_ratio", "0.1"], ["training.warmup_ratio", "training.warmup_steps"]),
    "a tracker that is not installed": (
        ["--training.report_to", "wandb"],
        ["wandb is not installed", "pip install wandb"],
    ),
    "a tracker that nobody knows": (["--training.report_to", "wandbb"], ["no tracker 'wandbb'", "wandb"]),
    "no such settings file": (["--config", "my.yml"], ["--config 'my.yml'", "no such file or recipe"]),
    "a variant of another file": (["--variant", "lora"], ["--variant 'lora'", "no variants there"]),
    "a ZeRO stage that is none": (["--training.deepspeed", "zero7"], ["zero7", "zero0, zero2, zero3"]),
    "half precision of what trains": (["--training.fp16", "true"], ["training.fp16", "model.dtype"]),
    "nothing to resume": (["--resume", "last"], ["no complete checkpoint in out"]),
    "a pattern without a hit": (["--adapter.targets", '["*.query"]'], ["*.query", "matches none"]),
    "a rate of what does not train": (["--optim.rates", '{"vison": 1e-4}'], ["vison", "dora"]),
    "no such base": (["--model.base", "./models/llava"], ["./models/llava", "no such folder", "hub id"]),
    "a folder that is no model": (["--model.base", "pictures"], ["pictures"]),
    "another model's prompt format": (["--model.template", "chatml"], ["<|im_start|>", "model.template"]),
    "a prompt format that is none": (
        ["--model.template", "vicuna_v2"],
        ["model.template is vicuna_v2; it must be one of vicuna_v1, llava_v1"],
    ),
    "a quantisation that is none": (
        ["--model.quantisation", "int3"],
        ["model.quantisation is int3; it must be one of nf4, int8, hqq, null"],
    ),
    "an adapter to start from that is none": (
        ["--adapter.initial", "stage1"],
        ["adapter.initial", "stage1", "no such"],
    ),
    "a picture folder that is none": (
        ["--data.image_folder", "pics"],
        ["picture folder pics does not exist", "data.image_folder"],
    ),
    "the wrong picture folder": (
        ["--data.image_folder", "."],
        ["not one of its first 12 pictures is in .", "data.image_folder"],
    ),
    "two ways of validation": (
        ["--data.validation_share", "0.5", "--data.validation_size", "3"],
        ["data.validation_share", "set one of"],
    ),
    "no such test": (["--evaluation.file", "test.json"], ["test.json", "no such file"]),
    "no room for an answer": (["--data.max_tokens", "8"], ["none of its first 8 samples", "data.max_tokens"]),
    "a share that is none": (["--data.max_bad_share", "5"], ["data.max_bad_share", "5"]),
    "an empty limit": (["--data.limit", "0"], ["data.limit is 0", "at least 1"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(person: Person, name: str) -> None:
    options, expected = SETTINGS[name]
    config = [] if "--config" in options else ["--config", "run.yaml"]
    line = person.says(llava_instruct.main, *config, *options)
    assert line.startswith("error: ")
    assert [part for part in expected if part not in line] == [], line


DATA: dict[str, tuple[Callable[[Person], str], list[str]]] = {
    "no such file": (lambda one: "--data.train=mine.json", ["mine.json", "no such file"]),
    "an empty file": (lambda one: one.data("a.jsonl", ""), ["a.jsonl", "holds no records"]),
    "columns of other names": (
        lambda one: one.data("a.csv", "file,colour\nred-0.png,red\n"),
        ["a.csv", "none of its 1 records is a sample", "file", "colour"],
    ),
    "a comma too many": (
        lambda one: one.data("a.csv", "image,question,answer\nred-0.png,Q, really?,red\n"),
        ["a.csv", "line 2", "4 values for 3 columns"],
    ),
    "a table of Excel": (lambda one: one.data("a.xlsx", b"PK\x03\x04"), ["a.xlsx", "save the sheet as CSV"]),
    "half a JSON": (lambda one: one.data("a.json", '[{"image": "red-0.png", '), ["a.json", "line 1"]),
    "a picture that is missing": (
        lambda one: one.rows(row(), row("gone.png")),
        ["gone.png is missing in pictures", "1 of the 2"],
    ),
    "a path of another machine": (
        lambda one: one.rows(row(), row("/home/ann/red.png")),
        ["'/home/ann/red.png'", "must be relative to pictures"],
    ),
    "an address for a picture": (
        lambda one: one.rows(row("https://example.com/a.png")),
        ["is on the web", "fetch it and name the file"],
    ),
    "a placeholder too many": (
        lambda one: one.rows(row(question="<image> <image> Which?")),
        ["2 <image> placeholders", "names 1 pictures"],
    ),
    "answers that are blank": (lambda one: one.rows(row(answer=" ")), ["answer 1 of 1 is empty"]),
    "rows of two formats": (
        lambda one: one.rows(
            row(), {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ),
        ["rows of mixed formats", "row 2"],
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(person: Person, name: str) -> None:
    make, expected = DATA[name]
    line = person.says(llava_instruct.main, "--config", "run.yaml", make(person))
    assert [part for part in expected if part not in line] == [], line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            yaml.safe_dump(LLAMA_FACTORY),
            ["settings of llama-factory", "model_name_or_path is model.base", "dora-vl translate"],
        ),
        (
            yaml.safe_dump(AXOLOTL),
            ["settings of Axolotl", "micro_batch_size is training.per_device_train_batch_size", "dora-vl init"],
        ),
        ("model:\n\tbase: x\n", ["my.yaml: no YAML", "line 2", "indent with spaces"]),
        ("model: {base: base}\ndata: {train: pictures/train.json}\n", ["training.output_dir is missing"]),
        ("model: {base: base}\ntraining: {output_dir: out}\n", ["data.train"]),
    ],
)
def test_settings_files(person: Person, content: str, expected: list[str]) -> None:
    line = person.says(llava_instruct.main, "--config", person.write("my.yaml", content))
    assert [part for part in expected if part not in line] == [], line


def test_an_earlier_run_is_not_replaced(person: Person) -> None:
    person.adapter("out/adapter")
    line = person.says(llava_instruct.main, "--config", "run.yaml")
    assert line.startswith("error: out holds an earlier run's adapter; --overwrite true")


def test_asking(person: Person) -> None:
    run = person.adapter("runs/my/adapter").parent
    person.write("notes.txt", "no picture")
    question = ["--question", "Q?"]
    said = {
        "--image https://example.com/a.png": "https://example.com/a.png is on the web; save the picture",
        "--image gone.png": "picture gone.png is missing",
        "--image notes.txt": "picture notes.txt in . is no picture of PNG",
        "--image none/*.png": "no picture matches none/*.png",
        f"--adapter {run}": f"{run} is a run's folder or a checkpoint; its adapter is {run}/adapter",
        "--adapter base": "base is a model and has no adapter_model.safetensors",
        "--adapter none": "none is not a folder; give the adapter folder of a run",
        "": "give --adapter DIR, or --model FOLDER",
        "--model base --max-new-tokens 0": "--max-new-tokens is 0",
        "--model base --template chat": "--template 'chat': there are",
        f"--model {run}/adapter": f"--model {run}/adapter is an adapter folder; ask it with --adapter",
    }
    for words, expected in said.items():
        assert expected in person.says(image_qa.main, *words.split(), *question), words
    assert "video gone.mp4 is missing" in person.says(
        video_qa.main, "--video", "gone.mp4", "--model", "base", *question
    )


def test_a_processor_of_another_tower(person: Person, model: Path) -> None:
    """As where the one of 336 pixels lies beside a tower of 224."""
    other = Path(shutil.copytree(model, person.folder / "other"))
    for file in other.glob("*processor_config.json"):
        file.write_text(file.read_text().replace(f": {IMAGE_PIXELS}", ": 12"))
    person.write("a.png", picture(0))
    taken = f"its tower takes {IMAGE_PIXELS} x {IMAGE_PIXELS}; put the"
    for main, *words in (
        (llava_instruct.main, "--config", "run.yaml", "--model.base", "other"),
        (image_qa.main, "--model", "other", "--image", "a.png", "--question", "Q?"),
    ):
        assert person.says(main, *words).startswith(
            f"error: other: its processor makes pictures of 12 x 12 pixels, {taken}"
        )


def test_the_picture_token_of_another_code(person: Person, model: Path) -> None:
    other = Path(shutil.copytree(model, person.folder / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "image_token_index": -200}))
    said = person.says(llava_instruct.main, "--config", "run.yaml", "--model.base", "other")
    assert said.startswith("error: other: image_token_index in its config is -200, and it has ")


def test_verbs(person: Person) -> None:
    saved(tiny_llama(), person.folder / "llama")
    moved_peft(tiny_llama()).save_pretrained(person.folder / "peft" / "adapter")
    for number in range(60):
        person.write(f"crowd/some quite long name of a file {number}.txt", "x")
    person.write("mine/thesis.tex", "years")
    adapter = "--adapter peft/adapter --base llama"
    said = {
        "merg": "no command 'merg'; did you mean 'merge'?",
        "merge --adapter peft --base llama --to merged": "its adapter is peft/adapter",
        "merge --adapter crowd --base llama --to merged": "crowd has no adapter_model.safetensors",
        f"merge {adapter} --to mine": "mine is there already and holds thesis.tex",
        "merge --adapter peft/adapter --base none --to merged": "none",
        "convert crowd --to there": "and 52 more",
        "evaluate --adapter none --benchmarks pope": "none",
        "evaluate --model base --benchmarks poppe": "poppe",
        "check-data nowhere": "nowhere: neither a data file nor a folder",
        "prepare vqav3 --from x --to y": "vqav3",
        "analyze none runs/none": "none",
    }
    for words, expected in said.items():
        assert expected in person.says(dora_vl, *words.split()), words


def test_first_steps(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_on_gpu", lambda: False)
    write_folder(person.folder / "whole", count=8)
    write_table(person.folder / "two" / "b.csv", [["x.png", "Q?", "a"]])
    write_table(person.folder / "two" / "a.csv", [["x.png", "Q?", "a"]])
    person.write("bare/a.png", picture(1))
    person.write("runs/whole/run.yaml", "")
    person.adapter("adapter")
    (person.folder / "adapter" / "recipe.json").unlink()
    said = {
        "init none": "none: no such folder",
        "init bare": "1 pictures and no file of questions",
        "init two": "2 files hold questions, a.csv, b.csv; name one with --questions FILE",
        "init whole": "runs/whole holds an earlier run.yaml; --overwrite replaces",
        "init whole --to o --questions a.csv": "--questions a.csv: no such file",
        "init whole --to o --model adapter": "--model adapter is an adapter's folder",
        "init whole --to o --model ../none": "--model '../none': no such folder, and no hub id",
        "init whole --to o --model base --test-share 0": "--test-share is 0.0; it must be above 0",
    }
    for words, expected in said.items():
        assert expected in person.says(dora_vl, *words.split()), words


def test_messages_are_shorter_than_five_hundred_characters() -> None:
    assert len("error: ") + LONGEST_MESSAGE < 500


def test_there_are_more_than_forty() -> None:
    assert len(SETTINGS) + len(DATA) > 40


def test_the_settings_that_the_mistakes_are_made_in_do_work(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every case above could fail for another reason."""
    monkeypatch.undo()
    monkeypatch.chdir(person.folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(person.folder / ".cache"))
    Image.open("pictures/red-0.png").verify()
    monkeypatch.setattr(sys, "argv", ["llava_instruct.py", "--config", "run.yaml", "--training.max_steps", "1"])
    llava_instruct.main()
    assert (person.folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
