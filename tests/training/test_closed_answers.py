"""Tasks answered from a closed list: the list, the loss, the head in the adapter folder, resume, merge and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep import features
from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.vision_store import FeatureReader, open_features
from dora_vl.backbones.vlbart import VlBartBackbone, load_vlbart, set_answer_heads
from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, ExampleFile, write_examples
from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.evaluation.vlbart_tasks import all_subtasks
from dora_vl.run.settings import RunConfig
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tasks import image_qa
from tests.training.tiny_run import json_of, losses_of
from tests.training.tiny_vlbart_run import (
    FEATURE_TOKENS,
    FEATURE_WIDTH,
    ITEMS,
    vlbart_run,
    write_vlbart_data,
    write_vlbart_run,
)

TASKS = ("vqav2", "gqa", "coco_caption")
LISTS = {"vqav2": ["blue", "red", "circle", "elsewhere"], "gqa": ["blue", "yes", "green", "circle", "red"]}
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
OUTSIDE = {"vqav2": [1, 3, 5, 6], "gqa": [3, 6]}
WEIGHTS = Path("adapter") / "adapter_model.safetensors"
HEAD = "base_model.model.answer_heads.{}.logit_fc.0.weight"


def config_of(file: Path, *overrides: str) -> RunConfig:
    return vlbart_run(file, *overrides).config


def train(file: Path, *overrides: str) -> Path:
    pipeline = vlbart_run(file, *overrides)
    assert run(pipeline) is None
    return Path(pipeline.config.training["output_dir"])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps over two closed tasks and captions: VQAv2 by a file of answers, GQA by its five most frequent."""
    folder = tmp_path_factory.mktemp("closed")
    data = write_vlbart_data(folder / "data")
    (folder / "answers.txt").write_text("blue\n red\n\ncircle\nelsewhere\n")
    tested = {task: str(data / "records" / f"{task}.jsonl") for task in ("vqav2", "gqa")}
    return write_vlbart_run(
        folder / "run.yaml",
        data,
        TASKS,
        data={
            "closed_answers": {"vqav2": str(folder / "answers.txt"), "gqa": 5},
            "validation_files": {"gqa": tested["gqa"]},
        },
        optim={"rates": {"answer_head": 0.1}},
        training={"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01, "eval_strategy": "epoch"},
        evaluation={"files": tested, "batch_size": 4},
    )


@pytest.fixture(scope="module")
def trained(run_file: Path) -> Path:
    return train(run_file)


def loaded(folder: Path, base: Path) -> VlBartBackbone:
    """The base with a run's adapter, as a person loads it."""
    backbone = load_vlbart(base)
    set_answer_heads(backbone.model, json_of(folder / "adapter" / "recipe.json")["closed_answers"])
    load_adapter(backbone.model, folder / "adapter")
    return backbone.eval()


def scores(backbone: VlBartBackbone, task: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(4, 90, (3, 7), generator=generator)
    features = torch.randn(3, 1, FEATURE_TOKENS, FEATURE_WIDTH, generator=generator)
    with torch.no_grad():
        return backbone.answer_head(task)(backbone.first_hidden(ids, torch.ones_like(ids), features))


@torch.no_grad()
def by_hand(config: RunConfig, backbone: VlBartBackbone, task: str) -> torch.Tensor:
    """Scores of a task's training records, one at a time, by the model's parts alone."""
    encoder = VlBartPipeline(config).encoder
    reader = FeatureReader(open_features(Path(config.data.features[task])), FEATURE_TOKENS, FEATURE_WIDTH)
    head, model = backbone.answer_head(task).logit_fc, backbone.model.model
    rows = []
    for example in ExampleFile(Path(str(config.data.train[task]))):
        ids, _ = encoder.encode(all_subtasks()[task].prompt(example), max_tokens=20)
        encoded, mask = backbone.encode(
            ids[None], torch.ones_like(ids)[None], reader.read(example.images[0])[None, None]
        )
        start = torch.tensor([[backbone.config.decoder_start_token_id]])
        decoded = model.decoder(input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=mask)
        rows.append(head(decoded.last_hidden_state[0, 0]))
    return torch.stack(rows)


def test_the_head_trains_and_is_saved_with_its_list_and_answers_the_test(run_file: Path, trained: Path) -> None:
    recipe = json_of(trained / "adapter" / "recipe.json")
    assert recipe["closed_answers"] == LISTS
    names = [name for task in LISTS for name in recipe["adapter"]["parts"]["answer_head"] if f".{task}." in name]
    assert len(names) == 2 * 6
    metrics = json_of(trained / "metrics.json")
    assert metrics["settings"]["closed_answers"] == {
        "vqav2": {"answers": 4, "outside": 4},
        "gqa": {"answers": 5, "outside": 2},
    }
    left_out = json_of(trained / "closed_answers.json")["outside"]
    assert left_out == {task: [f"{task}-{index}" for index in indices] for task, indices in OUTSIDE.items()}
    backbone = loaded(trained, run_file.parent / "data" / "base")
    for task, answers in LISTS.items():
        assert metrics["sets"][task]["asked_with"]["answer_by"] == "closed"
        rows = read_predictions(trained / "predictions.jsonl")[task].values()
        best = by_hand(config_of(run_file), backbone, task).argmax(1)
        assert [row.prediction for row in rows] == [answers[index] for index in best.tolist()]
    shutil.copytree(trained, again := trained.with_name("again"))
    for name in ("metrics.json", "predictions.jsonl"):
        (again / name).unlink()
    train(run_file, f"--training.output_dir={again}", "--test_only=true")
    sets = json_of(again / "metrics.json")["sets"]
    assert {name: entry["metrics"] for name, entry in sets.items()} == {
        name: entry["metrics"] for name, entry in metrics["sets"].items()
    }


@pytest.mark.parametrize("task", ["vqav2", pytest.param("gqa", marks=pytest.mark.slow)])
def test_the_loss_of_a_step_is_vl_t5s_written_out(run_file: Path, task: str) -> None:
    """Micro-batches of 5 and 2 samples make one mean over all 7; GQA's answer has one score, VQAv2's less than 1."""
    folder, config = run_file.parent / f"one-{task}", config_of(run_file)
    options = ["--data.batch_size=10", "--evaluation.files={}", "--data.validation_files={}"]
    options += ["--training.max_steps=1", "--training.gradient_accumulation_steps=2", "--training.eval_strategy=no"]
    for name in ("train", "closed_answers"):
        options.append(f"--data.{name}={json.dumps({task: getattr(config.data, name)[task]})}")
    train(run_file, f"--training.output_dir={folder}", *options)
    backbone = load_vlbart(config.model.base)
    set_answer_heads(backbone.model, {task: LISTS[task]}, seed=3)
    chance = by_hand(config, backbone, task).sigmoid().double()
    truth = [
        [sum(answer.weight for answer in example.answers if answer.text == text) for text in LISTS[task]]
        for example in ExampleFile(Path(str(config.data.train[task])))
    ]
    right = torch.tensor(truth, dtype=torch.float64)
    expected = -(right * chance.log() + (1 - right) * (1 - chance).log()).sum() / ITEMS
    assert losses_of(folder).tolist() == [pytest.approx(float(expected), rel=1e-5)]
    before = backbone.model.get_parameter(f"answer_heads.{task}.logit_fc.0.weight")
    moved = load_file(folder / WEIGHTS)[HEAD.format(task)] - before
    assert float(moved.detach().abs().max()) == pytest.approx(0.1, rel=1e-3)  # AdamW's first step is the part's rate


def test_a_resumed_run_ends_like_one_that_was_not_stopped(run_file: Path, trained: Path) -> None:
    folder = run_file.parent / "resumed"
    options = (f"--training.output_dir={folder}", "--training.save_strategy=steps", "--training.save_steps=4")
    train(run_file, *options, "--training.max_steps=4")
    shutil.rmtree(folder / "adapter")
    other = f"--data.closed_answers.gqa={run_file.parent / 'other.txt'}"
    (run_file.parent / "other.txt").write_text("\n".join(reversed(LISTS["gqa"])))
    with pytest.raises(SettingError) as error:
        train(run_file, *options, "--resume=last", other)
    assert error.value.key == "resume"
    train(run_file, *options, "--resume=last", f"--data.closed_answers.gqa={folder}/checkpoint-4/adapter/recipe.json")
    resumed, expected = load_file(folder / WEIGHTS), load_file(trained / WEIGHTS)
    assert resumed.keys() == expected.keys()
    for name, tensor in resumed.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_a_base_with_a_merged_head_trains_on_with_its_list_or_in_words(run_file: Path, trained: Path) -> None:
    merged = run_file.parent / "merged"
    main(["merge", "--adapter", str(trained / "adapter"), "--to", str(merged)])
    plain, adapted = load_vlbart(merged).eval(), loaded(trained, run_file.parent / "data" / "base")
    for task in LISTS:
        torch.testing.assert_close(scores(plain, task), scores(adapted, task), atol=1e-5, rtol=1e-4)
    options = (f"--model.base={merged}", "--training.learning_rate=0", "--optim.rates={}", "--model.compose=null")
    same = f"--data.closed_answers={json.dumps(dict.fromkeys(LISTS, str(merged / 'config.json')))}"
    on = train(run_file, *options, same, f"--training.output_dir={run_file.parent / 'on'}")
    assert torch.equal(load_file(on / WEIGHTS)[HEAD.format("gqa")], load_file(trained / WEIGHTS)[HEAD.format("gqa")])
    other = run_file.parent / "other"
    with pytest.raises(UserError):  # the base has a list of its own
        train(run_file, *options, "--data.closed_answers={gqa: 3}", f"--training.output_dir={other}")
    train(run_file, *options, "--data.closed_answers={}", f"--training.output_dir={other}")
    assert not [name for name in load_file(other / WEIGHTS) if "answer_heads" in name]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        pytest.param(["--model.dtype=bfloat16"], "answer_head", marks=pytest.mark.slow),
        (["--adapter.method=full", "--optim.rates={}"], "full"),
    ],
    ids=["bfloat16", "full"],
)
def test_the_head_trains_whole_and_in_float32_whatever_is_adapted(run_file, tmp_path, changes, part) -> None:
    folder = train(run_file, f"--training.output_dir={tmp_path / 'run'}", "--training.max_steps=2", *changes)
    recipe = json_of(folder / "adapter" / "recipe.json")
    assert sum(name.startswith("answer_heads.") for name in recipe["adapter"]["parts"][part]) == 12
    assert load_file(folder / WEIGHTS)[HEAD.format("gqa")].dtype == torch.float32
    main(["merge", "--adapter", str(folder / "adapter"), "--to", str(tmp_path / "merged")])
    assert load_vlbart(tmp_path / "merged").config.closed_answers == LISTS


