"""The benchmarks of VQA's kind and of sentences about pictures: VQAv2, TextVQA, VizWiz, GQA, NLVR and NLVR2.

Each is scored as its publisher's script does, or the one that LLaVA used; where a script stops at a question without an
answer, that counts as wrong here, and nothing is rounded.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Literal

from dora_vl.data.benchmarks.fields import PEOPLE
from dora_vl.data.example import Example
from dora_vl.errors import UserError, parse_digits, short_repr
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.scores.benchmark import (
    REPEATED,
    SHORT,
    UNANSWERABLE,
    Benchmark,
    ByKey,
    Key,
    plain,
    published_id,
    question_in,
    right_answer,
    short,
    true_or_false,
)
from dora_vl.evaluation.scores.scored import (
    ACCURACY,
    AnswersById,
    Formula,
    Ratio,
    Scored,
    Tally,
    score_points,
    share_of,
)

# How the official VQA script (GT-Vision-Lab/VQA, vqaEval.py) rewrites an answer before it compares.
#
# Quirks that decide scores, kept:
#
# - A punctuation mark becomes a space, but vanishes where the text has it next to a space anywhere; and where a comma
#   stands between two digits anywhere, *all* punctuation vanishes ("1,2/3" -> "123").
# - A period goes unless a digit follows: "3." loses it, ".5" keeps it (the look-behind meant to protect "3." is
#   mistyped). At most 32 go: a flag is passed where the script's `sub` takes a count.
# - Number words up to ten and "none" become digits, then a, an, the go, then contractions get their apostrophe.
# - The contractions with a capital I never match, since the text is in lower case by then; "somebody'd" *loses* its
#   apostrophe.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = int(re.UNICODE)  # 32
COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})

_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

CONTRACTIONS = {
    form[:index] + form[index + 1 :]: form
    for form in _FORMS.split()
    for index, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Maps a spelling that lacks an apostrophe to the right one; the official table holds just these."""


def normalise(answer: str) -> str:
    """Rewrites a prediction by all of these rules."""
    return map_words(strip_punctuation(one_line(answer)))


def one_line(answer: str) -> str:
    """Turns line breaks and tabs into spaces, none at the ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Treats punctuation and periods as the script does; letters stay as they are."""
    in_number = COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        vanishes = in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if vanishes else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def map_words(text: str) -> str:
    """Writes lower case, digits for number words, no articles, contractions with their apostrophe."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def human_answers(example: Example) -> list[str]:
    """Returns the ten people's raw answers: `extra["human_answers"]`, or else the example's answers."""
    people = example.extra.get("human_answers")
    answers = [answer.text for answer in example.answers] if people is None else [str(answer) for answer in people]
    if len(answers) != PEOPLE:
        raise UserError(
            f"example {short_repr(example.id)} has {len(answers)} human answers, the metric needs {PEOPLE} "
            "(extra.human_answers); prepare the set again from the publisher's annotations"
        )
    return answers


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Averages min(1, others who said the prediction / 3) over the people, by exact comparison."""
    same = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (same - (answer == prediction)) / 3) for answer in answers) / len(answers)


