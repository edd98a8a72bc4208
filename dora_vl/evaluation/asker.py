"""What every way of asking needs of a model: the scripts, `dora-vl evaluate` and the test after training use no more.

`assistant.Assistant` is a LLaVA-1.5, any other vision-language model, or a plain language model; the one of
`vlbart_assistant` is a VL-BART. `open_asker` opens the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.data.examples import Clip, Example
    from dora_vl.data.turns import Turn
    from dora_vl.evaluation.ask import Asking
    from dora_vl.evaluation.evaluation_set import EvaluationSet
    from dora_vl.evaluation.shown import Shown
    from dora_vl.vision.frame_sampling import Sampling

Write = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of many questions.

    Attributes:
        answers: by id, in the questions' order.
        failed: the reason for each question that could not be asked, by id.
        answered_before: how many an earlier run had answered.
        cut: the tokens that each text which was cut lost, by id.
        seconds: how long it took.
    """

    answers: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    answered_before: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class View:
    """A question about a video as a model is asked it, and what it looks at."""

    example: Example
    clip: Clip
    sampling: Sampling


@runtime_checkable
class Asker(Protocol):
    """A model, ready to be asked."""

    def answer(
        self, turns: Sequence[Turn], pictures: Sequence[Image], *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """The answer to turns that end with a question; one `<image>` in them for each picture.

        Args:
            turns: the conversation so far, its last turn the question.
            pictures: RGB pictures in the order of their placeholders.
            max_new_tokens: longest answer.
            write: receives the answer piece by piece while it is made.

        Raises:
            UserError: the turns cannot be put to this model.
        """
        ...

    def view(self, example: Example, *, frames: int) -> View:
        """What this model looks at of an example's video; `frames` of it where nothing else was trained.

        Raises:
            UserError: no such question can be put to it.
        """
        ...

    def answer_example(
        self, example: Example, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """The answer to an example's question about these pictures or this video; see `answer`."""
        ...

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """Puts a benchmark's questions to the model; what fails is named and counted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model with its adapter, if it has one, and without where that was asked for.

    Attributes:
        adapted: what is asked.
        base: the model without the adapter.
    """

    adapted: Asker
    base: Asker | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which model is to be opened: an adapter on its base, or a model by itself.

    Attributes:
        adapter: the folder that training or PEFT wrote.
        model: a model's folder or hub id, to be asked without an adapter.
        base: where the adapter's base is now; None looks where the adapter says.
        any_base: accepts a base with other content than the one trained on.
        with_base: also opens the model without the adapter; it shares all weights that the adapter leaves alone.
        template: the prompt format of a LLaVA-1.5 or a language model of which nothing says it.
    """

    adapter: Path | None = None
    model: str | None = None
    base: str | None = None
    any_base: bool = False
    with_base: bool = False
    template: str | None = None
