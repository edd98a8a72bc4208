"""One way to ask every model: batches as one by one, letters by likelihood, with an adapter, PEFT's, or none."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.generation import NotFiniteScores
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.evaluation import assistant as assistant_module
from dora_vl.evaluation.assistant import Assistant, answered_sample, inputs_on_device, prompt_batch, prompt_sample
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.predictor import Decoding, PromptMedia, media_reader
from dora_vl.evaluation.scores.benchmark import LETTER
from tests.backbones.tiny_image_text import coloured_video, write_tiny, write_tiny_video
from tests.backbones.tiny_language import write_tiny_language
from tests.serving.tiny_served import spread
from tests.training.tiny_run import write_tiny_llava

MORE_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("smolvlm", "internvl")]
MODELS = ["qwen2_5_vl", "llava", "language", *MORE_FAMILIES]
NEW_TOKENS = 6
COLOURS = ("red", "green", "blue")


def write_model(name: str, folder: Path) -> Path:
    if name == "language":
        return spread(write_tiny_language(folder))
    if name == "llava":
        return spread(write_tiny_llava(folder))
    return spread(write_tiny(name, folder))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


def opened(folder: Path) -> Assistant:
    template = "vicuna_v1" if is_language(folder) else None
    assistant = open_model(ModelRequest(model=str(folder), template=template)).adapted
    return assistant


def is_language(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def conversations(name: str) -> Iterator[tuple[list[Turn], PromptMedia]]:
    """Prompts of many lengths: no picture, one, two, of different sizes; a second question."""
    yield [Turn("user", "What colour is it?")], PromptMedia()
    yield [Turn("user", "Say " * 9), Turn("assistant", "red"), Turn("user", "And the shape?")], PromptMedia()
    if name == "language":
        return
    red, wide = Image.new("RGB", (21, 15), "red"), Image.new("RGB", (60, 17), (20, 40, 220))
    yield [Turn("user", "<image>\nSay the colour.")], PromptMedia(pictures=(red,))
    yield [Turn("user", "<image>\n<image>\nWhich is red? Say it.")], PromptMedia(pictures=(wide, red))
    yield [Turn("user", "<video>\nWhat moves?")], PromptMedia(videos=(coloured_video(2),))


def new_ids(assistant: Assistant, *samples: Sample) -> list[list[int]]:
    return assistant.new_ids(prompt_batch(assistant.encoder, samples), max_new_tokens=NEW_TOKENS).tolist()


def assert_a_batch_is_each_alone(assistant: Assistant, samples: Sequence[Sample]) -> None:
    assert len({len(sample.input_ids) for sample in samples}) > 1  # or nothing is padded
    alone = [new_ids(assistant, sample)[0] for sample in samples]
    assert len(set(map(tuple, alone))) > 1
    assert [row[: len(own)] for own, row in zip(alone, new_ids(assistant, *samples), strict=True)] == alone


def test_a_batch_answers_as_one_by_one_to_the_id(model: tuple[str, Path]) -> None:
    name, folder = model
    assistant = opened(folder)
    assert_a_batch_is_each_alone(
        assistant, [prompt_sample(assistant.encoder, *conversation) for conversation in conversations(name)]
    )


def test_a_row_without_numbers_has_no_answer_and_the_others_have_theirs(model: tuple[str, Path]) -> None:
    name, folder = model
    assistant = opened(folder)
    samples = [prompt_sample(assistant.encoder, *conversation) for conversation in conversations(name)]
    batch = prompt_batch(assistant.encoder, samples)
    expected = assistant.answers(batch, max_new_tokens=NEW_TOKENS)
    others = {token for index, sample in enumerate(samples) if index != 1 for token in sample.input_ids.tolist()}
    own = next(token for token in samples[1].input_ids.tolist() if token not in others)

    def break_row(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == own).unsqueeze(-1), float("nan"))

    assistant.backbone.model.get_input_embeddings().register_forward_hook(break_row)
    predictions = assistant.answers(batch, max_new_tokens=NEW_TOKENS)
    assert predictions == [None if index == 1 else text for index, text in enumerate(expected)]
    turns, seen = list(conversations(name))[1]
    with pytest.raises(NotFiniteScores):
        assistant.answer(Example(id="q", turns=tuple(turns)), seen, max_new_tokens=NEW_TOKENS, write=lambda text: None)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_a_family_with_videos_is_shown_videos(name: str, tmp_path: Path) -> None:
    assistant = opened(spread(write_tiny_video(name, tmp_path / "model")))
    picture, clip = Image.new("RGB", (21, 15), "red"), coloured_video(4)
    conversations = [
        ([Turn("user", "<video>\nWhat moves?")], PromptMedia(videos=(clip,))),
        ([Turn("user", "<image>\nIs it here: <video>\nSay it.")], PromptMedia(pictures=(picture,), videos=(clip,))),
        ([Turn("user", "What colour is it?")], PromptMedia()),
    ]
    samples = [prompt_sample(assistant.encoder, *conversation) for conversation in conversations]
    assert ["pixel_values_videos" in sample.inputs for sample in samples] == [True, True, False]
    assert assistant.encoder.videos_of_one_length is (name == "llava_onevision")
    assert assistant.encoder.no_videos_reason is None
    assert_a_batch_is_each_alone(assistant, samples)


def test_a_likelihood_is_the_sum_over_the_answer_and_what_closes_it(model: tuple[str, Path]) -> None:
    name, folder = model
    assistant = opened(folder)
    turns, seen = list(conversations(name))[-1]
    choices = ["A", "B because it is", "C it"]
    samples = [answered_sample(assistant.encoder, turns, seen, text) for text in choices]
    together = assistant.log_likelihoods(samples)
    prompt = len(prompt_sample(assistant.encoder, turns, seen).input_ids)
    for sample, likelihood in zip(samples, together, strict=True):
        batch = inputs_on_device(assistant.encoder.collate([sample]), "cpu")
        del batch["attention_mask"]
        with torch.no_grad():
            logits = assistant.backbone.model(**batch).logits.log_softmax(-1)[0]
        labelled = (sample.labels != -100).nonzero().flatten()
        assert int(labelled[0]) == prompt  # the answer begins where the prompt ends
        expected = sum(float(logits[position - 1, sample.input_ids[position]]) for position in labelled.tolist())
        assert float(likelihood) == pytest.approx(expected, abs=1e-3)
    assert len({round(float(value), 3) for value in together}) == len(choices)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of one's own: questions with choices about pictures, one broken, one without."""
    folder = tmp_path_factory.mktemp("own")
    examples: list[Example] = []
    for number, colour in enumerate(("red", "green", "blue", "white", "red", "blue")):
        Image.new("RGB", (9 + 7 * number, 12), colour).save(folder / f"{number}.png")
        asked: Any = {"id": f"q{number}", "question": "Which colour?" + " Say." * number, "choices": COLOURS}
        asked["extra"] = {"correct": number % 3, "kind": ("even", "odd")[number % 2]}
        images = () if number == 3 else (f"{number}.png",)
        examples.append(Example(**asked, images=images, answers=(Answer(text=colour),)))
    (folder / "1.png").write_bytes(b"no picture")
    write_examples(folder / "colours.jsonl", examples)
    (folder / "colours.yaml").write_text("name: colours\nscoring: choice\nfile: colours.jsonl\nmax_new_tokens: 5\n")
    return folder


