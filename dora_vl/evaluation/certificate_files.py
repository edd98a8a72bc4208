"""A certificate beside the weights that it is about: `certificate.json`, and `certificate.md` for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dora_vl.adapters.merge_folder import CERTIFICATES
from dora_vl.adapters.provenance import versions
from dora_vl.evaluation.certificate import Answered, Certificate, Summary
from dora_vl.run.run_folder import write_json

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
