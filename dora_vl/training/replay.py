"""Short chats that a base writes itself, learned beside a run's data, so that the base keeps what it knows.

An instruct model is given the opening of a user's turn by its own chat template, writes a question, then answers it as
the run asks (Magpie, arXiv 2406.08464). A plain language model continues plain openings. No data set is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets.config
import torch
from tqdm import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.adapters.adapter import content_hash, local_folder
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.generation import NOT_YET_A_CHARACTER, end_tokens
from dora_vl.backbones.templates import shared_beginning
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample
from dora_vl.data.table import ExampleTable, load_rows
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, SettingError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.files import file_sha256, whole_file, write_json_lines
from dora_vl.run.folder import REPLAY, run_folder_of
from dora_vl.run.settings import ModelConfig, RunConfig

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of a file's name: raise it when other chats would be written."""
CHATS, BATCH, MOST_BATCHES = 128, 64, 16
QUESTION_TOKENS, ANSWER_TOKENS = 40, 72
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
COUNTED_ROWS = 1_000
"""So many rows of the data, at even distances, tell how many of its tokens are labelled."""
MARKS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, NOT_YET_A_CHARACTER)
OPENINGS = (
    *("The", "In", "It", "When", "A", "There are", "One of the", "At first", "Many people", "She", "He", "They", "We"),
    *("After the", "Before the", "Most", "During the", "If you", "As a", "The first", "On the", "For", "This", "To"),
    *("Every", "Some", "The city of", "The history of", "Water", "Children", "In winter", "Because", "According to"),
)
"""Beginnings of plain text, for a base without a chat template."""


@dataclass(frozen=True)
class Opening:
    """What stands before the text that a base writes of itself, and what closes it."""

    ids: list[int]
    closing: str = ""
    closing_id: int | None = None


def opening_of(encoder: Encoder) -> Opening:
    """Returns what opens and closes a user's turn: what prompts of two different questions share."""
    first, second = (encoder.encode_prompt([Turn("user", word)]).input_ids.tolist() for word in ("Apples", "zebra"))
    begin, end = shared_beginning(first, second), shared_beginning(first[::-1], second[::-1])
    behind, tokenizer = first[len(first) - end :], encoder.tokenizer
    special = [token for token in behind if token in tokenizer.added_tokens_decoder]
    words = tokenizer.decode(behind[: behind.index(special[0])] if special else behind).strip()
    return Opening(first[:begin], words.split("\n")[0].strip(), special[0] if special and not words else None)


def repeated_share(text: str) -> float:
    """Returns the share of a text's pieces of four words that stood in it before."""
    words = text.split()
    pieces = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


