"""Asking about a video of one's own: a LLaVA sees frames as pictures, a VL-BART their features."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import features
from data_prep.moving_shapes import Settings, make
from dora_vl import cli
from dora_vl.backbones.vision_store import open_features
from dora_vl.data.example import Clip, Example, iterate_examples, write_examples
from dora_vl.data.samples import Sample
from dora_vl.data.video import VideoReader
from dora_vl.errors import UserError
from dora_vl.evaluation import ask_command, vlbart_tasks
from dora_vl.evaluation import assistant as assistant_module
from dora_vl.evaluation.open_model import ModelRequest, OpenedModel, open_model
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.settings_parser import read_run, read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from dora_vl.training.train_command import pipeline_of
from tasks import video_qa
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import write_vlbart_run

pytest.importorskip("av", reason="pip install '.[video]'")
pytest.importorskip("decord", reason="pip install '.[video]'")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    make(folder / "data", Settings(pretrain=1, adapt=2, test=1, seed=1), workers=1)
    return folder


@pytest.fixture(scope="module")
def clip(root: Path) -> str:
    return str(root / "data/clips/test-00000.mp4")


@pytest.fixture(scope="module")
def llava(root: Path) -> Path:
    base, records = write_tiny_llava(root / "llava"), write_tiny_data(root / "pictures")
    path = write_run(root / "run.yaml", base, records, training={"use_cpu": True, "max_steps": 1})
    run(DecoderPipeline(read_run_file(path)))
    return root / "run" / "adapter"


@pytest.fixture(scope="module")
def vlbart(root: Path) -> Path:
    import timm

    weights = root / "tower.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), weights)
    tower = ["--library", "timm", "--name", "tf_efficientnet_lite0", "--weights", str(weights), "--image-size", "64"]
    kept = ["--layer", "-3", "--grid-pool", "2", "--merge", "2", "--changes", "--frames", "3", "--workers", "0"]
    features.main(["--root", str(root / "data"), "--to", str(root / "features"), *tower, *kept])
    kept[kept.index("3")] = "2"
    features.main(["--root", str(root / "data"), "--to", str(root / "caption_features"), *tower, *kept])
    records = root / "data/records/moving_shapes/adapt.jsonl"
    captions = root / "data/records/moving_shapes_caption"
    small = {"texts": [str(records)], "vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feedforward": 16}
    compose = {"small": {**small, "max_positions": 256}, "feature_width": 320, "pooled_side": None, "dropout": 0.0}
    tests = {"video_caption": captions / "test.jsonl", "video_words": records.with_name("test.jsonl")}
    sections: dict[str, Any] = {
        "model": {"base": str(root / "base"), "compose": compose},
        "training": {"use_cpu": True, "max_steps": 1, "optim": "adamw_torch"},
        "evaluation": {"files": {task: str(file) for task, file in tests.items()}, "image_folder": str(root / "data")},
    }
    data = {
        "train": {"video_words": str(records), "video_caption": str(captions / "adapt.jsonl")},
        "features": {"video_words": str(root / "features"), "video_caption": str(root / "caption_features")},
    }
    data |= {"feature_tokens": 3, "batch_size": 4}
    path = write_vlbart_run(root / "vlbart.yaml", root, (), data=data, **sections)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
        run(pipeline_of(read_run([f"--config={path}"])))
    return root / "vlbart" / "adapter"


def test_a_llava_sees_frames_as_pictures(llava: Path, clip: str, capsys: Any) -> None:
    common = ["--adapter", str(llava), "--video", clip, "--question", "What moves?", "--max-new-tokens", "3"]
    video_qa.main([*common, "--frames", "2", "--compare-base"])
    heading, *answers = capsys.readouterr().out.splitlines()
    assert (
        heading == f"{clip} (2 frames as separate pictures, since it takes no videos, 0.8 to 2.4 s, pyav)  What moves?"
    )
    assert len(answers) == 2
    video_qa.main([*common, "--frames", "3", "--start", "1", "--end", "2", "--choice", "red", "--choice", "blue"])
    assert "3 frames as separate pictures, since it takes no videos, 1.1 to 1.8 s" in capsys.readouterr().out


def test_a_vlbart_sees_what_it_was_trained_on(vlbart: Path, clip: str, capsys: Any) -> None:
    choices = [word for choice in ("red", "blue", "green", "white") for word in ("--choice", choice)]
    common = ["--adapter", str(vlbart), "--video", clip, "--question", "which color comes first?"]
    video_qa.main([*common, *choices, "--subtitle", "anna: look at the red one."])
    heading, answer = capsys.readouterr().out.splitlines()
    assert "(3 frames, 0.5 to 2.6 s, pyav)" in heading
    assert answer.strip() in {"red", "blue", "green", "white"}
    video_qa.main([*common, "--question", ""])  # its own words without choices; no question asks for a caption
    words, _, caption, _ = capsys.readouterr().out.splitlines()
    assert "(3 frames, 0.5 to 2.6 s, pyav)" in words
    assert "(2 frames, 0.8 to 2.4 s, pyav)" in caption  # captions were trained on features of their own


def test_features_on_the_way_equal_the_stored_ones(vlbart: Path, root: Path) -> None:
    assistant = open_model(ModelRequest(adapter=vlbart)).adapted
    subtasks = {subtask.name: subtask for subtask in assistant.subtasks}
    words, caption = subtasks["video_words"], subtasks["video_caption"]
    question, clip = Example(id="1", question="which?"), Clip(path="clips/test-00000.mp4")
    with VideoReader() as reader:
        frames, caption_frames = (
            reader.read(root / "data", clip, assistant.view(example, frames=0).sampling).pictures
            for example in (Example(id="1", question=text, videos=(clip,)) for text in ("which?", ""))
        )
    for subtask, pictures, folder, count in (
        (words, frames, "features", 3),
        (caption, caption_frames, "caption_features", 2),  # by settings of their own, filled up with zeros
    ):
        features, stored = assistant.sample(question, subtask, pictures).features[0], open_features(root / folder)
        torch.testing.assert_close(features[:count].half(), stored.read("test-00000"), atol=2e-3, rtol=2e-3)
        assert not features[count:].any()
    labels_alone = replace(assistant, subtasks=(vlbart_tasks.video_subtasks()["tvqa"],))
    without = replace(assistant, features={"video_caption": assistant.features["video_caption"]})
    for unable in (labels_alone, without):  # of a question without choices, and without features of its task
        with pytest.raises(UserError):
            unable.answer(question, PromptMedia(pictures=tuple(frames)))


CHOICE = ["--question", "what moves?", "--choice", "a", "--choice", "b"]


@pytest.mark.parametrize(
    ("task", "flags", "stated"),
    [
        *(("tvqa", CHOICE, "[TS] (0.5-2)"), ("how2qa", CHOICE, "[TS] (0.5-2.0)"), ("video_choice", CHOICE, "[TS] ()")),
        ("tvc", ["--question", ""], "[TS] ([0.5, 2.0])"),
    ],
)
def test_a_part_that_the_text_states_is_stated_and_the_whole_is_seen(
    vlbart: Path, clip: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, task: str, flags: list[str], stated: str
) -> None:
    trained = open_model(ModelRequest(adapter=vlbart)).adapted
    texts: list[str] = []
    encode = trained.encoder.encode
    monkeypatch.setattr(
        trained.encoder, "encode", lambda prompt, **limits: (texts.append(prompt.text), encode(prompt, **limits))[1]
    )
    assistant = replace(
        trained, subtasks=(vlbart_tasks.video_subtasks()[task],), features={task: trained.features["video_words"]}
    )
    monkeypatch.setattr(ask_command, "opened_by", lambda options: OpenedModel(adapted=assistant))
    common = ["--adapter", str(vlbart), "--video", clip, *flags]
    video_qa.main([*common, "--start", "0.5", "--end", "2"])
    assert stated in texts[-1]
    seen = "0.7 to 1.7 s" if task == "video_choice" else "0.5 to 2.6 s"  # the part, or the whole
    assert f"(3 frames, {seen}, pyav)" in capsys.readouterr().out
    if task == "video_choice":
        return
    with pytest.raises(SystemExit, match="2"):
        video_qa.main([*common, "--start", "0.5"])


def test_another_tower_is_refused(vlbart: Path, clip: str, tmp_path: Path, capsys: Any) -> None:
    adapter = shutil.copytree(vlbart, tmp_path / "adapter")
    recipe = json.loads((adapter / "recipe.json").read_text())
    recipe["features"]["video_caption"]["sha256"] = "0123456789abcdef" * 4
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    options = ["--adapter", str(adapter), "--video", clip, "--question", "", "--question", "what moves?"]
    with pytest.raises(SystemExit, match="2"):
        video_qa.main(options)
    video_qa.main([*options, "--any-base"])
    assert "(2 frames" in capsys.readouterr().out


@pytest.fixture(scope="module")
def own_benchmark(root: Path) -> Path:
    records = root / "data/records/moving_shapes/test.jsonl"
    first = next(iterate_examples(records))
    missing = replace(first, id="gone", videos=(Clip(path="clips/gone.mp4"),))
    write_examples(root / "own" / "clips.jsonl", [first, missing])
    (root / "own" / "moving.yaml").write_text(
        "name: moving\nscoring: choice\nfile: clips.jsonl\nprompt: video\nmax_new_tokens: 3\nframes: 3\n"
    )
    return root / "own" / "moving.yaml"


def evaluated(adapter: Path, benchmark: object, root: Path, to: Path, *more: object) -> dict[str, Any]:
    options = ["--adapter", adapter, "--benchmarks", benchmark, "--images", root / "data", "--to", to, *more]
    cli.main(["evaluate", *map(str, options)])
    return json.loads((to / "metrics.json").read_text())


def test_a_llava_is_evaluated_on_frames(
    llava: Path, own_benchmark: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    pictures = assistant_module.QuestionSamples.__getitem__

    def counted(self: Any, index: int) -> Any:
        sample = pictures(self, index)
        if isinstance(sample, Sample):
            shown.append(len(sample.inputs["pixel_values"]))
        return sample

    monkeypatch.setattr(assistant_module.QuestionSamples, "__getitem__", counted)
    metrics = evaluated(llava, own_benchmark, root, tmp_path, "--batch-size", 2)
    entry = metrics["sets"]["moving"]
    assert (entry["n"], entry["failed"].keys()) == (2, {"gone"})
    assert "clips/gone.mp4 is missing" in entry["failed"]["gone"]
    assert entry["asked_with"]["frames"] == 3
    (line,) = read_predictions(tmp_path / "predictions.jsonl")["moving"].values()
    assert line.question.endswith("Answer with the option's letter from the given choices directly.")
    evaluated(llava, own_benchmark, root, tmp_path, "--frames", 2)  # other frames: answers of before are not taken
    assert shown == [3, 2]


def test_a_vlbart_is_evaluated_as_it_was_trained(
    vlbart: Path, own_benchmark: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java
    entry = evaluated(vlbart, own_benchmark, root, tmp_path / "choice")["sets"]["moving"]
    assert (entry["n"], entry["failed"].keys()) == (2, {"gone"})
    (line,) = read_predictions(tmp_path / "choice" / "predictions.jsonl")["moving"].values()
    example = next(iterate_examples(own_benchmark.parent / "clips.jsonl"))
    own = read_predictions(vlbart.parent / "predictions.jsonl")
    trained = next(iter(own["video_words"].values()))
    assert f"a{ord(line.prediction) - ord('A')}" == trained.prediction  # as the run's own test answered
    right = line.prediction == "ABCDEFGH"[example.extra["correct"]]
    assert entry["metrics"]["accuracy"]["value"] == 50.0 * right
    captions = root / "data/records/moving_shapes_caption/test.jsonl"
    entry = evaluated(vlbart, f"yc2c={captions}", root, tmp_path / "caption")["sets"]["yc2c"]
    (line,) = read_predictions(tmp_path / "caption" / "predictions.jsonl")["yc2c"].values()
    assert line.prediction == next(iter(own["video_caption"].values())).prediction
    assert entry["headline"] == "CIDEr"
