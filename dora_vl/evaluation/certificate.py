"""Whether exported weights answer as the model that they came from: the same questions put to each, and compared.

Each model answers greedily by itself. Then all are shown the reference's answers, token by token, so that their logits
stand over the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dora_vl.adapters.adapter import versions
from dora_vl.adapters.merge import CERTIFICATES
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Asker, Decoding, MediaReader, ask
from dora_vl.evaluation.questions import Question
from dora_vl.run.folder import write_json

Open = Callable[[], Asker]


@dataclass(frozen=True, kw_only=True)
class Comparison:
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
        questions: those that were asked.
        answers: the reference's, in the same order.
        others: each other model's comparisons, by its name, in the same order.
        most_different: the largest share of questions whose answers may differ.
        failed: the reason for each question that could not be asked, by id.
    """

    reference: str
    questions: Sequence[Question]
    answers: Sequence[str]
    others: Mapping[str, Sequence[Comparison]]
    most_different: float
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def summaries(self) -> dict[str, Summary]:
        """Each other model's, by its name."""
        return {
            name: Summary(
                different_answers=sum(one.answer != own for one, own in zip(rows, self.answers, strict=True)),
                tokens=sum(one.tokens for one in rows),
                agreeing_tokens=sum(one.agreeing for one in rows),
                largest_logit_difference=max(one.largest_difference for one in rows),
            )
            for name, rows in self.others.items()
        }

    @property
    def worst(self) -> int:
        """The most answers of any model that differ."""
        return max(one.different_answers for one in self.summaries.values())

    @property
    def passed(self) -> bool:
        """Whether no model's answers differ on more questions than may."""
        return self.worst <= self.most_different * len(self.questions)


def certify(
    reference: tuple[str, Open],
    others: Mapping[str, Open],
    questions: Sequence[Question],
    media: MediaReader,
    decoding: Decoding,
    *,
    most_different: float,
    scratch: Path,
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
    model = open_reference()
    predictions = ask(model, questions, media, decoding)
    if not predictions.rows:
        raise UserError(f"not one of {len(questions)} questions can be asked; the first: {_first(predictions.failed)}")
    asked = [question for question in questions if question.id in predictions.answers]
    answers = [predictions.answers[question.id] for question in asked]
    for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        torch.save(model.logits(question, answer, media, decoding), scratch / f"{number}.pt")
    del model
    compared = {
        other: _compared(other, open_other(), asked, answers, media, decoding, scratch)
        for other, open_other in others.items()
    }
    return Certificate(
        reference=name,
        questions=asked,
        answers=answers,
        others=compared,
        most_different=most_different,
        failed=predictions.failed,
    )


def _first(failed: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in failed.items()), "none was given")


def _compared(
    name: str,
    model: Asker,
    questions: Sequence[Question],
    answers: Sequence[str],
    media: MediaReader,
    decoding: Decoding,
    scratch: Path,
) -> list[Comparison]:
    own = ask(model, questions, media, decoding)
    if own.failed:
        raise UserError(f"the {name} model cannot be asked what the other answers: {_first(own.failed)}")
    rows: list[Comparison] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        logits = model.logits(question, answer, media, decoding)
        expected = torch.load(scratch / f"{number}.pt", weights_only=True)
        if logits.shape != expected.shape:
            raise UserError(
                f"the {name} model gives logits {list(logits.shape)} for the answer to {question.id}, the other "
                f"{list(expected.shape)}; its vocabulary or its prompt is another"
            )
        rows.append(
            Comparison(
                answer=own.answers[question.id],
                tokens=len(expected),
                agreeing=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
                largest_difference=float((logits - expected).abs().max()) if len(expected) else 0.0,
            )
        )
    return rows


# A certificate beside the weights that it is about: `certificate.json`, and `certificate.md` for people.


JSON_FILE, TEXT_FILE = CERTIFICATES
EQUAL_SHOWN = 20
"""Questions with equal answers that the text shows; the JSON holds all."""


def write_certificate(certificate: Certificate, folder: Path, about: Mapping[str, object]) -> None:
    """Writes both files, replacing earlier ones.

    Args:
        about: what was compared and how the questions were put, as JSON values.
    """
    answers = [
        {
            "id": question.id,
            "question": question.text,
            "images": list(question.images),
            "truth": question.truth,
            certificate.reference: answer,
            **{name: asdict(rows[number]) for name, rows in certificate.others.items()},
        }
        for number, (question, answer) in enumerate(zip(certificate.questions, certificate.answers, strict=True))
    ]
    content = {
        **about,
        "reference": certificate.reference,
        "passed": certificate.passed,
        "most_different": certificate.most_different,
        "n": len(certificate.questions),
        "models": {name: asdict(one) for name, one in certificate.summaries.items()},
        "failed_questions": dict(certificate.failed),
        "answers": answers,
        "versions": versions(),
    }
    write_json(folder / JSON_FILE, content)
    (folder / TEXT_FILE).write_text("\n".join(_text(certificate, about)) + "\n", encoding="utf-8")


def table(certificate: Certificate) -> list[str]:
    """The lines that are printed: a row for each model."""
    head = ("model", f"answers of {len(certificate.questions)} that differ", "tokens alike", "largest logit difference")
    rows = [head, *_model_rows(certificate)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _model_rows(certificate: Certificate) -> list[tuple[str, ...]]:
    return [
        (
            name,
            str(one.different_answers),
            f"{one.agreeing_tokens} of {one.tokens}",
            f"{one.largest_logit_difference:.2g}",
        )
        for name, one in certificate.summaries.items()
    ]


def verdict(certificate: Certificate) -> str:
    """Whether it passed, in one line."""
    n, worst = len(certificate.questions), certificate.worst
    counts = f"{worst} of {n} answers differ ({worst / n:.1%}), {certificate.most_different:.1%} may"
    if certificate.passed:
        return f"passed: {counts}"
    return f"FAILED: {counts}; weights of a wider number type lose less to rounding, and --most-different allows more"


def _text(certificate: Certificate, about: Mapping[str, object]) -> Iterator[str]:
    reference, names = certificate.reference, list(certificate.others)
    yield from (f"# {' and '.join(names)} beside {reference}", "", verdict(certificate), "")
    yield from _rows(
        ["model", "answers that differ", "tokens alike", "largest logit difference"], _model_rows(certificate)
    )
    explained = (
        f"Each model answers greedily. Then all are shown the answers of {reference}, token by token: tokens alike are "
        "those after which both would say the same next."
    )
    yield from ("", explained, "")
    yield from _rows(["", ""], [[name, str(value)] for name, value in about.items()])
    head = ["id", "question", "right answer", reference, *names]
    different: list[list[str]] = []
    equal: list[list[str]] = []
    for number, (question, answer) in enumerate(zip(certificate.questions, certificate.answers, strict=True)):
        others = [rows[number].answer for rows in certificate.others.values()]
        row = [question.id, question.text, question.truth, answer, *others]
        (equal if all(other == answer for other in others) else different).append(row)
    if different:
        yield from ("", "## Answers that differ", "", *_rows(head, different))
    if equal:
        title = f"## Equal answers ({min(len(equal), EQUAL_SHOWN)} of {len(equal)})"
        yield from ("", title, "", *_rows(head, equal[:EQUAL_SHOWN]))
    if certificate.failed:
        failed = [[name, reason] for name, reason in certificate.failed.items()]
        yield from ("", "## Not asked", "", *_rows(["id", "why"], failed))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        cells = (" ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|") for text in row)
        yield f"| {' | '.join(cells)} |"
