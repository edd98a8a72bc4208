"""Short chats that a base writes itself, learned beside a run's data, so that the base keeps what it knows.

An instruct model is given the opening of a user's turn by its own chat template, writes a question, then answers it as
the run asks (Magpie, arXiv 2406.08464). A plain language model continues plain openings. No data set is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets.config
import torch
from tqdm import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.adapters.adapter import content_hash, local_folder
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.formats import shared_beginning
from dora_vl.backbones.generation import NOT_YET_A_CHARACTER, decoded, end_tokens
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.table import ExampleTable, load_rows
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, SettingError, UserError
from dora_vl.evaluation.assistant import Assistant, prompt_batch
from dora_vl.files import file_sha256, whole_file, write_json_lines
from dora_vl.run.folder import REPLAY, run_folder_of
from dora_vl.run.launch import on_first_rank
from dora_vl.run.settings import ModelConfig, RunConfig

logger = logging.getLogger(__name__)

VERSION = 1
"""This is part of a file's name: raise it when other chats would be written."""
CHATS, BATCH, MOST_BATCHES = 128, 64, 16
QUESTION_TOKENS, ANSWER_TOKENS = 40, 72
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
COUNTED_ROWS = 1_000
"""The data's share of labelled tokens is estimated from this many rows, evenly spread."""
MARKS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, NOT_YET_A_CHARACTER)
OPENINGS = (
    *("The", "In", "It", "When", "A", "There are", "One of the", "At first", "Many people", "She", "He", "They", "We"),
    *("After the", "Before the", "Most", "During the", "If you", "As a", "The first", "On the", "For", "This", "To"),
    *("Every", "Some", "The city of", "The history of", "Water", "Children", "In winter", "Because", "According to"),
)
"""A base without a chat template continues these beginnings of plain text."""


def user_turn_opening(encoder: Encoder) -> tuple[list[int], int | None]:
    """Returns the ids that open a user's turn and the special token that closes it: what two prompts share."""
    first, second = (encoder.encode_prompt([Turn("user", word)]).input_ids.tolist() for word in ("Apples", "zebra"))
    after = first[len(first) - shared_beginning(first[::-1], second[::-1]) :]
    special = encoder.tokenizer.added_tokens_decoder
    return first[: shared_beginning(first, second)], next((token for token in after if token in special), None)


