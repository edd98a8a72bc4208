"""Vision networks of timm, open_clip and transformers as one `PreTrainedModel`, and the preparation of pictures.

transformers' `LlavaForConditionalGeneration` takes a `GridTower` as its `vision_config` unchanged, with
`vision_feature_layer=-1` and `vision_feature_select_strategy="full"`. Pictures are padded to a square, cropped or
squashed, bit for bit as each was published.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, no_type_check

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling, new
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dora_vl.backbones.specs import VisionLibrary
from dora_vl.data.pictures import READING
from dora_vl.errors import UserError, needs_extra, short_repr
from dora_vl.files import opening
from dora_vl.shapes import Float

logger = logging.getLogger(__name__)

Aspect = Literal["pad", "square", "squash"]
Layout = Literal["NCHW", "NHWC", "NLC"]
PADDED_SIDE = 4_096
"""A square of up to this side, in pixels, is padded as a whole, as published; a larger one is padded by rows."""
ROWS = 256
"""This many rows are padded at once."""


# transformers' generated __init__ takes more names than its signature says; a checker that reads it refuses them.
@no_type_check
class GridTowerConfig(PreTrainedConfig):
    """Rebuilds a vision tower of any library without its weights, and states the preparation it expects.

    `layout`, `prefix_tokens` and `grid_side` describe what the library's network returns. They are measured once, when
    the tower is composed (`tower_sources.load_tower`), so that nothing is guessed from a network's class later.
    """

    model_type = "dora_grid_tower"

    library: VisionLibrary = "timm"
    architecture: str = ""
    """Names the network as the library does, e.g. `tf_efficientnet_lite0` or `ViT-B-32`."""
    options: dict[str, Any] | None = None
    """Holds further arguments of the library: timm's keyword arguments, open_clip's `vision_cfg`..., a config."""
    layer: int = -1
    """Numbers the hidden state to take, from the end; -1 is the last one, after the network's final norm."""
    grid_pool: int | None = None
    layout: Layout = "NCHW"
    prefix_tokens: int = 0
    """Counts the class and register tokens in front of the grid, which are dropped (`NLC` only)."""
    grid_side: int = 7
    hidden_size: int = 1280
    image_size: int = 224
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    interpolation: str = "bicubic"

    @property
    def tokens(self) -> int:
        """Returns the grid tokens of one picture."""
        return (self.grid_pool or self.grid_side) ** 2

    @property
    def patch_size(self) -> int:
        """Pixels per grid token along a side, rounded down; transformers' processor counts tokens with it."""
        return self.image_size // (self.grid_pool or self.grid_side)


def build_network(config: GridTowerConfig) -> nn.Module:
    """Builds the library's network with its random initial weights and no classification head."""
    options: dict[str, Any] = dict(config.options or {})
    if config.library == "timm":
        import timm

        return timm.create_model(config.architecture, pretrained=False, num_classes=0, **options)
    if config.library == "open_clip":
        with needs_extra("towers", "a tower of open_clip"):
            from open_clip.model import CLIP, CLIPTextCfg

        # Public functions build both towers or none, so the text tower is as small as it can be, and thrown away.
        smallest_text = CLIPTextCfg(context_length=1, vocab_size=2, width=8, heads=1, layers=1)
        quick_gelu = options.get("quick_gelu", False)
        return CLIP(options["embed_dim"], options["vision_cfg"], smallest_text, quick_gelu=quick_gelu).visual
    network: Any = AutoModel.from_config(AutoConfig.for_model(**options))
    return network


class GridTower(PreTrainedModel):
    """A frozen-or-trained vision network whose only output is its grid, as tokens.

    Batch norms always run on their stored statistics: a LLaVA batch says nothing about the tower's pictures, and
    updated statistics would be a change that no adapter carries.
    """

    config_class = GridTowerConfig
    config: GridTowerConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = "image"
    # The network brings its own attention; whatever the language model uses must not be refused here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GridTowerConfig) -> None:
        super().__init__(config)
        self.network = build_network(config)
        keep_all_buffers(self.network)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps the library's own initial weights."""

    def train(self, mode: bool = True) -> GridTower:
        """Sets the mode of everything but batch norms."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                if module.affine:  # DeepSpeed casts weights and leaves the statistics in float32
                    module.to(module.weight.dtype)
        return self

    def forward(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        **_: Any,  # transformers passes output flags on; there is one output, so none of them matters
    ) -> BaseModelOutput:
        """Returns grid tokens [images, tokens, width], row by row, as the only hidden state."""
        # On a processor convolutions take half the time where a pixel's channels lie side by side.
        grid = network_output(self.network, self.config, pixel_values.contiguous(memory_format=torch.channels_last))
        if self.config.layout == "NHWC":
            grid = grid.permute(0, 3, 1, 2)
        elif self.config.layout == "NLC":
            side = self.config.grid_side
            grid = grid[:, self.config.prefix_tokens :].transpose(1, 2).unflatten(2, (side, side))
        if self.config.grid_pool is not None:
            grid = F.adaptive_avg_pool2d(grid, self.config.grid_pool)
        tokens = grid.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


def network_output(network: nn.Module, config: GridTowerConfig, pixel_values: Tensor) -> Tensor:
    """Returns the library's output of the chosen layer, in the library's own layout."""
    if config.library == "open_clip":
        taken = network.forward_intermediates(  # pyright: ignore[reportCallIssue]
            pixel_values, indices=[config.layer], normalize_intermediates=config.layer == -1, intermediates_only=True
        )
        return taken["image_intermediates"][0]
    if config.library == "timm" and config.layer == -1:
        return network.forward_features(pixel_values)  # pyright: ignore[reportCallIssue]
    if config.library == "timm":
        return network.forward_intermediates(  # pyright: ignore[reportCallIssue]
            pixel_values, indices=[config.layer], intermediates_only=True, output_fmt="NCHW", stop_early=True
        )[0]
    if config.layer == -1:
        return network(pixel_values).last_hidden_state
    return network(pixel_values, output_hidden_states=True).hidden_states[config.layer]


def keep_all_buffers(network: nn.Module) -> None:
    """Makes every buffer part of the checkpoint.

    `from_pretrained` builds on the meta device, so a buffer that is computed at construction and not saved (Swin's
    relative positions, rotary tables) would come back uninitialised.
    """
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=True)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The picture size (pixels along a side) and colour statistics that a network was trained with."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def stated_preparation(processor: Mapping[str, Any], image_size: int) -> Preparation:
    """Reads a picture processor's fields, except the size; raises what Python does for anything else."""

    def colours(name: str) -> tuple[float, ...]:
        red, green, blue = (float(value) for value in processor[name])
        return red, green, blue

    interpolation = Resampling(int(processor["resample"])).name.lower()
    return Preparation(
        image_size=image_size, mean=colours("image_mean"), std=colours("image_std"), interpolation=interpolation
    )


