"""Which model is asked: an adapter folder or a model's folder read and checked, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from dora_vl.adapters import folder_files
from dora_vl.adapters.folder import CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE
from dora_vl.adapters.named_folder import no_adapter
from dora_vl.adapters.provenance import content_hash, local_folder
from dora_vl.adapters.settings import check_peft_fields
from dora_vl.backbones.base import Attention
from dora_vl.backbones.families import NOT_TRAINED, model_type_of
from dora_vl.backbones.prompt_formats import FORMATS
from dora_vl.backbones.template_table import TEMPLATES
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.asker import Wanted
from dora_vl.evaluation.result_files import file_sha256
from dora_vl.model_files import HUB_ID
from dora_vl.run.adapting import CAUSAL_LM, IMAGE_TEXT, LLAVA, VLBART

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES: Mapping[str, tuple[str, ...]] = {
    LLAVA: ("base", "revision", "base_sha256", "template", "image_aspect", "dtype", "max_tokens"),
    IMAGE_TEXT: ("base", "revision", "base_sha256", "dtype", "max_tokens"),
    CAUSAL_LM: ("base", "revision", "base_sha256", "prompt", "train_on", "dtype", "max_tokens"),
    VLBART: ("task", "tasks", "base", "base_sha256", "dtype", "feature_tokens", "features", "settings"),
}
"""What `recipe.json` must say so that a model of each kind can be asked."""
ENCODERS = frozenset({*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})
"""Types that transformers also calls causal language models, where their decoder is asked for alone."""
OWN_TEMPLATE = "tokenizer"
"""The name of a language model's own chat template."""
DTYPES = ("bfloat16", "float16", "float32")
FLASH = "flash_attention_2"
KERNELS = ("sdpa", "eager", FLASH)
"""Of attention; transformers fetches others from the hub and runs them."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be opened.

    Attributes:
        kind: of the backbone, as `run.adapting` and `recipe.json` call it.
        place: folder or hub id of the base, or of the model itself.
        recipe: the adapter's; empty where no training run of ours wrote one.
        dtype: of the weights.
        attention: as the adapter was trained with it; None: transformers' choice.
    """

    kind: str
    place: str
    wanted: Wanted
    revision: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attention: Attention = None


def find_source(wanted: Wanted) -> ModelSource:
    """What is to be opened.

    Raises:
        UserError: no such folder or hub id, an incomplete one, a base that is another than the one trained on, or a
            kind of model that cannot be asked.
    """
    if (wanted.adapter is None) == (wanted.model is None):
        raise UserError("give --adapter DIR, or --model FOLDER for a model without an adapter, one of the two")
    if wanted.adapter is None:
        source = _model(wanted, str(wanted.model))
    elif "base" in (recipe := read_recipe(wanted.adapter)):
        source = _of_run(wanted, wanted.adapter, recipe)
    else:
        source = _of_peft(wanted, wanted.adapter)
    if wanted.template is not None:
        _check_template(wanted.template, source)
    return source


def _check_template(template: str, source: ModelSource) -> None:
    """Refuses a prompt format where the model has its own, or of a name that there is not."""
    if source.recipe:
        raise UserError(
            f"--template {shown(template)}: {source.wanted.adapter} says how its model is asked; leave it out"
        )
    if source.kind == IMAGE_TEXT and template in FORMATS:
        return
    if source.kind == IMAGE_TEXT:
        raise UserError(f"--template {shown(template)}: {source.place} is asked by its own chat template; leave it out")
    if template not in TEMPLATES and template != OWN_TEMPLATE:
        raise UserError(f"--template {shown(template)}: there are {', '.join(TEMPLATES)} and {OWN_TEMPLATE}")


def _model(wanted: Wanted, model: str) -> ModelSource:
    if wanted.base is not None or wanted.with_base or wanted.any_base:
        raise UserError("--base, --any-base and --compare-base are about an adapter; --model names the model itself")
    if not Path(model).is_dir() and (model.startswith((".", "/")) or not HUB_ID.fullmatch(model)):
        raise UserError(f"--model {shown(model)}: no such folder, and no hub id")
    if (Path(model) / WEIGHTS_FILE).is_file() and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model} is an adapter folder; ask it with --adapter {model}")
    kind = kind_of_base(model)
    if kind == VLBART:
        raise UserError(f"--model {model} is a VL-BART: its tasks and features stand in an adapter's recipe.json alone")
    return ModelSource(kind=kind, place=model, wanted=wanted, dtype=_stated_dtype(model, None))


def _of_run(wanted: Wanted, adapter: Path, recipe: Mapping[str, Any]) -> ModelSource:
    place = find_base(wanted.base or recipe["base"], adapter)
    revision = None if wanted.base else recipe.get("revision")
    kind = str(recipe["backbone"]) if "backbone" in recipe else kind_of_base(place, revision)  # none in older folders
    if kind not in ENTRIES:
        raise UserError(f"{adapter / RECIPE_FILE}: backbone is {shown(kind)}; there are {', '.join(ENTRIES)}")
    missing = [name for name in ENTRIES[kind] if name not in recipe]
    if missing:
        raise UserError(f"{adapter / RECIPE_FILE} lacks {', '.join(missing)}; it was not written by a training run")
    if not wanted.any_base:
        check_base(recipe, place, adapter)
    return ModelSource(
        kind=kind,
        place=place,
        wanted=wanted,
        revision=revision,
        recipe=recipe,
        dtype=str(recipe["dtype"]),
        attention=_attention(recipe.get("attn_implementation"), adapter),
    )


