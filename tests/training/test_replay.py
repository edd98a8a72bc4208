"""Chats that a base writes itself: what is kept of them, how many an epoch draws, and that a run resumes with them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_vl.backbones.encoder import open_encoder
from dora_vl.data.example import Example
from dora_vl.data.table import load_rows
from dora_vl.errors import SettingError
from dora_vl.run.folder import run_folder_of
from dora_vl.run.settings import ModelConfig
from dora_vl.training.extras import replay
from dora_vl.training.extras.replay import ChatWriter, tokens_in_labels
from tests.backbones.tiny_language import byte_tokenizer, write_tiny_language
from tests.training.launched import launch
from tests.training.tiny_run import MakeRun, check_resume, decoder_run, losses_of, refused_key, trained, write_chats

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
        encoder=encoder,
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
    writer, backbone = writer_of(
        chatml_base, "chatml", [questions, answers, [f"What colour is it?{END}"], [f"It is red.{END}"]]
    )
    chats = [tuple(turn.text for turn in chat.turns) for chat in _first(writer.write(100), backbone)]
    assert chats == [("What colour is it?", "It is red."), ("What colour is a chat?", "It is green.")]
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


@pytest.fixture
def with_chats(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeRun:
    """Settings of runs with replay, whose base has chats instead of writing them."""

    chats = write_chats(tmp_path / "chats.jsonl")
    monkeypatch.setattr(replay, "chats_path", lambda *_: chats)
    return make_run


def test_a_run_resumes_with_the_chats_that_it_had(with_chats: MakeRun, tmp_path: Path) -> None:
    training = {"use_cpu": True, "max_steps": 20, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 5}
    run_file = with_chats(training=training, data={"replay": 0.4})
    _, stopped = check_resume(run_file, step=7)
    (tmp_path / "chats.jsonl").write_text("")  # the run has its own
    trained(run_file, f"--resume={stopped / 'checkpoint-7'}", name="stopped")
    (stopped / "replay.jsonl").write_text((stopped / "replay.jsonl").read_text().replace("blue", "red"))
    with pytest.raises(SettingError) as error:
        trained(run_file, "--resume=last", name="stopped")
    assert error.value.key == "resume"


@pytest.mark.parametrize("packing", ["trees", "plain"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("answer", ["Neither of the two is blue, so far as I can see.", "."])
def test_chats_are_a_share_of_samples_or_tokens_and_others_in_each_epoch(
    with_chats: MakeRun, tmp_path: Path, packing: str, grouped: bool, answer: str
) -> None:
    """The chats' answers are longer than those of the data, or shorter."""
    share, written = 0.2, 40
    turns = [[f"Say {number}.", answer] for number in range(written)]
    rows = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": text}] for prompt, text in turns]
    lines = [json.dumps({"id": f"replay-{number}", "conversations": row}) for number, row in enumerate(rows)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    settings = {"replay": share, "packing": packing, "group_by_modality_length": grouped}
    pipeline = decoder_run(with_chats(training={"use_cpu": True}, data=settings))
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    backbone = pipeline.load()
    run_folder_of(pipeline.config.training).mkdir(parents=True)
    pipeline.write_replay(backbone, arguments)
    data = pipeline.data(backbone, arguments)
    own, drawn = 48, []
    tokens: list[int] = []
    for epoch in range(3):
        for set_epoch in data.set_epoch:
            set_epoch(epoch)
        assert data.sampler is not None
        order = list(data.sampler)
        assert len(order) == data.samples
        assert sorted(index for index in order if index < own) == list(range(own))
        chats = [index for index in order if index >= own]
        counts = [chats.count(chat) for chat in range(own, own + written)]
        assert max(counts) - min(counts) <= 1  # none again before all were drawn
        drawn.append(tuple(chats))
        labelled = {index: int((data.train[index].labels != -100).sum()) for index in order}
        tokens += [sum(labelled[index] for index in chats), sum(labelled[index] for index in order)]
    assert len({*drawn}) > 1
    of_samples, of_tokens = len(chats) / len(order), sum(tokens[::2]) / sum(tokens[1::2])
    decides, other = (of_samples, of_tokens) if len(answer) > 1 else (of_tokens, of_samples)
    assert decides == pytest.approx(share, abs=0.02)
    assert other > share + 0.04


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["--training.deepspeed=zero3", "--training.fsdp=true"])
def test_sharded_ranks_learn_chats_as_one_rank_does(make_run: MakeRun, tmp_path: Path, sharding: str) -> None:
    training = {"max_steps": 8, "per_device_train_batch_size": 2}
    settings = {"replay": 0.1, "group_by_modality_length": False}
    optim = {"loss_normalisation": "step_tokens"}  # ranks and micro-batches hold unequally many labels
    run_file = make_run(data=settings, training={**training, "learning_rate": 2e-2}, optim=optim)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_chats(folder / "replay.jsonl")
    launch(
        run_file,
        f"--training.output_dir={folders[0]}",
        "--training.gradient_accumulation_steps=2",
        ranks=1,
        launcher="",
    )
    launch(run_file, f"--training.output_dir={folders[1]}", sharding, ranks=2)
    losses = losses_of(folders[0])
    assert losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(losses_of(folders[1]), losses, atol=1e-3, rtol=0)


def test_labelled_tokens_are_counted_as_they_are_trained(chatml_base: Path, tmp_path: Path) -> None:
    """What is cut does not count, and a row that cannot be rendered is left to training."""
    encoder = open_encoder(str(chatml_base), template="chatml", max_tokens=40)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    def tokens_of(*rows: tuple[str, list[Any]]) -> float:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        turns = [[{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}] for text, _ in rows]
        path.write_text(
            json.dumps([{"messages": each, "tools": used} for each, (_, used) in zip(turns, rows, strict=True)])
        )
        return tokens_in_labels(load_rows(str(path)), encoder)

    short, long, unrendered = ("abcdefgh", []), ("long " * 100, []), ("abcdefgh", tools)
    assert 8 < tokens_of(short) < 20
    assert tokens_of(short, long) == (tokens_of(short) + 40) / 2
    assert tokens_of(short, unrendered) == tokens_of(short)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"replay": 1.0}},
        {"data": {"replay": 0.1, "streaming": True, "group_by_modality_length": False}},
        {"data": {"replay": 0.1}, "objective": {"loss": "dpo"}},
        {"data": {"replay": 0.1}, "model": {"template": "plain"}},
    ],
)
def test_what_makes_no_sense_is_refused(make_run: MakeRun, settings: Any) -> None:
    assert refused_key(make_run(training={"use_cpu": True}, **settings)) == "data.replay"


def test_a_base_that_writes_nothing_usable_ends_the_run(chatml_base: Path, tmp_path: Path) -> None:
    writer, _ = writer_of(chatml_base, "chatml", [[f"Say.{END}"] * 64] * 20)
    with pytest.raises(SettingError) as error:
        replay.write_chats(tmp_path / "chats.jsonl", writer._assistant, ModelConfig(base=str(chatml_base)))
    assert error.value.key == "data.replay"
    assert not (tmp_path / "chats.jsonl").exists()
