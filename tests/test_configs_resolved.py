"""The published runs' settings stay what they are: each recipe, resolved, against the values written down for it.

`configs_resolved.json` holds every value of every run, defaults included: those that most runs of a folder share once,
then what a run has else. It is changed by hand, with the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dora_vl.run.reading import run_parser
from dora_vl.run.settings import settings_of
from tests.test_configs import CONFIGS, Recipe, read

RESOLVED: Mapping[str, Any] = json.loads(Path(__file__).with_name("configs_resolved.json").read_text())
EXPECTED = {name: {**group["shared"], **run} for group in RESOLVED.values() for name, run in group["runs"].items()}
NAMES = {recipe.name: recipe for recipe in CONFIGS}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    named = {f"{prefix}.{key}" if prefix else key: entry for key, entry in value.items()}
    return {name: leaf for key, entry in named.items() for name, leaf in flat(entry, key).items()}


def resolved(recipe: Recipe) -> dict[str, Any]:
    settings = settings_of(read(recipe))
    assert (settings.pop("variant"), settings.pop("task")) == (recipe.variant, recipe.path.parent.name)
    return flat(settings)


def test_every_recipe_is_written_down() -> None:
    assert sorted(NAMES) == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_resolves_to_what_is_written_down(name: str) -> None:
    actual, expected = resolved(NAMES[name]), EXPECTED[name]
    assert {key: actual.get(key, "is not there") for key in expected} == expected
    defaults = run_parser(read(NAMES[name]).task).get_defaults().as_dict()
    defaults = flat(json.loads(json.dumps(defaults)))  # as what was read: lists for tuples
    more = {key: value for key, value in actual.items() if key not in expected}
    assert more == {key: defaults.get(key, "has no default") for key in more}, "it sets what it did not set"
