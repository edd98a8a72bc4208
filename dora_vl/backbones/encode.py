"""Conversations as token ids and labels: pictures expanded, answers supervised, the tail cut, nothing silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from dora_vl.backbones.generation import decoded
from dora_vl.backbones.templates import PROBE, Rendered, Span, Template, framed, refuse_marks
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Encoded, TrainedAnswer
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError

_FIRST_STAND_IN = 0xFDD1  # after `templates.BREAK`; Unicode reserves U+FDD0 to U+FDEF as noncharacters
_STAND_INS = 31


@dataclass(frozen=True)
class _Tokens:
    """Token ids, and for each whether it is supervised; `pictures_end` is the first place after all pictures."""

    ids: list[int]
    trained: list[bool]
    pictures_end: int


class ControlTokenizer:
    """Tokenises text in which special tokens count only where the template wrote them.

    A question may well contain `</s>` or `<|im_end|>` as characters. So special tokens in the text are switched off
    and the template's own are replaced by stand-ins of the same length, made of characters that no text holds, which
    the tokenizer's copy knows as added tokens with the special token's flags. The split of the text, and so every
    id and character offset, is the one that the plain tokenizer makes when the text holds no special token itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"{tokenizer.name_or_path} has no tokenizer.json; character offsets need a fast tokenizer (convert it "
                "with AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = {place: token for place, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stand_in = {
            token.content: _stand_in(token.content, number) for number, token in enumerate(special.values())
        }
        self._real_id: dict[int, int] = {}
        self._tokenizer.add_tokens(
            [
                AddedToken(self._stand_in[token.content], normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
                for token in special.values()
            ]
        )
        for place, token in special.items():
            stand_in = self._tokenizer.token_to_id(self._stand_in[token.content])
            same_length = len(self._stand_in[token.content]) == len(token.content)
            if stand_in is None or stand_in in self._real_id or not same_length:
                raise UserError(f"special token {token.content!r} is too short to be kept apart from text")
            self._real_id[stand_in] = place
        self.start_ids = _ids_before_text(self._tokenizer)

    def encode(self, text: str, controls: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids and character offsets, without the tokens that a tokenizer puts around a text by itself.

        Raises: UserError if the template's control text is no special token of this tokenizer.
        """
        for start, end in controls:
            token = text[start:end]
            if token not in self._stand_in:
                raise UserError(
                    f"the template writes {token!r}, which is no special token of this tokenizer; choose a "
                    "model.template that fits the language model (tokenizer is its own)"
                )
            text = text[:start] + self._stand_in[token] + text[end:]
        # Not kept by pickling, and a data worker gets this object pickled.
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [self._real_id.get(token, token) for token in encoding.ids], encoding.offsets


def _stand_in(token: str, number: int) -> str:
    """`number` in noncharacters, filled up to the token's length, so that offsets stay what they are."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, _STAND_INS)
        digits = chr(_FIRST_STAND_IN + digit) + digits
    return digits.rjust(len(token), chr(_FIRST_STAND_IN))


def _ids_before_text(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before any text by itself: the begin token, or nothing."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    around = tokenizer.encode("a", add_special_tokens=True).ids
    start = next(place for place in range(len(around)) if around[place : place + len(bare)] == bare)
    return around[:start]


class LlavaEncoder:
    """Turns into token ids of one tokenizer and template; holds no model and can be pickled.

    As in LLaVA, the text between pictures is tokenised piece by piece, with one begin token in front, so a piece
    after a picture begins like a text of its own (a SentencePiece tokenizer puts its space mark there).

    Args:
        tokenizer: the language model's, with the picture token added.
        template: how turns become text.
        tokens_per_image: how often the picture token stands for one picture.
        image_token_id: id of the picture token.
        max_tokens: a longer sample loses text at its end; pictures are never cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        tokens_per_image: int,
        image_token_id: int,
        max_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tokens_per_image = tokens_per_image
        self.image_token_id = image_token_id
        self.max_tokens = max_tokens
        self._controls = ControlTokenizer(tokenizer)

    def encode(self, conversation: Example) -> Encoded:
        """Ids and labels of a whole conversation, the labels -100 except on answers and the tokens that close them.

        Raises: BadSample if the turns do not fit the template, a picture would be cut, or no answer is left.
        """
        sample = conversation.id
        if conversation.videos:
            raise BadSample(sample, "it has a video, which a LLaVA-1.5 is not trained on; leave the sample out")
        tokens = self._tokens(self._rendered(conversation.turns, sample, generation_prompt=False))
        cut = max(0, len(tokens.ids) - self.max_tokens)
        if tokens.pictures_end > self.max_tokens:
            raise BadSample(
                sample,
                f"its {len(conversation.images)} pictures and the text before the last one take {tokens.pictures_end} "
                f"tokens of {self.max_tokens}; raise data.max_tokens or use fewer tokens a picture",
            )
        ids, trained = tokens.ids[: self.max_tokens], tokens.trained[: self.max_tokens]
        if not any(trained):
            raise BadSample(sample, f"no answer is left to train on after {cut} of {len(tokens.ids)} tokens were cut")
        labels = [token if train else IGNORED_LABEL for token, train in zip(ids, trained, strict=True)]
        return Encoded(torch.tensor(ids), torch.tensor(labels), cut)

    def answers(self, conversation: Example) -> list[TrainedAnswer]:
        """What the labels of a conversation must say."""
        probe = self.template.render(PROBE)
        said = [turn for turn in conversation.turns if turn.role == "assistant"]
        return framed(
            [replace(turn, text=turn.text.replace(IMAGE_PLACEHOLDER, "")) for turn in said],
            probe.text[slice(*probe.answer_spans[0])],
        )

    def encode_prompt(self, turns: Sequence[Turn]) -> Int[Tensor, " seq"]:
        """Ids of turns that end with a question, up to where the answer begins; never cut."""
        return torch.tensor(self._tokens(self._rendered(turns, "prompt", generation_prompt=True)).ids)

    def decode(self, ids: Int[Tensor, " seq"] | Sequence[int]) -> str:
        """The text of an answer, without special tokens and surrounding space, up to where the template ends one."""
        return self.answer_in(decoded(self.tokenizer, ids))

    def answer_in(self, text: str) -> str:
        """What of decoded text is the answer."""
        return (text.partition(self.template.stop)[0] if self.template.stop else text).strip()

    def _rendered(self, turns: Sequence[Turn], sample: str, *, generation_prompt: bool) -> Rendered:
        try:
            refuse_marks(turns)
            return self.template.render(turns, generation_prompt=generation_prompt)
        except ValueError as error:
            raise BadSample(sample, str(error)) from error

    def _tokens(self, rendered: Rendered) -> _Tokens:
        ids: list[int] = []
        trained: list[bool] = []
        pictures_end = 0
        start = 0
        for number, piece in enumerate(rendered.text.split(IMAGE_PLACEHOLDER)):
            if number:
                ids += [self.image_token_id] * self.tokens_per_image
                trained += [False] * self.tokens_per_image
                pictures_end = len(ids)
                start += len(IMAGE_PLACEHOLDER)
            piece_ids, piece_trained = self._piece(rendered, start, start + len(piece))
            ids += piece_ids
            trained += piece_trained
            start += len(piece)
        begin = [] if ids[: len(self._controls.start_ids)] == self._controls.start_ids else self._controls.start_ids
        if pictures_end:
            pictures_end += len(begin)
        return _Tokens(begin + ids, [False] * len(begin) + trained, pictures_end)

    def _piece(self, rendered: Rendered, start: int, end: int) -> tuple[list[int], list[bool]]:
        """Ids of one stretch of text between pictures, and which of them touch an answer."""
        controls = [(a - start, b - start) for a, b in rendered.control_spans if start <= a and b <= end]
        ids, offsets = self._controls.encode(rendered.text[start:end], controls)
        answered = bytearray(end - start)
        for a, b in rendered.answer_spans:
            for place in range(max(a - start, 0), min(b, end) - start):
                answered[place] = 1
        # A token of no characters (a space mark put before a piece) counts where it stands.
        return ids, [any(answered[first : max(last, first + 1)]) for first, last in offsets]
