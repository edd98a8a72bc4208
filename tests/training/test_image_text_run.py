"""A vision-language model that is no LLaVA through the scripts: trained, resumed, merged, asked, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from dora_vl import cli
from dora_vl.adapters.folder import read_weights
from dora_vl.backbones.encoder import Encoder
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.evaluation import merge_command
from dora_vl.evaluation.ask import Assistant
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.open_model import Wanted, open_model
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.prompt_inputs import Shown
from dora_vl.evaluation.questions import Question
from dora_vl.training.command_line import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa, llava_instruct
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import COLOURS, write_run, write_tiny_data

CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL, and data in which every second block of four samples has no picture."""
    folder = tmp_path_factory.mktemp("any-model")
    write_tiny("qwen2_5_vl", folder / "base")
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    return folder


def settings(there: Path, name: str, **changes: dict[str, object]) -> Path:
    training = {**CPU, **changes.pop("training", {})}
    return write_run(
        there / f"{name}.yaml", there / "base", there / "data" / "train.json", training=training, **changes
    )


def trained(there: Path, name: str, **training: object) -> Path:
    path = settings(there, name, training={"max_steps": 4, **training})
    adapter = there / name / "adapter"
    if not adapter.is_dir():
        run(DecoderPipeline(read_run_file(path)))
    return adapter


