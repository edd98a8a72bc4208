"""Asking an adapter about one's own pictures and videos, beside its base; what its folder says of base and prompt."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep import features
from data_prep.moving_shapes import Settings, make
from dora_vl import cli
from dora_vl.adapters.adapter import content_hash
from dora_vl.adapters.foreign_formats import read_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.vision_store import open_features
from dora_vl.data.example import Clip, Example, iterate_examples, write_examples
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.data.video import VideoReader
from dora_vl.errors import UserError
from dora_vl.evaluation import ask_command, vlbart_tasks
from dora_vl.evaluation import assistant as assistant_module
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import inputs_on_device, prompt_batch, prompt_sample
from dora_vl.evaluation.open_model import ModelRequest, OpenedModel, find_source, open_model, prompt_encoder
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.settings_parser import read_run, read_run_file
from dora_vl.serving.model import open_served
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from dora_vl.training.train_command import pipeline_of
from tasks import image_qa, video_qa
from tests.backbones.tiny_language import write_tiny_language
from tests.serving.tiny_served import write_adapter
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import write_vlbart_run


@pytest.fixture(scope="module")
def pictures_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    base, records = write_tiny_llava(folder / "llava"), write_tiny_data(folder / "data")
    path = write_run(folder / "run.yaml", base, records, training={"use_cpu": True, "max_steps": 30})
    run(DecoderPipeline(read_run_file(path)))
    return folder / "run" / "adapter"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, color in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (9, 12), color).save(path)
    return [str(path) for path in paths]


def ask(*arguments: str) -> None:
    image_qa.main([*arguments, "--max-new-tokens", "4"])


def test_every_question_is_put_to_every_picture(pictures_adapter: Path, pictures: list[str], capsys: Any) -> None:
    images = [part for path in pictures for part in ("--image", path)]
    ask(
        "--adapter", str(pictures_adapter), *images, "--question", "Say the colour.", "--question", "What colour is it?"
    )
    lines = capsys.readouterr().out.splitlines()
    headings, answers = lines[::2], lines[1::2]
    assert headings == [
        f"{path}  {question}" for question in ("Say the colour.", "What colour is it?") for path in pictures
    ]
    assert all(answer.startswith("  ") and answer.strip() for answer in answers)


def test_the_base_beside_it_is_the_base(pictures_adapter: Path, pictures: list[str], capsys: Any) -> None:
    from dora_vl.backbones.model import open_backbone

    both = open_model(ModelRequest(adapter=pictures_adapter, with_base=True))
    recipe = json.loads((pictures_adapter / "recipe.json").read_text())
    untouched = open_backbone(recipe["base"]).model.state_dict()
    shown = both.base.backbone.model.state_dict()
    assert shown.keys() == untouched.keys()
    for name, tensor in untouched.items():
        torch.testing.assert_close(shown[name], tensor, rtol=0, atol=0)
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    shared = both.adapted.backbone.model.state_dict(keep_vars=True)[weight]
    assert shared.data_ptr() == shown[weight].data_ptr()
    ask("--adapter", str(pictures_adapter), "--image", pictures[0], "--question", "Say the colour.", "--compare-base")
    _, with_adapter, without = capsys.readouterr().out.splitlines()
    assert with_adapter.startswith("  with adapter:")
    assert without.startswith("  without adapter:")
    assert with_adapter.split(":")[1].strip() != without.split(":")[1].strip()


@torch.no_grad()
def test_strength_is_that_of_the_server(pictures_adapter: Path, pictures: list[str]) -> None:
    model = open_served(None, {"one": pictures_adapter})
    turns, seen = [Turn("user", "<image>\nSay the colour.")], PromptMedia(pictures=(open_picture(Path(pictures[0])),))
    batch = prompt_batch(model.assistant.encoder, [prompt_sample(model.entry("one").encoder, turns, seen)])
    inputs = inputs_on_device(batch, "cpu")

    labels, seen_logits = inputs["input_ids"].clamp_min(0), []
    for strength in (0.0, 0.4, 1.0, 1.7):
        with model.holding([model.entry("one")], [1], [strength]):
            expected = model.backbone(**inputs, labels=labels, keep_logits=True).logits
        opened: Any = open_model(ModelRequest(adapter=pictures_adapter, strength=strength, with_base=True))
        actual, base = (
            assistant.backbone(**inputs, labels=labels, keep_logits=True).logits
            for assistant in (opened.adapted, opened.base)
        )
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        seen_logits.append(actual)
        assert torch.equal(base, seen_logits[0])  # the base is the base, whatever is beside it
    assert all(not torch.allclose(first, other, atol=1e-2) for first, other in pairwise(seen_logits))


def test_pictures_together_and_a_talk(pictures_adapter, pictures, monkeypatch, capsys) -> None:
    seen: list[tuple[list[Turn], int]] = []

    def answer(self: object, question: Example, shown: PromptMedia, **_: object) -> str:
        seen.append(([*question.turns], len(shown.pictures)))
        return "red"

    monkeypatch.setattr("dora_vl.evaluation.assistant.Assistant.answer", answer)
    images = [part for path in pictures for part in ("--image", path)]
    options = ["--together", "--conversation", "--question", "first?", "--question", "second?"]
    ask("--adapter", str(pictures_adapter), *images, *options)
    first, second = seen
    assert first == ([Turn("user", "<image>\n<image>\nfirst?")], 2)
    assert second == ([*first[0], Turn("assistant", "red"), Turn("user", "second?")], 2)


def test_typed_questions(pictures_adapter: Path, pictures: list[str], monkeypatch: Any, capsys: Any) -> None:
    typed = iter(["Say the colour.", ":image missing.png", f":image {pictures[1]}", "What colour is it?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    ask("--adapter", str(pictures_adapter), "--image", pictures[0])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3  # how to leave, and two answers
    assert printed.err.startswith("error: picture missing.png is missing")
    assert list(typed) == []


def refused(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        ask(*arguments, "--question", "q")


def test_an_incomplete_recipe_and_a_base_moved_or_changed(pictures_adapter, pictures, tmp_path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(pictures_adapter, copied)
    recipe = json.loads((copied / "recipe.json").read_text())
    base = Path(recipe["base"])
    image = ["--adapter", str(copied), "--image", pictures[0]]

    (copied / "recipe.json").write_text(json.dumps({**recipe, "base": "runs/long/gone"}))
    refused(*image)
    ask(*image, "--question", "Say the colour.", "--base", str(base))

    other = write_tiny_llava(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "projector_bias": True}))
    refused(*image, "--base", str(other))
    ask(*image, "--question", "Say the colour.", "--base", str(other), "--any-base")

    (copied / "recipe.json").write_text(json.dumps({"base": str(base)}))
    refused(*image)


WORDING = {"template": "tokenizer", "image_aspect": "pad"}


def folders(where: Path, model_type: str, **recipe: object) -> Path:
    """A base of a config alone, and an adapter folder that names it."""
    (where / "base").mkdir()
    (where / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
    (where / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, where / "adapter" / "adapter_model.safetensors")
    common = {"base": str(where / "base"), "revision": None, "dtype": "float32", "max_tokens": 64}
    stated = {**common, "base_sha256": content_hash(where / "base"), **recipe}
    (where / "adapter" / "recipe.json").write_text(json.dumps(stated))
    return where / "adapter"


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        ("llama", {}),
        ("qwen2_5_vl", {**WORDING, "attn_implementation": "hub/kernel"}),
        ("qwen2_5_vl", {**WORDING, "attn_implementation": {"": "sdpa", "text_config": [1]}}),
        ("bert", {}),
    ],
)
def test_what_cannot_be_asked_is_refused(model_type: str, recipe: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        find_source(ModelRequest(adapter=folders(tmp_path, model_type, **recipe)))


def test_attention_is_the_recipe_s_and_another_machine_s_is_transformers_choice(tmp_path, monkeypatch) -> None:
    pictures_adapter = folders(tmp_path, "qwen2_5_vl", **WORDING, attn_implementation={"": "flash_attention_2"})
    for available, expected in ((True, {"": "flash_attention_2"}), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_source(ModelRequest(adapter=pictures_adapter)).attention == expected


def test_a_merged_llava_prepares_pictures_as_it_was_trained(tmp_path: Path) -> None:
    """Its base states no way, which means padded; merged once more, the later run's way holds."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 40, 3), np.uint8))
    folder = write_tiny_llava(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())

    def pixels(request: ModelRequest) -> torch.Tensor:
        return prompt_encoder(find_source(request)).processor.pixels(picture)

    seen = [pixels(ModelRequest(model=str(folder), template="vicuna_v1"))]
    for aspect in ("squash", "pad"):
        pictures_adapter = write_adapter(folder, tmp_path / f"{aspect}-adapter", seed=1, targets=("*.q_proj",), rank=2)
        recipe = {"base": str(folder), "revision": None, "base_sha256": content_hash(folder), "template": "vicuna_v1"}
        stated = json.dumps({**recipe, "image_aspect": aspect, "dtype": "float32", "max_tokens": 64})
        (pictures_adapter / "recipe.json").write_text(stated)
        folder = tmp_path / aspect
        merge_to_folder(read_adapter(pictures_adapter), Path(recipe["base"]), folder)
        seen.append(pixels(ModelRequest(adapter=pictures_adapter)))
        assert torch.equal(pixels(ModelRequest(model=str(folder), template="vicuna_v1")), seen[-1])
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[0], seen[1])
    assert {**json.loads((folder / "config.json").read_text()), "image_aspect": 0} == {**config, "image_aspect": 0}
    (folder / "config.json").write_text(json.dumps({**config, "image_aspect": "anyres"}))
    with pytest.raises(UserError):
        pixels(ModelRequest(model=str(folder), template="vicuna_v1"))


