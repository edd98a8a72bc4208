"""VL-BART's tasks: texts, targets and features; its test tells what it lacks early, and NaN costs one answer."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.tower_sources import small_tokenizer
from dora_vl.backbones.vision_store import (
    FeatureReader,
    FeatureWriter,
    MediumFeatures,
    features_of,
    fixed_length,
    open_features,
)
from dora_vl.data.benchmarks.videos import clip_row
from dora_vl.data.example import Answer, Clip, Example, ExampleFile, Subtitle, write_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation import vlbart_assistant, vlbart_tasks
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.settings_parser import read_run
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.tiny_vlbart_run import write_vlbart_data, write_vlbart_run

WORDS = (
    "vqa gpa nlvr caption tvqa how2qa tvc yc2c [Subs] [Q] [TS] [Choices] a0 a1 a2 a3 a4 hello is it red ? true false"
)


@pytest.fixture(scope="module")
def encoder() -> Seq2SeqEncoder:
    return Seq2SeqEncoder(small_tokenizer(iter([WORDS] * 4), vocabulary=420))


def text(encoder: Seq2SeqEncoder, ids: Tensor) -> str:
    return str(encoder.tokenizer.decode(ids.tolist()))


VIDEO = Example(
    id="7",
    videos=(Clip(path="clip.mp4"),),
    question="is it red?",
    choices=("red ", "blue.", "green . ", "a dog", "none"),
    subtitles=tuple(Subtitle(f"hello number {index}") for index in range(400)),
    extra={"ts": "1.5-2.5", "correct": 2},
)
TAIL = " [Q] is it red? [TS] (1.5-2.5) [Choices] a0: red. a1: blue. a2: green. a3: a dog. a4: none. tvqa: </s>"


def test_a_long_text_loses_subtitles_and_keeps_question_choices_and_prompt(encoder: Seq2SeqEncoder) -> None:
    task = vlbart_tasks.video_subtasks()["tvqa"]
    prompt = task.prompt(VIDEO)
    ids, cut = encoder.encode(prompt, max_tokens=600)
    assert len(ids) == 600
    assert text(encoder, ids).endswith(TAIL)
    assert text(encoder, ids).startswith("<s>[Subs] hello number 0 hello number 1")
    whole, none = encoder.encode(prompt, max_tokens=None)
    assert none == 0
    assert len(whole) - cut == 600
    plain = Seq2SeqEncoder(encoder.tokenizer, subtitles_first=False)
    published, _ = plain.encode(prompt, max_tokens=600)
    assert "[Q]" not in text(encoder, published)
    assert torch.equal(plain.encode(prompt, max_tokens=None)[0], whole)  # the pieces' tokens are the whole text's
    assert whole.tolist() == encoder.tokenizer(prompt.subtitles_before + prompt.subtitles + prompt.text).input_ids
    assert task.target(VIDEO, None, Random(0)).text == "a2"


def test_the_published_shares_and_a_cut_question(encoder: Seq2SeqEncoder) -> None:
    images = vlbart_tasks.image_subtasks()
    example = Example(id="1", images=("a.png",), question="is it red?")
    assert vlbart_tasks.image_subtasks(task_prompt=False)["vqav2"].prompt(example).text == "is it red?"
    assert [images[name].batch_share * 300 for name in ("vqav2", "gqa", "nlvr2", "coco_caption")] == pytest.approx(
        [300, 500, 100, 250]
    )
    ids, cut = encoder.encode(images["vqav2"].prompt(Example(id="3", question="is it red? " * 20)), max_tokens=20)
    assert (len(ids), ids[0], ids[-1], cut > 0) == (20, 0, 2, True)


def test_a_descriptions_leading_space_is_in_its_first_token(encoder: Seq2SeqEncoder, tmp_path: Path) -> None:
    """TVC's descriptions as its files have them, some with a space before them."""
    row = {"clip_id": 7, "vid_name": "a", "descs": [{"desc": " hello is it"}, {"desc": "hello"}, {"desc": " "}]}
    write_examples(tmp_path / "tvc.jsonl", [clip_row(row, answered=True)])
    file, task = ExampleFile(tmp_path / "tvc.jsonl", each_answer=True), vlbart_tasks.video_subtasks()["tvc"]
    targets = [task.target(file[index], file.answer_of(index), Random(0)).text for index in range(len(file))]
    assert targets == [" hello is it", "hello"]
    first = encoder.tokenizer.convert_ids_to_tokens(encoder.labels(targets[0], max_tokens=20)[0].tolist())[1]
    assert first == "\u0120hello"