def _attention(stated: object, adapter: Path) -> Attention:
    """What a recipe states; transformers' choice where it is for another machine than this one.

    Raises:
        UserError: it states something else than `KERNELS`.
    """
    kernels = [*stated.values()] if isinstance(stated, dict) else [stated]
    if stated is not None and not all(kernel in KERNELS for kernel in kernels):
        raise UserError(
            f"{adapter / RECIPE_FILE}: attn_implementation is {shown(stated)}; there are {', '.join(KERNELS)}"
        )
    if FLASH in kernels and not torch.cuda.is_available():
        return None
    return cast(Attention, stated)


def _of_peft(wanted: Wanted, adapter: Path) -> ModelSource:
    """An adapter folder of PEFT's own two files, or one that was converted: its base says what it is."""
    config = folder_files.read_peft_config(adapter)
    check_peft_fields(str(adapter), config)
    stated = config.get("base_model_name_or_path")
    if not wanted.base and not (isinstance(stated, str) and stated):
        raise UserError(f"{adapter / CONFIG_FILE} does not say which base it was trained on; add --base FOLDER")
    place = find_base(wanted.base or str(stated), adapter)
    revision = None if wanted.base else config.get("revision")
    kind = kind_of_base(place, revision)
    if kind == VLBART:
        raise UserError(f"{adapter} is a VL-BART's without tasks and features; ask the folder that training wrote")
    return ModelSource(kind=kind, place=place, wanted=wanted, revision=revision, dtype=_stated_dtype(place, revision))


def kind_of_base(place: str, revision: str | None = None) -> str:
    """Which kind of backbone a model is, by its config alone.

    Raises:
        UserError: none that can be asked; it names the type and what can.
    """
    model_type = model_type_of(place, revision)
    if model_type in (LLAVA, VLBART):
        return model_type
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type not in NOT_TRAINED:
        return IMAGE_TEXT
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in (*NOT_TRAINED, *ENCODERS):
        return CAUSAL_LM
    reasons = {**dict.fromkeys(ENCODERS, "it has an encoder, which reads a text as a whole"), **NOT_TRAINED}
    reason = reasons.get(model_type, "transformers knows it as no image-text-to-text and no causal language model")
    raise UserError(
        f"{place} is a {model_type!r}, which cannot be asked here: {reason}; take a model that answers chats, such as "
        "qwen2_5_vl, smolvlm, internvl, gemma3, llava or llama"
    )


def _stated_dtype(place: str, revision: str | None) -> str:
    """The number type that a model's config states; else float32."""
    config: Any = PreTrainedConfig.get_config_dict(place, revision=revision or "main")[0]
    stated = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return stated if stated in DTYPES else "float32"


def read_recipe(adapter: Path) -> Mapping[str, Any]:
    """The adapter's recipe; empty where the folder has none, as PEFT's.

    Raises:
        UserError: no such folder, or it is incomplete.
    """
    if not adapter.is_dir():
        raise UserError(f"{adapter} is not a folder; give the adapter folder of a run, such as runs/demo/adapter")
    if not (adapter / WEIGHTS_FILE).is_file():
        raise no_adapter(adapter)
    return folder_files.read_recipe(adapter)


def find_base(base: str, adapter: Path) -> str:
    """The base as a path, tried as given and under the repository; else as a hub id.

    Raises:
        UserError: no such folder, and the name cannot be a hub id; it lists the places.
    """
    places = [Path(base), REPOSITORY / base]
    for place in places:
        if place.is_dir():
            return str(place)
    if HUB_ID.fullmatch(base):
        return base
    looked = " and ".join(dict.fromkeys(str(place.resolve()) for place in places))
    raise UserError(
        f"{adapter} was trained on {base}, which is not at {looked}; say where it is now with --base FOLDER"
    )


def check_base(recipe: Mapping[str, Any], base: str, adapter: Path) -> None:
    """Refuses a base whose weights or config are not those the adapter was trained on.

    Raises:
        UserError: it is another one; both hashes are named.
    """
    try:
        found = content_hash(local_folder(base, recipe.get("revision")))
    except OSError:
        return  # a hub id that is not in the cache yet; loading it says what is wrong, or fetches that revision
    if found != recipe["base_sha256"]:
        raise UserError(
            f"{adapter} was trained on a base with sha256 {recipe['base_sha256'][:12]}…, {base} has {found[:12]}…; "
            "name the right one with --base FOLDER, or add --any-base to try it all the same"
        )


def hashes(source: ModelSource) -> Mapping[str, str]:
    """What tells the answers of an opened model from others': of the base's content, and of the adapter."""
    wanted, recipe = source.wanted, source.recipe
    known = recipe.get("base_sha256") if not wanted.any_base else None
    base = str(known) if known else content_hash(local_folder(source.place, source.revision))
    own = {} if wanted.adapter is None else {"adapter": file_sha256(wanted.adapter / WEIGHTS_FILE)}
    return {**own, "base": base}