def test_a_language_run_s_adapter_is_asked_with_its_prompt(tmp_path: Path, capsys: Any) -> None:
    base = write_tiny_language(tmp_path / "base")
    pictures_adapter = write_adapter(
        base, tmp_path / "adapter", seed=1, targets=("*.q_proj", "*.up_proj"), rank=3, alpha=7.0
    )
    recipe = {"task": "commonsense", "base": str(base), "revision": None, "template": "alpaca", "image_aspect": None}
    recipe |= {"base_sha256": content_hash(base), "dtype": "float32", "max_tokens": 512}
    (pictures_adapter / "recipe.json").write_text(json.dumps(recipe))
    backbone = open_model(ModelRequest(adapter=pictures_adapter)).adapted.backbone
    options = ["--adapter", str(pictures_adapter), "--question", "Which answer?", "--max-new-tokens", "4"]
    image_qa.main([*options, "--compare-base"])
    with_adapter, without = (line.split(":", 1)[1].strip() for line in capsys.readouterr().out.splitlines()[-2:])
    encoder = open_encoder(str(base), template="alpaca", max_tokens=512)
    ids = encoder.encode_prompt([Turn("user", "Which answer?")]).input_ids[None]
    new = backbone.generate(ids, torch.ones_like(ids), max_new_tokens=4)[0]
    assert " ".join(encoder.decode(new).split()) == " ".join(with_adapter.split())
    assert with_adapter != without
    with pytest.raises(SystemExit, match="2"):  # it reads one question at a time
        image_qa.main([*options, "--question", "Another?", "--conversation"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("av", "decord"):
        pytest.importorskip(name, reason="pip install '.[video]'")
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


def test_a_llava_is_evaluated_on_frames(llava, own_benchmark, root, tmp_path, monkeypatch) -> None:
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


def test_a_vlbart_is_evaluated_as_it_was_trained(vlbart, own_benchmark, root, tmp_path, monkeypatch) -> None:
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