def test_an_answer_is_drawn_as_often_as_its_score_says_and_weighs_so() -> None:
    answers = (Answer(text="red", weight=0.9), Answer(text="blue", weight=0.3), Answer(text="never", weight=0.0))
    example = Example(id="1", images=("a.png",), answers=answers)
    images = vlbart_tasks.image_subtasks()
    drawn = [images["vqav2"].target(example, None, Random(number)) for number in range(4000)]
    share = Counter(target.text for target in drawn)["red"] / 4000
    assert abs(share - 0.75) < 0.03
    assert {(target.text, target.weight) for target in drawn} == {("red", 0.9), ("blue", 0.3)}
    assert {images["gqa"].target(example, None, Random(n)).weight for n in range(20)} == {1.0}
    with pytest.raises(BadSample) as error:
        images["vqav2"].target(Example(id="2", images=("a.png",)), None, Random(0))
    assert error.value.sample_id == "2"


def test_an_empty_answer_and_a_strange_label_train_nothing() -> None:
    tasks, empty = vlbart_tasks.all_subtasks(), Answer(text=" ")
    mixed = Example(id="1", images=("a.png",), answers=(empty, Answer(text="red")))
    assert {tasks["vqav2"].target(mixed, None, Random(number)).text for number in range(20)} == {"red"}
    assert vlbart_tasks.soft_scores(mixed) == {"red": 1.0}
    assert tasks["nlvr2"].target(Example(id="1", answers=(Answer(text="True"),)), None, Random(0)).text == "true"
    for name, text in (("gqa", " "), ("coco_caption", ""), ("tvc", " "), ("nlvr", "yes"), ("nlvr2", "")):
        with pytest.raises(BadSample) as error:
            tasks[name].target(Example(id="2", answers=(Answer(text=text),)), None, Random(0))
        assert error.value.sample_id == "2"


def test_what_a_long_answer_loses_is_counted(encoder: Seq2SeqEncoder, tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, {}) as writer:
        writer.add(MediumFeatures("a", torch.zeros(2, 3)))
    reader, tasks = FeatureReader(open_features(tmp_path), 2, 3), vlbart_tasks.all_subtasks()
    example = Example(id="1", images=("a.png",), question="is it red?")
    for words, cut in ((3, 0), (30, 13)):  # the first word is two tokens, and two of 20 are the ends
        target = vlbart_tasks.Target(text=" ".join(["hello"] * words))
        sample = vlbart_tasks.make_sample(example, tasks["short_answer"], encoder=encoder, reader=reader, target=target)
        assert sample.cut_tokens == cut


def test_frames_are_filled_up_with_zeros_or_each_place_is_pooled_over_time_to_the_largest() -> None:
    short = torch.arange(6.0).view(3, 2)
    assert torch.equal(fixed_length(short, 5, frames=3), torch.cat([short, torch.zeros(2, 2)]))
    long = torch.randn(128, 2).half()
    torch.testing.assert_close(fixed_length(long, 64, frames=128), long.float().view(64, 2, 2).amax(1))
    grids = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))  # six frames of 2 x 2 tokens
    pooled = fixed_length(grids.flatten(0, 1), 12, frames=6)
    assert torch.equal(pooled, grids.view(3, 2, 4, 3).amax(1).flatten(0, 1))
    with pytest.raises(UserError):  # no multiple of 4
        fixed_length(grids.flatten(0, 1), 10, frames=6)


def test_features_of_another_part_of_the_video_are_not_taken(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, {}) as writer:
        for name, part in (("whole", (0.0, None)), ("some", (1.5, 4.0))):
            writer.add(MediumFeatures(name, torch.randn(2, 3), "pyav", (0, 9), (0.0, 0.9), part))
    reader = FeatureReader(open_features(tmp_path), 2, 3)
    part = {"start_seconds": 1.5, "end_seconds": 4.0}
    for clip in (Clip(path="whole.mp4"), Clip(path="whole.mp4", start_seconds=0.0), Clip(path="some.mp4", **part)):
        assert features_of(Example(id="1", videos=(clip,)), reader).shape == (1, 2, 3)
    stated = Example(id="1", videos=(Clip(path="whole.mp4", **part),), extra={"ts": "1.5-4"})
    assert features_of(stated, reader).shape == (1, 2, 3)  # the text says which part is meant
    for clip in (Clip(path="whole.mp4", **part), Clip(path="some.mp4", start_seconds=2.0)):
        with pytest.raises(BadSample) as error:
            features_of(Example(id="1", videos=(clip,)), reader)
        assert error.value.sample_id == "1"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_vlbart_data(tmp_path / "data")


