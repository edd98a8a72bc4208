"""Opens a model of any kind, ready to be asked; what a kind needs is only imported for that kind."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from dora_vl.adapters import files
from dora_vl.adapters.adapter import CLOSED_ANSWERS, IMAGE_ASPECT, content_hash, local_folder, refuse_other_base
from dora_vl.adapters.base_weights import replaced_by, shared_tensors
from dora_vl.adapters.files import CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE
from dora_vl.adapters.folder import load_adapter, no_adapter
from dora_vl.adapters.settings import check_peft_fields
from dora_vl.backbones.base import Attention, Backbone, model_type_of, why_refused
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.formats import FORMATS, OWN_TEMPLATE, PROMPTS, TEMPLATES
from dora_vl.backbones.model import open_backbone
from dora_vl.core.strength import whole_model_between
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predictor import Predictor
from dora_vl.files import HUB_ID, check_attention, file_sha256
from dora_vl.run.base import DECODER, VLBART, load_base
from dora_vl.run.settings import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Says which model is to be opened: an adapter on its base, or a model by itself.

    Attributes:
        base: where the adapter's base is now; None looks where the adapter says.
        any_base: accepts a base with other content than the one trained on.
        template: the prompt format of a LLaVA-1.5 or a language model of which nothing says it.
        strength: how much of the adapter is applied: 0 nothing, 1 all, beyond it more of the same.
    """

    adapter: Path | None = None
    model: str | None = None
    base: str | None = None
    any_base: bool = False
    with_base: bool = False
    template: str | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """The model with its adapter, if it has one, and without it if that was asked for."""

    adapted: Predictor
    base: Predictor | None = None


REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES: Mapping[str, tuple[str, ...]] = {
    DECODER: ("base", "revision", "base_sha256", "template", "image_aspect", "dtype", "max_tokens"),
    VLBART: ("tasks", "base", "base_sha256", "dtype", "feature_tokens", "features", "settings"),
}
"""`recipe.json` must hold these entries, by kind of model, so that the model can be asked."""
DTYPES = ("bfloat16", "float16", "float32")
FLASH = "flash_attention_2"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be opened; without a recipe if no training run of ours wrote the adapter."""

    kind: str
    base: str
    request: ModelRequest
    revision: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attention: Attention = None


def find_source(request: ModelRequest) -> ModelSource:
    """Finds the model to open: reads and checks its folders before any weight is loaded."""
    adapter, recipe, revision = request.adapter, {}, None
    if (adapter is None) == (request.model is None):
        raise UserError("give either --adapter DIR, or --model FOLDER for a model without an adapter")
    if adapter is None:
        base = _plain_model(request, str(request.model))
    else:
        recipe = adapter_recipe(adapter)
        if "base" in recipe:
            name, revision = recipe["base"], recipe.get("revision")
        else:  # PEFT's own two files, or a folder that was converted
            recipe = {}
            name, revision = _base_of_peft(request, adapter)
        if request.base:
            name, revision = request.base, None
        base = find_base(name, adapter)
    kind = kind_of_base(base, revision)
    if kind == VLBART and not recipe:
        message = f"{adapter or base} is a VL-BART; its tasks and features are only stated in a run's recipe.json"
        raise UserError(message)
    if adapter is not None and recipe:
        _check_recipe(request, adapter, recipe, kind, base)
    if request.template is not None:
        names = (*TEMPLATES, *FORMATS, *PROMPTS, OWN_TEMPLATE)
        if recipe or request.template not in names:
            why = f"{adapter} says how its model is asked; leave it out" if recipe else f"there are {', '.join(names)}"
            raise UserError(f"--template {short_repr(request.template)}: {why}")
    dtype = str(recipe["dtype"]) if recipe else _stated_dtype(base, revision)
    attention = _attention(recipe)
    return ModelSource(
        kind=kind, base=base, request=request, revision=revision, recipe=recipe, dtype=dtype, attention=attention
    )


def _plain_model(request: ModelRequest, model: str) -> str:
    """Checks that a model is asked without an adapter."""
    if request.base is not None or request.with_base or request.any_base or request.strength != 1:
        raise UserError("--base, --any-base, --compare-base and --strength are about an adapter, not about --model")
    if (Path(model) / WEIGHTS_FILE).is_file() and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model} is an adapter folder; ask it with --adapter {model}")
    return model


def _base_of_peft(request: ModelRequest, adapter: Path) -> tuple[str, str | None]:
    """Reads the base and revision that a folder of PEFT's names."""
    config = files.read_peft_config(adapter)
    check_peft_fields(str(adapter), config)
    name = config.get("base_model_name_or_path")
    if not request.base and not (isinstance(name, str) and name):
        raise UserError(f"{adapter / CONFIG_FILE} does not say which base it was trained on; add --base FOLDER")
    return str(name), config.get("revision")


