"""`dora-vl init`: it says what is in a folder, parts it without a leak, and what it writes is checked and trains."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader
from PIL import Image, ImageDraw
from transformers import LlavaForConditionalGeneration

from dora_vl.cli import main
from dora_vl.data.check import FileCheck, MediaCheck
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.video import no_video_reason
from dora_vl.data.video_backends import BackendMissing
from dora_vl.errors import UserError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.predictor import prediction
from dora_vl.evaluation.questions import read_questions
from dora_vl.limited_process import JobFailed
from dora_vl.run.settings_parser import read_run_file
from dora_vl.start import init
from dora_vl.start.run_file import Base, Data, choose_base, run_file_text
from tests.backbones.tiny_image_text import write_tiny
from tests.data.video_files import write_clip
from tests.start.people import picture, write_folder, write_table
from tests.training.own_data import HOLD_PICTURES, WRITERS, items, write_pictures
from tests.training.tiny_run import write_tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("init") / "llava")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(init, "_on_gpu", lambda: False)
    monkeypatch.setattr(init, "_program", str)


def printed_by(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    main(["init", *map(str, words)])
    return capsys.readouterr().out


def run_of(*words: object) -> list[str]:
    parser, arguments = argparse.ArgumentParser(), [str(word) for word in words]
    init.add_arguments(parser)
    return list(init.run(parser.parse_args(arguments, argparse.Namespace(words=arguments))))


def refused(*words: object) -> None:
    with pytest.raises(UserError):
        run_of(*words)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_table_with_headings_of_its_own_is_refused_with_the_options_that_settle_it(tmp_path, base, capsys) -> None:
    rows = write_folder(tmp_path / "my", count=24)
    path = tmp_path / "my" / "answers.csv"
    write_table(path, rows)
    path.write_text(path.read_text().replace("image,question,answer", "Bilddatei,Frage,Antwort", 1))
    options = ["--columns", "Frage=question,Antwort=answer,Bilddatei=image"]
    with pytest.raises(UserError, match=" ".join(options)):
        run_of("my", "--model", base)
    refused("my", "--model", base, "--columns", f"{options[1]},Bild=image")
    assert not (tmp_path / "runs").exists()
    assert "Bilddatei: used as images" in printed_by(capsys, "my", "--model", base, *options)


def test_the_only_column_of_pictures_is_taken_whatever_its_name(tmp_path: Path, base: Path, capsys: Any) -> None:
    rows = write_folder(tmp_path / "my", count=24)
    path = write_table(tmp_path / "my" / "answers.csv", rows, "file,question,answer")
    printed = printed_by(capsys, "my", "--model", base)
    assert "24 rows, 24 usable\n  file: used as images\n" in printed
    assert all((tmp_path / "my" / "photos" / row["image"]).is_file() for row in rows_of(Path("runs/my/train.jsonl")))
    write_table(path, [[*row, rows[0][0]] for row in rows], "file,question,answer,second")
    refused("my", "--model", base, "--overwrite")


@pytest.mark.parametrize("folder", ["scans/", "/home/ada/scans/", "C:\\Ada\\scans\\"])
def test_names_in_folders_that_are_not_there_lead_to_the_files(folder, tmp_path, base, capsys) -> None:
    rows = write_folder(tmp_path / "my", count=24)
    named = [[folder + row[0], *row[1:]] for row in rows]
    path = write_table(tmp_path / "my" / "answers.csv", named)
    printed = printed_by(capsys, "my", "--model", base)
    assert "24 rows, 24 usable\n" in printed
    name = named[0][0].replace("\\", "/")
    assert f"for {name} {rows[0][0]} is read" in printed
    train = rows_of(Path("runs/my/train.jsonl"))
    truth = {name: (question, answer) for name, question, answer in rows}
    for row in train:
        question, answer = truth[row["image"]]
        assert [question, answer] == [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    for other in (f"{folder}none.png", f"other{named[0][0]}"):  # one is nowhere, one is perhaps another picture
        write_table(path, [*named[:3], [other, *rows[0][1:]]])
        refused("my", "--model", base, "--overwrite")


def test_a_table_and_photographs_below_become_the_files_of_a_run(tmp_path: Path, base: Path, capsys: Any) -> None:
    rows = write_folder(tmp_path / "my", count=24)
    photos = tmp_path / "my" / "photos"
    files = {"copy.png": picture(3), "cut.png": picture(5)[:-30], "phone.jpg": picture(8, "JPEG")}
    for name, content in {**files, "spare.png": picture(9)}.items():
        (photos / name).write_bytes(content)
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(photos / "clear.png")
    extra = [["copy.png", "Say it.", "white"], ["cut.png", "Say it.", "red"], ["none.png", "Say it.", "red"]]
    extra += [["phone.jpg", "Which one is it?", "a red one"], ["clear.png", "Is it?", "no"], ["001.png", "Is it?", " "]]
    write_table(tmp_path / "my" / "answers.csv", [*rows, *extra])

    printed = printed_by(capsys, "my", "--model", base)
    assert "my/answers.csv: question/answer, 30 rows, 27 usable\n  image: used as images\n" in printed
    assert "pictures: 27 in my/photos, PNG 26, JPEG 1; 1 more that no row names" in printed
    for kind, name in (("truncated media", "cut.png"), ("missing media", "none.png"), ("empty answer", "row 30")):
        assert any(kind in line and name in line for line in printed.splitlines()), kind
    assert re.fullmatch(r"next:  \S*dora-vl train runs/my/run\.yaml", printed.splitlines()[-1])

    run = tmp_path / "runs" / "my"
    written = {"features", "probe.json", "run.yaml", "test.jsonl", "train.jsonl"}
    assert {path.name for path in run.iterdir()} == written
    train, test = rows_of(run / "train.jsonl"), rows_of(run / "test.jsonl")
    assert len(train) + len(test) == 27
    assert 3 <= len(test) <= 6
    sides = [{(photos / str(row["image"])).read_bytes() for row in half} for half in (train, test)]
    assert sides[0].isdisjoint(sides[1])  # the copy stays with what it is a copy of
    for name in ("train.jsonl", "test.jsonl"):
        assert not FileCheck(run / name, media=MediaCheck(photos, decode=True)).run().findings
    config = read_run_file(run / "run.yaml")
    assert (config.data.train, config.data.image_folder) == ("runs/my/train.jsonl", "my/photos")
    assert (config.evaluation.file, config.model.template) == ("runs/my/test.jsonl", "vicuna_v1")


def test_the_base_is_the_demo_s_where_it_is(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "my")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for name in ("base", "tuned"):
        (tmp_path / "runs" / "demo" / name).symlink_to(base)
    assert "base runs/demo/base" in printed_by(capsys, "my")
    (tmp_path / "clips").mkdir()
    for number, name in enumerate("ab"):
        write_clip(tmp_path / "clips" / f"{name}.mp4", frames=3 + number)
    rows = [[name, "what moves?", "the bar"] for name in ("a.mp4", "b.mp4")]
    write_table(tmp_path / "clips" / "questions.csv", rows, "video,question,answer")
    assert "base runs/demo/tuned" in printed_by(capsys, "clips", "--test-share", 0.5)


def test_the_seed_decides_and_an_earlier_init_is_not_replaced_unasked(tmp_path: Path, base: Path, capsys: Any) -> None:
    write_folder(tmp_path / "my")
    printed_by(capsys, "my", "--model", base)
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs/my").iterdir() if path.is_file()}
    refused("my", "--model", base)
    (tmp_path / "runs/my/adapter").mkdir()
    printed_by(capsys, "my", "--model", base, "--overwrite")
    assert {name: (tmp_path / "runs/my" / name).read_bytes() for name in files} == files
    assert (tmp_path / "runs/my/adapter").is_dir()
    printed_by(capsys, "my", "--model", base, "--overwrite", "--seed", 1)
    assert (tmp_path / "runs/my/test.jsonl").read_bytes() != files["test.jsonl"]


def test_what_can_be_read_of_the_base_is_told_before_training_and_stands_beside_the_score(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_folder(tmp_path / "my", count=60)
    more = [[row[0], "Is it large?", "yes" if number % 7 % 2 else "no"] for number, row in enumerate(rows)]
    write_table(tmp_path / "my" / "answers.csv", [*rows, *more])
    printed = printed_by(capsys, "my", "--model", base)
    assert "  Say the colour. readable 12 of 12, its commonest answer" in printed
    guessed = re.search(r"Is it large\? readable (\d+) of 12, its commonest answer (\d+)", printed)
    assert guessed is not None
    assert int(guessed[1]) < 12, "no picture tells it"
    few = ("--training.max_steps=1", "--training.num_train_epochs=1", "--evaluation.forgetting=false", "--watch=0")
    main(["train", "runs/my/run.yaml", *few])
    entry = json.loads((tmp_path / "runs/my/metrics.json").read_text())["sets"]["test"]["baselines"]
    assert entry["readable"]["questions"]["Say the colour."]["readable"] == 12
    assert "advice" in entry


def test_pictures_inside_a_container_come_out_whole(tmp_path: Path, base: Path, capsys: Any) -> None:
    samples = items(16)
    (tmp_path / "my").mkdir()
    WRITERS[min(HOLD_PICTURES)](tmp_path / "my", samples)
    assert "16 rows" in printed_by(capsys, "my", "--model", base, "--to", "out")
    rows = [row for half in ("train", "test") for row in rows_of(tmp_path / "out" / f"{half}.jsonl")]
    conversations = {tuple(turn["value"] for turn in row["conversations"]) for row in rows}
    assert conversations == {(f"<image>\n{item.question}", item.answer) for item in samples}
    assert read_run_file("out/run.yaml").data.image_folder == "out"
    assert {Path("out", str(row["image"])).read_bytes() for row in rows} == {item.content for item in samples}


def test_the_settings_follow_the_base_and_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_folder(tmp_path / "my", count=240)
    other = write_tiny("qwen2_vl", tmp_path / "qwen")
    printed_by(capsys, "my", "--model", other)
    plain = yaml.safe_load((tmp_path / "runs/my/run.yaml").read_text())
    assert "template" not in plain["model"]
    assert "cache_features" not in plain["data"]
    assert plain["data"]["validation_share"] == 0.05
    assert plain["training"]["per_device_train_batch_size"] == 16
    write_table(tmp_path / "my" / "answers.csv", [[name, text, "a long answer " * 30] for name, text, _ in rows])
    printed_by(capsys, "my", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--overwrite")
    large = yaml.safe_load((tmp_path / "runs/my/run.yaml").read_text())
    assert large["model"]["base"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert large["training"]["gradient_checkpointing"] is True
    each, training = large["training"]["per_device_train_batch_size"], large["training"]
    assert each < 16 == each * training["gradient_accumulation_steps"]
    assert large["evaluation"]["max_new_tokens"] >= 180


ODD_NAMES = ("no", "0x1f", "12:30", "bilder 😀", "a: b", "a #b", "'", "*a", "- a", " a ", "a\nb", "a\x07b", "x " * 200)


def data_of(name: str) -> Data:
    files = {"train": f"{name}/train.jsonl", "test": f"{name}/test.jsonl", "root": name}
    lengths: Any = {"answer_words": 1, "answer_characters": 3, "usual_answer_words": 1.0}
    return Data(**files, **lengths, rows=200, has_videos=False)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_read_as_it_is_written(name: str) -> None:
    text = run_file_text(Base(name=name), data_of(name), output_dir=name, shards=False, commands=[f"run {name}"])
    for read in (yaml.safe_load, get_loader("yaml")):
        printed = read(text)
        assert printed["model"]["base"] == printed["data"]["image_folder"] == name
        assert printed["training"]["output_dir"] in (name, f"./{name}")
        assert printed["data"]["train"] in (f"{name}/train.jsonl", f"./{name}/train.jsonl")
        assert printed["evaluation"]["file"] == f"{name}/test.jsonl"


@pytest.mark.parametrize(("name", "share"), [("a/SmolVLM", 0.05), ("google/paligemma2-3b", None)])
def test_a_base_that_takes_words_alone_keeps_what_it_knows(name: str, share: float | None) -> None:
    text = run_file_text(choose_base(name), data_of("my"), output_dir="my", shards=False, commands=["run"])
    assert yaml.safe_load(text)["data"].get("replay") == share


@pytest.mark.parametrize(
    ("is_new", "base_answers", "loss", "rates"),
    [
        (True, False, {"dpo": 1, "sft": 1}, (2e-4, 2e-4)),
        (True, True, "dpo", (5e-5, 5e-5)),
        (False, False, {"dpo": 1, "sft": 1}, (5e-5, 2e-5)),
        (False, True, "dpo", (5e-5, 2e-5)),
    ],
)
def test_preferences_alone_are_for_a_base_that_answers(is_new, base_answers, loss, rates) -> None:
    base = Base(name="b", is_llava=True, is_new=is_new)
    data = replace(data_of("my"), loss="dpo", base_answers=base_answers)
    settings = yaml.safe_load(run_file_text(base, data, output_dir="my", shards=False, commands=["run"]))
    assert settings["objective"]["loss"] == loss
    assert (settings["training"]["learning_rate"], settings["optim"]["projector_learning_rate"]) == rates


def test_a_base_that_answers_gets_preferences_alone(tmp_path, base, capsys, monkeypatch) -> None:
    def right(_: object, examples: Sequence[Example], *__: object) -> Iterator[list[Prediction]]:
        yield [prediction(example, example.answers[0].text) for example in examples]

    monkeypatch.setattr(Assistant, "predict", right)
    folder, samples = tmp_path / "my", items(16)
    folder.mkdir()
    write_pictures(folder, samples)
    rows = [{"image": item.picture, "prompt": "?", "chosen": item.answer, "rejected": "no"} for item in samples]
    (folder / "rows.json").write_text(json.dumps(rows))
    printed_by(capsys, "my", "--model", base, "--to", "out")
    assert read_run_file(tmp_path / "out/run.yaml").objective.loss == "dpo"


def test_the_adapter_is_that_of_the_lowest_validation_loss_where_it_is_measured() -> None:
    for rows in (99, 100):
        data = replace(data_of("my"), rows=rows)
        text = run_file_text(Base(name="b"), data, output_dir="my", shards=False, commands=["run"])
        settings = yaml.safe_load(text)
        assert ("validation_share" in settings["data"]) == (rows == 100)
        assert settings["training"].get("load_best_model_at_end", False) == (rows == 100)


def test_a_size_is_in_a_hub_id_s_name_and_in_a_folder_s_headers(base: Path) -> None:
    sizes = {"Qwen/Qwen2.5-VL-7B-Instruct": 7e9, "HuggingFaceTB/SmolVLM-256M-Instruct": 256e6, "a/InternVL3-hf": 0}
    assert {name: choose_base(name).parameters for name in sizes} == sizes
    weights = LlavaForConditionalGeneration.from_pretrained(base).parameters()
    assert choose_base(str(base)).parameters == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({}, ["my"]),
        ({"odd.csv": "file,colour\na.png,red\n"}, ["my"]),
        ({"a.csv": "image,question,answer\ngone.png,Q?,red\n"}, ["my"]),
        ({name: "image,question,answer\na.png,Q?,red\n" for name in ("a.csv", "b.csv")}, ["my"]),
        ({"b.csv": "image,question,answer\na.png,Q?,red\n"}, ["my"]),  # one row cannot be parted
        ({}, ["sound", "--model", "./none"]),
        ({}, ["sound", "--test-share", "2"]),
        ({}, ["sound", "--to=-run"]),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, base, tables, words) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "a.png").write_bytes(picture(0))
    for name, text in tables.items():
        (tmp_path / "my" / name).write_text(text)
    write_folder(tmp_path / "sound", count=8)
    refused("--model", base, *words)
    assert list(tmp_path.rglob("*.y*ml")) == []
    assert not any(path.is_file() for path in (tmp_path / "runs").rglob("*"))


def test_the_current_folder_with_runs_in_it_is_still_one_folder(tmp_path: Path, base: Path, capsys: Any) -> None:
    write_folder(tmp_path)
    printed_by(capsys, ".", "--model", base, "--to", "runs/first")
    assert "answers.csv: question/answer, 24 rows" in printed_by(capsys, ".", "--model", base, "--to", "runs/second")


def test_rows_that_would_lose_a_column_are_one_line_until_it_is_named(tmp_path: Path, base: Path, capsys: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Which?", "choices": ["up", "down"], "reply": 1, "rating": 3}
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    rows = [{"id": name, **row, "image": image} for name, image in zip("abcd", ["a.png", "b.png"] * 2, strict=True)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reply = (tmp_path, "--model", base, "--test-share", "0.5", "--columns", "reply=answer")
    refused(*reply)
    assert "  rating: left out" not in printed_by(capsys, *reply, "--ignore", "rating", "--to", "out")
    assert rows_of(tmp_path / "out" / "test.jsonl")[0]["conversations"][1]["value"] == "B"
    refused(*reply[:-1], "reply")


def test_a_llava_takes_the_frames_of_videos(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        (folder := tmp_path / "clips" / ("left", "right")[number % 2]).mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"{number}.mp4", frames=3 + number)
    assert "videos: 6 in clips, MP4 6" in printed_by(capsys, "clips", "--model", base, "--ask", "Which way?")
    assert rows_of(tmp_path / "runs/clips/train.jsonl")[0]["videos"] == [{"path": "left/0.mp4"}]
    assert not read_run_file(tmp_path / "runs/clips/run.yaml").data.cache_features  # it is for pictures


@pytest.mark.parametrize("judged", [False, True])
def test_preferences_keep_every_answer_and_get_their_loss(tmp_path, base, judged, capsys) -> None:
    folder, samples = tmp_path / "my", items(16)
    folder.mkdir()
    write_pictures(folder, samples)
    asked = [{"image": item.picture, "prompt": item.question} for item in samples]
    answers = [{"chosen": item.answer, "rejected": f"not {item.answer}"} for item in samples]
    rows: list[dict[str, Any]] = [{**both, **pair} for both, pair in zip(asked, answers, strict=True)]
    rows[3]["rejected_images"] = [samples[5].picture]
    if judged:
        pairs = zip(asked, answers, strict=True)
        rows = [{**both, "completion": pair[kind], "label": kind == "chosen"} for both, pair in pairs for kind in pair]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert "the base answers 0 of " in printed_by(capsys, "my", "--model", base, "--to", "out")
    config, name = read_run_file(tmp_path / "out/run.yaml"), "kto" if judged else "dpo"
    assert (config.objective.loss, config.adapter.dropout) == ({name: 1, "sft": 1}, 0.0)
    assert not config.data.replay
    train, test = ([read_row(row) for row in rows_of(tmp_path / "out" / f"{half}.jsonl")] for half in ("train", "test"))
    examples = [*train, *test]
    held_out = {row.images[0] for row in test}
    assert [row.rejected_images for row in examples if row.rejected_images] == [(samples[5].picture,)] * (not judged)
    expected = {(item.picture, item.answer, (f"not {item.answer}",), None) for item in samples}
    if judged:  # a bad answer is no truth to test with
        expected = {(item.picture, item.answer, (), True) for item in samples}
        expected |= {
            (item.picture, f"not {item.answer}", (), False) for item in samples if item.picture not in held_out
        }
    assert {(row.images[0], row.turns[-1].text, row.rejected, row.is_good) for row in examples} == expected
    assert held_out.isdisjoint(row.images[0] for row in train)


def test_every_right_answer_is_in_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"circle": 10})
    rows = [
        {"image": f"circle/{number}.png", "question": "What?", "answers": ["o", "ring", "o"]} for number in range(10)
    ]
    Path("my/rows.json").write_text(json.dumps(rows))
    lines_of(capsys, "my")
    tested, _ = read_questions(Path("runs/my/test.jsonl"))
    assert {(row.question, *(answer.text for answer in row.answers)) for row in tested} == {("What?", "o", "ring")}
    assert [read_row(row).turns[-1].text for row in rows_of(Path("runs/my/train.jsonl"))] == ["o"] * 8


def test_words_alone_stand_in_one_half_by_their_question(capsys: pytest.CaptureFixture[str]) -> None:
    spelled = ["Capital of {}?", "capital  of {}?", "CAPITAL of {}? "]
    rows = [[form.format(number), f"c{number}"] for number in range(20) for form in spelled]
    write_table(Path("my/answers.csv"), rows, "question,answer")
    lines_of(capsys, "my")
    halves = [
        {row["conversations"][1]["value"] for row in rows_of(Path(f"runs/my/{half}.jsonl"))}
        for half in ("train", "test")
    ]
    assert halves[0].isdisjoint(halves[1])
    assert [*map(len, halves)] == [16, 4]


# Folders as people have them: what it says of each, which rows it writes, what it asks for.


BASE = "OWNER/NAME-1B"
"""Nothing is fetched of a base of the hub."""
ASK = ("--ask", "what is it?")


def draw(path: Path, shape: str, number: int) -> None:
    image = Image.new("RGB", (24, 24), (200, 200, 100 + number))
    box = (number % 5, number % 7, 15, 15)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=(20, 20, number))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def classes(folder: Path, sizes: dict[str, int], ending: str = "png") -> None:
    for start, (name, size) in enumerate(sizes.items()):
        for number in range(size):
            draw(folder / name / f"{number}.{ending}", name, 40 * start + number)


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    return printed_by(capsys, *words, "--model", BASE).splitlines()


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["init", *words, "--model", BASE])
    assert caught.value.code == 2
    assert not Path("runs").exists()
    return capsys.readouterr().err


def answers(name: str) -> Counter[str]:
    return Counter(row["conversations"][-1]["value"] for row in rows_of(Path(name)))


def test_a_folder_a_class_is_its_answers_and_each_is_in_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"circle": 20, "red_square": 10, "star": 5, "once": 1})
    first, *lines = lines_of(capsys, "my", *ASK)
    assert first == "my: question/answer, 36 rows, 36 usable"
    assert "answers as they are named: circle 20, red_square 10, star 5, once 1" in lines
    assert "held out by seed 0: 8 rows about 8 pictures; to train on: 28 rows about 28 pictures" in lines
    assert answers("runs/my/test.jsonl") == {"circle": 4, "red_square": 2, "star": 1, "once": 1}
    row = rows_of(Path("runs/my/train.jsonl"))[0]
    assert (row["id"], row["image"]) == ("circle/0.png", "circle/0.png") or row["image"].startswith("circle/")
    assert row["conversations"][0]["value"] == "<image>\nwhat is it?"


def test_a_column_that_names_splits_is_followed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"circle": 8})
    pictures = [path.relative_to("my").as_posix() for path in sorted(Path("my").rglob("*.png"))]
    splits = ["train", "train", "train", "val", "val", "test", "", "test"]
    rows = zip(pictures, splits, strict=True)
    lines = [f"{name},what is {number}?,a{number},{split}" for number, (name, split) in enumerate(rows)]
    Path("my/rows.csv").write_text("\n".join(["image,question,answer,split", *lines]) + "\n")
    printed = lines_of(capsys, "my")
    assert any(line.startswith("held out by their own split: 2 rows about 2") for line in printed)
    counts = {name: [*answers(f"runs/my/{name}.jsonl")] for name in ("train", "validation", "test")}
    assert counts == {"train": ["a0", "a1", "a2", "a6"], "validation": ["a3", "a4"], "test": ["a5", "a7"]}


def test_folders_named_as_splits_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for split, size in {"train": 6, "val": 2, "test": 3}.items():
        classes(Path("my") / split, {"circle": size, "square": size})
    (Path("my/val/circle/0.png")).write_bytes(Path("my/train/circle/0.png").read_bytes())
    Path("my/test/circle/0.png").write_bytes(Path("my/train/circle/1.png").read_bytes())
    lines = lines_of(capsys, "my", *ASK)
    assert any(
        line.startswith("held out by their own split: 6 rows about 6 pictures; to train on: 12") for line in lines
    )
    assert any("both the training and the test split" in line for line in lines)
    assert [len(rows_of(Path(f"runs/my/{name}.jsonl"))) for name in ("train", "test", "validation")] == [12, 6, 4]
    assert "validation: runs/my/validation.jsonl" in Path("runs/my/run.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("folders", [("train", "test", "more"), ("pictures/train", "pictures/val")])
def test_a_split_is_not_an_answer(folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in folders:
        classes(Path("my") / folder, {"circle": 2, "square": 2})
    error = told(capsys, "my", *ASK)
    assert all(Path(folder).name in error for folder in folders)


METADATA = [("metadata.csv", "file_name"), ("metadata.jsonl", "file_name")]
TABLES: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    ".csv": lambda path, rows: write_table(path, [list(row.values()) for row in rows], ",".join(rows[0])),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".jsonl": lambda path, rows: path.write_text("".join(f"{json.dumps(row)}\n" for row in rows)),
}


@pytest.mark.parametrize(("name", "column"), [("labels.csv", "image"), ("labels.json", "image"), *METADATA])
def test_a_table_of_pictures_and_labels_is_asked(name: str, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my/photos"), {"circle": 10, "square": 10}, "JPG")
    rows = [
        {column: f"photos/{shape}/{number}.jpg", "label": shape}  # their endings are in capitals on the disk
        for shape in ("circle", "square")
        for number in range(10)
    ]
    TABLES[Path(name).suffix](Path("my", name), rows)
    assert '--ask "what is it?"' in told(capsys, "my")
    lines = lines_of(capsys, "my", *ASK)
    assert lines[0] == f"my/{name}: question/answer, 20 rows, 20 usable"
    assert "pictures: 20 in my, JPEG 20" in lines
    assert answers("runs/my/test.jsonl") == {"circle": 2, "square": 2}


def test_a_text_beside_each_picture_is_its_caption_or_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"photos": 10})
    for number in range(10):
        Path(f"my/photos/{number}.txt").write_text(f"a circle, number {number}\n")
    Path("my/photos/4.txt").unlink()
    Path("my/notes.json").write_text("[]")
    lines = lines_of(capsys, "my")
    assert lines[0] == "no questions in notes.json: left out"
    assert "my: captions, 10 rows, 9 usable" in lines
    assert any("empty answer" in line and "photos/4.png" in line for line in lines)
    first = rows_of(Path("runs/my/train.jsonl"))[0]["conversations"]
    assert (first[0]["value"], first[1]["value"][:8]) == ("<image>", "a circle")
    lines_of(capsys, "my", *ASK, "--to", "runs/asked")
    assert rows_of(Path("runs/asked/train.jsonl"))[0]["conversations"][0]["value"] == "<image>\nwhat is it?"


def test_what_says_nothing_is_one_line_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("alone"), {"photos": 3})
    for words in (("alone",), ("alone", *ASK)):
        assert told(capsys, *words).count("\n") == 1
    classes(Path("my shapes"), {"circle": 3, "square": 3})
    assert '--ask "what is it?"' in told(capsys, "my shapes")
    for folder in ("my shapes", "alone"):
        Path(folder, "questions.xlsx").write_bytes(b"PK")
        assert told(capsys, folder).startswith(f"error: {folder}/questions.xlsx")
    Path("alone/square").symlink_to(Path("my shapes/square").resolve())
    assert "square" in told(capsys, "alone", *ASK)


def test_a_set_that_teaches_nothing_is_said_to(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """One folder a class, one answer, two rows; a stray video in a class, which nothing here can decode."""
    classes(Path("my"), {"dog": 12})
    assert "my/dog" in told(capsys, "my", *ASK)
    for name, rows in {"alike": 12, "two": 2}.items():
        table = [[f"dog/{number}.png", "Is it?", "yes" if name == "alike" else str(number)] for number in range(rows)]
        write_table(Path("my") / f"{name}.csv", table)
        lines = lines_of(capsys, "my", "--questions", f"my/{name}.csv", "--to", f"runs/{name}")
        assert any({"alike": "every answer is the same", "two": "2 rows"}[name] in line for line in lines)
    classes(Path("animals"), {"dog": 6, "cat": 6})
    Path("animals/cat/clip.mp4").write_bytes(b"no video")

    def missing(*_: object, **__: object) -> Iterator[object]:
        raise JobFailed(BackendMissing.__name__, "nothing decodes videos")
        yield

    monkeypatch.setattr("dora_vl.limited_process.LimitedProcess.run", missing)
    with pytest.raises(UserError, match=r"animals/cat/clip\.mp4"):
        no_video_reason(Path("animals/cat/clip.mp4"))


def test_what_is_beside_a_folder_a_class_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"circle": 10, "square": 10})
    classes(Path("my"), {"star": 2}, "ppm")
    classes(Path("elsewhere"), {"heart": 2})
    Path("my/heart").symlink_to(Path("elsewhere/heart").resolve())
    Path("my/questions.xlsx").write_bytes(b"PK")
    lines = lines_of(capsys, "my", *ASK)
    assert any("questions.xlsx" in line for line in lines)
    assert sum("star" in line and "heart" in line for line in lines) == 1
    assert answers("runs/my/test.jsonl").keys() == {"circle", "square"}


def test_what_is_probably_not_meant_is_named_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my/photos"), {"circle": 12})
    rows = [[f"circle/{number}.png", "Which colour?", "red"] for number in range(12)]
    rows += [["circle/0.png", "Which colour?", "red"], ["circle/0.png", "Which  colour?", "blue"]]
    rows += [["circle/0.png", "Which colour?", "blue"], ["", "Which colour?", "red"], ["circle/1.png", "", "red"]]
    write_table(Path("my/answers.csv"), rows)
    lines = lines_of(capsys, "my")
    doubts = [
        line for line in lines[lines.index("trained on as they are, though probably mistakes:") :] if "row " in line
    ]
    for kind, row in (("empty question", "row 17"), ("no picture", "row 16"), ("another answer", "row 15")):
        assert sum(kind in line and row in line for line in doubts) == 1, kind
    assert len(rows_of(Path("runs/my/train.jsonl"))) + len(rows_of(Path("runs/my/test.jsonl"))) == len(rows)
