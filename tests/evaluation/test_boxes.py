"""Questions about places: what is compared, what a run's test says of it, and what is refused."""

import itertools
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from dora_vl.data.example import Answer, Example
from dora_vl.data.objects import Box, iou, matched, place_of
from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.scores.exact import SCORINGS
from dora_vl.training.train_command import train
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import write_run


def drawn(rng: random.Random, labels: str = "") -> Box:
    x, y = (sorted(rng.sample(range(100), 2)) for _ in range(2))
    return Box((x[0] / 100, y[0] / 100, x[1] / 100, y[1] / 100), rng.choice(labels) if labels else "")


def test_one_box_is_scored_by_its_overlap() -> None:
    """A thousand drawn answers against the areas counted in cells of a hundredth."""
    rng, examples, answers, expected = random.Random(0), list[Example](), dict[str, str](), list[float]()
    for number in range(1000):
        true, answer = drawn(rng), drawn(rng)
        examples.append(Example(id=str(number), question="?", answers=(Answer(text=place_of([true])),)))
        answers[str(number)] = place_of([answer]) if number % 7 else "nowhere"
        cells = [
            set(
                itertools.product(
                    *(range(round(100 * box.corners[a]), round(100 * box.corners[a + 2])) for a in (0, 1))
                )
            )
            for box in (true, answer)
        ]
        expected.append(len(cells[0] & cells[1]) / len(cells[0] | cells[1]) if number % 7 else 0.0)
    scored = SCORINGS["box"](examples, answers)
    assert scored.metrics["mean overlap"] == pytest.approx(100 * sum(expected) / 1000)


def test_several_boxes_are_matched_by_their_labels() -> None:
    """The best of all ways to match, tried one by one, where the largest overlap first is the best."""
    rng = random.Random(1)
    for _ in range(200):
        true, answer = ([drawn(rng, "ab") for _ in range(rng.randint(1, 3))] for _ in range(2))
        shares = matched(place_of(true), place_of(answer))
        assert len(shares) == max(len(true), len(answer))
        allowed = {(i, j): iou(a, b) for i, a in enumerate(true) for j, b in enumerate(answer) if a.label == b.label}
        assert max(shares) == pytest.approx(max(allowed.values(), default=0.0))
        best = max(
            sum(allowed.get(pair, 0.0) for pair in zip(range(len(true)), order, strict=False))
            for order in itertools.permutations([*range(len(answer)), *[-1] * len(true)], len(true))
        )
        assert best / 2 <= sum(shares) + 1e-9 <= best + 1e-6


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("[0.1, 0.1, 0.5, 0.5]", 0.0),  # numbers that no family's reader made a place of
        (place_of([Box((0.1, 0.1, 0.5, 0.5))]), 1.0),
        (place_of([Box((0.6, 0.6, 0.9, 0.9)), Box((0.1, 0.1, 0.5, 0.5))]), 0.5),
        ("", 0.0),
    ],
)
def test_hostile_answers(answer: str, share: float) -> None:
    true = place_of([Box((0.1, 0.1, 0.5, 0.5))])
    example = Example(id="x", question="?", answers=(Answer(text=true),))
    assert SCORINGS["box"]([example], {"x": answer}).metrics["mean overlap"] == pytest.approx(100 * share)


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxed")
    write_tiny("qwen2_5_vl", folder / "base")
    rng, rows = random.Random(2), list[dict[str, object]]()
    for number in range(8):
        Image.new("RGB", (90, 60), (30 * number, 9, 9)).save(folder / f"{number}.png")
        answer = place_of([drawn(rng, "ab")])
        turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_a_run_is_tested_on_places(boxed: Path) -> None:
    run = write_run(
        boxed / "run.yaml", boxed / "base", boxed / "rows.json",
        data={"image_folder": str(boxed)}, training={"max_steps": 2, "output_dir": str(boxed / "run")},
        evaluation={"file": str(boxed / "rows.json"), "max_new_tokens": 12, "forgetting": False},
    )  # fmt: skip
    train([f"--config={run}"], program="train", description="")
    metrics = json.loads((boxed / "run" / "metrics.json").read_text())
    assert "mean overlap" in json.dumps(metrics)
    predictions = read_predictions(boxed / "run" / "predictions.jsonl")["rows"]
    rows = json.loads((boxed / "rows.json").read_text())
    truths = [row["conversations"][1]["value"] for row in rows]
    assert [prediction.truth for prediction in predictions.values()] == truths


@pytest.mark.parametrize("answer", ["red", '<objects>[{"box_px": [1, 1, 9, 9]}]</objects>'])
def test_boxes_among_other_answers_and_pixels_are_refused(boxed: Path, answer: str) -> None:
    rows = json.loads((boxed / "rows.json").read_text())
    rows[3]["conversations"][1]["value"] = answer
    (boxed / "mixed.json").write_text(json.dumps(rows))
    run = write_run(
        boxed / "mixed.yaml", boxed / "base", boxed / "rows.json",
        data={"image_folder": str(boxed)}, training={"max_steps": 1, "output_dir": str(boxed / "mixed")},
        evaluation={"file": str(boxed / "mixed.json")},
    )  # fmt: skip
    with pytest.raises(UserError, match="those of '3'"):
        train([f"--config={run}"], program="train", description="")
