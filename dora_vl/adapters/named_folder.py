"""What a person has named instead of an adapter's folder, and which folder is meant."""

from __future__ import annotations

from pathlib import Path

from dora_vl.adapters.checkpoints import complete_checkpoints
from dora_vl.adapters.folder import CONFIG_FILE, FILES, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, pickled
from dora_vl.errors import UserError, shown_names

INNER = "adapter"
"""Where a run and each of its checkpoints keep their adapter."""


def no_adapter(place: Path) -> UserError:
    """The error of a path that holds no adapter: what is there, and the next step."""
    if not place.exists():
        return UserError(f"{place} holds no adapter: no such file or folder; give a run's adapter folder")
    if place.is_file():
        return UserError(f"{place} is not a folder; give the adapter folder of a run, such as runs/demo/adapter")
    if (place / INNER / WEIGHTS_FILE).is_file():
        return UserError(f"{place} is a run's folder or a checkpoint; its adapter is {place / INNER}")
    checkpoints = [one / INNER for one in complete_checkpoints(place) if (one / INNER / WEIGHTS_FILE).is_file()]
    if checkpoints:
        return UserError(
            f"{place} is the folder of a run that has not ended; resume it, or take the adapter of its last "
            f"checkpoint, {checkpoints[-1]}"
        )
    if (place / PICKLED_WEIGHTS_FILE).is_file():
        return pickled(place)
    if (place / CONFIG_FILE).is_file():
        return UserError(f"{place} has no {WEIGHTS_FILE}; the folder is incomplete, copy it again or train again")
    if (place / "config.json").is_file():
        return UserError(
            f"{place} is a model's folder and has no {WEIGHTS_FILE}; give an adapter's, or ask it as --model"
        )
    there = shown_names(sorted(path.name for path in place.iterdir()))
    return UserError(
        f"{place} holds no adapter: it has no {WEIGHTS_FILE}, but {there}; an adapter is {', '.join(FILES)}"
    )
