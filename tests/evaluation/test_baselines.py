"""What stands beside a score: other pictures, commonest answers, the untrained base, what the model forgot."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.model import open_backbone
from dora_vl.data.example import MIDDLE_FRAME, Answer, Clip, Example
from dora_vl.data.turns import Turn
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.baselines import (
    MOST_EXCHANGED,
    UNTRAINED,
    ComparisonAnswers,
    advice,
    commonest_answers,
    compare_with,
    compare_with_baselines,
    digest,
    draw_sample,
    exchange_pictures_of,
    readable_answers,
    right_text,
)
from dora_vl.evaluation.forgetting import PASSAGES, compare_abilities, forgetting_lines, measure_abilities
from dora_vl.evaluation.scores.exact import score
from dora_vl.files import write_json
from dora_vl.run.folder import PROBE
from tests.backbones.tiny_language import write_tiny_language

COLOURS = ("red", "blue", "green")


def rows(count: int, question: str = "which colour?") -> list[Example]:
    named = [(str(number), COLOURS[number % 3]) for number in range(count)]
    return [
        Example(id=name, images=(f"{colour}-{name}.png",), question=question, answers=(Answer(text=colour),))
        for name, colour in named
    ]


def seen(example: Example) -> str:
    return example.images[0].partition("-")[0]


def told(examples: list[Example], says: Any) -> dict[str, Any]:
    answers = {example.id: says(example) for example in examples}
    sample = exchange_pictures_of(examples, answers)
    exchange = ComparisonAnswers(examples=sample, answers={example.id: says(example) for example in sample})
    entry, lines = compare_with_baselines(
        score(examples, answers), examples, answers, score, right_answer_of=right_text, exchange=exchange
    )
    assert lines[-1] == entry.get("warning", lines[-1])
    return entry


def test_answers_that_see_their_pictures_fall_with_others() -> None:
    entry = told(rows(60), seen)
    assert entry["metric"] == "accuracy"
    part, sample = entry["exchanged_pictures"], exchange_pictures_of(rows(60), [example.id for example in rows(60)])
    right = sum(seen(example) == right_text(example) for example in sample)
    assert (part["n"], part["value"], part["with_their_own"]) == (60, pytest.approx(100 * right / 60), 100.0)
    assert part["difference"]["value"] == pytest.approx(100 - 100 * right / 60)
    assert part["difference"]["low"] > 30
    assert "warning" not in entry


@pytest.mark.parametrize("says", [lambda _: "red", lambda example: COLOURS[int(example.id) % 3]])
def test_answers_that_do_not_are_warned_of(says: Any) -> None:
    entry = told(rows(60), says)
    assert entry["exchanged_pictures"]["difference"]["value"] == 0
    assert "warning" in entry


def other_picture(example: Example) -> str:
    """Says another thing of each picture, never the right one."""
    return f"sign {example.images[0]}"


def test_nothing_is_said_of_the_pictures_where_no_answer_is_right() -> None:
    entry = told(rows(60), other_picture)
    part = entry["exchanged_pictures"]
    assert (part["with_their_own"], part["value"], part["changed"], "warning" in entry) == (0.0, 0.0, 60, False)
    assert "warning" not in told(rows(60), lambda _: "none of it")


def test_the_warning_counts_the_answers_that_change() -> None:
    """A third is right whatever the picture, and two thirds of the wrong answers follow it."""
    entry = told(rows(60), lambda example: "red" if int(example.id) % 3 == 0 else other_picture(example))
    assert entry["exchanged_pictures"]["changed"] == 40
    assert "do not seem to depend" not in entry["warning"]
    assert "40" in entry["warning"]
    assert "do not seem to depend" in told(rows(60), lambda _: "red")["warning"]


@pytest.mark.parametrize(
    ("log", "named", "not_named"),
    [
        ([{"step": 9, "log_probs/chosen": -16.0}], "sft", "num_train_epochs"),
        ([{"step": 9, "log_probs/chosen": -0.3}], "num_train_epochs", "sft"),
        (
            [{"step": 50, "eval_loss": 0.05}, {"step": 100, "eval_loss": 0.21}],
            "optim.early_stopping",
            "num_train_epochs",
        ),
        ([{"step": 50, "eval_loss": 0.21}, {"step": 100, "eval_loss": 0.05}], "num_train_epochs", "early_stopping"),
        ([{"step": step, "loss": 0.5 / step} for step in range(1, 91)], "by heart (loss 0.0059 ", "early_stopping"),
        ([{"step": step, "loss": 9 / step} for step in range(1, 91)], "num_train_epochs", "by heart"),
        ([{"step": 9, "loss": 0.001, "rewards/mean": 0.4}], "num_train_epochs", "by heart"),
        (
            [{"step": 45, "eval_loss": 0.04}, {"step": 89, "loss": 0.002}, {"step": 90, "eval_loss": 0.17}],
            "rows about other pictures",
            "training.learning_rate",
        ),
        ([], "num_train_epochs", "sft"),
    ],
)
def test_advice_follows_the_log(log: list[dict[str, float]], named: str, not_named: str) -> None:
    kinds = {"which colour?": {"n": 30, "readable": 29, "learned": 10}}
    text = advice({"readable": {"n": 30, "questions": kinds}}, log, score=33.3)
    assert text is not None
    assert named in text
    assert not_named not in text
    learned = {"which colour?": {"n": 30, "readable": 29, "learned": 28}, "other questions": {"n": 9, "learned": 0}}
    assert advice({"readable": {"n": 30, "questions": learned}}, log, score=93.3) is None


def test_preferences_that_fail_are_advised_without_a_probe() -> None:
    unlikely, likely = ([{"step": 9, "log_probs/chosen": value}] for value in (-16.0, -0.3))
    baselines = {"commonest_answer": {"value": 34.0}}
    assert "sft" in str(advice(baselines, unlikely, score=0.7))
    assert advice(baselines, unlikely, score=74.1) is None
    assert advice(baselines, likely, score=0.7) is None
    assert advice(baselines, [], score=0.7) is None


def test_the_commonest_answer_is_each_question_s_own_where_it_is_asked_often() -> None:
    often = rows(7)  # red red red, blue blue, green green
    seldom = [
        Example(id=f"s{number}", question=f"question {number}?", answers=(Answer(text=text),))
        for number, text in enumerate(("no", "yes", "yes"))
    ]
    blank = [Example(id="kept", question="which colour?"), Example(id="caption", answers=(Answer(text="a dog"),))]
    assert commonest_answers([*often, *seldom, *blank], right_text) == {
        **{example.id: "red" for example in often},
        **{example.id: "yes" for example in seldom},
    }
    entry = told([*often, *seldom], lambda example: seen(example) if example.images else "no")
    assert entry["commonest_answer"]["value"] == pytest.approx(100 * 5 / 10)
    assert entry["commonest_answer"]["n"] == 10


def test_every_picture_gets_one_other_of_as_many() -> None:
    singles, pairs = rows(20), [Example(id=f"p{n}", images=(f"{n}.png", f"{n + 1}.png")) for n in range(4)]
    twice = [Example(id=f"again{example.id}", images=example.images, question="again?") for example in singles[:3]]
    parts = [Clip(path="v.mp4", start_seconds=float(n)) for n in range(3)]
    clips = [
        Example(id=f"c{n}", videos=(part,), extra={MIDDLE_FRAME: f"{float(n)}.png", "kind": n})
        for n, part in enumerate(parts)
    ]
    words, alone = Example(id="words", question="?"), Example(id="alone", images=("a.png", "b.png", "c.png"))
    everything = {example.id: example for example in (*singles, *pairs, *twice, *clips, words, alone)}
    sample = {example.id: example for example in exchange_pictures_of(everything.values(), everything)}
    assert sample.keys() == everything.keys() - {"words", "alone"}
    for name, row in sample.items():
        own = everything[name]
        assert (row.images, row.videos) != (own.images, own.videos)
        assert (len(row.images), len(row.videos)) == (len(own.images), len(own.videos))
        assert (row.question, row.answers, row.extra.get("kind")) == (own.question, own.answers, own.extra.get("kind"))
    assert all(sample[f"again{n}"].images == sample[str(n)].images for n in range(3))
    for n in range(3):
        assert sample[f"c{n}"].extra[MIDDLE_FRAME] == f"{sample[f'c{n}'].videos[0].start_seconds}.png"
    assert "p3" not in {
        item.id for item in exchange_pictures_of(everything.values(), everything.keys() - {"p0", "p1", "p2"})
    }


def test_the_sample_is_seeded_bounded_and_keeps_what_is_scored_together() -> None:
    examples = rows(3 * MOST_EXCHANGED)
    take = partial(exchange_pictures_of, examples, {row.id for row in examples}, together=lambda row: int(row.id) // 7)
    sample = take()
    assert sample == take()
    assert MOST_EXCHANGED - 7 < len(sample) <= MOST_EXCHANGED
    kept = {int(row.id) // 7 for row in sample}
    assert len(sample) == sum(int(row.id) // 7 in kept for row in examples)
    assert digest(sample) != digest(sample[1:])
    assert draw_sample(examples) == draw_sample(examples)
    assert len({example.id for example in draw_sample(examples)}) == MOST_EXCHANGED
    assert sorted(example.id for example in draw_sample(examples[:7])) == [str(number) for number in range(7)]


def test_where_no_pictures_differ_nothing_is_exchanged_and_warned_of() -> None:
    same = [Example(id=str(n), images=("a.png",), question="?", answers=(Answer(text="x"),)) for n in range(9)]
    assert told(same, lambda _: "x").keys() == {"metric", "commonest_answer"}


def test_the_untrained_base_is_compared_on_the_questions_that_it_was_asked() -> None:
    """It says red to everything: right for a third of 30 of the 60, while the adapter's model knows 50 of all."""
    examples = rows(60)
    asked = examples[:30]
    answers = {example.id: seen(example) if int(example.id) < 50 else "none" for example in examples}
    untrained = ComparisonAnswers(examples=asked, answers={example.id: "red" for example in asked})
    part, line = compare_with(UNTRAINED, untrained, examples, answers, score)
    assert (part["n"], part["value"], part["with_the_adapter"]) == (30, pytest.approx(100 / 3), 100.0)
    assert part["difference"]["value"] == pytest.approx(200 / 3)
    assert part["difference"]["low"] > 40
    assert "33.33 % of 30" in line