def _check_recipe(request: ModelRequest, adapter: Path, recipe: Mapping[str, Any], kind: str, base: str) -> None:
    """Refuses a run's recipe that says too little, names a strange kernel, or is of another base."""
    path = adapter / RECIPE_FILE
    if missing := [name for name in ENTRIES[kind] if name not in recipe]:
        raise UserError(f"{path} lacks {', '.join(missing)}; it was not written by a training run")
    if not request.any_base:
        refuse_other_base(recipe, base, str(adapter), recipe.get("revision"))
    check_attention(path, {"attn_implementation": recipe.get("attn_implementation")})


def _attention(recipe: Mapping[str, Any]) -> Any:
    """Returns the kernels that the adapter was trained with; leaves to transformers what only another machine has."""
    kernels = recipe.get("attn_implementation")
    missing = FLASH in (kernels.values() if isinstance(kernels, dict) else [kernels]) and not torch.cuda.is_available()
    return None if missing else kernels


def kind_of_base(base: str, revision: str | None = None) -> str:
    """Tells from its config which kind of backbone a model is."""
    model_type = model_type_of(base, revision)
    if model_type == VLBART:
        return VLBART
    if reason := why_refused(model_type):
        raise UserError(
            f"{base} is a {model_type!r}, which cannot be asked here: {reason}; take a model that answers chats, such "
            "as qwen2_5_vl, smolvlm, internvl, gemma3, llava or llama"
        )
    return DECODER


def _stated_dtype(base: str, revision: str | None) -> str:
    """Returns the number type that a model's config states; else float32."""
    config: Any = PreTrainedConfig.get_config_dict(base, revision=revision or "main")[0]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def adapter_recipe(adapter: Path) -> Mapping[str, Any]:
    """Reads the adapter's recipe; empty if the folder has none, as PEFT's."""
    if not (adapter / WEIGHTS_FILE).is_file():
        raise no_adapter(adapter)
    return files.read_recipe(adapter)


def find_base(base: str, adapter: Path) -> str:
    """Finds the base as a path, as given or under the repository, else as a hub id."""
    folders = [Path(base), REPOSITORY / base]
    for folder in folders:
        if folder.is_dir():
            return str(folder)
    if HUB_ID.fullmatch(base):
        return base
    looked = " and ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    message = f"{adapter} was trained on {base}, which is not at {looked}; say where it is now with --base FOLDER"
    raise UserError(message)


def model_hashes(source: ModelSource) -> Mapping[str, str]:
    """Hashes what the answers of a model depend on: the base's content and the adapter."""
    request, recipe = source.request, source.recipe
    digest = recipe.get("base_sha256") if not request.any_base else None
    base = str(digest) if digest else content_hash(local_folder(source.base, source.revision))
    of_adapter = {} if request.adapter is None else {"adapter": file_sha256(request.adapter / WEIGHTS_FILE)}
    return {**of_adapter, "base": base}


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone[Any])
DEFAULT_MAX_TOKENS = 1 << 20
"""A prompt and its answer may have this many tokens where no recipe states a limit: none is cut."""


def open_model(source: ModelSource | ModelRequest) -> OpenedModel:
    """Opens the model, quietly, on the GPU where there is one."""
    if isinstance(source, ModelRequest):
        source = find_source(source)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if source.kind == VLBART:
        return _open_vlbart(source)
    encoder, request = prompt_encoder(source), source.request  # before the weights: it may refuse
    backbone = load_decoder(source)
    adapted, plain = with_adapter(backbone, request.adapter, with_base=request.with_base, strength=request.strength)
    return OpenedModel(adapted=Assistant(adapted, encoder), base=None if plain is None else Assistant(plain, encoder))


