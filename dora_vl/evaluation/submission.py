"""The file that each benchmark's server takes, from answers by id.

A test split's answers are the publisher's; these files are how they are scored. Each function returns the file's name
and its text; nothing is written here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from dora_vl.data.examples import Example
from dora_vl.scores import gqa, mmvet
from dora_vl.scores.caption import clip_of
from dora_vl.scores.evalai_normaliser import normalise
from dora_vl.scores.llava_bench import judge_requests
from dora_vl.scores.video_qa import label_of, submitted_index
from dora_vl.whole_numbers import number_of

Submission = Callable[[Sequence[Example], Mapping[str, str]], tuple[str, str]]


def vqav2(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """EvalAI: normalised answers for *all* questions of the split, "" where there is none."""
    rows = [
        {"question_id": _number(example.id), "answer": normalise(answers.get(example.id, ""))} for example in examples
    ]
    return "vqav2.json", json.dumps(rows, ensure_ascii=False)


def vizwiz(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """EvalAI: normalised answers by picture."""
    rows = [
        {
            "image": (example.images or (example.id,))[0].rsplit("/", 1)[-1],
            "answer": normalise(answers.get(example.id, "")),
        }
        for example in examples
    ]
    return "vizwiz.json", json.dumps(rows, ensure_ascii=False)


def gqa_predictions(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """GQA's eval.py and server: answers without final periods, in lower case."""
    rows = [
        {"questionId": example.id, "prediction": gqa.converted(answers.get(example.id, ""))} for example in examples
    ]
    return "gqa.json", json.dumps(rows, ensure_ascii=False)


def mmbench(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """MMBench's columns as tab-separated text; a spreadsheet program saves it as the .xlsx that the server takes."""
    widest = max(len(example.choices) for example in examples)
    letters = ascii_uppercase[:widest]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "question", *letters, "hint", "category", "prediction"])
    for example in examples:
        choices = [*example.choices, *[""] * (widest - len(example.choices))]
        extra = [str(example.extra.get(name) or "") for name in ("hint", "category")]
        index = example.extra.get("index", example.id)
        writer.writerow([index, example.question, *choices, *extra, answers.get(example.id, "")])
    return "mmbench.tsv", stream.getvalue()


def mmvet_answers(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """MM-Vet's grader."""
    return "mmvet.json", json.dumps(mmvet.judge_file(examples, answers), ensure_ascii=False, indent=1)


def llava_bench_requests(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """One request to the judge a line."""
    return "llava_bench_judge.jsonl", _lines(judge_requests(examples, answers))


def nlvr2(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """A CSV of identifier and answer; a missing one is False, since the script ends where an id lacks."""
    rows = [f"{example.id},{' '.join(answers.get(example.id, '').splitlines()) or 'False'}" for example in examples]
    return "nlvr2.csv", "\n".join(rows) + "\n"


def tvqa(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: choice indices by question id."""
    return "tvqa_test_predictions.json", _indices(examples, answers)


def how2qa(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: choice indices by question id."""
    return "how2qa_test_public_predictions.json", _indices(examples, answers)


def tvc(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: one caption for each clip, in the references' order."""
    return "tvc_test_predictions.jsonl", _captions(examples, answers)


def yc2c(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: one caption for each clip, in the references' order; the video's name is `video_id` there."""
    return "yc2c_test_predictions.jsonl", _captions(examples, answers, video_name="video_id")


def coco_caption(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """COCO's caption server: a caption for each image."""
    captions = {clip_of(example): answers.get(example.id, "") for example in examples}
    rows = [{"image_id": _number(image), "caption": text} for image, text in captions.items()]
    return "captions_results.json", json.dumps(rows, ensure_ascii=False)


def _indices(examples: Sequence[Example], answers: Mapping[str, str]) -> str:
    labels = {example.id: label_of(example, answers.get(example.id, "")) for example in examples}
    return json.dumps({name: submitted_index(label) for name, label in labels.items()})


def _captions(examples: Sequence[Example], answers: Mapping[str, str], video_name: str = "vid_name") -> str:
    rows: dict[str, dict[str, object]] = {}
    for example in examples:
        clip = clip_of(example)
        if clip not in rows:
            extra = example.extra
            row: dict[str, object] = {video_name: extra.get("vid_name", ""), "clip_id": _number(clip)}
            row |= {"ts": extra["ts"]} if "ts" in extra else {}
            rows[clip] = {**row, "descs": [{"desc": answers.get(example.id, "")}]}
    return _lines(list(rows.values()))


def _lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _number(name: str) -> int | str:
    number = number_of(name)
    return name if number is None else number
