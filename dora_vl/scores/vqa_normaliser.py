"""How the official VQA script (GT-Vision-Lab/VQA, vqaEval.py) rewrites an answer before it compares.

Quirks that decide scores, kept:

- A punctuation mark becomes a space, but vanishes where the text has it next to a space anywhere; and where a comma
  stands between two digits anywhere, *all* punctuation vanishes ("1,2/3" -> "123").
- A period goes unless a digit follows: "3." loses it, ".5" keeps it (the look-behind meant to protect "3." is
  mistyped). At most 32 go: a flag is passed where the script's `sub` takes a count.
- Number words up to ten and "none" become digits, then a, an, the go, then contractions get their apostrophe.
- The contractions with a capital I never match, since the text is in lower case by then; "somebody'd" *loses* its
  apostrophe.
"""

from __future__ import annotations

import re

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


def _one_apostrophe_less(form: str) -> list[str]:
    return [form[:place] + form[place + 1 :] for place, letter in enumerate(form) if letter == "'"]


CONTRACTIONS = {spelling: form for form in _FORMS.split() for spelling in _one_apostrophe_less(form)} | {
    "somebody'd": "somebodyd"
}
"""A spelling that lacks one apostrophe -> the form; the official table holds just these."""


def normalise(answer: str) -> str:
    """The whole treatment, as a prediction gets it."""
    return map_words(strip_punctuation(one_line(answer)))


def one_line(answer: str) -> str:
    """Line breaks and tabs as spaces, none at the ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Punctuation and periods as the script treats them; letters stay as they are."""
    in_number = COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        vanishes = in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if vanishes else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def map_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe, single spaces."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
