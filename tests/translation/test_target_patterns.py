"""PEFT's endings and expressions as patterns of full names: they hit the names that PEFT's own matching hits."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from dora_vl.start.rules import globs_of_endings, globs_of_expression

NAMES = [
    f"{prefix}.layers.{number}.{block}.{leaf}"
    for prefix in ("model.language_model", "model.vision_tower.vision_model.encoder", "model.visual")
    for number in (0, 3, 17)
    for block, leaf in (
        ("self_attn", "q_proj"),
        ("self_attn", "k_proj"),
        ("self_attn", "out_proj"),
        ("mlp", "gate_proj"),
        ("mlp", "fc1"),
    )
] + [
    "lm_head",
    "model.multi_modal_projector.linear_1",
    "model.visual.merger.mlp.0",
    "model.language_model.embed_tokens",
]


def hit(globs: list[str]) -> set[str]:
    return {name for name in NAMES if any(fnmatchcase(name, glob) for glob in globs)}


def peft_hits(targets: str | list[str]) -> set[str]:
    config = LoraConfig(target_modules=targets)
    return {name for name in NAMES if check_target_module_exists(config, name)}


ENDINGS = [
    ["q_proj"],
    ["q_proj", "out_proj", "fc1"],
    ["self_attn.k_proj"],
    ["lm_head"],
    ["merger.mlp.0", "fc1"],
    ["model.language_model.layers.3.self_attn.q_proj"],
]
EXPRESSIONS = [
    r".*\.q_proj",
    r"^model\.language_model\..*(q_proj|k_proj)$",
    r".*language_model.*\.(self_attn|mlp)\.(q_proj|gate_proj)",
    r"model\.visual\.layers\.\d+\.mlp\.fc1",
    r"model\.language_model\.layers\.[0-3]\.self_attn\.[qk]_proj",
    r"(?:model\.)?lm_head",
    r".+_proj",
    r"model\.visual\..*?\.fc.",
    r"lm_head|.*linear_[^2]",
]


@pytest.mark.parametrize("names", ENDINGS, ids=str)
def test_endings_hit_what_peft_hits(names: list[str]) -> None:
    globs = globs_of_endings(names)
    assert hit(globs) == peft_hits(names) != set()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_hits_what_peft_hits(expression: str) -> None:
    globs = globs_of_expression(expression)
    assert hit(globs) == peft_hits(expression) != set()


@pytest.mark.parametrize(
    "expression",
    [r"^(?!.*visual).*proj$", r"(a|b)+", r"a{2}", r"[\w]x", r"\w+", r"(a", r"a)b", r"a+", r"x\Z", "[", "a*"],
)
def test_what_patterns_cannot_say_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        globs_of_expression(expression)


@given(st.text(st.sampled_from("ab.[]*?!0\\(|)^$+d{"), max_size=12))
def test_any_expression_is_read_rightly_or_refused(expression: str) -> None:
    try:
        globs = globs_of_expression(expression)
        compiled = re.compile(expression)
    except (ValueError, re.error):
        return
    for name in ("", "a", "b", "ab", "a.b", "aab", "0", "a0", "[", "]", "*", "?", "!", "ba.0"):
        assert any(fnmatchcase(name, glob) for glob in globs) >= bool(compiled.fullmatch(name)), (
            expression,
            globs,
            name,
        )
