"""Writes `docs/models.md` from the table of tiny families: `python -m tests.backbones.model_table`."""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dora_vl.backbones.families import NOT_TRAINED
from tests.backbones.tiny_families.family import Family
from tests.backbones.tiny_families.language import LANGUAGE_MODELS
from tests.backbones.tiny_families.table import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
# Which models train

<!-- Written by `python -m tests.backbones.model_table` from tests/backbones/tiny_families/; change it there. -->

`tasks/llava_instruct.py` adapts any of these; `model.base` is a folder or a hub id, and its `model_type` (in
`config.json`) says the family. Each is tested with a tiny random model: token ids equal to the processor's own, the
loss equal to transformers' own within 1e-5 (float32), conversations without a picture, with one and with two, three
training steps, the adapter opened again, merged and asked.

By default every linear layer of the language model is adapted and the projector trains whole. What is no linear layer
is named in the log of the run.

## Vision-language models

| `model_type` | pictures in a conversation | videos | prompt | not adapted | remarks |
| --- | --- | --- | --- | --- | --- |
"""
PEFT = """
PEFT opens the adapters of these families, and of the language models below, with the same logits (within 1e-4), but
for {refused}, whose layers it takes for those of an older model and would lose, as it would {untried}'s: their folders
say `DORA_VL`, which PEFT refuses.
"""
LANGUAGE = """
## Language models

Conversations of words alone, through the tokenizer's chat template; a sample with a picture is refused by its id.
Tested: {tested}. Other types of
`AutoModelForCausalLM` go the same way.
"""
REFUSED = """
## Not trained

Refused in one line before any weight is loaded.

| `model_type` | why |
| --- | --- |
"""
LOST_BY_PEFT = ("inkling2", "inkling2_loop", "unlimited_ocr")
"""Types that have no tiny model here, and that PEFT takes for older ones."""
UNTRIED = """
## Not tried

The other types of `AutoModelForImageTextToText` go the same way, and nobody has tested them: {untried}.

## Models without a chat template

`model.template` names a prompt format instead:

- `question_answer`: `Question: ... Answer: ...`, a line for each round, the end token behind each answer.
- `paligemma`: the question as prefix, seen in both directions, the answer as suffix. PaliGemma's processor takes no
  other, so it need not be named. One question a conversation, pictures before it.

A base with neither is refused before its weights are loaded.
"""


def row(name: str, family: Family) -> str:
    """One family's line."""
    prompt = f"`{family.format}`" if family.format else "chat template"
    several = "one question, pictures first" if family.format == "paligemma" else "any number"
    video = "yes" if family.video else "as pictures"
    remarks = "; ".join(
        one for one in (family.remark, f"needs the package {family.needs}" if family.needs else "") if one
    )
    return f"| {name} | {several} | {video} | {prompt} | {family.unadapted or '-'} | {remarks or '-'} |"


def page() -> str:
    """The whole page."""
    tried = set(FAMILIES) | set(NOT_TRAINED)
    untried = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - tried)
    lines = [row(name, FAMILIES[name]) for name in sorted(FAMILIES)]
    refused_by_peft = [name for name in sorted(FAMILIES) if not FAMILIES[name].peft]
    refused = [f"| {name} | {NOT_TRAINED[name]} |" for name in sorted(NOT_TRAINED)]
    return (
        f"{HEAD}{chr(10).join(lines)}\n"
        f"{PEFT.format(refused=', '.join(refused_by_peft), untried=', '.join(LOST_BY_PEFT))}"
        f"{LANGUAGE.format(tested=', '.join(LANGUAGE_MODELS))}"
        f"{REFUSED}{chr(10).join(refused)}\n"
        f"{UNTRIED.format(untried=', '.join(untried))}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
