"""The task files of VL-BART by the name that `recipe.json` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from dora_vl.errors import UserError
from dora_vl.tasks.subtask import Subtask

TASK_FILES = {"vlbart_image": "dora_vl.tasks.vlbart_image", "vlbart_video": "dora_vl.tasks.vlbart_video"}


def subtasks_of(task: str, *, task_prompt: bool) -> Mapping[str, Subtask]:
    """Every task of a VL-BART task file, by the file's name; `task_prompt` as in training.

    Raises:
        UserError: no such task file.
    """
    if task not in TASK_FILES:
        raise UserError(f"the adapter was trained by {task!r}; there are {', '.join(TASK_FILES)}")
    return import_module(TASK_FILES[task]).subtasks(task_prompt=task_prompt)