def test_what_the_pictures_tell_stands_beside_what_was_learned(tmp_path: Path) -> None:
    examples = [*rows(30), *(replace(row, id=f"o{row.id}", question=f"of {row.id}?") for row in rows(3))]
    read = {example.id: seen(example) for example in examples}
    read["1"] = "none"
    blue = {example.id: "blue" for example in examples}
    entry, lines = compare_with_baselines(
        score(examples, blue), examples, blue, score, right_answer_of=right_text, exchange=None, readable=read
    )
    part = entry["readable"]
    assert (part["n"], part["value"]) == (33, pytest.approx(100 * 32 / 33))
    assert part["questions"] == {
        "which colour?": {"n": 30, "readable": 29, "learned": 10},
        "other questions": {"n": 3, "readable": 3, "learned": 1},
    }
    assert "which colour?: readable 29, learned 10 of 30" in lines
    some = {name: read[name] for name in ("2", "3")}
    scored = score(examples, read)
    learned, told = compare_with_baselines(
        scored, examples, read, score, right_answer_of=right_text, exchange=None, readable=some
    )
    assert learned["readable"]["n"] == 2
    assert learned["readable"]["questions"]["other questions"] == {"n": 3, "learned": 3}
    assert any("other questions" in line and "unknown" in line and "3 of 3" in line for line in told)

    write_json(tmp_path / PROBE, {"questions_sha256": "of the file", "answers": some})
    assert readable_answers(tmp_path / "test.jsonl", "of the file") == some
    assert not readable_answers(tmp_path / "test.jsonl", "of another")
    assert not readable_answers(tmp_path / "nothing" / "test.jsonl", None)
    assert not readable_answers(None, None)