def image_processor(preparation: Preparation, *, aspect: Aspect) -> LlavaImageProcessorPil:
    """Makes transformers' processor with these values.

    It is the PIL one, whatever else is installed: only that equals the original bit for bit (torchvision's differs by
    up to 1/255).
    """
    side = preparation.image_size
    return LlavaImageProcessorPil(
        do_pad=aspect == "pad",
        size={"height": side, "width": side} if aspect == "squash" else {"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=Resampling[preparation.interpolation.upper()],
        image_mean=list(preparation.mean),
        image_std=list(preparation.std),
    )


class ImagePreparation:
    """Turns a picture into pixels, in one of three published ways.

    `pad` (every LLaVA-1.5 recipe): the picture is centred on a square of the colour int(mean * 255), then resized.
    `square` (CLIP's own): the shorter side is resized to the tower's size and the middle is cut out.
    `squash` (VL-Adapter's grid features): both sides are resized to the tower's size.
    """

    def __init__(self, preparation: Preparation, *, aspect: Aspect) -> None:
        if aspect not in get_args(Aspect):
            raise UserError(f"image_aspect {short_repr(aspect)}: there are {', '.join(get_args(Aspect))}")
        self.preparation = preparation
        self.aspect: Aspect = aspect
        self._processor = image_processor(preparation, aspect=aspect)
        self._warned = False

    @classmethod
    def from_folder(cls, folder_or_id: str, *, aspect: Aspect, revision: str | None = None) -> ImagePreparation:
        """Reads the size and colours that a LLaVA folder's preprocessor states."""
        with opening(f"{folder_or_id!r} states no picture preparation"):
            config = LlavaImageProcessorPil.from_pretrained(folder_or_id, revision=revision or "main").to_dict()
            return cls(stated_preparation(config, int(config["crop_size"]["height"])), aspect=aspect)

    def prepare(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """Returns normalised pixels of one RGB picture."""
        if self.aspect == "pad" and max(picture.size) > PADDED_SIDE:
            picture = self._padded_by_rows(picture)
        if self.aspect == "square" and not self._warned and max(picture.size) > 2 * min(picture.size):
            self._warned = True
            logger.warning("square keeps only the middle of a picture of %d x %d; squash keeps all", *picture.size)
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"]
        return pixels[0]

    def as_picture(self, pixels: Float[Tensor, "3 height width"]) -> Image.Image:
        """Returns the picture that normalised pixels show; preparing it again, in any way, gives the same pixels."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preparation.mean, self.preparation.std))
        shades = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(shades.permute(1, 2, 0).numpy())

    def _padded_by_rows(self, picture: Image.Image) -> Image.Image:
        """Makes the padded square at its final size without the full square, which takes gigabytes for long pictures.

        Pillow resizes rows first, each by itself, and rounds them to 8 bits before the columns; so does this, and
        rows that are only padding keep their colour.
        """
        side, colour = self.preparation.image_size, tuple(int(value * 255) for value in self.preparation.mean)
        resample = Resampling[self.preparation.interpolation.upper()]
        length = max(picture.size)
        left, top = ((length - own) // 2 for own in picture.size)
        narrow = new("RGB", (side, length), colour)
        for start in range(0, picture.height, ROWS):
            rows = picture.crop((0, start, picture.width, min(start + ROWS, picture.height)))
            padded = new("RGB", (length, rows.height), colour)
            padded.paste(rows, (left, 0))
            narrow.paste(padded.resize((side, rows.height), resample), (0, top + start))
        return narrow.resize((side, side), resample)

    def fingerprint(self) -> str:
        """Hashes everything that changes the pixels."""
        settings = {"aspect": self.aspect, "reading": READING, **dataclasses.asdict(self.preparation)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
