"""Every family through the scripts: three steps, resumed after the second, merged, opened again and asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.backbones.base import attention_of
from dora_vl.backbones.model import open_backbone
from dora_vl.data.turns import Turn
from dora_vl.evaluation.predictor import Shown
from dora_vl.serving.engine import Engine
from tasks import image_qa, llava_instruct
from tests.backbones.image_text_conversations import TWO_QUESTIONS, encoder_of, talks_of
from tests.backbones.tiny_families.table import FAMILIES, param
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.serving.tiny_served import alone, answer_alone, answers, served
from tests.training.tiny_run import logged_losses, merged, write_run

TRAINING = {
    "use_cpu": True,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 0,
}


def write_talks(folder: Path, *, pictures: tuple[int, ...], rounds: int) -> Path:
    """Six conversations, of so many pictures in turn."""
    folder.mkdir()
    records = []
    for index in range(6):
        shown = pictures[index % len(pictures)]
        names = [f"{index}-{number}.png" for number in range(shown)]
        for number, name in enumerate(names):
            Image.new("RGB", (30 + 4 * number, 22 + index), (200, 30 * number, 40)).save(folder / name)
        turns = [("human", "<image>\n" * shown + "Say the colour."), ("gpt", "It is red.")]
        turns += [("human", "Sure?"), ("gpt", "Yes")] if rounds > 1 and index % 2 else []
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(index), **({"image": names} if names else {}), "conversations": conversation})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def started(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", *options])
    llava_instruct.main()


def trained(
    base: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    template: str | None,
    pictures: tuple[int, ...],
    rounds: int,
    projector: bool,
) -> Path:
    """The adapter of three steps; the third was taken twice, by the run and by one that resumed it."""
    records = write_talks(folder / "data", pictures=pictures, rounds=rounds)
    path = write_run(
        folder / "run.yaml",
        base,
        records,
        training=TRAINING,
        model={"template": template} if template else {},
        data={"max_tokens": 1024},
        optim={"projector_learning_rate": 1e-3 if projector else None},
    )
    adapter = folder / "run" / "adapter"
    started(monkeypatch, "--config", str(path))
    whole = logged_losses(folder / "run"), read_weights(adapter)
    shutil.rmtree(adapter)
    started(monkeypatch, "--config", str(path), "--resume", str(folder / "run" / "checkpoint-2"))
    resumed = logged_losses(folder / "run"), read_weights(adapter)
    assert len(whole[0]) == 3
    assert resumed[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=1e-6)
    return adapter


def check_adapter(base: Path, adapter: Path, prompt: dict[str, Any], to: Path, *, merges: bool = True) -> None:
    """The adapted model, opened again, differs from the base and is what merging gives; it answers."""
    plain, adapted = open_backbone(str(base)), open_backbone(str(base))
    inputs = {**prompt, "keep_logits": True}
    load_adapter(adapted.model, adapter)
    with torch.no_grad():
        before, ours = plain.eval()(**inputs).logits, adapted.eval()(**inputs).logits
        if merges:
            theirs = open_backbone(str(merged(adapter, to))).eval()(**inputs).logits
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        else:
            with pytest.raises(SystemExit):
                merged(adapter, to)
    assert (ours - before).abs().max() > 1e-3
    answer = adapted.generate(**prompt, max_new_tokens=3)
    assert 1 <= answer.shape[1] <= 3


QUICK = ("qwen3_vl", "qwen3_5_moe", "mllama")
"""Pictures by their positions, experts, and pictures beside the text's attention."""


@pytest.mark.parametrize("family", [param(name, is_slow=name not in QUICK) for name in FAMILIES])
def test_a_family_trains_resumes_opens_merges_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    base = write_tiny(family, tmp_path / family)
    row, taken = FAMILIES[family], talks_of(family)
    pictures = (0, 1, 2) if "no picture" in taken else (1, 2)
    rounds = 2 if TWO_QUESTIONS in taken else 1
    adapter = trained(
        base, tmp_path, monkeypatch, template=row.format, pictures=pictures, rounds=rounds, projector=row.projector
    )
    encoder = encoder_of(base)
    picture = Image.new("RGB", (33, 21), (10, 200, 30))
    prompt = encoder.encode_prompt([Turn("user", "<image>\nSay the colour.")], [picture])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.inputs}
    check_adapter(base, adapter, inputs, tmp_path / "merged", merges=row.merges)
    picture.save(tmp_path / "asked.png")
    options = ["--image", str(tmp_path / "asked.png"), "--question", "Say the colour.", "--max-new-tokens", "3"]
    capsys.readouterr()
    image_qa.main(["--adapter", str(adapter), *options])
    assert "Say the colour." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        ("hy_v4_vl", {"": "eager", "text_config": "eager", "vision_config": "sdpa"}),
        pytest.param("gemma2", "eager", marks=pytest.mark.slow),
    ],
)
def test_where_sdpa_cannot_be_it_trains_answers_and_is_served_without_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_type: str, attention: Any
) -> None:
    sees = model_type in FAMILIES
    base = (write_tiny if sees else write_tiny_language)(model_type, tmp_path / model_type)
    records = write_talks(tmp_path / "data", pictures=(1,) if sees else (0,), rounds=1)
    path = write_run(
        tmp_path / "run.yaml",
        base,
        records,
        training={**TRAINING, "save_strategy": "no"},
        optim={"projector_learning_rate": None},
    )
    started(monkeypatch, "--config", str(path))
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "recipe.json").read_text())["attn_implementation"] == attention
    turns = [Turn("user", "<image>\nSay the colour." if sees else "Say the colour.")]
    shown = Shown(pictures=(Image.open(tmp_path / "data" / "0-0.png").convert("RGB"),)) if sees else Shown()
    opened = [alone(base, adapter), alone(base, None)]
    assert [attention_of(assistant.backbone.model) for assistant in opened] == [attention, attention]
    expected = answer_alone(opened[0], turns, shown, tokens=8)
    named = ["--image", str(tmp_path / "data" / "0-0.png")] if sees else []
    capsys.readouterr()
    image_qa.main(["--adapter", str(adapter), *named, "--question", "Say the colour.", "--max-new-tokens", str(8)])
    assert expected in capsys.readouterr().out
    with Engine(served(base, {"mine": adapter})) as engine:
        assert answers(engine, [("mine", turns, shown)]) == [expected]


@pytest.mark.parametrize(
    "model_type", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "lfm2"))]
)
def test_a_language_model_trains_resumes_opens_merges_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    base = write_tiny_language(model_type, tmp_path / model_type)
    adapter = trained(base, tmp_path, monkeypatch, template=None, pictures=(0,), rounds=2, projector=False)
    prompt = encoder_of(base).encode_prompt([Turn("user", "Say the colour.")], [])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.inputs}
    check_adapter(base, adapter, inputs, tmp_path / "merged")