class ChatWriter:
    """A base that writes chats; what is empty, repeated or not to be encoded is left out.

    Args:
        model: says where the base's own chat template is.
    """

    def __init__(self, assistant: Assistant, model: ModelConfig) -> None:
        self._assistant, self._encoder = assistant, assistant.prompts.encoder
        self._tokenizer = self._encoder.tokenizer
        self._ends = end_tokens(assistant.backbone.model)
        self._openings = [Opening(self._tokenizer(text)["input_ids"]) for text in OPENINGS]
        self.asks = bool(self._tokenizer.chat_template or vars(self._encoder.processor).get("chat_template"))
        if self.asks:  # by the template that it was tuned with, its default system turn included
            own = open_encoder(model.base, template="tokenizer", max_tokens=512, revision=model.revision)
            self._openings = [opening_of(own)]
        self.tried = 0

    def write(self, count: int, seed: int = 0) -> Iterator[Example]:
        """Yields so many chats, or fewer where a base writes hardly any that can be used."""
        chance, seen, devices = random.Random(seed), set[str](), []
        if self._assistant.device.type == "cuda":
            devices = [self._assistant.device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for _ in range(MOST_BATCHES):
                for question, answer in self._batch(chance):
                    example = Example(f"replay-{len(seen)}", turns=(Turn("user", question), Turn("assistant", answer)))
                    if len(seen) < count and question + answer not in seen and self._can_be_learned(example):
                        seen.add(question + answer)
                        yield example
                if len(seen) == count or (not seen and self.tried >= 4 * BATCH):
                    return

    def _batch(self, chance: random.Random) -> list[tuple[str, str]]:
        openings = chance.choices(self._openings, k=BATCH)
        self.tried += BATCH
        prompts = [Sample(ids := torch.tensor(opening.ids), torch.full_like(ids, -100)) for opening in openings]
        if not self.asks:
            beginnings = [self._tokenizer.decode(opening.ids, skip_special_tokens=True) for opening in openings]
            texts = self._texts(prompts, ANSWER_TOKENS)
            return [(begin, whole(*text)) for begin, text in zip(beginnings, texts, strict=True)]
        texts = self._texts(prompts, QUESTION_TOKENS, self._openings[0])
        questions = [text for text, ended in texts if ended and len(text.split()) >= 3 and is_plain(text, repeated=0.1)]
        prompts = [Sample(**vars(self._encoder.encode_prompt([Turn("user", text)]))) for text in questions]
        texts = self._texts(prompts, ANSWER_TOKENS) if prompts else []
        return [(question, whole(*text)) for question, text in zip(questions, texts, strict=True)]

    def _texts(self, prompts: Sequence[Sample], tokens: int, opening: Opening | None = None) -> list[tuple[str, bool]]:
        """Returns what the base writes behind each prompt, and whether it came to its end."""
        batch = self._assistant.prompts.collate(prompts, "left")
        ends = {*self._ends, *([] if opening is None or opening.closing_id is None else [opening.closing_id])}
        options = {**SAMPLED, **({"eos_token_id": sorted(ends)} if ends else {})}
        rows = self._assistant.new_ids(batch, max_new_tokens=tokens, options=options).tolist()
        texts: list[tuple[str, bool]] = []
        for row in rows:
            end = next((place for place, token in enumerate(row) if token in ends or token < 0), None)
            text, ended = self._tokenizer.decode(row[:end], skip_special_tokens=True), end is not None
            if opening is None:
                text = self._encoder.prompts.answer_in(text)
            elif opening.closing:
                text, closing, _ = text.partition(opening.closing)
                ended = bool(closing)
            texts.append((text.strip(), ended))
        return texts

    def _can_be_learned(self, example: Example) -> bool:
        question, answer = (turn.text for turn in example.turns)
        if not answer or not is_plain(answer, repeated=0.2) or not is_plain(question, repeated=1.0):
            return False
        try:
            return not self._encoder.encode(example).cut_tokens
        except BadSample:
            return False


def file_of_chats(config: RunConfig, encoder: Encoder) -> Path:
    """Returns where a base's chats are kept for all its runs, written or not."""
    model, prompts = config.model, encoder.prompts
    base = content_hash(local_folder(model.base, model.revision))
    key = json.dumps([VERSION, base, prompts.name, prompts.thinking])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return Path(datasets.config.HF_DATASETS_CACHE) / "dora_vl" / f"replay-{digest}.jsonl"


def write_chats(path: Path, assistant: Assistant, model: ModelConfig, count: int = CHATS) -> None:
    """Has a base write its chats into a file."""
    started, writer, rows = time.monotonic(), ChatWriter(assistant, model), []
    for chat in tqdm(writer.write(count), desc=f"{model.base} writes chats", total=count, disable=None):
        asked, answered = (turn.text for turn in chat.turns)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        rows.append({"id": chat.id, "conversations": turns})
    if len(rows) < count // 8:
        raise SettingError(
            "data.replay", f": {model.base} wrote {len(rows)} chats that can be used in {writer.tried} tries; set it 0"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, rows)
    seconds = time.monotonic() - started
    logger.info("%d chats of %d that %s began kept in %s, %.0f s", len(rows), writer.tried, model.base, path, seconds)


def check_replay(config: RunConfig) -> None:
    """Refuses a share of chats where it makes no sense."""
    share, reason = config.data.replay, None
    if not 0 <= share < 1:
        reason = f" is {share}; it must be at least 0 and below 1"
    elif share and config.data.streaming:
        reason = (
            " is a share of samples that are counted, and data.streaming counts none; set one of them to 0 or false"
        )
    elif share and not config.objective.is_sft:
        names = ", ".join(config.objective.weights)
        reason = f" is for supervised tuning: {names} compares answers, and chats have one; set it 0"
    elif share and config.model.template == "plain":
        reason = " is of questions with answers, and model.template plain drops questions; set it 0"
    if reason is not None:
        raise SettingError("data.replay", reason)


def check_base_writes(config: RunConfig, encoder: Encoder) -> None:
    """Refuses a base that takes no words without a picture, and one that is sharded and has written nothing yet."""
    try:
        encoder.encode_prompt([Turn("user", "Hello.")])
    except BadSample as error:
        raise SettingError("data.replay", f" is of words alone: {error.reason}; set it 0") from None
    copied = run_folder_of(config.training) / REPLAY
    if is_deepspeed_zero3_enabled() and not (copied.is_file() or file_of_chats(config, encoder).is_file()):
        raise SettingError(
            "data.replay", " needs chats that a whole base writes, and ZeRO-3 shards it: run `dora-vl replay` before"
        )


def put_chats(config: RunConfig, assistant: Assistant, device: torch.device) -> None:
    """Puts a base's chats into a run's folder, unless a resumed run has them there; for one rank alone.

    A base that has none yet writes them on a device.
    """
    target = run_folder_of(config.training) / REPLAY
    if target.is_file():
        return
    path, before = file_of_chats(config, assistant.prompts.encoder), assistant.device
    if not path.is_file():
        assistant.backbone.to(device)
        write_chats(path, assistant, config.model)
        assistant.backbone.to(before)  # where the other ranks' are, or an adapter would begin otherwise
    with whole_file(target, binary=True) as file:
        file.write(path.read_bytes())


@dataclass(frozen=True)
class Replay:
    """The chats of a run.

    Attributes:
        drawn: how many of them an epoch takes.
    """

    path: Path
    chats: ExampleTable
    drawn: int

    @classmethod
    def of(cls, path: Path, train: ExampleTable, encoder: Encoder, share: float) -> Replay:
        """Draws as many chats as make this share of all labelled tokens."""
        chats = load_rows(str(path))
        own, written = (tokens_in_labels(table, encoder) for table in (train, chats))
        drawn = max(1, round(share / (1 - share) * own * len(train) / written))
        logger.info(
            "%s: an epoch draws %d of %d chats of the base, some %.0f %% of its labelled tokens",
            *(path, drawn, len(chats), 100 * share),
        )
        return cls(path, chats, drawn)

    def media(self) -> dict[str, str]:
        """Returns what the file holds, as that of a picture."""
        return {self.path.name: file_sha256(self.path)}


def tokens_in_labels(table: ExampleTable, encoder: Encoder) -> float:
    """Returns about how many tokens of a row are labelled, in the mean over rows at even distances."""
    counts = [
        sum(
            len(encoder.tokenizer("".join(answer), add_special_tokens=False)["input_ids"])
            for turn, answer in zip(
                (turn for turn in row.turns if turn.role == "assistant"), encoder.answers(row), strict=True
            )
            if turn.is_trained
        )
        for row in table.select(range(0, len(table), -(-len(table) // COUNTED_ROWS)))
        if isinstance(row, Example)
    ]
    return max(1.0, sum(counts) / max(1, len(counts)))


def is_plain(text: str, *, repeated: float) -> bool:
    """Tells whether a text repeats less than this share of itself, and holds no place of a picture."""
    return repeated_share(text) < repeated and not any(mark in text for mark in MARKS)


def whole(text: str, ended: bool) -> str:
    """Returns a text that came to its end, and another up to the end of its last whole sentence."""
    sentences = re.match(r".*[.!?](?=\s)", text, re.DOTALL)
    return text if ended else sentences[0] if sentences else ""