def prompt_encoder(source: ModelSource) -> Encoder:
    """Opens the encoder of a decoder's prompts; reads no weights."""
    if source.kind != DECODER:
        raise UserError(f"{source.base} is a {source.kind}, which answers no chat")
    model = _model_config(source)
    return open_encoder(
        model.base,
        template=source.recipe.get("template") or source.request.template,
        aspect=model.image_aspect,
        max_tokens=int(source.recipe.get("max_tokens", DEFAULT_MAX_TOKENS)),
        revision=model.revision,
        thinking=source.recipe.get("thinking"),
    )


def load_decoder(source: ModelSource) -> Backbone[Any]:
    """Opens a decoder with its weights."""
    return load_base(open_backbone, _model_config(source))


def _model_config(source: ModelSource) -> ModelConfig:
    """Returns a source's settings as a run's `model` section has them."""
    recipe = source.recipe
    dtype: Any = source.dtype
    attention: Any = source.attention
    merged = PreTrainedConfig.get_config_dict(source.base, revision=source.revision or "main")[0].get(IMAGE_ASPECT)
    return ModelConfig(
        base=source.base,
        revision=source.revision,
        image_aspect=recipe.get(IMAGE_ASPECT) or merged or "pad",
        dtype=dtype,
        attn_implementation=attention,
        quantisation=recipe.get("quantisation"),
    )


def with_adapter(
    backbone: AnyBackbone, adapter: Path | None, *, with_base: bool = False, strength: float = 1.0
) -> tuple[AnyBackbone, AnyBackbone | None]:
    """Returns the backbone with the adapter at a strength, and with `with_base` one without, ready to answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if adapter is None:
        return backbone.to(device).eval(), None
    needs_base = with_base or strength != 1
    plain = None
    if needs_base:  # it shares every weight but those that the adapter replaces, such as the projector
        plain = copy.deepcopy(backbone, shared_tensors(backbone.model, replaced_by(adapter))).to(device).eval()
    load_adapter(backbone.model, adapter, change_base=not needs_base)
    adapted = backbone.to(device).eval()
    if plain is not None and strength == 0:
        adapted = plain
    elif plain is not None and strength != 1:
        whole_model_between(plain.model, adapted.model, strength)
    return adapted, plain if with_base else None


def _open_vlbart(source: ModelSource) -> OpenedModel:
    from dora_vl.backbones.feature_encoder import open_encoders
    from dora_vl.backbones.vlbart import load_vlbart, set_answer_heads, vlbart_encoder
    from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
    from dora_vl.evaluation.vlbart_tasks import Subtask, all_subtasks, closed, with_input_tokens

    request, recipe, base = source.request, source.recipe, source.base
    adapter, is_merged = Path(str(request.adapter)), request.model is not None
    loaded = load_vlbart(base, dtype=getattr(torch, source.dtype), attn_implementation=source.attention)
    lists, of_base = recipe.get(CLOSED_ANSWERS, {}), set(loaded.config.closed_answers)
    if request.strength != 1 and set(lists) - of_base:
        raise UserError(f"--strength: {adapter} answers from lists that its base does not have; leave it out")
    if not is_merged:
        set_answer_heads(loaded.model, lists)
    change = None if is_merged else adapter
    adapted, plain = with_adapter(loaded, change, with_base=request.with_base, strength=request.strength)
    trained_with = recipe["settings"]
    device = next(adapted.parameters()).device
    known = all_subtasks(task_prompt=trained_with["task_prompt"])
    trained = [with_input_tokens(known[name], trained_with.get("input_tokens")) for name in recipe["tasks"]]

    def subtasks(heads: Collection[str]) -> tuple[Subtask, ...]:
        return tuple(closed(task) if task.name in lists and task.name in heads else task for task in trained)

    first = VlBartAssistant(
        backbone=adapted,
        encoder=vlbart_encoder(base, subtitles_first=trained_with["subtitles_first"]),
        features=open_encoders(adapter, recipe, device=device, any_tower=request.any_base),
        subtasks=subtasks(lists),
        feature_tokens=recipe["feature_tokens"],
    )
    # Without the adapter a task is answered in words, unless the base brought a head of its own.
    without = None if plain is None else replace(first, backbone=plain, subtasks=subtasks(of_base))
    return OpenedModel(adapted=first, base=without)
