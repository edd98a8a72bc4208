"""A decoder, ready to be asked: a LLaVA-1.5, any other vision-language model, or a plain language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.base import Features, max_positions
from dora_vl.backbones.generation import NO_TOKEN, NOT_YET_A_CHARACTER, NoNumbers
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.asker import Asked, Shown, View, Write, videos_placed
from dora_vl.evaluation.asking import open_picture as open_picture
from dora_vl.evaluation.predict import Decoding
from dora_vl.evaluation.prompt_inputs import Prompts, model_inputs
from dora_vl.evaluation.scores.prompts import about_video, turns_of

if TYPE_CHECKING:
    from dora_vl.evaluation.ask import Asking
    from dora_vl.evaluation.questions import EvaluationSet


class TextStreamer(BaseStreamer):
    """Hands on an answer's text as its tokens come, never half a character."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Takes the next token; generate's first call brings the prompt's ids, of which embeddings have none."""
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith(NOT_YET_A_CHARACTER):
            self._hand_on(text)

    def end(self) -> None:
        """Hands on what is left."""
        self._hand_on(self._decode(self._ids))

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


@dataclass(frozen=True)
class Assistant:
    """A backbone with what turns words and pictures into its inputs; an `asker.Asker`.

    Attributes:
        backbone: its `generate` gives the new ids of left-padded prompts, its forward `Features`, both from what
            `prompts` makes.
        prompts: of the backbone's kind.
        while_training: the model goes on training afterwards, so that nothing of it may become what autograd refuses
            to save, as the tensors of inference mode are.
    """

    backbone: Any
    prompts: Prompts
    while_training: bool = False

    # -- one question ----------------------------------------------------------------------------------------

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Write | None = None,
    ) -> str:
        """See `Asker.answer`."""
        return self._answer(turns, Shown(pictures=tuple(pictures)), max_new_tokens=max_new_tokens, write=write)

    def view(self, example: Example, *, frames: int) -> View:
        """See `Asker.view`: so many frames of the example's own clip."""
        if example.video is None:
            raise ValueError(f"example {example.id} has no video")
        as_pictures = self.prompts.frames_are_pictures
        return View(example=example, clip=example.video, sampling=Uniform(frames), as_pictures=as_pictures)

    def answer_example(
        self, example: Example, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """See `Asker.answer_example`."""
        asked = turns_of(replace(example, images=("",) * len(seen.pictures)), about_video)
        turns = videos_placed(asked, len(seen.videos))
        return self._answer(turns, seen, max_new_tokens=max_new_tokens, write=write)

    def _answer(self, turns: Sequence[Turn], seen: Shown, *, max_new_tokens: int, write: Write | None) -> str:
        try:
            sample = self.prompts.sample(turns, seen)
            self.decoding(max_new_tokens=max_new_tokens).check_room(len(sample.input_ids), "question")
        except BadSample as error:
            raise UserError(f"the question cannot be put to this model: {error.reason}") from error
        streamer = None if write is None else TextStreamer(self.prompts.growing_text(), write)
        batch = self.prompts.collate([sample], "left")
        said = self._text(self.new_ids(batch, max_new_tokens=max_new_tokens, streamer=streamer)[0])
        if said is None:
            raise NoNumbers
        return said

    def _text(self, ids: Int[Tensor, " new"]) -> str | None:
        """An answer's ids as text; None where the model's scores were no numbers."""
        return None if NO_TOKEN in ids.tolist() else self.prompts.decode(ids)

    # -- many questions --------------------------------------------------------------------------------------

    def decoding(self, **settings: Any) -> Decoding:
        """How questions are answered, within what the model has positions for."""
        return Decoding(**settings, max_positions=max_positions(self.backbone.config))

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
        named = {"streamer": streamer, "options": options}
        more = {name: value for name, value in named.items() if value is not None}
        with torch.no_grad() if self.while_training else torch.inference_mode():
            return self.backbone.generate(**inputs, max_new_tokens=max_new_tokens, **more).cpu()

    def answers(self, batch: Mapping[str, Any], *, max_new_tokens: int) -> list[str | None]:
        """See `predict.BatchAnswerer.answers`."""
        return [self._text(row) for row in self.new_ids(batch, max_new_tokens=max_new_tokens)]

    @torch.inference_mode()
    def labelled(self, samples: Sequence[Sample]) -> Features:
        """What the model makes of samples at the places that predict their labelled tokens."""
        batch = self.prompts.collate(samples, "right")
        return self.backbone(**model_inputs(batch, self.device), labels=batch["labels"].to(self.device))

    @torch.inference_mode()
    def log_likelihoods(self, samples: Sequence[Sample]) -> Float[Tensor, " samples"]:
        """The log-likelihood of each sample's labelled tokens behind what stands before them."""
        found = self.labelled(samples)
        each = found.logits.float().log_softmax(-1).gather(1, found.targets.unsqueeze(1)).squeeze(1)
        return torch.zeros(len(samples), device=each.device).index_add_(0, found.rows, each).cpu()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        module: nn.Module = self.backbone
        return next(module.parameters()).device

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """See `Asker.ask`: greedily and left-padded, or the likeliest letter of each question's choices."""
        from dora_vl.evaluation.ask_decoder import ask_decoder

        return ask_decoder(self, one, asking)
