"""Whether exported weights answer as the model that they came from: the same questions put to each, and compared.

Each model answers greedily by itself. Then all are shown the reference's answers, token by token, so that their logits
stand over the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.adapters.adapter import versions
from dora_vl.adapters.merge import CERTIFICATES
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predict import predict
from dora_vl.evaluation.predictions import PredictionsFile
from dora_vl.evaluation.questions import Question
from dora_vl.training.run_folder import write_json

Logits = Float[Tensor, "tokens vocab"]


@runtime_checkable
class Witness(Protocol):
    """A model as a certificate asks it."""

    def answers(self, questions: Sequence[Question], probe: Probe, path: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Its own answers by id, and why others have none; `path` is a file that may be written meanwhile."""
        ...

    def logits(self, question: Question, answer: str, media: MediaReader) -> Logits:
        """At the places that predict an answer's tokens; none where the answer cannot stand there."""
        ...


Open = Callable[[], Witness]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is put to each model.

    Attributes:
        media: reads what the questions show.
        max_new_tokens: longest answer.
        batch_size: questions at once.
    """

    questions: Sequence[Question]
    media: MediaReader
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One model beside the reference on one question.

    Attributes:
        answer: its own.
        tokens: of the reference's answer, with what closes it.
        agreeing: those of them behind which both models would say the same token next.
        largest_difference: between their logits at any of these places.
    """

    answer: str
    tokens: int
    agreeing: int
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with every model's answer; `others` by the model's name."""

    question: Question
    answer: str
    others: Mapping[str, Compared]

    @property
    def differs(self) -> bool:
        """Whether any model's answer is another than the reference's."""
        return any(one.answer != self.answer for one in self.others.values())


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One model beside the reference on all questions."""

    different_answers: int
    tokens: int
    agreeing_tokens: int
    largest_logit_difference: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What came of it.

    Attributes:
        reference: the name of the model that the others are held to.
        most_different: the largest share of questions whose answers may differ.
        failed: the reason for each question that could not be asked, by id.
    """

    reference: str
    answered: Sequence[Answered]
    most_different: float
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def summaries(self) -> dict[str, Summary]:
        """Each other model's, by its name."""
        names = self.answered[0].others
        return {name: self._summary(name) for name in names}

    def _summary(self, name: str) -> Summary:
        found = [one.others[name] for one in self.answered]
        return Summary(
            different_answers=sum(one.answer != one.others[name].answer for one in self.answered),
            tokens=sum(one.tokens for one in found),
            agreeing_tokens=sum(one.agreeing for one in found),
            largest_logit_difference=max(one.largest_difference for one in found),
        )

    @property
    def passed(self) -> bool:
        """Whether no model's answers differ on more questions than may."""
        most = self.most_different * len(self.answered)
        return all(one.different_answers <= most for one in self.summaries.values())


def certify(
    reference: tuple[str, Open], others: Mapping[str, Open], probe: Probe, *, most_different: float, scratch: Path
) -> Certificate:
    """Puts the questions to each model, one model in memory at a time.

    Args:
        reference: its name and what opens it.
        others: likewise, by name.
        scratch: an empty folder; receives the reference's logits, tokens x vocabulary x 4 bytes of each answer.

    Raises:
        UserError: not one question can be asked, or a model has another vocabulary.
    """
    name, open_reference = reference
    answers, failed = _of_reference(open_reference(), probe, scratch)
    if not answers:
        raise UserError(f"not one of {len(probe.questions)} questions can be asked; the first: {_first(failed)}")
    asked = [question for question in probe.questions if question.id in answers]
    compared = {
        other: _of_other(other, open_other(), asked, answers, probe, scratch) for other, open_other in others.items()
    }
    answered = [
        Answered(
            question=question,
            answer=answers[question.id],
            others={other: found[question.id] for other, found in compared.items()},
        )
        for question in asked
    ]
    return Certificate(reference=name, answered=answered, most_different=most_different, failed=failed)


def _first(failed: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in failed.items()), "none was given")


