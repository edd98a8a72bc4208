"""An error is one short line that names the file, the setting or the sample; a program ends with it and status 2.

The mistakes are made one at a time, at a terminal in a folder of settings, data and a base that work; no case reads a
weight.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_vl.cli import main
from dora_vl.errors import (
    LEFT_OUT,
    LONGEST_MESSAGE,
    BadSample,
    SettingError,
    UserError,
    exit_on_user_error,
    leave_out_foreign_lines,
    one_line,
    shown,
    shown_names,
    shown_text,
)
from dora_vl.run import arguments
from dora_vl.run.reading import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa, llava_instruct, video_qa
from tests.training.tiny_run import IMAGE_PIXELS, write_run, write_tiny_data, write_tiny_llava

LONG = 60_755


@settings(deadline=None)
@example(message="0\t0", most=30)
@given(message=st.text(), most=st.integers(min_value=30, max_value=200))
def test_any_message_is_one_short_line(message: str, most: int) -> None:
    line = one_line(message, most)
    assert len(line) <= most
    assert len(line.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in line)


def test_the_beginning_and_the_end_of_a_long_message_stay() -> None:
    error = UserError(f"a.jsonl, line 7: {'x' * LONG} is no answer; write it again")
    assert len(str(error)) == LONGEST_MESSAGE
    assert str(error).startswith("a.jsonl, line 7: xxx")
    assert str(error).endswith("xxx is no answer; write it again")
    assert " [...] " in str(error)
    assert str(UserError("two\n  lines\x1b[31m \ud83d")) == "two lines?[31m ?"


def test_a_bad_sample_is_short_too_and_travels() -> None:
    error = pickle.loads(pickle.dumps(BadSample("i" * LONG, "r" * LONG)))
    assert len(str(error)) <= LONGEST_MESSAGE
    assert len(error.reason) == LONGEST_MESSAGE
    assert error.sample_id == "i" * LONG


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("it's", '"it\'s"'),
        ([1, "b"], "[1, 'b']"),
        ("x" * LONG, "'" + "x" * 56 + "..."),
        (b"y" * LONG, "b'" + "y" * 55 + "..."),
        ([0] * LONG, "[" + "0, " * 18 + "0," + "..."),
        ([10**5000], "a list too large to be shown"),
        ({"a": [1, {"b": None}], 2: "\ud83d"}, "{'a': [1, {'b': None}], 2: '\\ud83d'}"),
        ({name: name for name in range(LONG)}, "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9:..."),
    ],
)
def test_a_quoted_value_is_short(value: object, text: str) -> None:
    assert shown(value) == text


def test_values_nested_without_end_are_short_too() -> None:
    inside: list[object] = []
    inside.append(inside)
    deep: Any = 1
    for _ in range(LONG):
        deep = {"a": [deep]}
    for value in (inside, deep, [["x" * LONG] * LONG] * LONG):
        assert len(shown(value)) <= 60
    while isinstance(deep, dict):  # Python's own end of it would need as many calls
        deep = deep["a"].pop()


def test_text_without_quotes_and_names_are_short_and_can_be_printed() -> None:
    assert shown_text("two\nlines \ud83d\x00é") == r"two\nlines \ud83d\x00é"
    assert shown_text("x" * LONG) == "x" * 57 + "..."
    assert shown_text("\n" * LONG, 10) == r"\n\n\n\..."
    assert shown_names(["a", 1, "y" * LONG]) == "a, 1, " + "y" * 21 + "..."
    assert shown_names(range(11)) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert shown_names([]) == "nothing"


def test_the_line_on_stderr_has_at_most_500_characters(capsys: Any) -> None:
    @exit_on_user_error
    def fails() -> None:
        raise UserError("é" * LONG)

    with pytest.raises(SystemExit) as status:
        fails()
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.startswith("error: é")
    assert error.count("\n") == 1
    assert len(error) <= 500


@pytest.mark.parametrize("option", ["--predictions", "--records", "--against"])
def test_a_path_of_any_length_is_a_persons_error(option: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\nscoring: exact\nfile: {'y' * LONG}\n")
    for benchmark in ("pope", str(own)):
        options = {"--predictions": str(own), option: f"{tmp_path}/{'x' * LONG}", "--benchmarks": benchmark}
        with pytest.raises(SystemExit) as status:
            main(["evaluate", *(word for pair in options.items() for word in pair)])
        assert status.value.code == 2


@pytest.mark.parametrize("name", LEFT_OUT)
def test_known_lines_of_other_libraries_alone_are_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    leave_out_foreign_lines()
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)  # DeepSpeed's hands nothing on
    for line in (*(f"{beginning}: %s" for beginning in LEFT_OUT[name]), "what matters: %s"):
        logger.warning(line, "this")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"what matters: this"}


class Person:
    """Somebody at a terminal, in a folder with a model, data and settings that work."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def write(self, name: str, content: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return name

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
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    row = {"image": "red-0.png", "question": "Q?", "answer": "red"}
    for file, rows in (("gone", (row, {**row, "image": "gone.png"})), ("mixed", (row, conversation))):
        person.write(f"{file}.jsonl", "".join(json.dumps(entry) + "\n" for entry in rows))
    assert name in str(train(person, options).value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model:\n\tbase: x\n", ["my.yaml", "line 2"]),
        ("model: {base: base}\ndata: {train: pictures/train.json}\n", ["training.output_dir"]),
        ("model: {base: base}\ntraining: {output_dir: out}\n", ["data.train"]),
    ],
)
def test_settings_files(person: Person, content: str, named: list[str]) -> None:
    line = person.says(llava_instruct.main, "--config", person.write("my.yaml", content))
    assert [part for part in named if part not in line] == [], line


def test_asking(person: Person) -> None:
    person.write("notes.txt", "no picture")
    folder = "runs/my/adapter"
    for file in ("adapter_model.safetensors", "adapter_config.json", "recipe.json"):
        person.write(f"{folder}/{file}", "{}")
    cases = {
        "--image https://example.com/a.png": "https://example.com/a.png",
        "--image gone.png": "gone.png",
        "--image notes.txt": "notes.txt",
        "--image none/*.png": "none/*.png",
        "--adapter runs/my": folder,
        "--adapter base": "base",
        "--adapter none": "none",
        "": "--adapter DIR",
        "--model base --max-new-tokens 0": "--max-new-tokens",
        "--model base --template chat": "--template",
        f"--model {folder}": "--adapter",
    }
    for words, named in cases.items():
        assert named in person.says(image_qa.main, *words.split(), "--question", "Q?"), words
    gone = ("--video", "gone.mp4", "--model", "base", "--question", "Q?")
    assert "gone.mp4" in person.says(video_qa.main, *gone)


@pytest.mark.parametrize("wrong", ["processor", "picture token"])
def test_a_base_of_which_a_file_is_anothers(person: Person, model: Path, wrong: str) -> None:
    """As where the processor of 336 pixels lies beside a tower of 224, or a config of the original code."""
    other = Path(shutil.copytree(model, person.folder / "other"))
    if wrong == "processor":
        for file in other.glob("*processor_config.json"):
            file.write_text(file.read_text().replace(f": {IMAGE_PIXELS}", ": 12"))
        asked = ("--model", "other", "--image", "pictures/red-0.png", "--question", "Q?")
        assert person.says(image_qa.main, *asked).startswith("error: other: ")
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