def evaluate(data: Path, to: Path, *more: object) -> dict[str, Any]:
    options = ["--benchmarks", data / "colours.yaml", "--images", data, "--to", to, *more]
    main(["evaluate", *map(str, options)])
    return json.loads((to / "metrics.json").read_text())


def answers(to: Path) -> dict[str, str]:
    return {name: row.prediction for name, row in read_predictions(to / "predictions.jsonl").get("colours", {}).items()}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_model_without_an_adapter_is_evaluated(name: str, data: Path, tmp_path: Path) -> None:
    folder = write_model(name, tmp_path / "model")
    metrics = evaluate(data, tmp_path / "one", "--model", folder, "--batch-size", 1)
    entry = metrics["sets"]["colours"]
    assert (entry["n"], list(entry["failed"])) == (6, ["q1"])
    assert metrics["answers_of"] == str(folder)
    assert list(metrics["answers_sha256"]) == ["base"]
    assert {"accuracy", "kind/even", "kind/odd"} <= set(entry["metrics"])
    evaluate(data, tmp_path / "four", "--model", folder, "--batch-size", 4, "--workers", 2)
    assert answers(tmp_path / "four") == answers(tmp_path / "one")
    assert len(answers(tmp_path / "one")) == 5

    likeliest = evaluate(data, tmp_path / "letters", "--model", folder, "--answer-by", "likelihood")
    assert set(answers(tmp_path / "letters").values()) <= {"A", "B", "C"}
    assert likeliest["sets"]["colours"]["asked_with"]["answer_by"] == "likelihood"
    assistant, shown = opened(folder), PromptMedia(pictures=(Image.open(data / "0.png").convert("RGB"),))
    turns = [Turn("user", f"<image>\nWhich colour?\nA. red\nB. green\nC. blue\n{LETTER}")]
    samples = [answered_sample(assistant.encoder, turns, shown, letter) for letter in "ABC"]
    assert answers(tmp_path / "letters")["q0"] == "ABC"[int(assistant.log_likelihoods(samples).argmax())]


def auto_class(base: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if is_language(base) else AutoModelForImageTextToText


def peft_adapter(base: Path, folder: Path, *, use_dora: bool, targets: Sequence[str] = ("q_proj", "up_proj")) -> Path:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), use_dora=use_dora)
    wrapped = peft.get_peft_model(auto_class(base).from_pretrained(base), config)
    random = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=random, std=0.5)
    wrapped.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    return folder


