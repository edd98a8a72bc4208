"""An error is one short line that names the file, the setting or the sample; a program ends with it and status 2.

The mistakes are made one at a time, at a terminal in a folder of settings, data and a base that work; no case reads a
weight.
"""

import errno
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
    short_names,
    short_repr,
    short_text,
)
from dora_vl.run import arguments
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa
from tests.training.tiny_run import IMAGE_PIXELS, write_run, write_tiny_data, write_tiny_llava

LONG = 60_755


@settings(deadline=None, max_examples=50)
@example(message="0\t0", most=30)
@given(message=st.text(), most=st.integers(min_value=30, max_value=200))
def test_any_message_is_one_short_line(message: str, most: int) -> None:
    line = one_line(message, most)
    assert len(line) <= most
    assert len(line.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in line)


def test_a_bad_sample_is_short_too_and_travels() -> None:
    error = pickle.loads(pickle.dumps(BadSample("i" * LONG, "r" * LONG)))
    assert len(str(error)) <= LONGEST_MESSAGE
    assert error.sample_id == "i" * LONG


def test_quoted_values_texts_and_names_are_short_and_can_be_printed() -> None:
    inside: list[object] = []
    inside.append(inside)
    for value in ("x" * LONG, [0] * LONG, [10**5000], dict.fromkeys(range(LONG)), inside, [["x" * LONG]] * LONG):
        assert len(short_repr(value)) <= 60
    assert short_repr({"a": [1, {"b": None}], 2: "\ud83d"}) == "{'a': [1, {'b': None}], 2: '\\ud83d'}"
    assert short_text("two\nlines \ud83d\x00é") == r"two\nlines \ud83d\x00é"
    assert short_names(["a", 1, "y" * LONG]) == "a, 1, " + "y" * 21 + "..."


@pytest.mark.parametrize("option", ["--predictions", "--records", "--against"])
def test_a_path_of_any_length_is_a_persons_error(option: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\nscoring: exact\nfile: {'y' * LONG}\n")
    for benchmark in ("pope", str(own)):
        options = {"--predictions": str(own), option: f"{tmp_path}/{'x' * LONG}", "--benchmarks": benchmark}
        with pytest.raises(SystemExit) as status:
            main(["evaluate", *(word for pair in options.items() for word in pair)])
        assert status.value.code == 2


@pytest.mark.parametrize("below", ["file/run", "file/in/run"])
def test_a_path_that_leads_through_a_file_is_a_persons_error(below: str, tmp_path: Path, capsys: Any) -> None:
    """Also one without permission, which root always has."""
    for colour in ("red", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / colour / "1.png")
    (tmp_path / "file").touch()
    words = ["init", str(tmp_path / "pictures"), "--ask", "What?", "--to", str(tmp_path / below)]
    denied = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/file")
    for called in (lambda: main(words), exit_on_user_error(Mock(side_effect=denied))):
        with pytest.raises(SystemExit, match="2"):
            called()
        assert f"error: {tmp_path}/file" in capsys.readouterr().err


@pytest.mark.parametrize("name", LEFT_OUT)
def test_known_lines_of_other_libraries_alone_are_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    leave_out_foreign_lines()
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)  # DeepSpeed's hands nothing on
    for line in (*(f"{beginning}: %s" for beginning in LEFT_OUT[name]), "what matters: %s"):
        logger.warning(line, "this")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"what matters: this"}


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != ".cache"}


def refused(*options: str) -> UserError:
    """What a run ends with before a weight is read; nothing may be left of it."""
    before = files(Path())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "get_available_reporting_integrations", list)
        patch.setattr(DecoderPipeline, "load", lambda self: pytest.fail("weights are read"))
        with pytest.raises(UserError) as error:
            run(DecoderPipeline(read_run(["--config=run.yaml", *options])))
    assert files(Path()) == before
    return error.value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("mistakes") / "llava")


@pytest.fixture
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    (tmp_path / "base").symlink_to(model)
    data = write_tiny_data(tmp_path / "pictures", samples=12)
    training = {"output_dir": "out", "use_cpu": True, "max_steps": 1}
    write_run(tmp_path / "run.yaml", Path("base"), data.relative_to(tmp_path), training=training)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--training.deepspeed=zero7", "training.deepspeed"),
        ("--training.report_to=wandb", "training.report_to"),
        ("--adapter.initial=stage1", "adapter.initial"),
        ("--data.image_folder=pics", "data.image_folder"),
        ("--data.validation_share=0.5 --data.validation_size=3", "data.validation"),
        ('--adapter.targets=["*.query"]', "*.query"),
        ('--optim.rates={"vison":1e-4}', "vison"),
        ("--model.template=chatml", "model.template"),
        ("--evaluation.file=empty.json", "empty.json"),
        ("--data.max_tokens=8", "data.max_tokens"),
        ("--data.train=other.csv", "other.csv"),
        ("--data.train=gone.jsonl", "gone.png"),
        ("--data.train=mixed.jsonl", "row 2"),
    ],
)
def test_the_setting_the_file_or_what_a_model_lacks_is_named(here: Path, options: str, name: str) -> None:
    write(here / "other.csv", "file,colour\nred-0.png,red\n")
    write(here / "empty.json", "[]")
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    row = {"image": "red-0.png", "question": "Q?", "answer": "red"}
    for file, rows in (("gone", (row, {**row, "image": "gone.png"})), ("mixed", (row, conversation))):
        write(here / f"{file}.jsonl", "".join(json.dumps(entry) + "\n" for entry in rows))
    error = refused(*options.split())
    assert (isinstance(error, SettingError) and error.key == name) or name in str(error)


@pytest.mark.parametrize("wrong", ["processor", "picture token"])
def test_a_base_of_which_a_file_is_anothers(here, model, capsys, wrong) -> None:
    """As where the processor of 336 pixels lies beside a tower of 224, or a config of the original code."""
    other = Path(shutil.copytree(model, here / "other"))
    if wrong == "processor":
        for file in other.glob("*processor_config.json"):
            file.write_text(file.read_text().replace(f": {IMAGE_PIXELS}", ": 12"))
        before = files(Path())
        with pytest.raises(SystemExit):
            image_qa.main(["--model", "other", "--image", "pictures/red-0.png", "--question", "Q?"])
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: other: ")
        assert files(Path()) == before
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "image_token_index": -200}))
    assert str(refused("--model.base=other")).startswith("other: ")


def test_the_settings_that_the_mistakes_are_made_in_do_work(here: Path) -> None:
    """Or every case above could fail for another reason."""
    run(DecoderPipeline(read_run(["--config=run.yaml"])))
    assert (here / "out" / "adapter" / "adapter_model.safetensors").is_file()