def normalise_evalai(answer: str) -> str:
    """Rewrites text as EvalAI's VQA server and TextVQA's m4c evaluator do before they compare.

    The steps of `normalise` with three differences, which change about a tenth of tricky strings:

    - Lower case first, then "," and "?" go, so that the rule for a comma between digits never applies ("1,2/3" -> "12
      3").
    - "'s" is split off before numbers and contractions are looked up: "two's" -> "2 's", "she's" -> "she 's".
    - Line breaks become spaces after the ends were stripped, not before.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return map_words(strip_punctuation(one_line(text)))


Version = Literal["after_2021", "before_2021"]


def vqa_score(examples: Sequence[Example], answers: AnswersById, *, version: Version = "after_2021") -> Scored:
    """Scores all questions, and by `extra["answer_type"]` (yes/no, number, other) where there is one.

    Source: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools. Its versions before and after a change of 2021 disagree
    on about a fifth of tricky questions, so a number needs its version beside it:

    - `before_2021` (also VL-T5's and VL-Adapter's `evaluate_raw`, so the paper's VL-BART numbers): the prediction is
      always normalised. The people's answers get punctuation handling only, and that only if they differ: an answer
      such as "Two" or "the dog" can never be matched.
    - `after_2021`: both sides get the whole treatment, but only if the ten answers differ. If all ten agree, nothing is
      normalised: "No" against ten "no" scores 0.

    `upload accuracy` is that of the server's file, whose answers EvalAI's normaliser has been over, as in LLaVA's.
    """

    def uploaded(example: Example) -> Mapping[str, float]:
        upload = normalise_evalai(answers.get(example.id, ""))
        return {"uploaded right": accuracy(upload, human_answers(example), version)}

    return score_points(
        examples,
        answers,
        lambda example, answer: accuracy(answer, human_answers(example), version),
        metrics={"accuracy": ACCURACY, "upload accuracy": Ratio("uploaded right", "asked")},
        kinds=lambda example: [f"answer type/{kind}"] if (kind := example.extra.get("answer_type")) else [],
        more=uploaded,
        settings={"vqa_version": version},
    )


def accuracy(prediction: str, people: Sequence[str], version: Version) -> float:
    """Returns one question's points, from 0 to 1."""
    if version == "before_2021":
        references = [strip_punctuation(answer) for answer in people] if len(set(people)) > 1 else people
        return leave_one_out(normalise(prediction), references)
    stripped = [one_line(answer) for answer in people]
    if len(set(stripped)) > 1:
        return leave_one_out(normalise(prediction), [normalise(answer) for answer in stripped])
    return leave_one_out(one_line(prediction), stripped)


def vqa_submission(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes EvalAI's file: normalised answers for *all* questions of the split, "" where there is none."""
    records = [
        {"question_id": published_id(example.id), "answer": normalise_evalai(answers.get(example.id, ""))}
        for example in examples
    ]
    return "vqav2.json", json.dumps(records, ensure_ascii=False)


_AFTER, _BEFORE = partial(vqa_score, version="after_2021"), partial(vqa_score, version="before_2021")
VQA = Benchmark(
    modes={"after_2021": _AFTER, "before_2021": _BEFORE},
    prompt=short,
    splits=("test_dev", "test", "validation"),
    submission=vqa_submission,
)
KARPATHY = Benchmark(modes={"before_2021": _BEFORE, "after_2021": _AFTER}, prompt=short)

EVALAI = {"normaliser": "evalai (m4c)"}


def _soft_points(example: Example, answer: str) -> float:
    return leave_one_out(normalise_evalai(answer), [normalise_evalai(text) for text in human_answers(example)])


def textvqa_prompt(example: Example) -> str:
    """Asks in LLaVA's wording, with its line of OCR tokens where `extra["reference_ocr"]` holds them."""
    tokens = example.extra.get("reference_ocr")
    line = "" if tokens is None else f"Reference OCR token: {tokens}\n"
    return f"{example.question}\n{line}{SHORT}"


def _textvqa_key(prediction: Prediction) -> Key:
    question = question_in(prediction.question)
    return (REPEATED.sub("", prediction.id), question) if question else None


TEXTVQA = Benchmark(
    modes={"": partial(score_points, points=_soft_points, settings=EVALAI)},  # by m4c's evaluator, as LLaVA's script
    prompt=textvqa_prompt,
    splits=("validation",),
    joins=(
        ByKey(
            "picture and question",
            _textvqa_key,
            lambda example: (str(example.extra.get("image_id")), plain(example.question)),
        ),
    ),
)


def vizwiz_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores mean soft accuracy over EvalAI's normaliser, in percent, as LLaVA's upload is scored.

    A missing answer is scored as the empty one that the file holds. Questions that the publisher marks as unanswerable
    (`extra["answerable"]` false) are also counted on their own.
    """

    def kinds(example: Example) -> list[str]:
        if "answerable" not in example.extra:
            return []
        return ["accuracy/answerable" if example.extra["answerable"] else "accuracy/unanswerable"]

    submitted = {example.id: answers.get(example.id, "") for example in examples}
    scored = score_points(examples, submitted, _soft_points, kinds=kinds, settings=EVALAI)
    items = {name: replace(item, failed=name not in answers) for name, item in scored.items.items()}
    return replace(scored, items=items)


def vizwiz_prompt(example: Example) -> str:
    """Asks in LLaVA's wording."""
    return f"{example.question}\n{UNANSWERABLE}\n{SHORT}"


def vizwiz_submission(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes EvalAI's file: normalised answers by picture."""
    pictures = {example.id: (example.images or (example.id,))[0].rsplit("/", 1)[-1] for example in examples}
    records = [
        {"image": picture, "answer": normalise_evalai(answers.get(name, ""))} for name, picture in pictures.items()
    ]
    return "vizwiz.json", json.dumps(records, ensure_ascii=False)


def _number_key(prediction: Prediction) -> Key:
    number = parse_digits(prediction.id)
    return None if number is None else (number, question_in(prediction.question))


def _number_example(example: Example) -> Key:
    match = re.search(r"_(\d+)$", PurePosixPath(example.images[0]).stem) if example.images else None
    number = parse_digits(match.group(1)) if match else None
    return None if number is None else (number, plain(example.question))


VIZWIZ = Benchmark(
    modes={"": vizwiz_score},
    prompt=vizwiz_prompt,
    submission=vizwiz_submission,
    joins=(
        ByKey(
            "picture",
            lambda prediction: PurePosixPath(prediction.ids.get("image", prediction.id)).name,
            lambda example: PurePosixPath(example.images[0]).name if example.images else None,
        ),
        ByKey("number in the picture's name, and question", _number_key, _number_example),
    ),
)

Conversion = Literal["llava", "vl_t5"]


def converted(answer: str) -> str:
    """Rewrites an answer as LLaVA's submission holds it.

    Periods go off the end *before* lower-casing, white space stays: " yes" and "yes. " are wrong.
    """
    return answer.rstrip(".").lower()


def gqa_score(examples: Sequence[Example], answers: AnswersById, *, conversion: Conversion = "llava") -> Scored:
    """Scores all, by open/binary, structural and semantic type; consistency and distribution where possible.

    As GQA's eval.py gives it, on answers that are converted as LLaVA does. `vl_t5` (so the paper's VL-BART numbers)
    compares the generated text as it is, and gives an answer's weight where a question has several.

    A question whose structural type is "query" counts as open, every other as binary. Without the publisher's choices
    file validity and plausibility are 0 and are not listed here. Consistency is the mean over *rightly answered*
    questions that entail others (`extra["entailed"]`) of how many of those are right. Distribution is chi-square
    between the histograms of true and given answers in each `extra["global_group"]`, weighted by the group's size, /
    100: lower is better, and no percent. Only questions with `extra["is_balanced"]`, or without it, are scored.
    """
    predictions = {name: converted(answer) if conversion == "llava" else answer for name, answer in answers.items()}
    right = {example.id: points(example, predictions) for example in examples}
    balanced = [example for example in examples if example.extra.get("is_balanced", True)]

    def entailed(example: Example) -> list[str]:
        return [name for name in example.extra.get("entailed", ()) if name != example.id]

    def kinds(example: Example) -> list[str]:
        shape, meaning = _types(example)
        of_shape = [f"accuracy/{'open' if shape == 'query' else 'binary'}", f"structural/{shape}"] if shape else []
        return [*of_shape, *([f"semantic/{meaning}"] if meaning else [])]

    def consistency(example: Example) -> Mapping[str, float]:
        names, hit = entailed(example), right[example.id]
        share = sum(right.get(name, 0.0) for name in names) / max(1, len(names))
        return {"consistent": hit * share, "entailing": hit} if names else {}

    metrics: dict[str, Formula] = {"accuracy": ACCURACY}
    if any(_types(example)[0] for example in balanced):
        metrics |= {kind: share_of(kind) for kind in ("accuracy/binary", "accuracy/open")}
    if any(map(entailed, balanced)):
        metrics["consistency"] = Ratio("consistent", "entailing")
    scored = score_points(
        balanced,
        answers,
        lambda example, _: right[example.id],
        metrics=metrics,
        kinds=kinds,
        more=consistency,
        settings={"conversion": conversion},
    )
    return replace(scored, metrics={**scored.metrics, **_distribution(balanced, predictions)})  # no bootstrap draws it


def _types(example: Example) -> tuple[str, str]:
    """Returns the structural and the semantic type, "" where the record has none."""
    types = example.extra.get("types", {})
    return types.get("structural", ""), types.get("semantic", "")


def points(example: Example, predictions: Mapping[str, str]) -> float:
    """Returns the weight of the true answer that was predicted; 1 where a question has one true answer."""
    return {answer.text: answer.weight for answer in example.answers}.get(predictions.get(example.id, ""), 0.0)


def _distribution(examples: Sequence[Example], predictions: Mapping[str, str]) -> dict[str, float]:
    true: defaultdict[str, Counter[str]] = defaultdict(Counter)
    answered: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        if (group := example.extra.get("global_group")) is not None:
            true[group][right_answer(example)] += 1
            answered[group][predictions.get(example.id, "")] += 1
    if not true:
        return {}
    weighted, everything = 0.0, 0
    for group, expected in true.items():
        distance = sum((answered[group][answer] - count) ** 2 / count for answer, count in expected.items())
        weighted += distance * expected.total()
        everything += expected.total()
    return {"distribution": weighted / everything / 100}


def gqa_submission(
    examples: Sequence[Example], answers: AnswersById, *, conversion: Conversion = "llava"
) -> tuple[str, str]:
    """Writes the file of GQA's eval.py and server, answers as the mode converts them."""
    as_held = converted if conversion == "llava" else str
    records = [{"questionId": example.id, "prediction": as_held(answers.get(example.id, ""))} for example in examples]
    return "gqa.json", json.dumps(records, ensure_ascii=False)


GQA = Benchmark(
    modes={"llava": partial(gqa_score, conversion="llava"), "vl_t5": partial(gqa_score, conversion="vl_t5")},
    prompt=short,
    splits=("testdev", "test", "validation"),
    submission=gqa_submission,
    submissions={"vl_t5": partial(gqa_submission, conversion="vl_t5")},
)


# NLVR2 and NLVR as their metrics.py gives them.


def sentence_of_nlvr2(identifier: str) -> str:
    """Returns the identifier without its third field ("dev-850-0-0"), which a sentence's examples share."""
    fields = identifier.split("-")
    if len(fields) != 4:
        raise UserError(f"NLVR2 identifier {identifier!r} has {len(fields)} fields, not four as in 'dev-850-0-0'")
    return "-".join([*fields[:2], "", fields[3]])


def as_read(answer: str) -> str:
    """Reads an answer as the script does after an identifier in a line.

    It strips a line of its CSV, parts it at commas and takes the second field; letter case aside that must be the label
    exactly. So " True", "true." and "True ,x" are wrong, "True " and "True,x" right.
    """
    return f"identifier,{answer}".strip().split(",")[1]


def nlvr2_score(
    examples: Sequence[Example], answers: AnswersById, *, sentence_of: Callable[[str], str] = sentence_of_nlvr2
) -> Scored:
    """Scores accuracy (precision there) and consistency, all of a sentence's examples right, in percent."""
    read = {example.id: as_read(answers.get(example.id, "")).lower() for example in examples}
    right = {example.id: read[example.id] == right_answer(example).lower() for example in examples}
    of_sentence = Counter(sentence_of(example.id) for example in examples)
    wrong = {sentence_of(name) for name, hit in right.items() if not hit}
    tally = Tally()
    for example in examples:
        sentence, hit = sentence_of(example.id), float(right[example.id])
        share = 1 / of_sentence[sentence]  # the sentence's examples add up to one sentence
        columns = {"right": hit, "asked": 1.0, "sentences": share, "consistent": share * (sentence not in wrong)}
        tally.add(example.id, hit, columns, unit=sentence, failed=example.id not in answers)
    return tally.scored({"accuracy": ACCURACY, "consistency": Ratio("consistent", "sentences")})


def score_nlvr(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores by NLVR's grouping of sentences: the part before the "-" ("1572-0"), whatever picture order follows."""
    return nlvr2_score(examples, answers, sentence_of=lambda identifier: identifier.split("-")[0])


def nlvr2_submission(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes the script's CSV; a missing answer stays empty, which is wrong there as it is here."""
    lines = [f"{example.id},{' '.join(answers.get(example.id, '').splitlines())}" for example in examples]
    return "nlvr2.csv", "\n".join(lines) + "\n"


NLVR = Benchmark(modes={"": score_nlvr}, prompt=true_or_false, together=lambda example: example.id.split("-")[0])
NLVR2 = Benchmark(
    modes={"": nlvr2_score},
    prompt=true_or_false,
    submission=nlvr2_submission,
    together=lambda example: sentence_of_nlvr2(example.id),
    joins=(
        ByKey("identifier without .png", lambda answer: answer.id.removesuffix(".png"), lambda example: example.id),
    ),
)