class ChatWriter:
    """Has the base write chats by its template; leaves out those that are empty, repetitive or not encodable."""

    def __init__(self, assistant: Assistant, model: ModelConfig) -> None:
        self._assistant, self._encoder = assistant, assistant.encoder
        self._ends = end_tokens(assistant.backbone.model)
        self._opening, self._closing = list[int](), None
        with suppress(UserError):  # no chat template, or none that fits: plain openings
            # By the template that it was tuned with, its default system turn included.
            own = open_encoder(model.base, template="tokenizer", max_tokens=512, revision=model.revision)
            self._opening, self._closing = user_turn_opening(own)
        self.tried = 0

    def write(self, count: int, seed: int = 0) -> Iterator[Example]:
        """Yields `count` chats, or fewer if the base writes hardly any that can be used."""
        device, seen = self._assistant.device, set[str]()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            while len(seen) < count and self.tried < (MOST_BATCHES if seen else 4) * BATCH:
                for question, answer in self._batch():
                    example = Example(f"replay-{len(seen)}", turns=(Turn("user", question), Turn("assistant", answer)))
                    if len(seen) < count and question + answer not in seen and self._can_be_learned(example):
                        seen.add(question + answer)
                        yield example
                self.tried += BATCH

    def _batch(self) -> list[tuple[str, str]]:
        """Returns questions with answers; of a base that closes no question, plain openings with what follows."""
        if self._closing is None:
            questions = [OPENINGS[(self.tried + number) % len(OPENINGS)] for number in range(BATCH)]
            ids = [self._encoder.tokenizer(text)["input_ids"] for text in questions]
        else:
            texts = self._texts([self._opening] * BATCH, QUESTION_TOKENS, {*self._ends, self._closing})
            questions = [text for text, ended in texts if ended and len(text.split()) > 2 and is_clean(text, 0.1)]
            prompts = {text: ids for text in questions if (ids := self._prompt(text)) is not None}
            questions, ids = [*prompts], [*prompts.values()]
        texts = self._texts(ids, ANSWER_TOKENS, self._ends) if ids else []
        answers = [complete_sentences(self._encoder.prompts.answer_in(text), ended=ended) for text, ended in texts]
        return list(zip(questions, answers, strict=True))

    def _prompt(self, question: str) -> list[int] | None:
        with suppress(BadSample):
            return self._encoder.encode_prompt([Turn("user", question)]).input_ids.tolist()

    def _texts(self, prompts: Sequence[list[int]], tokens: int, ends: Collection[int]) -> list[tuple[str, bool]]:
        """Returns what the base writes after each prompt, and whether it came to its end."""
        samples = [Sample(ids := torch.tensor(prompt), torch.full_like(ids, IGNORED_LABEL)) for prompt in prompts]
        options = {**SAMPLED, **({"eos_token_id": sorted(ends)} if ends else {})}
        batch = prompt_batch(self._encoder, samples)
        texts: list[tuple[str, bool]] = []
        for row in self._assistant.new_ids(batch, max_new_tokens=tokens, options=options).tolist():
            end = next((index for index, token in enumerate(row) if token in ends or token < 0), None)
            texts.append((decoded(self._encoder.tokenizer, row[:end]).strip(), end is not None))
        return texts

    def _can_be_learned(self, example: Example) -> bool:
        answer = example.turns[-1].text
        with suppress(BadSample):
            return bool(answer) and is_clean(answer, 0.2) and not self._encoder.encode(example).cut_tokens
        return False


def chats_path(config: RunConfig, encoder: Encoder) -> Path:
    """Returns where a base's chats are kept for all its runs, written or not."""
    model, prompts = config.model, encoder.prompts
    base = content_hash(local_folder(model.base, model.revision))
    key = json.dumps([VERSION, base, prompts.name, prompts.thinking])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return Path(datasets.config.HF_DATASETS_CACHE) / "dora_vl" / f"replay-{digest}.jsonl"


def write_chats(path: Path, assistant: Assistant, model: ModelConfig, count: int = CHATS) -> None:
    """Has a base write its chats into a file."""
    started, writer, chats = time.monotonic(), ChatWriter(assistant, model), []
    for chat in tqdm(writer.write(count), desc=f"{model.base} writes chats", total=count, disable=None):
        question, answer = (turn.text for turn in chat.turns)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        chats.append({"id": chat.id, "conversations": turns})
    if len(chats) < count // 8:
        raise SettingError(
            "data.replay", f": {model.base} wrote {len(chats)} chats that can be used in {writer.tried} tries; set it 0"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, chats)
    seconds = time.monotonic() - started
    logger.info("%d chats of %d that %s began kept in %s, %.0f s", len(chats), writer.tried, model.base, path, seconds)


def check_replay(config: RunConfig) -> None:
    """Refuses a share of chats that the run cannot use."""
    share, reason = config.data.replay, None
    if not 0 <= share < 1:
        reason = f" is {share}; it must be at least 0 and below 1"
    elif share and config.data.streaming:
        reason = (
            " is a share of samples that are counted, and data.streaming counts none; set one of them to 0 or false"
        )
    elif share and config.objective.kind != "supervised":
        names = ", ".join(config.objective.weights)
        reason = f" is for supervised tuning: {names} compares answers, and chats have one; set it 0"
    elif share and config.model.template == "plain":
        reason = " is of questions with answers, and model.template plain drops questions; set it 0"
    if reason is not None:
        raise SettingError("data.replay", reason)


