"""Instructions as text and as tokens: the published prompts, to the last space, and the labels they are trained with.

Sources: AGI-Edgerunners/LLM-Adapters, `finetune.py` and `commonsense_evaluate.py`; NVlabs/DoRA, the files of the same
names in `commonsense_reasoning/`. Their training prompt is indented by 16 spaces, its blank lines hold 16 spaces too,
and its first line ends in white space (in LLM-Adapters in a linter's comment); the test prompt ends its first line
otherwise and has empty blank lines. Both are kept as they are: a model trained with the one is asked with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.encode import ControlTokenizer
from dora_vl.backbones.growing_text import decoded
from dora_vl.backbones.specs import PromptName, TrainOn
from dora_vl.data.dataset import IGNORED_LABEL, Encoded, TrainedAnswer
from dora_vl.data.turns import Conversation, Turn
from dora_vl.errors import BadSample, UserError, shown_text

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, kw_only=True)
class InstructionPrompt:
    """What stands before an output, in training and in a test; `{instruction}` and `{input}` are filled in."""

    train: str
    train_with_input: str
    test: str
    test_with_input: str

    def before_output(self, instruction: str, context: str, *, test: bool) -> str:
        """The text up to where the output begins; `context` is the record's `input`."""
        plain, paired = (self.test, self.test_with_input) if test else (self.train, self.train_with_input)
        pieces = (paired if context else plain).split("{instruction}")
        return instruction.join(piece.replace("{input}", context) for piece in pieces)


def _laid_out(first_line: str, *, blank: str, indent: str, with_input: bool) -> str:
    """Alpaca's sections, each line indented; `blank` is what stands on the lines between them."""
    sections = ["### Instruction:\n{instruction}", *(["### Input:\n{input}"] if with_input else []), "### Response:\n"]
    body = f"\n{blank}\n".join(f"{indent}{section}".replace("\n", f"\n{indent}") for section in sections)
    return f"{first_line}\n\n{body}"


def _published(*, train_ends: tuple[str, str], test_ends: tuple[str, str]) -> InstructionPrompt:
    """The indented prompts; the pairs are how the first line ends, without and with an input."""
    spaces = " " * 16
    return InstructionPrompt(
        train=_laid_out(PLAIN + train_ends[0], blank=spaces, indent=spaces, with_input=False),
        train_with_input=_laid_out(PAIRED + train_ends[1], blank=spaces, indent=spaces, with_input=True),
        test=_laid_out(PLAIN + test_ends[0], blank="", indent=spaces, with_input=False),
        test_with_input=_laid_out(PAIRED + test_ends[1], blank="", indent=spaces, with_input=True),
    )


_ALPACA = (
    _laid_out(PLAIN, blank="", indent="", with_input=False),
    _laid_out(PAIRED, blank="", indent="", with_input=True),
)
PROMPTS: Mapping[str, InstructionPrompt] = {
    "nvlabs": _published(train_ends=("  ", " "), test_ends=(" ", "")),
    "llm_adapters": _published(train_ends=("  # noqa: E501", "  # noqa: E501"), test_ends=(" ", "")),
    "alpaca": InstructionPrompt(
        train=_ALPACA[0], train_with_input=_ALPACA[1], test=_ALPACA[0], test_with_input=_ALPACA[1]
    ),
}
"""`nvlabs` is the DoRA paper's; `alpaca` is Stanford's own, the same in training and test."""


