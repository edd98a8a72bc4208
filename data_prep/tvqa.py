"""TVQA (Lei et al., 2018): five-choice questions about clips of six television series, with subtitles.

Files: `tvqa_train.jsonl`, `tvqa_val.jsonl`, `tvqa_test_public.jsonl` (122,039 / 15,253 / 7,623;
`tvqa_qa_release.tar.gz` at nlp.cs.unc.edu/data/jielei/tvqa/tvqa_public_html), in VALUE also
`tvqa_test_release.jsonl` (15,253: test-public and -private). Subtitles: `tv_subtitles.jsonl` (VALUE),
`tvqa_preprocessed_subtitles.jsonl` (TVR, TVC), or TVQA's `tvqa_subtitles/*.srt`. Licence: the annotations MIT-like
for research; the clips are the broadcasters' and are given as frames after a form is signed.

Quirks: `ts` is text, "20.16-25.12", and "nan-nan" in some rows: those keep no span. Test keeps `answer_idx` back;
the server takes {qid: index}. `tvqa_val_solution.json` of VALUE's EvaluationTools ({"solution": {series: {qid:
index}}}), where present, fills in the answers of a validation file that lacks them. Videos are called
"<vid_name>.mp4" here; frames come as folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import integer, mapping
from data_prep.joins import refusing
from data_prep.published import WANTED, Split, present, some_present
from data_prep.subtitles import Subtitles
from data_prep.video_questions import convert_question, question_rows
from dora_vl.data.text_file import json_object

FILES = {
    "tvqa_train.jsonl": ("train", 122_039),
    "tvqa_val.jsonl": ("validation", 15_253),
    "tvqa_test_public.jsonl": ("test_public", 7_623),
    "tvqa_test_release.jsonl": ("test", 15_253),
}
SUBTITLES = ("tv_subtitles.jsonl", "tvqa_preprocessed_subtitles.jsonl", "tvqa_subtitles")
SOLUTION = "tvqa_val_solution.json"
CHOICES = 5


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose questions are there."""
    found = some_present(folder, list(FILES))
    subtitles = Subtitles(folder, SUBTITLES)
    solved = present(folder, [SOLUTION])
    for file, path in found.items():
        name, size = FILES[file]
        solution = solved.get(SOLUTION) if name == "validation" else None
        yield Split(
            task="tvqa",
            name=name,
            inputs=(path, *subtitles.inputs, *([solution] if solution else [])),
            rows=partial(question_rows, path, subtitles, read_solution(solution) if solution else None),
            convert=partial(convert_question, choices=CHOICES, answered=not name.startswith("test")),
            published_rows=size,
            notes={"subtitles": subtitles.path.name if subtitles.path else "none found"},
        )


def read_solution(path: Path) -> dict[str, int]:
    """VALUE's solution file as question id -> right choice.

    Raises:
        UserError: it has another form.
    """
    with refusing(f"{path}: not {{'solution': {{series: {{qid: index}}}}}}"):
        all_series = mapping(json_object(path, WANTED), "solution")
        return {
            qid: integer(answers, qid)
            for series in all_series
            for answers in [mapping(all_series, series)]
            for qid in answers
        }