def vlbart(data: Path, tested: tuple[str, ...], *overrides: str, trained: str = "vqav2") -> VlBartPipeline:
    files = {name: str(data / "records" / f"{name}.jsonl") for name in tested}
    features = dict.fromkeys((trained, *tested), str(data / "features"))
    path = write_vlbart_run(
        data.parent / "run.yaml",
        data,
        (trained,),
        data={"features": features},
        training={"use_cpu": True},
        evaluation={"files": files},
    )
    config = read_run([f"--config={path}", *overrides])
    return VlBartPipeline(config)


def unlabelled(data: Path) -> None:
    path = data / "records" / "nlvr2.jsonl"
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "answers": []}), *lines]) + "\n")


def features(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda data: change(data / "features" / "p5.npz")


def holding(tokens: int, width: int, value: float = 0.0) -> Callable[[Path], object]:
    return features(lambda path: np.savez(path, features=np.full((tokens, width), value, np.float16)))


@pytest.mark.parametrize(
    ("spoil", "tested"),
    [
        (lambda data: (data / "records" / "gqa.jsonl").unlink(), "gqa"),
        (unlabelled, "nlvr2"),
        (features(Path.unlink), "gqa"),
        (features(lambda path: path.write_bytes(path.read_bytes()[:-40])), "tvqa"),
        *((holding(9, 8), "nlvr2"), (holding(4, 9), "gqa"), (holding(4, 8, np.nan), "gqa")),
    ],
)
def test_what_the_test_lacks_is_told_before_training(data: Path, spoil: Callable[[Path], object], tested: str) -> None:
    spoil(data)
    with pytest.raises(UserError):
        run(vlbart(data, (tested,)))
    assert not (data.parent / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("renamed", ["gqa", "tvqa"])
def test_pictures_and_videos_of_one_name_are_told_before_training(data: Path, renamed: str) -> None:
    """Features are found by a file's name alone, so `b/p1.png` would have been shown as `images/p1.png`."""
    path = data / "records" / f"{renamed}.jsonl"
    text = path.read_text().replace("images/p2.png", "b/p1.png").replace('"p2.mp4"', '"b/p1.mp4"')
    path.write_text(text)
    with pytest.raises(UserError):
        run(vlbart(data, (renamed,)))
    with pytest.raises(UserError):
        run(vlbart(data, (), trained=renamed))
    assert not (data.parent / "run" / "log.jsonl").exists()


def test_a_missing_caption_scorer_is_told_before_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.cider", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError):
        run(vlbart(data, ("tvc",)))
    assert not (data.parent / "run" / "log.jsonl").exists()


def break_row(number: int, patched: pytest.MonkeyPatch) -> None:
    collate = vlbart_assistant.Seq2SeqCollator.__call__

    def broken(self: Any, parts: Any) -> dict[str, Any]:
        batch = collate(self, parts)
        batch["features"][number] = float("nan")
        return batch

    patched.setattr(vlbart_assistant.Seq2SeqCollator, "__call__", broken)


@pytest.mark.parametrize("name", ["gqa", "tvqa"])  # as text, as a choice
def test_the_others_of_a_batch_have_their_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = vlbart(write_vlbart_data(tmp_path / "data"), (name,), trained=name)
    run(pipeline)
    whole = answers_in(tmp_path, name)
    (tmp_path / "run" / "predictions.jsonl").unlink()
    with monkeypatch.context() as patched:
        break_row(2, patched)
        with pytest.raises(UserError):
            pipeline.test({})
    answers = answers_in(tmp_path, name)
    (broken,) = whole.keys() - answers.keys()
    assert "-2" in broken
    assert answers == {key: text for key, text in whole.items() if key != broken}


def answers_in(folder: Path, task: str) -> dict[str, str]:
    rows = read_predictions(folder / "run" / "predictions.jsonl")[task]
    return {name: row.prediction for name, row in rows.items()}
