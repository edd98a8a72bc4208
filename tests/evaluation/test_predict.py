"""Batched prediction: each question gets its own answer, failures are named, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig

from dora_vl.backbones.generation import NO_TOKEN
from dora_vl.data.batches import Collator
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.ask import Assistant, Decoding, EncoderPrompts, MediaReader, Shown, ask
from dora_vl.evaluation.predictions import Predictions
from dora_vl.evaluation.questions import Question
from dora_vl.run.base import VideoReading

END = 1
FIRST_LETTER = 10
WITHOUT_NUMBERS = "N"
"""In a prompt: the model's scores are NaN."""


class LetterPrompts(EncoderPrompts):
    """One token a letter; a picture, as many pixels wide as its number, contributes no token."""

    encoder: Any = SimpleNamespace(
        videos_of_one_length=False,
        decode=lambda ids: "".join(chr(int(token) - FIRST_LETTER) for token in ids if token > END),
    )

    def __init__(self) -> None: ...

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        if "\ufdd0" in turns[-1].text:
            raise BadSample("prompt", "a noncharacter")
        ids = torch.tensor([FIRST_LETTER + ord(letter) for letter in turns[-1].text])
        pixels = [torch.full((3, 2, 2), float(picture.width - 1)) for picture in seen.pictures]
        inputs = {"pixel_values": torch.stack(pixels)}
        return Sample(index=0, id="", input_ids=ids, labels=ids, inputs=inputs)

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample], side: str) -> Mapping[str, Any]:
        return {**Collator(0, pad_side=side)(samples)}


class LastWordModel(torch.nn.Module):
    """Answers with the prompt's last letter, then the picture's number; checks the padding on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = PretrainedConfig()
        self.batches: list[list[int]] = []
        self.stop_after: int | None = None

    def generate(self, input_ids, attention_mask, *, pixel_values, max_new_tokens=16):
        assert max_new_tokens == 3
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        lengths = attention_mask.sum(1)
        assert torch.equal(attention_mask.sort(dim=1).values, attention_mask)  # zeros on the left
        assert torch.equal(input_ids == 0, attention_mask == 0)
        assert not torch.is_grad_enabled()
        self.batches.append(lengths.tolist())
        digits = FIRST_LETTER + ord("0") + pixel_values[:, 0, 0, 0].long()
        new = torch.stack([input_ids[:, -1], digits, torch.full_like(digits, END)], dim=1)
        return new.masked_fill((input_ids == FIRST_LETTER + ord(WITHOUT_NUMBERS)).any(1, keepdim=True), NO_TOKEN)


def question(number: int, text: str = "") -> Question:
    words = text or "x" * (number % 5) + "abcdefghij"[number % 10]
    return Question(id=f"q{number}", images=(f"{number % 10}.png",), turns=(Turn("user", words),), truth="a0")


def asked(
    folder: Path, questions: list[Question], model: LastWordModel, *, workers: int = 0, **media: Any
) -> Predictions:
    for number in range(10):
        Image.new("RGB", (number + 1, 2)).save(folder / f"{number}.png")
    (folder / "broken").write_bytes(b"no picture")
    videos = VideoReading(folder=folder, sampling=Uniform(2))
    return ask(
        Assistant(model, LetterPrompts()),
        questions,
        MediaReader(folder=folder, videos=videos, **media),
        Decoding(batch_size=4, max_new_tokens=3),
        path=folder / "predictions.jsonl",
        settings={},
    )


def test_every_question_gets_its_own_answer_longest_prompts_first(tmp_path: Path) -> None:
    model, questions = LastWordModel(), [question(number) for number in range(11)]
    predictions = asked(tmp_path, questions, model)
    assert predictions.failed == {}
    assert predictions.answers == {f"q{n}": f"{'abcdefghij'[n % 10]}{n % 10}" for n in range(11)}
    lengths = [length for batch in model.batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in model.batches] == [4, 4, 3]


def test_what_cannot_be_asked_is_named_and_never_an_empty_answer(tmp_path: Path) -> None:
    model = LastWordModel()
    model.config = PretrainedConfig(max_position_embeddings=20)
    broken = Question(id="bad picture", images=("broken",), turns=(Turn("user", "b"),), truth="a")
    questions = [broken, question(3, "\ufdd0"), question(2, "x" * 18), question(1, "fits")]
    predictions = asked(tmp_path, questions, model)
    assert predictions.answers == {"q1": "s1"}
    assert predictions.failed.keys() == {"bad picture", "q3", "q2"}
    predictions = asked(tmp_path, [question(3, "\ufdd0")], again := LastWordModel())  # nothing of a batch
    assert (predictions.rows, list(predictions.failed), again.batches) == ([], ["q3"], [])


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    questions = [question(number) for number in range(11)]
    stopped, again = LastWordModel(), LastWordModel()
    stopped.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path, questions, stopped)
    predictions = asked(tmp_path, questions, again)
    assert sum(map(len, again.batches)) == 7
    assert len(predictions.rows) == 11
    asked(tmp_path, questions, third := LastWordModel())
    assert third.batches == []


def test_a_question_whose_scores_are_no_numbers_is_named_at_the_end_and_costs_no_other_its_answer(
    tmp_path: Path,
) -> None:
    model, questions = LastWordModel(), [question(number, "abcdefghi"[number:]) for number in range(9)]
    questions[2] = question(2, f"cdefgh{WITHOUT_NUMBERS}")
    with pytest.raises(UserError):
        asked(tmp_path, questions, model)
    assert list(map(len, model.batches)) == [4, 4, 1]
    predictions = asked(tmp_path, [one for one in questions if one.id != "q2"], again := LastWordModel())
    assert again.batches == []
    assert predictions.answers == {f"q{n}": f"i{n}" for n in range(9) if n != 2}


def test_a_model_without_any_numbers_ends_at_its_first_batch(tmp_path: Path) -> None:
    model = LastWordModel()
    with pytest.raises(UserError):
        asked(tmp_path, [question(number, WITHOUT_NUMBERS) for number in range(9)], model)
    assert list(map(len, model.batches)) == [4]
