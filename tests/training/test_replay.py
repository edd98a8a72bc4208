"""Chats that a base writes itself: what is kept of them, how many an epoch draws, and that a run resumes with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_vl.backbones.encoder import open_encoder
from dora_vl.data.example import Example
from dora_vl.data.order import ModalityLengthSampler, ReplaySampler, SamplingLengths, TreeSampler
from dora_vl.data.turns import Turn
from dora_vl.errors import SettingError
from dora_vl.evaluation.assistant import EncoderPrompts
from dora_vl.run.settings import ModelConfig
from dora_vl.training import replay
from dora_vl.training.replay import ChatWriter, opening_of, repeated_share, whole
from tests.backbones.tiny_language import byte_tokenizer, write_tiny_language
from tests.training.tiny_run import (
    MakeRun,
    assert_same_weights,
    decoder_run,
    json_of,
    logged,
    logged_losses,
    refused,
    trained,
)

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class ScriptedBackbone(torch.nn.Module):
    """Says the given texts, batch by batch, in place of a model."""

    def __init__(self, tokenizer: Any, batches: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id))
        self._tokenizer, self._batches = tokenizer, iter(batches)
        self.prompts: list[list[str]] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        kept = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        self.prompts.append([self._tokenizer.decode(row) for row in kept])
        texts = list(next(self._batches))[: len(input_ids)]
        texts += [""] * (len(input_ids) - len(texts))
        rows = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


@pytest.fixture
def chatml_base(tmp_path: Path) -> Path:
    """A tiny language model whose tokenizer has ChatML's tokens and a chat template."""
    folder = write_tiny_language(tmp_path / "chatml")
    tokenizer = byte_tokenizer(begin=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def writer_of(base: Path, template: str, batches: Sequence[Sequence[str]]) -> tuple[ChatWriter, ScriptedBackbone]:
    encoder = open_encoder(str(base), template=template, max_tokens=256)
    backbone = ScriptedBackbone(encoder.tokenizer, batches)
    assistant: Any = SimpleNamespace(
        prompts=EncoderPrompts(encoder),
        backbone=backbone,
        device=torch.device("cpu"),
        new_ids=lambda batch, **options: backbone.generate(batch["input_ids"], batch["attention_mask"], **options),
    )
    return ChatWriter(assistant, ModelConfig(base=str(base))), backbone


END = "<|im_end|>"


def test_a_base_asks_by_its_own_template_and_what_is_empty_repeated_or_cut_is_left_out(chatml_base: Path) -> None:
    questions = [
        f"What colour is it?{END}",
        f"Say it is it is it is it is it is it.{END}",  # repeats itself
        "What colour is it, and so on",  # came to no end
        f"Say.{END}",  # hardly a question
        f"What colour is a chat?{END}",
        f"Say the colour twice.{END}",
        f"Say the colour of <image> it.{END}",
    ]
    answers = [
        f"It is red.{END}",
        "It is green. Between the two chats it is",  # cut: to the end of the last whole sentence
        f"red red red red red red red red{END}",
        f"It is blue.{END}",
    ]
    writer, backbone = writer_of(chatml_base, "chatml", [questions, answers, [f"What colour is it?{END}"], [f"It is red.{END}"]])
    chats = [tuple(turn.text for turn in chat.turns) for chat in _first(writer.write(100), backbone)]
    assert chats == [
        ("What colour is it?", "It is red."),
        ("What colour is a chat?", "It is green."),
    ]
    assert set(backbone.prompts[0]) == {"<|im_start|>user\n"}
    assert backbone.prompts[1][0] == "<|im_start|>user\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n"


def _first(chats: Iterator[Example], backbone: ScriptedBackbone) -> list[Example]:
    """What was written until the script ends."""
    kept: list[Example] = []
    try:
        for chat in chats:
            kept.append(chat)
    except (StopIteration, RuntimeError):
        pass
    return kept


def test_without_a_chat_template_a_base_goes_on_with_plain_openings(tmp_path: Path) -> None:
    base = write_tiny_language(tmp_path / "plain")
    writer, backbone = writer_of(base, "question_answer", [["runs to the sea.</s>", "went", "is on. And then"]])
    chats = [tuple(turn.text for turn in chat.turns) for chat in _first(writer.write(100), backbone)]
    assert [answer for _, answer in chats] == ["runs to the sea.", "is on."]
    assert {question for question, _ in chats} <= {*replay.OPENINGS}
    assert {text.removeprefix("<s>") for text in backbone.prompts[0]} <= {*replay.OPENINGS}


def test_what_closes_a_question_may_be_words(tiny_llava: Path) -> None:
    encoder = open_encoder(str(tiny_llava), template="vicuna_v1", max_tokens=256)
    opening = opening_of(encoder)
    assert opening.closing_id is None
    assert "".join(opening.closing.split()).replace("\u0120", "") == "ASSISTANT:"


def test_repeated_and_cut_texts() -> None:
    assert repeated_share("a b c d a b c d e") == pytest.approx(1 / 6)
    assert repeated_share("a b c") == 0.0
    assert whole("One. Two", ended=False) == "One."
    assert whole("One. Two", ended=True) == "One. Two"
    assert whole("One", ended=False) == ""


# A run.

CHATS = 7
PART = "replay.jsonl"


@pytest.fixture
def with_chats(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeRun:
    """Settings of runs with replay, whose base has chats instead of writing them."""

    def file_of_chats(*_: object) -> Path:
        path = tmp_path / "chats.jsonl"
        if not path.exists():
            lines = [
                {"id": f"replay-{number}", "conversations": [
                    {"from": "human", "value": f"Say {number}."},
                    {"from": "gpt", "value": "It is " + "blue " * number + "."},
                ]}
                for number in range(CHATS)
            ]  # fmt: skip
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    monkeypatch.setattr(replay, "file_of_chats", file_of_chats)
    return make_run


def seen_by(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    raise NotImplementedError


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("teaches", ["labels", "divergence"])
def test_a_run_resumes_with_the_chats_that_it_had(
    with_chats: MakeRun, tmp_path: Path, teaches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"use_cpu": True, "max_steps": 20, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 5}
    run_file = with_chats(training=training, data={"replay": 0.4}, objective={"replay": teaches})
    whole_run = trained(run_file, name="whole")
    stopped = trained(run_file, name="stopped")
    for path in (stopped / "adapter", stopped / "checkpoint-14", stopped / "checkpoint-20"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    (tmp_path / "chats.jsonl").write_text("")  # the run has its own
    trained(run_file, "--resume=last", name="stopped")
    assert logged_losses(stopped)[-13:] == logged_losses(whole_run)[-13:]
    assert_same_weights(stopped, whole_run)

    (stopped / PART).write_text((stopped / PART).read_text().replace("blue", "red"))
    with pytest.raises(SettingError, match=PART) as error:
        trained(run_file, "--resume=last", name="stopped")
    assert error.value.key == "resume"


def test_chats_change_what_is_learned_by_their_share_of_labelled_tokens(with_chats: MakeRun) -> None:
    run_file = with_chats(training={"use_cpu": True}, data={"replay": 0.4})
    pipeline = decoder_run(run_file)
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