def _of_reference(witness: Witness, probe: Probe, scratch: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Its answers by id and why others have none; their logits go into the folder."""
    answers, failed = witness.answers(probe.questions, probe, scratch / "reference.jsonl")
    for question in probe.questions:
        if question.id in answers:
            torch.save(witness.logits(question, answers[question.id], probe.media), _file(scratch, question, probe))
    return answers, failed


def _of_other(
    name: str, witness: Witness, asked: Sequence[Question], answers: Mapping[str, str], probe: Probe, scratch: Path
) -> dict[str, Compared]:
    own, failed = witness.answers(asked, probe, scratch / f"{name}.jsonl")
    if failed:
        raise UserError(f"the {name} model cannot be asked what the other answers: {_first(failed)}")
    found: dict[str, Compared] = {}
    for question in asked:
        theirs = witness.logits(question, answers[question.id], probe.media)
        ours = torch.load(_file(scratch, question, probe), weights_only=True)
        if theirs.shape != ours.shape:
            raise UserError(
                f"the {name} model gives logits {list(theirs.shape)} for the answer to {question.id}, the other "
                f"{list(ours.shape)}; its vocabulary or its prompt is another"
            )
        found[question.id] = Compared(
            answer=own[question.id],
            tokens=len(ours),
            agreeing=int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
            largest_difference=float((theirs - ours).abs().max()) if len(ours) else 0.0,
        )
    return found


def _file(scratch: Path, question: Question, probe: Probe) -> Path:
    """Where a question's logits are; ids may be no file names."""
    return scratch / f"{probe.questions.index(question)}.pt"


@dataclass(frozen=True)
class ChatWitness:
    """A model that answers chats."""

    assistant: Assistant

    def answers(self, questions: Sequence[Question], probe: Probe, path: Path) -> tuple[dict[str, str], dict[str, str]]:
        """See `Witness.answers`."""
        decoding = self.assistant.decoding(batch_size=probe.batch_size, max_new_tokens=probe.max_new_tokens)
        with PredictionsFile(path, {}) as file:
            failed = predict(self.assistant, questions, media=probe.media, file=file, decoding=decoding)
            return {name: one.prediction for name, one in file.done.items()}, failed

    def logits(self, question: Question, answer: str, media: MediaReader) -> Logits:
        """See `Witness.logits`; an empty answer has none."""
        try:
            sample = self.assistant.prompts.with_answer(question.turns, media.read(question), answer)
        except BadSample:
            return torch.zeros(0, 1)
        return self.assistant.labelled([sample]).logits.float().cpu()


# A certificate beside the weights that it is about: `certificate.json`, and `certificate.md` for people.


JSON_FILE, TEXT_FILE = CERTIFICATES
EQUAL_SHOWN = 20
"""Questions with equal answers that the text shows; the JSON holds all."""


def write_certificate(certificate: Certificate, folder: Path, about: Mapping[str, object]) -> None:
    """Writes both files, replacing earlier ones.

    Args:
        about: what was compared and how the questions were put, as JSON values.
    """
    write_json(folder / JSON_FILE, _content(certificate, about))
    (folder / TEXT_FILE).write_text("\n".join(_text(certificate, about)) + "\n", encoding="utf-8")


def _content(certificate: Certificate, about: Mapping[str, object]) -> dict[str, Any]:
    return {
        **about,
        "reference": certificate.reference,
        "passed": certificate.passed,
        "most_different": certificate.most_different,
        "n": len(certificate.answered),
        "models": {name: asdict(one) for name, one in certificate.summaries.items()},
        "failed_questions": dict(certificate.failed),
        "answers": [_entry(certificate.reference, one) for one in certificate.answered],
        "versions": versions(),
    }


def _entry(reference: str, one: Answered) -> dict[str, Any]:
    return {
        "id": one.question.id,
        "question": one.question.text,
        "images": list(one.question.images),
        "truth": one.question.truth,
        reference: one.answer,
        **{name: asdict(other) for name, other in one.others.items()},
    }


def table(certificate: Certificate) -> list[str]:
    """The lines that are printed: a row for each model."""
    n = len(certificate.answered)
    rows = [("model", f"answers of {n} that differ", "tokens alike", "largest logit difference")]
    rows += [(name, *_cells(one)) for name, one in certificate.summaries.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(one: Summary) -> tuple[str, str, str]:
    alike = f"{one.agreeing_tokens} of {one.tokens}"
    return str(one.different_answers), alike, f"{one.largest_logit_difference:.2g}"


def verdict(certificate: Certificate) -> str:
    """Whether it passed, in one line."""
    n, most = len(certificate.answered), certificate.most_different
    worst = max(one.different_answers for one in certificate.summaries.values())
    said = f"{worst} of {n} answers differ ({worst / n:.1%}), {most:.1%} may"
    if certificate.passed:
        return f"passed: {said}"
    return f"FAILED: {said}; weights of a wider number type lose less to rounding, and --most-different allows more"


def _text(certificate: Certificate, about: Mapping[str, object]) -> Iterator[str]:
    reference, names = certificate.reference, list(certificate.summaries)
    yield f"# {' and '.join(names)} beside {reference}"
    yield from ("", verdict(certificate), "")
    yield from _rows(
        ["model", "answers that differ", "tokens alike", "largest logit difference"],
        [[name, *_cells(one)] for name, one in certificate.summaries.items()],
    )
    explained = (
        f"Each model answers greedily. Then all are shown the answers of {reference}, token by token: tokens alike are "
        "those after which both would say the same next."
    )
    yield from ("", explained, "")
    yield from _rows(["", ""], [[name, str(value)] for name, value in about.items()])
    head = ["id", "question", "right answer", reference, *names]
    different = [one for one in certificate.answered if one.differs]
    if different:
        yield from ("", "## Answers that differ", "", *_rows(head, [_answers(one) for one in different]))
    equal = [one for one in certificate.answered if not one.differs]
    if equal:
        title = f"## Equal answers ({min(len(equal), EQUAL_SHOWN)} of {len(equal)})"
        yield from ("", title, "", *_rows(head, [_answers(one) for one in equal[:EQUAL_SHOWN]]))
    if certificate.failed:
        failed = [[name, reason] for name, reason in certificate.failed.items()]
        yield from ("", "## Not asked", "", *_rows(["id", "why"], failed))


def _answers(one: Answered) -> list[str]:
    return [
        one.question.id,
        one.question.text,
        one.question.truth,
        one.answer,
        *(x.answer for x in one.others.values()),
    ]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(_cell(one) for one in row)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