def check_base_writes(config: RunConfig, encoder: Encoder) -> None:
    """Refuses a base that takes no text without a picture, and one that is sharded and has written nothing yet."""
    try:
        encoder.encode_prompt([Turn("user", "Hello.")])
    except BadSample as error:
        raise SettingError("data.replay", f" trains on text only: {error.reason}; set it 0") from None
    copied = run_folder_of(config.training) / REPLAY
    if is_deepspeed_zero3_enabled() and not (copied.is_file() or chats_path(config, encoder).is_file()):
        raise SettingError(
            "data.replay", " needs chats that a whole base writes, and ZeRO-3 shards it: run `dora-vl replay` before"
        )


def find_or_write_chats(config: RunConfig, assistant: Assistant, device: torch.device) -> Path:
    """Returns the file of a base's chats; one that has none yet writes them on a device."""
    path, before = chats_path(config, assistant.encoder), assistant.device
    if not path.is_file():
        assistant.backbone.to(device)
        write_chats(path, assistant, config.model)
        assistant.backbone.to(before)  # where the other ranks' are, or an adapter would begin differently
    return path


def copy_chats(config: RunConfig, assistant: Assistant, device: torch.device) -> None:
    """Puts a base's chats into a run's folder, unless a resumed run has them there; every rank must call it."""
    target = run_folder_of(config.training) / REPLAY

    def copy() -> None:
        if not target.is_file():
            content = find_or_write_chats(config, assistant, device).read_bytes()
            with whole_file(target, binary=True) as file:
                file.write(content)

    on_first_rank(copy)


@dataclass(frozen=True)
class Replay:
    """The chats of a run, of which an epoch takes `drawn`; they are numbered from `first_index`, after the data."""

    path: Path
    chats: ExampleTable
    drawn: int
    first_index: int

    @classmethod
    def of(cls, path: Path, train: ExampleTable, encoder: Encoder, share: float) -> Replay:
        """Draws as many chats as make this share of the samples, or of all labelled tokens where that is more."""
        chats = load_rows(str(path))
        own, written = (tokens_in_labels(table, encoder) for table in (train, chats))
        # Answers of a word or two would draw a chat an epoch by tokens alone.
        drawn = chats_in_epoch(share, len(train) * max(1.0, own / written))
        tokens = drawn * written / (drawn * written + len(train) * own)
        logger.info(
            "%s: an epoch draws %d times of %d chats of the base, %.0f %% of its samples and some %.0f %% of the "
            "tokens that are learned",
            *(path, drawn, len(chats), 100 * drawn / (drawn + len(train)), 100 * tokens),
        )
        return cls(path, chats, drawn, len(train))

    def media(self) -> dict[str, str]:
        """Returns the file's hash, as for a picture."""
        return {self.path.name: file_sha256(self.path)}


def chats_in_epoch(share: float, samples: float) -> int:
    """Returns how many chats are this share of an epoch that holds these samples too; one at least of any share."""
    return max(1, round(share / (1 - share) * samples)) if share else 0


def tokens_in_labels(table: ExampleTable, encoder: Encoder) -> float:
    """Returns about how many tokens of an example are labelled, by some at even distances that can be rendered."""
    examples = [
        row for row in table.select(range(0, len(table), -(-len(table) // COUNTED_ROWS))) if isinstance(row, Example)
    ]
    counts: list[int] = []
    for example in examples:
        turns = [turn for turn in example.turns if turn.role == "assistant"]
        with suppress(ValueError):
            texts = [
                "".join(each) for turn, each in zip(turns, encoder.answers(example), strict=True) if turn.is_trained
            ]
            tokens = sum(len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
            counts.append(min(tokens, encoder.max_tokens))
    return max(1.0, sum(counts) / max(1, len(counts)))


def is_clean(text: str, repeated: float) -> bool:
    """Tells whether less than this share of a text's runs of four words come again, and it holds no placeholder."""
    words = text.split()
    runs = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    again = 1 - len(set(runs)) / len(runs) if runs else 0.0
    return again < repeated and not any(mark in text for mark in MARKS)


def complete_sentences(text: str, *, ended: bool) -> str:
    """Returns a text that came to its end whole, any other up to the end of its last whole sentence."""
    sentences = re.match(r".*[.!?](?=\s)", text, re.DOTALL)
    if ended:
        return text
    return sentences[0] if sentences else ""