@pytest.mark.parametrize(
    ("name", "use_dora"), [("qwen2_5_vl", True), ("llava", False), ("llava", True), ("language", True)]
)
def test_a_folder_of_peft_opens(name: str, use_dora: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    base = write_model(name, tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "adapter", use_dora=use_dora)
    assert not (adapter / "recipe.json").exists()
    template = "vicuna_v1" if name == "language" else None
    ours = open_model(ModelRequest(adapter=adapter, with_base=True, template=template))
    turns, seen = list(conversations(name))[-1]
    sample = prompt_sample(ours.adapted.encoder, turns, seen)
    batch = inputs_on_device(prompt_batch(ours.adapted.encoder, [sample]), "cpu")
    plain = auto_class(base).from_pretrained(base)
    with torch.no_grad():
        logits, bare = (assistant.backbone.model(**batch).logits for assistant in (ours.adapted, ours.base))
        theirs = PeftModel.from_pretrained(plain, str(adapter)).eval()(**batch).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)
    assert (logits - bare).abs().max() > 1e-2


@pytest.fixture(scope="module")
def paths(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    for name in ("empty", "bare_adapter", "lora", "florence2", "bert", "vlbart"):
        (folder / name).mkdir()
    for name in ("florence2", "bert", "vlbart"):
        (folder / name / "config.json").write_text(json.dumps({"model_type": name}))
    for name in ("bare_adapter", "lora"):
        save_file({"a": torch.zeros(1)}, folder / name / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    models = {"bare": write_tiny("qwen2_5_vl", folder / "bare"), "silent": write_tiny("qwen2_5_vl", folder / "silent")}
    models |= {"language": write_tiny_language(folder / "language"), "llava": write_tiny_llava(folder / "llava")}
    for model in models.values():
        (model / "model.safetensors").unlink()
    (models["silent"] / "chat_template.jinja").unlink()
    others = {path.name: path for path in folder.iterdir()}
    return {**others, **models, "data": data, "own": data / "colours.yaml", "gone": folder / "gone"}


EVALUATE = "evaluate --benchmarks {own} --to {gone}/to --images {data} --model "


@pytest.mark.parametrize(
    "words",
    [
        *("ask --question q --model {florence2}", EVALUATE + "{bert}", "ask --question q --model {vlbart}"),
        *("ask --question q", "ask --question q --model ./gone"),
        *(EVALUATE + "{bare} --images {empty}", EVALUATE + "{silent}"),
        "evaluate --benchmarks {own} --model {bare} --images {data}",
        "evaluate --to {gone} --model {bare} --benchmarks pope={data}/colours.jsonl --answer-by likelihood",
        *("ask --question q --model {language}", "ask --question q --model {llava} --template tokenizer"),
        *("ask --question q --model {llava} --template odd", "ask --question q --model {bare} --adapter {lora}"),
        *("ask --question q --model {bare} --compare-base", "ask --question q --model {bare_adapter}"),
        "ask --question q --adapter {lora}",
    ],
)
def test_what_cannot_be_asked_is_one_line_and_reads_no_weights(words: str, paths: dict[str, Path], capsys: Any) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(words.format(**paths).split())
    assert capsys.readouterr().err.count("\n") == 1
    assert not paths["gone"].exists()


# Questions about one picture share the run of its tower, and get the answers that they would get alone.


WORDS = ("What colour is it?", "Say the colour.", "What is it? Say it.")


def example(number: int, *images: str) -> Example:
    text = "<image>\n" * len(images) + WORDS[number % 3] + " red" * (number % 5)
    return Example(id=str(number), images=images, turns=(Turn("user", text),))


def examples_in(folder: Path) -> list[Example]:
    random = torch.Generator().manual_seed(3)
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        pixels = torch.randint(0, 255, (8, 8, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    about_one = [example(number, names[number * 3 % 5]) for number in range(24)]
    return [*about_one, example(24), example(25, names[0], names[1]), example(26, names[0], names[1])]


PROOF = 40
"""Passes by which a tower is proven to run apart, at most."""


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_picture_is_read_once(tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, examples = tmp_path, examples_in(tmp_path)
    base = write_tiny_llava(folder / "base")
    assistant = Assistant(open_backbone(str(base)), open_encoder(str(base), max_tokens=512))
    media, decoding = media_reader(folder, frames=1), Decoding(batch_size=batch_size, max_new_tokens=4)

    seen: list[int] = []
    tower = next(module for name, module in assistant.backbone.model.named_modules() if name.endswith("vision_tower"))
    tower.register_forward_pre_hook(
        lambda _, inputs, named: seen.append(len(inputs[0] if inputs else named["pixel_values"])), with_kwargs=True
    )

    def answers() -> tuple[dict[str, str], int]:
        seen.clear()
        rows = [row for several in assistant.predict(examples, media, decoding) for row in several]
        assert not any(row.error for row in rows)
        return {row.id: row.prediction for row in rows}, sum(seen)

    shared, few = answers()
    monkeypatch.setattr(DecoderBackbone, "continues_prompts", False)
    towers, _ = answers()
    monkeypatch.setattr(assistant_module, "LEAST_REPEATED", 1000)
    alone, most = answers()
    assert shared == towers == alone
    assert len(set(alone.values())) > 2
    assert most == 24 + 2 * 2
    assert few - PROOF < 5 + 2 + -(-27 // batch_size) * 2 < most
