"""The one way to ask a model: questions, what they show, and a table of predictions that goes on after a stop."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from math import isnan
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.base import Features, max_positions
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.generation import NO_NUMBERS, NO_TOKEN, NOT_YET_A_CHARACTER, NoNumbers, growing_text
from dora_vl.backbones.model import check_packing
from dora_vl.backbones.video_inputs import Video
from dora_vl.data.batches import Collator
from dora_vl.data.columns import RowKind
from dora_vl.data.example import Clip, Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, any_is_there, open_image
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample, Skipped
from dora_vl.data.turns import Turn
from dora_vl.data.video import Sampling, Uniform
from dora_vl.errors import BadSample, UserError, one_line, shown, shown_names, shown_text
from dora_vl.evaluation.predictions import (
    PREDICTIONS,
    Prediction,
    Predictions,
    PredictionsFile,
    cut_broken_tail,
    read_predictions,
    same_settings,
    settings_file,
    write_in_order,
)
from dora_vl.evaluation.questions import Question, endings_of, outputs_of
from dora_vl.run.base import VideoReading
from dora_vl.run.launch import (
    leave_process_group,
    on_first_rank,
    rank_and_ranks,
    threads_of_this_rank,
    wait_for_everyone,
)
from dora_vl.run.watched import SIDE, tiled

log = logging.getLogger(__name__)

WARNED_FAILURES = 20  # more are counted, and named in metrics.json
Write = Callable[[str], object]
By = Literal["generation", "letters", "outputs", "cloze"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one prompt shows, RGB, in the order of the prompt's `<image>` and `<video>`."""

    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """Every video's frames."""
        return tuple(frame for video in self.videos for frame in video.pictures)