class InstructionEncoder:
    """Token ids of one tokenizer and prompt; holds no model and can be pickled.

    As in the references: the whole text is cut after `max_tokens`, and the end token is added where there is room.

    Args:
        tokenizer: the language model's.
        prompt: a name in `PROMPTS`.
        train_on: `all` labels prompt and output, as the published runs do; `answer` the output and its end alone.
        max_tokens: of prompt, output and end token together.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, prompt: PromptName, train_on: TrainOn, max_tokens: int
    ) -> None:
        end_id = tokenizer.eos_token_id
        if not isinstance(end_id, int):
            raise UserError(f"{tokenizer.name_or_path} names no end token (eos_token), which closes every output")
        self.tokenizer = tokenizer
        self.prompt = PROMPTS[prompt]
        self.train_on: TrainOn = train_on
        self.max_tokens = max_tokens
        self._end_id = end_id
        self._text = ControlTokenizer(tokenizer)  # "</s>" in a question stays characters

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of prompt and output.

        Raises: BadSample for anything but one instruction and its output, or if the cut leaves nothing to train on.
        """
        name = conversation.id
        if conversation.images or conversation.videos:
            raise BadSample(name, "it has pictures or videos, which a language model does not see")
        before = self._before_output(conversation.turns[:-1], name, test=False)
        ids, first_of_output = self._split(before, conversation.turns[-1].text)
        if len(ids) < self.max_tokens:
            ids = [*ids, self._end_id]
        cut = max(0, len(ids) - self.max_tokens)
        ids = ids[: self.max_tokens]
        first_label = 0 if self.train_on == "all" else first_of_output
        if first_label >= len(ids):
            raise BadSample(
                name,
                f"no output is left to train on after {cut} of {len(ids) + cut} tokens were cut; raise data.max_tokens",
            )
        labels = [IGNORED_LABEL] * first_label + ids[first_label:]
        return Encoded(torch.tensor(ids), torch.tensor(labels), cut)

    def answers(self, conversation: Conversation) -> list[TrainedAnswer]:
        """What the labels of a conversation must say; the prompt too where it is trained."""
        opening = ""
        if self.train_on == "all":
            start = str(self.tokenizer.decode(self._text.start_ids))
            opening = start + self._before_output(conversation.turns[:-1], conversation.id, test=False)
        return [TrainedAnswer(opening, conversation.turns[-1].text, str(self.tokenizer.eos_token))]

    def encode_prompt(self, turns: Sequence[Turn]) -> Int[Tensor, " seq"]:
        """Ids of the test prompt of one instruction. Never cut.

        Raises: BadSample for other turns than that one.
        """
        return torch.tensor(self._ids(self._before_output(turns, "question", test=True)))

    def encode_choice(self, turns: Sequence[Turn], choice: str) -> tuple[Int[Tensor, " seq"], int]:
        """Ids of the test prompt with this output and the end token after it, and the place where the output begins.

        Raises: BadSample as `encode_prompt`.
        """
        ids, first_of_output = self._split(self._before_output(turns, "question", test=True), choice)
        return torch.tensor([*ids, self._end_id]), first_of_output

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """The text of an output, without special tokens."""
        return self.answer_in(decoded(self.tokenizer, ids))

    def answer_in(self, text: str) -> str:
        """What of decoded text is the answer: all."""
        return text

    def _before_output(self, turns: Sequence[Turn], sample_id: str, *, test: bool) -> str:
        if len(turns) != 1 or turns[0].role != "user":
            roles = ", ".join(turn.role for turn in turns)
            raise BadSample(
                sample_id,
                "a prompt of instructions holds one question and its output, but here turns of "
                f"{shown_text(roles)} stand before the output; ask one question at a time",
            )
        if not turns[0].instruction.strip():
            raise BadSample(sample_id, "'instruction' is empty")
        return self.prompt.before_output(turns[0].instruction, turns[0].input, test=test)

    def _ids(self, text: str) -> list[int]:
        return self._text.start_ids + self._text.encode(text, ())[0]

    def _split(self, before: str, output: str) -> tuple[list[int], int]:
        """Ids of both, tokenised as one text, and the first token that holds any of the output."""
        ids, offsets = self._text.encode(before + output, ())
        first = next((place for place, (_, end) in enumerate(offsets) if end > len(before)), len(ids))
        return self._text.start_ids + ids, len(self._text.start_ids) + first
