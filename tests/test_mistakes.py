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

from dora_vl.errors import SettingError, UserError
from dora_vl.run import arguments
from dora_vl.run.reading import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa, llava_instruct, video_qa
from tests.start.people import picture
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

    def rows(self, name: str, *rows: object) -> None:
        """A data file of JSON lines."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def adapter(self, name: str) -> Path:
        """An adapter folder as a training run leaves one."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        for file in ("adapter_model.safetensors", "adapter_config.json", "recipe.json"):
            (folder / file).write_text("{}")
        return folder

    def says(self, main: Callable[..., object], *words: object) -> str:
        """The one line that a program ends with; nothing may be left of it."""
        before = self.files()
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main() if main is llava_instruct.main else main([str(word) for word in words])
        lines = self._capsys.readouterr().err.splitlines()
        assert left.value.code == 2, lines
        assert self.files() == before
        assert len(lines[-1]) < 500
        return lines[-1]

    def files(self) -> set[str]:
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if path.parts[0] != ".cache"}


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


SETTINGS = [
    ("--training.deepspeed=zero7", "training.deepspeed"),
    ("--training.fp16=true", "training.fp16"),
    ("--training.report_to=wandb", "training.report_to"),
    ("--resume=last", "resume"),
    ("--adapter.initial=stage1", "adapter.initial"),
    ("--data.image_folder=pics", "data.image_folder"),
    ("--data.image_folder=.", "data.image_folder"),
    ("--data.validation_share=0.5 --data.validation_size=3", "data.validation"),
]
OTHERS = [
    ('--adapter.targets=["*.query"]', "*.query"),
    ('--optim.rates={"vison":1e-4}', "vison"),
    ("--model.base=./models/llava", "./models/llava"),
    ("--model.base=pictures", "pictures"),
    ("--model.template=chatml", "model.template"),
    ("--evaluation.file=test.json", "test.json"),
    ("--evaluation.file=empty.json", "empty.json"),
    ("--evaluation.file=pictures/train.json --evaluation.image_folder=none", "none"),
    ("--data.max_tokens=8", "data.max_tokens"),
    ("--data.max_bad_share=5", "data.max_bad_share"),
    ("--data.train=mine.json", "mine.json"),
    ("--data.train=other.csv", "other.csv"),
    ("--data.train=gone.jsonl", "gone.png"),
    ("--data.train=mixed.jsonl", "row 2"),
]


def train(person: Person, options: str) -> pytest.ExceptionInfo[UserError]:
    """What a run ends with before a weight is read; nothing may be left of it."""
    before = person.files()
    with pytest.raises(UserError) as error:
        run(DecoderPipeline(read_run(["--config=run.yaml", *options.split()])))
    assert person.files() == before
    return error


@pytest.mark.parametrize(("options", "key"), SETTINGS)
def test_a_setting_is_named_by_its_key(person: Person, options: str, key: str) -> None:
    error = train(person, options)
    assert isinstance(error.value, SettingError)
    assert error.value.key == key


@pytest.mark.parametrize(("options", "name"), OTHERS)
def test_what_a_model_or_a_file_has_wrong_is_named(person: Person, options: str, name: str) -> None:
    person.write("other.csv", "file,colour\nred-0.png,red\n")
    person.write("empty.json", "[]")
    person.rows("gone.jsonl", row(), row("gone.png"))
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    person.rows("mixed.jsonl", row(), talk)
    assert name in str(train(person, options).value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            yaml.safe_dump(LLAMA_FACTORY),
            ["settings of another tool", "model_name_or_path is model.base", "dora-vl init"],
        ),
        (
            yaml.safe_dump(AXOLOTL),
            ["settings of another tool", "micro_batch_size is training.per_device_train_batch_size", "dora-vl init"],
        ),
        ("model:\n\tbase: x\n", ["my.yaml: no YAML", "line 2", "indent with spaces"]),
        ("model: {base: base}\ndata: {train: pictures/train.json}\n", ["training.output_dir is missing"]),
        ("model: {base: base}\ntraining: {output_dir: out}\n", ["data.train"]),
    ],
)
def test_settings_files(person: Person, content: str, expected: list[str]) -> None:
    line = person.says(llava_instruct.main, "--config", person.write("my.yaml", content))
    assert [part for part in expected if part not in line] == [], line


def test_asking(person: Person) -> None:
    run = person.adapter("runs/my/adapter").parent
    person.write("notes.txt", "no picture")
    question = ["--question", "Q?"]
    cases = {
        "--image https://example.com/a.png": "https://example.com/a.png is on the web; save the picture",
        "--image gone.png": "picture gone.png is missing",
        "--image notes.txt": "picture notes.txt in . is no whole picture of PNG",
        "--image none/*.png": "no picture matches none/*.png",
        f"--adapter {run}": f"{run} is a run's folder or a checkpoint; its adapter is {run}/adapter",
        "--adapter base": "base is a model and has no adapter_model.safetensors",
        "--adapter none": "none is not a folder; give the adapter folder of a run",
        "": "give --adapter DIR, or --model FOLDER",
        "--model base --max-new-tokens 0": "--max-new-tokens is 0",
        "--model base --template chat": "--template 'chat': there are",
        f"--model {run}/adapter": f"--model {run}/adapter is an adapter folder; ask it with --adapter",
    }
    for words, expected in cases.items():
        assert expected in person.says(image_qa.main, *words.split(), *question), words
    assert "video gone.mp4 is missing" in person.says(
        video_qa.main, "--video", "gone.mp4", "--model", "base", *question
    )


@pytest.mark.parametrize("wrong", ["processor", "picture token"])
def test_a_base_of_which_a_file_is_anothers(person: Person, model: Path, wrong: str) -> None:
    """As where the processor of 336 pixels lies beside a tower of 224, or a config of the original code."""
    other = Path(shutil.copytree(model, person.folder / "other"))
    if wrong == "processor":
        for file in other.glob("*processor_config.json"):
            file.write_text(file.read_text().replace(f": {IMAGE_PIXELS}", ": 12"))
        person.write("a.png", picture(0))
        line = person.says(image_qa.main, "--model", "other", "--image", "a.png", "--question", "Q?")
        assert line.startswith("error: other: its processor makes pictures of 12 x 12 pixels, its tower takes ")
        person.folder.joinpath("a.png").unlink()
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "image_token_index": -200}))
    assert str(train(person, "--model.base=other").value).startswith("other: ")


def test_the_settings_that_the_mistakes_are_made_in_do_work(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every case above could fail for another reason."""
    monkeypatch.undo()
    monkeypatch.chdir(person.folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(person.folder / ".cache"))
    Image.open("pictures/red-0.png").verify()
    monkeypatch.setattr(sys, "argv", ["llava_instruct.py", "--config", "run.yaml", "--training.max_steps", "1"])
    llava_instruct.main()
    assert (person.folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
