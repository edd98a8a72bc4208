"""Writes `docs/models.md` from the table of tiny families: `python -m tests.backbones.model_table`."""

from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dora_vl.backbones.families.table import NOT_TRAINED
from tests.backbones.tiny_families.family import Family
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
# Which models train

<!-- Written by `python -m tests.backbones.model_table` from tests/backbones/tiny_families/; change it there. -->

`dora-vl train` adapts any of these; `model_type` in a base's `config.json` names the family. Tests train, save, open
again, merge and ask a tiny random model of each, and compare its ids and losses with transformers'. By default every
linear layer of the language model is adapted and the projector trains whole. Prompts are the base's chat template, and
conversations hold any number of pictures, unless the table says otherwise.

{all} families. Those with a + take videos as such; the others see a video's frames as separate pictures: {names}.

Packed rows and trees (`data.packing`) give {rows} families the same loss and gradients as padded rows. Outputs of the
frozen vision parts can be stored (`data.cache_features`) in {stored}.

| `model_type` | remarks |
| --- | --- |
"""
PEFT = """
PEFT opens their adapters with the same logits (within 1e-4), except {refused}: PEFT would take its layers for an older
model's. Such folders say `DORA_VL`, which PEFT refuses.
"""
LANGUAGE = """
## Language models

Conversations without pictures, through the tokenizer's chat template. Tested: {tested}.

Other types of `AutoModelForImageTextToText` and `AutoModelForCausalLM` go the same way, untested.
"""
ROUNDS = """
## Several rounds, and thoughts

Each answer is trained as it is asked for: behind the chat template's own generation prompt, through what closes it.
Some templates rewrite earlier answers once later turns follow (Qwen3 and gpt-oss drop their thoughts). Then each
rewritten round is a row of its own, with what inference would see.

Thoughts are what an answer has in `<think>...</think>` at its beginning; the template gets them in its own form. A
template with a switch (`enable_thinking`, `thinking`) is asked with it on if any sample that is looked at has thoughts,
else off. `recipe.json` keeps that for `dora-vl ask`, `evaluate` and `serve`; other servers take it from you, such as
vLLM by `chat_template_kwargs`. Where a prompt itself opens a thought (QwQ, DeepSeek-R1), an answer without one is
trained behind an empty one.
"""
REFUSED = """
## Not trained

Refused in one line before any weight is loaded, as are language models that do not predict the next token of a text
(BERT, BART and their kin).

| why | `model_type` |
| --- | --- |
"""
FORMATS = """
## Models without a chat template

`model.template` names a prompt format instead:

- `question_answer`: `Question: ... Answer: ...`, a line for each round, the end token behind each answer.
- `paligemma` (taken without being named): the question as prefix, seen in both directions, the answer as suffix; one
  question a conversation, pictures before it.
"""


def row(name: str, family: Family) -> str:
    """One family's line."""
    remarks = (
        f"prompt `{family.format}`" if family.format else "",
        f"not adapted: {family.unadapted}" if family.unadapted else "",
        f"outputs not stored: {family.unstored}" if family.unstored else "",
        f"plain rows: {family.plain_rows}" if family.plain_rows else "",
        family.remark,
    )
    return f"| {name} | {'; '.join(filter(None, remarks))} |"


def refused() -> list[str]:
    """The types for pictures and text that are not trained, a line for each reason; the same in every transformers."""
    types: dict[str, list[str]] = {}
    of_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    for name in sorted(NOT_TRAINED.keys() - of_text):
        types.setdefault(NOT_TRAINED[name], []).append(name)
    return [f"| {reason} | {', '.join(names)} |" for reason, names in types.items()]


def page() -> str:
    """The whole page."""
    families = sorted(FAMILIES)
    lines = [line for line in (row(name, FAMILIES[name]) for name in families) if not line.endswith("|  |")]
    names = ", ".join(f"{name}{'+' if FAMILIES[name].video else ''}" for name in families)
    stored, rows = (sum(not getattr(FAMILIES[name], why) for name in families) for why in ("unstored", "plain_rows"))
    head = HEAD.format(names=names, stored=stored, rows=rows, all=len(families))
    refused_by_peft = [name for name in sorted(FAMILIES) if not FAMILIES[name].peft]
    return (
        f"{head}{chr(10).join(lines)}\n"
        f"{PEFT.format(refused=', '.join(refused_by_peft))}"
        f"{LANGUAGE.format(tested=', '.join(LANGUAGE_MODELS))}"
        f"{ROUNDS}{REFUSED}{chr(10).join(refused())}\n"
        f"{FORMATS}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
