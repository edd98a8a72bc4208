"""docs/settings.md is what the dataclasses say, whole."""

from __future__ import annotations

import re
from typing import get_args

from dora_vl.run.reading import setting_names
from dora_vl.run.settings import Task
from tests.run.settings_page import PAGE, page

REMEDY = "python -m tests.run.settings_page writes it anew"


def test_the_page_is_made_of_the_dataclasses() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), REMEDY


def test_every_setting_of_every_task_has_a_row_with_a_sentence() -> None:
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL))
    rows = {
        f"{'' if section == 'At the top level' else f'{section}.'}{name}": text
        for section, body in sections.items()
        for name, text in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", body, re.MULTILINE)
    }
    names = {name for task in get_args(Task) for name in setting_names(task, training=False)}
    assert names - {"training"} <= set(rows)
    assert [name for name, text in rows.items() if len(text) < 12] == []