def model_inputs(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """What the model itself takes of a batch, on its device."""
    added = {"labels", *BOOKKEEPING}  # by a collator
    kept = {name: value for name, value in batch.items() if name not in added}
    return dict(send_to_device(kept, device))


@dataclass(frozen=True)
class EncoderPrompts:
    """A decoder's encoder as asking needs it; holds no model, and may be sent to data workers."""

    encoder: Encoder

    @property
    def frames_are_pictures(self) -> bool:
        """Whether the model takes no videos, and is asked about their frames as so many pictures."""
        return self.encoder.why_no_videos is not None

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """Turns that end with a question, up to where the answer begins, without labels; never cut."""
        inputs = self.encoder.encode_prompt(turns, seen.pictures, seen.videos)
        ids = inputs.pop("input_ids")[0]
        return Sample(ids, torch.full_like(ids, IGNORED_LABEL), inputs=inputs)

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """The same with an answer behind it, which is labelled, with what closes it; never cut."""
        return Sample(**vars(self.encoder.encode_choice(turns, answer, seen.pictures, seen.videos)))

    def continued(self, context: str, ending: str) -> Sample:
        """A context and, behind a space, its ending, which alone is labelled; tokenised as lm-eval does."""
        before = context.rstrip()
        ids, shared = (self.encoder.tokenizer(text)["input_ids"] for text in (f"{context} {ending}", before))
        labels = [*[IGNORED_LABEL] * len(shared), *ids[len(shared) :]]
        return Sample(torch.tensor(ids), torch.tensor(labels))

    def collate(
        self, samples: Sequence[Sample], side: Literal["left", "right"], rows: RowKind = "plain"
    ) -> Mapping[str, Any]:
        """One batch, padded on this side: the model's inputs and `labels`; trees are questions with their answers."""
        return Collator(self.encoder.pad_token_id, pad_side=side, rows=rows, shares=lambda sample: sample.id)(samples)

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """`decode` for the ids of one answer as they grow."""
        return growing_text(self.encoder.tokenizer, self.encoder.prompts.answer_in)


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads what questions show; `stored` are pictures that a data file holds. It may be sent to data workers."""

    folder: Path | MediaFolder
    videos: VideoReading
    stored: HeldPictures | None = None

    def read(self, question: Question) -> Shown:
        """Everything that a question shows."""
        videos = tuple(self.videos.read(question.videos))
        pictures = tuple(open_image(self.folder, path, self.stored) for path in question.images)
        return Shown(pictures=pictures, videos=videos)

    def frames(self, clip: Clip, sampling: Sampling) -> Video:
        """The frames of a clip, picked in another way than `videos` says."""
        return self.videos.reader.read(self.videos.folder, clip, sampling)

    def picture(self, question: Question) -> Image.Image:
        """One picture of all that a question shows, up to four of its pictures or frames, for people to look at."""
        pictures = [open_image(self.folder, path, self.stored) for path in question.images[: SIDE**2]]
        frames = [frame for clip in question.videos[:1] for frame in self.frames(clip, Uniform(SIDE**2)).pictures]
        if not pictures and not frames:
            raise BadSample(question.id, "it shows nothing")
        return tiled(pictures or frames)

    def close(self) -> None:
        """Ends the decoder's process."""
        self.videos.reader.close()


def media_reader(folder: Path | MediaFolder, *, frames: int, one_length: bool = False) -> MediaReader:
    """Reads pictures and so many frames of a video below one folder."""
    videos = VideoReading(folder=folder, sampling=Uniform(frames), frames=frames if one_length else None)
    return MediaReader(folder=folder, videos=videos)


def check_pictures(images: Iterable[str], folder: Path, *, of: str = "", setting: str) -> None:
    """Refuses a picture folder that is none, or holds not one of the pictures; before any model is loaded."""
    if not folder.is_dir():
        raise UserError(f"picture folder {folder} does not exist; set {setting}")
    names = list(dict.fromkeys(images))
    if names and not any_is_there(names, folder):
        raise UserError(
            f"{f'{of}: ' if of else ''}not one of {len(names)} pictures is in {folder}, first {shown(names[0])}; set "
            f"{setting} to the folder that their paths start from"
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How questions are answered.

    Attributes:
        workers: processes that read pictures ahead; 0 reads them in this one.
        by: what the model says, or of the question's choices the likeliest letter, or of the outputs that its last
            line admits the likeliest one; cloze: the log-likelihood of every ending, as numbers.
        task: of a VL-BART, the trained task by name; "" tells it by the question's form.
        letters: a VL-BART's choice is given as its letter, not as its label.
    """

    batch_size: int = 32
    max_new_tokens: int = 64
    workers: int = 0
    by: By = "generation"
    task: str = ""
    letters: bool = False


@dataclass(frozen=True, kw_only=True)
class View:
    """A question about a video as a model is asked it, and what it looks at: as pictures where it takes no videos."""

    example: Example
    clip: Clip
    sampling: Sampling
    as_pictures: bool = False


@runtime_checkable
class Asker(Protocol):
    """A model, ready to be asked."""

    def answer(self, question: Question, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None) -> str:
        """The answer to one question about these pictures or videos; `write` receives it piece by piece."""
        ...

    def predict(
        self, questions: Sequence[Question], media: MediaReader, decoding: Decoding
    ) -> Iterator[list[Prediction]]:
        """Every question's prediction, batch by batch, in an order of the model's own; none is left out."""
        ...

    def logits(
        self, question: Question, answer: str, media: MediaReader, decoding: Decoding
    ) -> Float[Tensor, "tokens vocab"]:
        """At the places that predict an answer's tokens; none where the answer cannot stand there."""
        ...

    def view(self, example: Example, *, frames: int) -> View:
        """What this model looks at of an example's video; `frames` of it where nothing else was trained."""
        ...


def ask(
    model: Asker,
    questions: Sequence[Question],
    media: MediaReader,
    decoding: Decoding,
    *,
    path: Path | None = None,
    settings: Mapping[str, object] | None = None,
) -> Predictions:
    """Answers every question that the file has no prediction for, and appends the answers to it, batch by batch.

    What could not be asked gets no line in the file, so that the next run asks it again.

    Args:
        settings: what the answers depend on; earlier ones with other settings are not taken, without any none is.

    Raises:
        UserError: the model's scores were no numbers for some questions; the others are answered first, unless
            `batch_size` in a row cannot be.
    """
    started = time.monotonic()
    failed: dict[str, str] = {}
    without_numbers: list[str] = []
    in_a_row = 0
    with PredictionsFile(path, settings) as file:
        todo = [question for question in questions if question.id not in file.done]
        before = len(questions) - len(todo)
        if before:
            log.info("%d of %d questions were answered by an earlier run", before, len(questions))
        with tqdm(total=len(todo), desc="answering", unit="question", disable=not todo) as progress:
            for rows in model.predict(todo, media, decoding):
                for row in rows:
                    if not row.error:
                        file.add(row)
                        in_a_row = 0
                    elif row.error == NO_NUMBERS:
                        without_numbers.append(row.id)
                        in_a_row += 1
                    else:
                        failed[row.id] = row.error
                        if len(failed) <= WARNED_FAILURES:
                            log.warning("question %s could not be asked: %s", shown_text(row.id), one_line(row.error))
                file.flush()
                progress.update(len(rows))
                if in_a_row >= min(decoding.batch_size, len(todo)):
                    break
        rows = [file.done[question.id] for question in questions if question.id in file.done]
    if without_numbers:
        raise UserError(f"question {shown_names(without_numbers)}: {NO_NUMBERS}")
    if cut := [row for row in rows if row.cut_tokens]:
        log.warning(
            "%d texts were cut, such as that of %s by %d tokens", len(cut), shown_text(cut[0].id), cut[0].cut_tokens
        )
    return Predictions(rows=rows, failed=failed, answered_before=before, seconds=time.monotonic() - started)


def prediction(question: Question, answer: str | None, error: str = "", *, cut_tokens: int = 0) -> Prediction:
    """A question with its answer, or why it has none."""
    return Prediction(
        id=question.id,
        images=list(question.images),
        question=question.text,
        truth=question.truth,
        prediction="" if answer is None else answer.strip(),
        kind=question.kind,
        error=error or (NO_NUMBERS if answer is None else ""),
        cut_tokens=cut_tokens,
    )


# By all processes of a launch, each a share.


PART = "predictions.part-{}.jsonl"
LONGEST_SHARE = timedelta(days=2)  # how long a process that is done waits for the others


@contextlib.contextmanager
def joined_launch() -> Iterator[None]:
    """Joins the other processes of a `torchrun` or `deepspeed` launch, each with its GPU; alone it does little."""
    threads = threads_of_this_rank()
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo", timeout=LONGEST_SHARE)  # text alone is exchanged
    try:
        yield
    finally:
        leave_process_group()


def ask_together(
    model: Asker,
    questions: Sequence[Question],
    media: MediaReader,
    decoding: Decoding,
    *,
    folder: Path,
    settings: Mapping[str, object],
) -> Predictions:
    """Answers every question; every process of a launch calls it and gets all answers.

    Each writes a part beside `predictions.jsonl`; the first joins them, also those of a run that was stopped.
    """
    file, order = folder / PREDICTIONS, [question.id for question in questions]
    join_parts = partial(_join_parts, folder, settings, order)
    on_first_rank(join_parts)
    done = read_predictions(file)
    before = sum(name in done for name in order)
    rank, ranks = rank_and_ranks()
    share = [question for question in questions if question.id not in done][rank::ranks]
    answered = ask(model, share, media, decoding, path=folder / PART.format(rank), settings=settings)
    parts = [answered] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(parts, answered)
    on_first_rank(join_parts)
    wait_for_everyone()
    done |= {row.id: row for part in parts for row in part.rows}
    return Predictions(
        rows=[done[name] for name in order if name in done],
        failed={name: reason for part in parts for name, reason in part.failed.items()},
        answered_before=before,
        seconds=max(part.seconds for part in parts),
    )


def _join_parts(folder: Path, settings: Mapping[str, object], order: Sequence[str]) -> None:
    """Moves every part's predictions into `predictions.jsonl`; parts made with other settings go."""
    parts = sorted(folder.glob(PART.format("*")))
    with PredictionsFile(folder / PREDICTIONS, settings) as whole:
        for part in parts:
            if same_settings(part, settings):
                cut_broken_tail(part)
                whole.done.update(read_predictions(part))
    write_in_order(folder / PREDICTIONS, whole.done, order)
    for part in parts:
        part.unlink()
        settings_file(part).unlink(missing_ok=True)


# A decoder.


class TextStreamer(BaseStreamer):
    """Hands on an answer's text as its tokens come, never half a character."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._written = ""

    def put(self, value: Tensor, *, is_last: bool = False) -> None:
        """Takes the next token; generate's first call brings the prompt's ids, of which embeddings have none."""
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if len(text) > len(self._written) and (is_last or not text.endswith(NOT_YET_A_CHARACTER)):
            self._write(text[len(self._written) :])
            self._written = text

    def end(self) -> None:
        """Hands on what is left."""
        self.put(torch.tensor([], dtype=torch.long), is_last=True)


def check_room(prompt_tokens: int, max_new_tokens: int, positions: int | None, sample_id: str) -> None:
    """Sees that a prompt leaves room for the longest answer among the model's positions; None: they have no end."""
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise BadSample(
            sample_id,
            f"its prompt takes {prompt_tokens} tokens and its answer up to {max_new_tokens}, but the model has "
            f"{positions} positions; shorten it, or allow a shorter answer",
        )


@dataclass(frozen=True)
class QuestionSamples(Dataset["Sample | Skipped"]):
    """Questions as samples without labels; what cannot be asked comes back as `Skipped`."""

    questions: Sequence[Question]
    prompts: EncoderPrompts
    media: MediaReader
    max_new_tokens: int
    positions: int | None

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Sample | Skipped:
        question = self.questions[index]
        try:
            sample = self.prompts.sample(question.turns, self.media.read(question))
            check_room(len(sample.input_ids), self.max_new_tokens, self.positions, question.id)
            return replace(sample, index=index, id=question.id)
        except BadSample as error:
            return Skipped(index, question.id, error.reason)

    def collate(self, items: list[Sample | Skipped]) -> tuple[list[int], list[Skipped], Mapping[str, Any] | None]:
        """The places of the rows, what is skipped, and the batch; None where nothing of it can be asked."""
        samples = [item for item in items if isinstance(item, Sample)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        batch = self.prompts.collate(samples, "left") if samples else None
        return [sample.index for sample in samples], skipped, batch


@dataclass(frozen=True)
class Assistant:
    """A decoder with what turns words and pictures into its inputs; an `Asker`.

    `while_training`: the model goes on training afterwards, and autograd must be able to save what it made here.
    """

    backbone: Any
    prompts: EncoderPrompts
    while_training: bool = False

    def __post_init__(self) -> None:
        self.prompts.encoder.take_positions_of(self.backbone.model)

    def answer(self, question: Question, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None) -> str:
        """See `Asker`."""
        try:
            sample = self.prompts.sample(question.turns, seen)
            check_room(len(sample.input_ids), max_new_tokens, self.positions, "question")
        except BadSample as error:
            raise UserError(f"the question cannot be put to this model: {error.reason}") from error
        streamer = None if write is None else TextStreamer(self.prompts.growing_text(), write)
        batch = self.prompts.collate([sample], "left")
        (text,) = self.answers(batch, max_new_tokens=max_new_tokens, streamer=streamer)
        if text is None:
            raise NoNumbers
        return text

    def view(self, example: Example, *, frames: int) -> View:
        """See `Asker.view`: so many frames of the example's own clip."""
        if example.video is None:
            raise ValueError(f"example {example.id} has no video")
        as_pictures = self.prompts.frames_are_pictures
        return View(example=example, clip=example.video, sampling=Uniform(frames), as_pictures=as_pictures)

    def predict(
        self, questions: Sequence[Question], media: MediaReader, decoding: Decoding
    ) -> Iterator[list[Prediction]]:
        """See `Asker.predict`: the longest prompts first, so that short memory shows at once."""

        def length(question: Question) -> tuple[int, int, int]:
            return len(question.videos), len(question.images), sum(len(turn.text) for turn in question.turns)

        longest_first = sorted(questions, key=length, reverse=True)
        if decoding.by != "generation":
            yield from self._likeliest(longest_first, media, decoding)
            return
        samples = QuestionSamples(longest_first, self.prompts, media, decoding.max_new_tokens, self.positions)
        loader = DataLoader(
            samples, batch_size=decoding.batch_size, collate_fn=samples.collate, num_workers=decoding.workers
        )
        for indices, skipped, batch in loader:
            texts = [] if batch is None else self.answers(batch, max_new_tokens=decoding.max_new_tokens)
            answered = [prediction(longest_first[index], text) for index, text in zip(indices, texts, strict=True)]
            yield answered + [prediction(longest_first[item.index], None, item.reason) for item in skipped]

    def _likeliest(
        self, questions: Sequence[Question], media: MediaReader, decoding: Decoding
    ) -> Iterator[list[Prediction]]:
        """The likeliest of each question's texts, with what closes an answer; of equals the first."""
        rows: list[Sample] = []
        batch: list[tuple[Question, list[str], int]] = []

        def chosen() -> list[Prediction]:
            size = decoding.batch_size
            parts = [self.log_likelihoods(rows[start : start + size]) for start in range(0, len(rows), size)]
            scores = iter(torch.cat(parts).tolist())
            answered: list[Prediction] = []
            for question, texts, count in batch:
                likelihoods = [next(scores) for _ in range(count)]
                numbers = " ".join(map("{:.6f}".format, likelihoods))
                best = texts[likelihoods.index(max(likelihoods))] if texts else numbers
                answered.append(prediction(question, None if any(map(isnan, likelihoods)) else best))
            return answered

        for question in questions:
            try:
                if decoding.by == "cloze":
                    pairs, texts = endings_of(question), []
                    samples = [self.prompts.continued(context, ending) for context, ending in pairs]
                else:
                    texts = _letters(question) if decoding.by == "letters" else outputs_of(question)
                    seen = media.read(question)
                    samples = [self.prompts.with_answer(question.turns, seen, text) for text in texts]
                samples = [replace(sample, id=question.id) for sample in samples]
                check_room(max(len(sample.input_ids) for sample in samples), 0, self.positions, question.id)
            except BadSample as error:
                yield [prediction(question, None, error.reason)]
                continue
            if rows and len(rows) + len(samples) > decoding.batch_size:
                yield chosen()
                rows, batch = [], []
            rows += samples
            batch.append((question, texts, len(samples)))
        if batch:
            yield chosen()

    @property
    def positions(self) -> int | None:
        """What the model takes of a prompt and its answer together."""
        return max_positions(self.backbone.config)

    def new_ids(
        self,
        batch: Mapping[str, Any],
        *,
        max_new_tokens: int,
        streamer: BaseStreamer | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Int[Tensor, "batch new"]:
        """The ids that the model adds to left-padded prompts, greedily unless `options` of generate say otherwise."""
        inputs = model_inputs(batch, self.device)
        more = {"streamer": streamer} if streamer is not None else {}
        more |= {"options": options} if options is not None else {}
        with torch.no_grad() if self.while_training else torch.inference_mode():
            return self.backbone.generate(**inputs, max_new_tokens=max_new_tokens, **more).cpu()

    def answers(
        self, batch: Mapping[str, Any], *, max_new_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[str | None]:
        """The text of each row's answer, None where the scores were no numbers; the rows are padded on the left."""
        ids = self.new_ids(batch, max_new_tokens=max_new_tokens, streamer=streamer)
        return [None if NO_TOKEN in row.tolist() else self.prompts.encoder.decode(row) for row in ids]

    @cached_property
    def rows(self) -> RowKind:
        """How samples with answers stand in a batch: as trees, where the model follows them."""
        return check_packing(self.backbone, self.prompts.encoder, "trees")[0]

    @torch.inference_mode()
    def labelled(self, samples: Sequence[Sample], rows: RowKind = "plain", *, keep_logits: bool = False) -> Features:
        """What the model makes of samples at the places that predict their labelled tokens."""
        batch = self.prompts.collate(samples, "right", rows)
        labels = batch["labels"].to(self.device)
        return self.backbone(**model_inputs(batch, self.device), labels=labels, keep_logits=keep_logits)

    @torch.inference_mode()
    def log_likelihoods(self, samples: Sequence[Sample]) -> Float[Tensor, " samples"]:
        """The log-likelihood of each sample's labelled tokens behind what stands before them."""
        features = self.labelled(samples, self.rows)
        sums = torch.zeros(len(samples), device=features.losses.device)
        return sums.index_add_(0, features.rows, -features.losses).cpu()

    def logits(
        self, question: Question, answer: str, media: MediaReader, decoding: Decoding
    ) -> Float[Tensor, "tokens vocab"]:
        """See `Asker`; an empty answer has none."""
        try:
            sample = self.prompts.with_answer(question.turns, media.read(question), answer)
        except BadSample:
            return torch.zeros(0, 1)
        logits = self.labelled([sample], keep_logits=True).logits
        assert logits is not None
        return logits.float().cpu()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        module: nn.Module = self.backbone
        return next(module.parameters()).device


def _letters(question: Question) -> list[str]:
    choices = 0 if question.example is None else len(question.example.choices)
    if not 0 < choices <= len(ascii_uppercase):
        raise BadSample(question.id, f"it has {choices} choices; letters are chosen among 1 to {len(ascii_uppercase)}")
    return [*ascii_uppercase[:choices]]