def losses(run_folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_trains_decoder_and_projector(there: Path) -> None:
    weights = read_weights(trained(there, "whole"))
    assert sum("lora_B" in name for name in weights) == 14
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    base = AutoModelForImageTextToText.from_pretrained(there / "base").state_dict()
    merger = {name: tensor for name, tensor in weights.items() if "merger" in name}
    assert merger
    for name, tensor in merger.items():
        assert not torch.equal(tensor, base[name.removeprefix("base_model.model.")])
    assert losses(there / "whole")[-1] < losses(there / "whole")[0]
    recipe = json.loads((there / "whole" / "adapter" / "recipe.json").read_text())
    assert (recipe["backbone"], recipe["template"]) == ("decoder", "tokenizer")


def test_stored_outputs_train_like_pixels(there: Path) -> None:
    trained(there, "whole")
    path = settings(there, "stored", data={"cache_features": True}, training={"max_steps": 4})
    run(DecoderPipeline(read_run_file(path)))
    assert losses(there / "stored") == pytest.approx(losses(there / "whole"), abs=1e-5)
    assert list((there / "stored" / "features").rglob("outputs-*.safetensors"))


def rows_with_system(there: Path, form: str) -> Path:
    """The data once more, each row with a system text, as messages or beside ShareGPT's talk."""
    rows = json.loads((there / "data" / "train.json").read_text())
    for row in rows if form == "messages" else ():
        asked, said = (turn["value"] for turn in row.pop("conversations"))
        talk = [("system", "Be brief."), ("user", asked), ("assistant", said)]
        row["messages"] = [{"role": role, "content": text} for role, text in talk]
        row["images"] = [row.pop("image")] if "image" in row else []
    path = there / "data" / f"{form}.json"
    path.write_text(json.dumps(rows if form == "messages" else [{**row, "system": "Be brief."} for row in rows]))
    return path


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_rows_with_a_system_turn_train(there: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    encode = Encoder.encode

    def noted(encoder: Encoder, *given: Any) -> Any:
        found = encode(encoder, *given)
        labelled = found.labels[found.labels != IGNORED_LABEL]
        seen.append((encoder.tokenizer.decode(found.input_ids), encoder.tokenizer.decode(labelled)))
        return found

    monkeypatch.setattr(Encoder, "encode", noted)
    data: dict[str, object] = {"train": str(rows_with_system(there, form))}
    path = settings(there, form, data=data, training={"max_steps": 2, "save_strategy": "no"})
    run(DecoderPipeline(read_run_file(path)))
    assert len(losses(there / form)) == 2
    assert len(seen) >= 8
    for text, answer in seen:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert answer.partition(" ")[0].removesuffix("<|im_end|>") in COLOURS
    log = [json.loads(line) for line in (there / form / "log.jsonl").read_text().splitlines()]
    assert {line["skipped"] for line in log if "skipped" in line} == {0}


def test_a_resumed_run_ends_where_a_whole_one_does(there: Path) -> None:
    whole = read_weights(trained(there, "whole"))
    path = settings(there, "half", training={"max_steps": 4})
    content = yaml.safe_load(path.read_text())
    run(DecoderPipeline(read_run_file(path)))
    checkpoint = there / "half" / "checkpoint-2"
    again = {**content, "resume": str(checkpoint)}
    path.write_text(yaml.safe_dump(again))
    run(DecoderPipeline(read_run_file(path)))
    resumed = read_weights(there / "half" / "adapter")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def answer_of(assistant: Assistant, picture: Path) -> torch.Tensor:
    from dora_vl.data.turns import Turn

    shown = Shown(pictures=(open_picture(picture),))
    sample = assistant.prompts.sample([Turn("user", "<image>\nSay the colour.")], shown)
    with torch.no_grad():
        return assistant.backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits


def test_a_merged_folder_is_the_adapted_model(there: Path, tmp_path: Path) -> None:
    import argparse

    adapter = trained(there, "whole")
    parser = argparse.ArgumentParser()
    merge_command.add_arguments(parser)
    list(merge_command.run(parser.parse_args(["--adapter", str(adapter), "--to", str(tmp_path / "merged")])))
    Image.new("RGB", (21, 15), "red").save(tmp_path / "red.png")
    opened = open_model(Wanted(adapter=adapter, with_base=True))
    assert isinstance(opened.adapted, Assistant)
    ours = answer_of(opened.adapted, tmp_path / "red.png")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    plain = Assistant(type(opened.adapted.backbone)(merged.eval()), opened.adapted.prompts)
    torch.testing.assert_close(answer_of(plain, tmp_path / "red.png"), ours, rtol=0, atol=1e-4)
    assert isinstance(opened.base, Assistant)
    assert (answer_of(opened.base, tmp_path / "red.png") - ours).abs().max() > 1e-2


def test_it_is_asked_from_the_command_line(there: Path, tmp_path: Path, capsys: Any) -> None:
    from dora_vl.data.turns import Turn

    adapter = trained(there, "whole")
    pictures = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in pictures:
        Image.new("RGB", (30, 17), path.stem).save(path)
    images = [part for path in pictures for part in ("--image", str(path))]
    asked = ["--adapter", str(adapter), *images, "--together", "--question", "Say the colour.", "--max-new-tokens", "4"]
    image_qa.main(asked)
    printed = capsys.readouterr().out.splitlines()[1].strip()
    assistant = open_model(Wanted(adapter=adapter)).adapted
    turns = [Turn("user", "<image>\n<image>\nSay the colour.")]
    assert printed == assistant.answer(
        Question(id="q", turns=tuple(turns)), Shown(pictures=tuple(map(open_picture, pictures))), max_new_tokens=4
    )


@pytest.mark.parametrize("model_type", ["florence2", "blip-2", "llama4", "bert"])
def test_a_base_that_cannot_be_trained_ends_in_one_line_before_its_weights(
    tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, model_type: str
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "base")  # and no weights
    path = write_run(tmp_path / "run.yaml", tmp_path / "base", there / "data" / "train.json", training=CPU)
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        llava_instruct.main()
    assert ended.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert f"'{model_type}', which cannot be trained here" in told[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_chat_template_is_told_before_weights_are_read(there: Path, tmp_path: Path) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (base / "model.safetensors").unlink()
    path = write_run(tmp_path / "run.yaml", base, there / "data" / "train.json", training=CPU)
    with pytest.raises(UserError, match="has no chat template"):
        run(DecoderPipeline(read_run_file(path)))


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("data", "share_pictures", True),
        ("model", "template", "plain"),
        ("model", "image_aspect", "square"),
    ],
)
def test_settings_of_the_llava_path_are_refused(there: Path, section: str, setting: str, value: object) -> None:
    task = DecoderPipeline(read_run_file(settings(there, "refused", **{section: {setting: value}})))
    with pytest.raises(UserError, match=rf"{section}\.{setting}"):
        run(task)


@pytest.fixture(scope="module")
def tested(there: Path) -> Path:
    """A run that was tested on its own data by its settings, one picture of which is broken."""
    questions = json.loads((there / "data" / "train.json").read_text())
    pictured = [row for row in questions if "image" in row]
    for number, question in enumerate(questions):
        question["kind"] = ("even", "odd")[number % 2]
    (there / "data" / "broken.png").write_bytes(b"no picture")
    pictured[2]["image"] = "broken.png"
    (there / "test.json").write_text(json.dumps(questions))
    evaluation = {"file": str(there / "test.json"), "batch_size": 5, "max_new_tokens": 4}
    path = settings(there, "tested", training={"max_steps": 4}, evaluation=evaluation)
    assert run(DecoderPipeline(read_run_file(path))) is None
    return path


def test_its_settings_test_it_as_they_do_a_llava(there: Path, tested: Path) -> None:
    output = there / "tested"
    metrics = json.loads((output / "metrics.json").read_text())
    predictions = read_predictions(output / "predictions.jsonl")
    right = sum(one.prediction == one.truth for one in predictions.values())
    assert (metrics["n"], len(predictions), metrics["unanswered"]) == (24, 23, 1)
    assert metrics["accuracy"] == pytest.approx(right / 24)
    low, high = metrics["interval_95"]
    assert low <= metrics["accuracy"] <= high
    assert {kind: part["n"] for kind, part in metrics["by_kind"].items()} == {"even": 12, "odd": 12}
    (reason,) = metrics["failed_questions"].values()
    assert "broken.png" in reason
    assert metrics["train_seconds"] > 0
    for name in ("loss_curve.png", "contact_sheet.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    again = DecoderPipeline(read_run_file(tested)).test({})
    assert (again["answers_from_earlier_run"], again["accuracy"]) == (23, metrics["accuracy"])


def test_evaluate_gives_the_answers_of_the_run_s_own_test(there: Path, tested: Path, tmp_path: Path) -> None:
    adapter = there / "tested" / "adapter"
    options = ["--adapter", adapter, "--benchmarks", f"exact_match={there / 'test.json'}", "--images", there / "data"]
    cli.main(["evaluate", *map(str, options), "--to", str(tmp_path), "--max-new-tokens", "4", "--batch-size", "7"])
    theirs = read_predictions(tmp_path / "exact_match" / "predictions.jsonl")
    own = read_predictions(there / "tested" / "predictions.jsonl")
    assert {name: one.prediction for name, one in theirs.items()} == {n: one.prediction for n, one in own.items()}
    entry = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]["exact_match"]
    accuracy = json.loads((there / "tested" / "metrics.json").read_text())["accuracy"]
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(100 * accuracy)


@pytest.mark.parametrize(
    ("written", "folder", "said"),
    [
        ("[]", "data", "holds no questions"),
        (None, "data", "questions.json"),
        ("whole", "empty", "not one of 12 pictures is in"),
    ],
)
def test_a_wrong_test_is_told_before_weights_are_read(
    there: Path, tmp_path: Path, written: str | None, folder: str, said: str
) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    (base / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    questions = tmp_path / "questions.json"
    if written is not None:
        questions.write_text((there / "data" / "train.json").read_text() if written == "whole" else written)
    pictures = there / "data" if folder == "data" else tmp_path / folder
    evaluation = {"file": str(questions), "image_folder": str(pictures)}
    records = there / "data" / "train.json"
    path = write_run(tmp_path / "run.yaml", base, records, training=CPU, evaluation=evaluation)
    with pytest.raises(UserError, match=said):
        run(DecoderPipeline(read_run_file(path)))
