"""A trained adapter on its base, ready to be asked; and, beside it, the base without the adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dora_vl.adapters.folder import RECIPE_FILE, WEIGHTS_FILE, load_adapter, own_name, read_json, read_weights
from dora_vl.adapters.provenance import content_hash, local_folder
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.backbones.module import Backbone
from dora_vl.core.opaque import loose_tensors
from dora_vl.data.examples import Example
from dora_vl.data.media import open_image
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.predict import Decoding
from dora_vl.evaluation.prompts import about_video
from dora_vl.run.assembly import build_encoder, load_backbone
from dora_vl.run.recipe import ModelConfig
from dora_vl.vision.images import ImagePreparation

REPOSITORY = Path(__file__).resolve().parents[2]
HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
LLAVA_ENTRIES = ("base", "revision", "base_sha256", "template", "image_aspect", "dtype", "max_tokens")
AnyBackbone = TypeVar("AnyBackbone", bound=Backbone[Any])
AnyAssistant = TypeVar("AnyAssistant", covariant=True)
NOT_YET_A_CHARACTER = "\ufffd"  # what decoding gives for the first bytes of a character whose last are still to come


class TextStreamer(BaseStreamer):
    """Hands on an answer's text as its tokens come, never half a character."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Takes the next token; generate's first call brings the prompt's ids, of which embeddings have none."""
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith(NOT_YET_A_CHARACTER):
            self._hand_on(text)

    def end(self) -> None:
        """Hands on what is left."""
        self._hand_on(self._decode(self._ids))

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


@dataclass(frozen=True)
class Assistant:
    """A backbone with what turns words and pictures into its inputs."""

    backbone: LlavaBackbone
    encoder: LlavaEncoder
    preparation: ImagePreparation

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Callable[[str], object] | None = None,
    ) -> str:
        """The answer to turns that end with a question; one `<image>` in them for each picture.

        Args:
            turns: the conversation so far, its last turn the question.
            pictures: RGB pictures in the order of their placeholders.
            max_new_tokens: longest answer.
            write: receives the answer piece by piece while it is made.

        Raises:
            UserError: the turns cannot be put to this model.
        """
        try:
            ids = self.encoder.encode_prompt(turns)[None].to(self.backbone.model.device)
            room = Decoding(max_new_tokens=max_new_tokens, max_positions=max_positions(self.backbone.config))
            room.check_room(ids.shape[1], "question")
        except BadSample as error:
            raise UserError(f"the question cannot be put to this model: {error.reason}") from error
        pixels = None
        if pictures:
            prepared = [self.preparation.prepare(picture) for picture in pictures]
            pixels = torch.stack(prepared).to(self.backbone.model.device)
        streamer = None if write is None else TextStreamer(self.encoder.decode, write)
        new_ids = self.backbone.generate(
            ids,
            torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )
        return self.encoder.decode(new_ids[0])

    def answer_example(
        self,
        example: Example,
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Callable[[str], object] | None = None,
    ) -> str:
        """The answer to an example's question about these pictures; see `answer`."""
        turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + about_video(example))]
        return self.answer(turns, pictures, max_new_tokens=max_new_tokens, write=write)


@dataclass(frozen=True)
class Assistants(Generic[AnyAssistant]):
    """The model with its adapter, and without where that was asked for."""

    adapted: AnyAssistant
    base: AnyAssistant | None


def open_assistants(
    adapter: Path, *, base: str | None = None, with_base: bool = False, any_base: bool = False
) -> Assistants[Assistant]:
    """Builds the LLaVA that an adapter folder's `recipe.json` describes, on the GPU where there is one.

    Args:
        adapter: the folder that training wrote.
        base: where the base model is now; None looks at the recipe's place.
        with_base: also gives the model without the adapter; it shares all weights that the adapter leaves alone.
        any_base: accepts a base with other content than the one trained on.

    Raises:
        UserError: the folder is incomplete, the base is not there, or is another one.
    """
    recipe = read_recipe(adapter, needed=LLAVA_ENTRIES)
    place = base_of(adapter, recipe, base=base, any_base=any_base)
    model = ModelConfig(
        base=place,
        revision=None if base else recipe["revision"],
        template=recipe["template"],
        image_aspect=recipe["image_aspect"],
        dtype=recipe["dtype"],
        quantisation=recipe.get("quantisation"),
    )
    adapted, plain = with_adapter(load_backbone(model, cached_features=False), adapter, with_base=with_base)
    encoder = build_encoder(model, adapted, max_tokens=recipe["max_tokens"])
    preparation = ImagePreparation.from_folder(place, aspect=model.image_aspect, revision=model.revision)
    return Assistants(
        adapted=Assistant(adapted, encoder, preparation),
        base=None if plain is None else Assistant(plain, encoder, preparation),
    )


def with_adapter(backbone: AnyBackbone, adapter: Path, *, with_base: bool) -> tuple[AnyBackbone, AnyBackbone | None]:
    """The backbone with the adapter loaded, and one without it where that is asked for, ready to answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = without_adapter(backbone, adapter).to(device).eval() if with_base else None
    load_adapter(backbone.model, adapter, change_base=not with_base)  # the two share the frozen weights
    return backbone.to(device).eval(), plain


def base_of(adapter: Path, recipe: Mapping[str, Any], *, base: str | None, any_base: bool) -> str:
    """Where the adapter's base is, checked to be the one that it was trained on.

    Raises:
        UserError: it is not there, or is another one.
    """
    place = find_base(base or recipe["base"], adapter)
    if not any_base:
        check_base(recipe, place, adapter)
    return place


def read_recipe(adapter: Path, *, needed: Sequence[str] = ()) -> Mapping[str, Any]:
    """The adapter's recipe, with every entry that asking needs.

    Raises:
        UserError: the folder, the recipe or an entry is missing.
    """
    if not adapter.is_dir():
        raise UserError(f"{adapter} is not a folder; give the adapter folder of a run, such as runs/demo/adapter")
    if not (adapter / WEIGHTS_FILE).is_file():
        raise UserError(f"{adapter} has no {WEIGHTS_FILE}; the folder is incomplete, copy it again or train again")
    recipe = read_json(adapter / RECIPE_FILE)
    missing = [name for name in needed if name not in recipe]
    if missing:
        raise UserError(f"{adapter / RECIPE_FILE} lacks {', '.join(missing)}; it was not written by a training run")
    return recipe


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


def without_adapter(backbone: AnyBackbone, adapter: Path) -> AnyBackbone:
    """A second backbone that shares every weight but those the adapter folder replaces (such as the projector).

    Call it before the adapter is loaded.
    """
    replaced = {own_name(key) for key in read_weights(adapter)}
    tensors = [*backbone.model.named_parameters(), *backbone.model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in replaced}
    shared |= {id(tensor): tensor for tensor in loose_tensors(backbone.model)}
    return copy.deepcopy(backbone, shared)


def open_picture(path: Path) -> Image.Image:
    """One picture file as RGB.

    Raises:
        UserError: it is missing or no picture.
    """
    try:
        return open_image(path.parent, path.name, follow_links=True)
    except BadSample as error:
        raise UserError(error.reason) from error
