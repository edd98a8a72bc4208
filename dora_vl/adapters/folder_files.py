"""The two JSON files of an adapter folder, `adapter_config.json` and `recipe.json`, and the types of their fields.

A folder comes from anywhere: a value of another type than its field's is refused by name before anything is computed
with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from dora_vl.core.config import DropoutMode, Init, LayerKind, Method, RankScaling
from dora_vl.data.regular_file import NoRegularFile, open_regular
from dora_vl.errors import UserError, shown

CONFIG_FILE = "adapter_config.json"
RECIPE_FILE = "recipe.json"

AS_JSON_HAS_IT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""No text for a number, no number for a flag; what is not named here is not read, or looked at where it is."""
Count = Annotated[int, Field(ge=1)]
Names = list[str]
Place = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Of a folder or a hub: the operating system takes no name with a NUL in it."""


@with_config(AS_JSON_HAS_IT)
class PeftFields(TypedDict, total=False):
    """PEFT's `adapter_config.json`, as far as something here is computed from it."""

    peft_type: str
    r: Count
    lora_alpha: float
    lora_dropout: float
    rank_pattern: dict[str, Count] | None
    alpha_pattern: dict[str, float] | None
    use_dora: bool
    use_rslora: bool
    fan_in_fan_out: bool
    modules_to_save: Names | None
    target_modules: str | Names | None
    base_model_name_or_path: Place | None
    revision: Place | None


@with_config(AS_JSON_HAS_IT)
class OwnFields(TypedDict, total=False):
    """`adapter` of our `recipe.json`."""

    method: Method
    rank: Count
    alpha: float
    dropout: float
    dropout_mode: DropoutMode
    detach_norm: bool
    rank_scaling: RankScaling
    kinds: list[LayerKind]
    init: Init
    random_seed: int
    opaque_layers: Names
    rank_pattern: dict[str, Count]
    alpha_pattern: dict[str, float]
    magnitude_targets: Names
    parts: dict[str, Names]
    adapted_parts: dict[str, Names]
    experts: Names
    kept: Names


@with_config(AS_JSON_HAS_IT)
class RecipeFields(TypedDict, total=False):
    """Our `recipe.json`: how the model is asked again."""

    task: str
    base: Place
    revision: Place | None
    base_sha256: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    quantisation: str | None
    max_tokens: Count
    template: str | None
    image_aspect: str | None
    as_published: bool
    adapter: OwnFields


_PEFT, _RECIPE = TypeAdapter(PeftFields), TypeAdapter(RecipeFields)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """PEFT's fields of an adapter folder.

    Raises:
        UserError: the file is missing or no JSON object, or a field is of another type.
    """
    return _checked(folder / CONFIG_FILE, _PEFT.validate_python)


def read_recipe(folder: Path) -> dict[str, Any]:
    """Our own settings beside them; empty for a folder that was not made here.

    Raises:
        UserError: the file is no JSON object, or a field is of another type.
    """
    path = folder / RECIPE_FILE
    return _checked(path, _RECIPE.validate_python) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of an adapter folder.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except NoRegularFile as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; an adapter folder holds it beside its tensors") from None
    except (ValueError, RecursionError) as error:  # no JSON, nested endlessly, or a number of thousands of digits
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _checked(path: Path, validate: Callable[[object], object]) -> dict[str, Any]:
    content = read_json(path)
    try:
        validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(one) for one in first["loc"])
        raise UserError(f"{path}: {place} is {shown(first['input'])}; {_in_small(first['msg'])}") from None
    return content


def _in_small(message: str) -> str:
    return message[:1].lower() + message[1:]
