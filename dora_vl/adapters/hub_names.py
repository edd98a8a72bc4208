"""The names that published checkpoints use for a model's tensors, which vLLM and older tools read.

transformers keeps the renamings from a checkpoint's names to its classes' own, and undoes them when it saves. One it
undoes only where the model was loaded from such a checkpoint: since 5.x a CLIP or SigLIP tower's class has no
`vision_model` inside it, so that a model made from parts is saved without that word, which every published folder has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def hub_conversions(model: Any) -> list[Any]:
    """transformers' conversions from a checkpoint's names to this model's, those that a save has to undo."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [one for one in get_model_conversion_mapping(model, add_legacy=False) if _is_undone(one)]


def _is_undone(conversion: Any) -> bool:
    """Whether published names have what this conversion takes away.

    A prefix that is taken from the whole model tells where somebody cut a text model out of a larger one, and one that
    is put in, where somebody left it out: of those nothing says that a checkpoint has them. A part's own prefix is its
    class's former layout.
    """
    from transformers.core_model_loading import PrefixChange

    if not isinstance(conversion, PrefixChange):
        return True
    return conversion.prefix_to_remove is not None and bool(conversion.scope_prefix)


def save_under_hub_names(model: Any) -> None:
    """Makes `model.save_pretrained` write the names of published folders, as if it had been loaded from one."""
    model._weight_conversions = hub_conversions(model)


Identified = tuple[str, str | None]
"""What transformers reads a key as: the model's own name, and the pattern of the pieces that are joined into it."""


def hub_names(
    model: Any,
    found: Mapping[str, Identified],
    read_as: Callable[[str], Identified],
    unjoined: Callable[[str], str],
) -> dict[str, str]:
    """Each key of a model's files -> the key that published folders have.

    Tensors that transformers joins or splits when it loads them stay the pieces that they are. A key whose new name
    would not be read as the same tensor keeps its own; so do all, where two would have one name.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = reversed(hub_conversions(model))
    undone: Any = [one.reverse_transform() for one in conversions if isinstance(one, WeightRenaming)]
    names = {key: rename_source_key(unjoined(key), undone, [])[0] for key in found}
    safe = {key: name if read_as(name) == found[key] else key for key, name in names.items()}
    return safe if len(set(safe.values())) == len(safe) else {key: key for key in safe}
