"""Which task a run's settings are for, and its pipeline: for training, and for commands that look at a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_vl.training.pipeline import Pipeline


TASKS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense")


def settings_and_task(
    words: Sequence[str], task: str | None, *, program: str, description: str = ""
) -> tuple[Any, str]:
    """The settings by the class of the named task, or of the one that knows most of what is stated."""
    from dora_vl.run.reading import read_settings
    from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig

    classes: dict[str, type[Any]] = {
        "llava_instruct": RunConfig,
        "commonsense": CommonsenseRunConfig,
        "vlbart_image": VlBartRunConfig,
        "vlbart_video": VlBartRunConfig,
    }
    name = task or _likeliest(words, {name: classes[name] for name in TASKS if name != "vlbart_video"})
    config = read_settings(words, classes[name], program=program, description=description)
    if task is None and name == "vlbart_image":
        from dora_vl.evaluation.vlbart_tasks import image_subtasks

        return config, "vlbart_image" if set(config.data.train) <= set(image_subtasks()) else "vlbart_video"
    return config, name


def _likeliest(words: Sequence[str], classes: Mapping[str, type[Any]]) -> str:
    """The task whose settings know most of what is stated."""
    from dora_vl.run.reading import setting_names

    stated = _stated(words)
    return min(classes, key=lambda name: len(_unknown(stated, setting_names(classes[name]))))


def _stated(words: Sequence[str]) -> set[str]:
    """Dotted names of all settings that the file and the command line give."""
    from dora_vl.run.reading import files_first, flattened

    found: set[str] = set()
    for word in files_first(words):
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        found |= set(flattened(json.loads(value))) if name == "config" else {name}
    return found


def _unknown(stated: set[str], names: Sequence[str]) -> list[str]:
    """Those that are neither a setting nor inside one."""
    known = (*names, "training", "variant")
    return [one for one in stated if not any(one == name or one.startswith(f"{name}.") for name in known)]


def pipeline_of(config: Any, task: str) -> Pipeline:
    """The task's pipeline; its imports take seconds, so they come after mistakes in the settings were reported."""
    if task in ("llava_instruct", "commonsense"):
        from dora_vl.training.decoder_pipeline import CommonsensePipeline, DecoderPipeline

        return DecoderPipeline(config) if task == "llava_instruct" else CommonsensePipeline(config)
    from dora_vl.evaluation import vlbart_tasks
    from dora_vl.training.vlbart_pipeline import VlBartPipeline

    is_video = task == "vlbart_video"
    subtasks = vlbart_tasks.video_subtasks if is_video else vlbart_tasks.image_subtasks
    known = subtasks(task_prompt=config.data.task_prompt)
    return VlBartPipeline(config, known, name=task, is_video=is_video)