def test_an_adapter_to_start_from_must_mean_the_same_answers(run_file: Path, trained: Path) -> None:
    initial = f"--adapter.initial={trained / 'adapter'}"
    options = (f"--training.output_dir={run_file.parent / 'started'}", "--training.max_steps=1")
    for more in (["--data.closed_answers.gqa=4"], ["--data.closed_answers={}", "--optim.rates={}"]):
        with pytest.raises(SettingError) as error:
            train(run_file, initial, *options, *more)
        assert error.value.key == "adapter.initial"
    train(run_file, initial, *options, "--training.learning_rate=0", "--optim.rates={}", "--overwrite=true")
    name = HEAD.format("vqav2")
    started = load_file(run_file.parent / "started" / WEIGHTS)[name]
    assert torch.equal(started, load_file(trained / WEIGHTS)[name])


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"nlvr2": 2}, ""),
        ({"gqa": 1}, ".gqa"),
        ({"gqa": -2}, ".gqa"),
        ({"gqa": "twice.txt"}, ".gqa"),
        ({"gqa": "missing.txt"}, None),
    ],
)
def test_what_cannot_be_closed_is_refused(run_file, tmp_path, setting, key) -> None:
    (tmp_path / "twice.txt").write_text("red\nblue\nred")
    setting = {task: value if isinstance(value, int) else str(tmp_path / value) for task, value in setting.items()}
    data, tasks = {"closed_answers": setting}, ("vqav2", "gqa", "nlvr2", "coco_caption")
    with pytest.raises(UserError) as error:
        train(write_vlbart_run(tmp_path / "run.yaml", run_file.parent / "data", tasks, data=data))
    assert getattr(error.value, "key", None) == (None if key is None else f"data.closed_answers{key}")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture(scope="module")
def gqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on features that a tower made of pictures, so that pictures can be asked about."""
    import timm
    from PIL import Image

    folder = tmp_path_factory.mktemp("asked")
    (folder / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (32, 32), colour).save(folder / "pictures" / f"{colour}.png")
    examples = [
        Example(id=name, images=(f"{name}.png",), question="what color is it?", answers=(Answer(text=name),))
        for name in COLOURS
    ]
    write_examples(folder / "gqa.jsonl", examples)
    torch.manual_seed(0)
    tower = folder / "tower.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tower)
    options = ["--library", "timm", "--name", "tf_efficientnet_lite0", "--weights", str(tower), "--image-size", "32"]
    kept = ["--layer", "-3", "--grid-pool", "2", "--workers", "0"]
    features.main(["--root", str(folder / "pictures"), "--to", str(folder / "features"), *options, *kept])
    small = {"texts": [str(folder / "gqa.jsonl")], "vocabulary": 300, "width": 16, "layers": 1, "heads": 2}
    compose = {"small": {**small, "feedforward": 16}, "feature_width": 40, "pooled_side": None, "dropout": 0.0}
    file = write_vlbart_run(
        folder / "run.yaml",
        folder,
        (),
        model={"base": str(folder / "base"), "compose": compose},
        data={
            "train": {"gqa": str(folder / "gqa.jsonl")},
            "features": {"gqa": str(folder / "features")},
            "closed_answers": {"gqa": 4},
        },
        training={"max_steps": 3, "optim": "adamw_torch"},
        evaluation={"files": {"gqa": str(folder / "gqa.jsonl")}},
    )
    train(file)
    return folder


def test_pictures_are_answered_from_the_list_and_by_the_base_in_words(gqa_folder: Path, capsys: Any) -> None:
    adapter, pictures = gqa_folder / "run" / "adapter", gqa_folder / "pictures"
    rows = read_predictions(gqa_folder / "run" / "predictions.jsonl")["gqa"].values()
    images = [part for colour in COLOURS for part in ("--image", str(pictures / f"{colour}.png"))]
    question = ["--question", "what color is it?", "--compare-base"]
    image_qa.main(["--adapter", str(adapter), *images, *question])
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("  with adapter:").strip() for line in lines[1::3]] == [row.prediction for row in rows]
    base = open_model(ModelRequest(adapter=adapter, with_base=True)).base
    assert isinstance(base, VlBartAssistant)
    assert [subtask.answer_by for subtask in base.subtasks] == ["text"]
    options = ["evaluate", "--adapter", str(adapter), "--benchmarks", f"gqa={gqa_folder / 'gqa.jsonl'}"]
    main([*options, "--images", str(pictures), "--to", str(gqa_folder / "evaluated")])
    evaluated = json_of(gqa_folder / "evaluated" / "metrics.json")
    tested = json_of(gqa_folder / "run" / "metrics.json")
    assert evaluated["sets"]["gqa"]["metrics"] == tested["sets"]["gqa"]["metrics"]