def test_the_base_s_answers_are_measured_on_both_models_without_what_closes_them(tmp_path: Path) -> None:
    base = write_tiny_language(tmp_path / "base")
    encoder = open_encoder(str(base), template="vicuna_v1", max_tokens=512)
    model = open_backbone(str(base), dtype=torch.float32).eval()
    assistant = Assistant(model, encoder)
    before = measure_abilities(assistant)
    with torch.no_grad():
        model.model.model.layers[0].self_attn.q_proj.weight.add_(0.3)
    after = measure_abilities(assistant, base=before)
    nats, tokens = 0.0, 0
    for question, answer in before.answers.items():
        prompt = encoder.encode_prompt([Turn("user", question)]).input_ids.tolist()
        ids = prompt + encoder.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        logits = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(prompt), len(ids))
        nats -= sum(float(logits[place - 1, ids[place]]) for place in places)
        tokens += len(places)
    assert after.answer_nats == pytest.approx(nats / tokens, rel=1e-4)
    assert before.answer_nats < nats / tokens

    entry = compare_abilities(before, after)
    assert entry["answers"]["nats"] == {"base": before.answer_nats, "adapted": after.answer_nats}
    assert entry["answers"]["n"] == len(PASSAGES["questions"])
    said = forgetting_lines(entry)
    assert f"{math.exp(after.nats) / math.exp(before.nats):.2f} times" in said["perplexity of other text"]
    assert f"{after.answer_nats:.2f} after" in said["answers to other questions"]
    assert forgetting_lines({"reason": "it takes no words"}) == {}
    assert forgetting_lines(None) == {}
