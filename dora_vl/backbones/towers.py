"""Vision networks of timm, open_clip and transformers as one `PreTrainedModel` that yields grid tokens.

transformers' `LlavaForConditionalGeneration` takes a `GridTower` as its `vision_config` unchanged, with
`vision_feature_layer=-1` and `vision_feature_select_strategy="full"`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal, no_type_check

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from dora_vl.errors import UserError

# Which vision network a run's settings name; imports nothing that takes time.


VisionLibrary = Literal["timm", "open_clip", "transformers"]
PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Which vision network to take, from where, and which part of it."""

    library: VisionLibrary
    name: str
    """timm's or open_clip's model name; for transformers a folder or hub id (a whole CLIP or its vision part)."""
    weights: str = PRETRAINED
    """`pretrained` (the library's own download, transformers' folder), `random`, an open_clip tag, or a `.pth` /
    `.safetensors` file."""
    weights_in_order: bool = False
    """Matches a weights file to the network by position instead of by name; every shape must fit."""
    layer: int | None = None
    """Hidden state from the end; None is -2 for transformers (as LLaVA-1.5 does) and -1 for the others."""
    grid_pool: int | None = None
    """Side of the grid after average pooling; None keeps the network's own."""
    image_size: int | None = None
    """Pixels along a side; None takes the published value."""
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


# The config of a grid tower; needs transformers' config class and nothing heavier.
#
# A file of its own: `lazy_registration` imports it while transformers' `modeling_utils`, which `towers` needs, may
# itself be halfway through its import.


Layout = Literal["NCHW", "NHWC", "NLC"]
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


# transformers' generated __init__ takes more names than its signature says; a checker that reads it refuses them.
@no_type_check
class GridTowerConfig(PreTrainedConfig):
    """All that rebuilds a vision tower of any library without its weights, and the preparation it expects.

    `layout`, `prefix_tokens` and `grid_side` describe what the library's network returns; they are measured once, when
    the tower is composed (`towers.load_tower`), so that nothing has to be guessed from a network's class later.
    """

    model_type = "dora_grid_tower"

    library: VisionLibrary = "timm"
    architecture: str = ""
    """The library's own name of the network, for example `tf_efficientnet_lite0` or `ViT-B-32`."""
    options: dict[str, Any] | None = None
    """What the library needs beside the name: timm's keyword arguments, open_clip's `vision_cfg`..., a config."""
    layer: int = -1
    """Which hidden state is taken, counted from the end; -1 is the last one, after the network's final norm."""
    grid_pool: int | None = None
    """Side of the grid after average pooling; None keeps the network's own grid."""
    layout: Layout = "NCHW"
    prefix_tokens: int = 0
    """Class and register tokens in front of the grid (`NLC` only); dropped."""
    grid_side: int = 7
    hidden_size: int = 1280
    image_size: int = 224
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    interpolation: str = "bicubic"

    @property
    def tokens(self) -> int:
        """Grid tokens that one picture becomes."""
        return (self.grid_pool or self.grid_side) ** 2

    @property
    def patch_size(self) -> int:
        """Pixels per grid token along a side, rounded down; transformers' processor counts tokens with it."""
        return self.image_size // (self.grid_pool or self.grid_side)


def register_config() -> None:
    """Makes transformers' `AutoConfig` know this config; calling it again changes nothing."""
    # Not at the top: importing the table runs `lazy_registration`'s hook, which imports this module.
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(GridTowerConfig.model_type, GridTowerConfig, exist_ok=True)


def build_network(config: GridTowerConfig) -> nn.Module:
    """The library's network of this config, with its random initial weights and no classification head."""
    options: dict[str, Any] = dict(config.options or {})
    if config.library == "timm":
        import timm

        return timm.create_model(config.architecture, pretrained=False, num_classes=0, **options)
    if config.library == "open_clip":
        return build_open_clip_visual(options)
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModel

    network = AutoModel.from_config(AutoConfig.for_model(**options))
    if not isinstance(network, nn.Module):
        raise TypeError(f"AutoModel built a {type(network).__name__} for {config.architecture}")
    return network


def build_open_clip_visual(options: dict[str, Any]) -> nn.Module:
    """open_clip's vision tower from `embed_dim`, `vision_cfg` and `quick_gelu`, without any text tower.

    open_clip builds both towers or none in public functions; the text tower is made as small as it can be and
    thrown away.
    """
    from open_clip.model import CLIP, CLIPTextCfg

    smallest_text = CLIPTextCfg(context_length=1, vocab_size=2, width=8, heads=1, layers=1)
    model = CLIP(
        embed_dim=options["embed_dim"],
        vision_cfg=options["vision_cfg"],
        text_cfg=smallest_text,
        quick_gelu=options.get("quick_gelu", False),
    )
    return model.visual


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
        """Leaves the library's own initial weights as they are."""

    def train(self, mode: bool = True) -> GridTower:
        """Sets the mode of everything but batch norms."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        **_: Any,  # transformers passes output flags on; there is one output, so none of them matters
    ) -> BaseModelOutput:
        """Grid tokens [images, tokens, width], row by row, as the only hidden state."""
        grid = self.grid(pixel_values)
        if self.config.grid_pool is not None:
            grid = F.adaptive_avg_pool2d(grid, self.config.grid_pool)
        tokens = grid.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def grid(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images channels rows columns"]:
        """The chosen layer's grid before pooling, channels first."""
        raw = network_output(self.network, self.config, pixel_values)
        if self.config.layout == "NHWC":
            return raw.permute(0, 3, 1, 2)
        if self.config.layout == "NLC":
            side = self.config.grid_side
            return raw[:, self.config.prefix_tokens :].transpose(1, 2).unflatten(2, (side, side))
        return raw


def network_output(network: nn.Module, config: GridTowerConfig, pixel_values: Tensor) -> Tensor:
    """What the library returns for the chosen layer, in the library's own layout."""
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


def register_towers() -> None:
    """Makes transformers' `AutoConfig` and `AutoModel` know `GridTower`; calling it again changes nothing."""
    # Not at the top: importing the table runs `lazy_registration`'s hook, which imports this module.
    from transformers.models.auto.modeling_auto import AutoModel

    register_config()
    AutoModel.register(GridTowerConfig, GridTower, exist_ok=True)


# Makes transformers know `GridTower` at the moment transformers itself is imported, and not before.
#
# A composed LLaVA must open with plain `transformers` after `import dora_vl`, in whichever order the two are imported.
# transformers has no plug-in entry point, so there are two ways:
#
# - import transformers here and register at once: two and a half seconds and torch for all who write
#   `import dora_vl`, and `dora_vl.core` could no longer be used where transformers is missing;
# - watch for the import (this module): one entry at the front of `sys.meta_path`, which answers for the two modules
#   that hold the auto classes' tables and for nothing else, and takes itself out after them. The price is that a
#   reader has
#   to know of it, so it is kept to this file; our own code does not rely on it and calls `towers.register_towers()`.


CONFIG_TABLE = "transformers.models.auto.configuration_auto"
MODEL_TABLE = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Registers `GridTower` as soon as transformers' tables exist: now, or when they are imported."""
    steps = {CONFIG_TABLE: _register_config, MODEL_TABLE: _register_model}
    waiting = {table: step for table, step in steps.items() if table not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _TableWatcher(waiting))
    for table in steps.keys() - waiting.keys():
        steps[table]()


def _register_config() -> None:
    if _is_known():
        import_module("dora_vl.backbones.towers").register_config()


def _register_model() -> None:
    if _is_known():
        import_module("dora_vl.backbones.towers").register_towers()


def _is_known() -> bool:
    """Whether transformers is of a major version that the towers are written for.

    vLLM's plugin brings this package into processes with an older one, whose import must not fail for it.
    """
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    return version.partition(".")[0] == "5"


class _TableWatcher(MetaPathFinder):
    """Finds the tables as any importer would, and registers once each has been executed."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec with our step behind its loader; None for every other module."""
        if fullname not in self.waiting:
            return None
        register = self.waiting.pop(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader, register)
                return spec
        return None


class _ThenRegister(Loader):
    """Runs a module as its own loader does, then one more function."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then registers."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.register()


# Fits a table of weights to a network exactly.


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, in_order: bool, source: str) -> None:
    """Fills the network from a table of tensors, every name (or, `in_order`, every position) exactly once."""
    target = network.state_dict()
    if in_order:
        state = renamed_in_order(state, target, source=source)
    missing, unexpected = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    wrong = sorted(name for name in target.keys() & state.keys() if target[name].shape != state[name].shape)
    if missing or unexpected or wrong:
        raise UserError(
            f"{source} does not fit {type(network).__name__}: {len(missing)} names missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}; where the "
            "tensors stand in the same order under other names, set vision_weights_in_order"
        )
    network.load_state_dict(dict(state), strict=True)


def renamed_in_order(state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same tensors under the target's names, position by position, each shape checked."""
    if len(state) != len(target):
        raise UserError(f"{source} holds {len(state)} tensors, the network {len(target)}: not the same order")
    renamed: dict[str, Tensor] = {}
    for place, ((theirs, value), (ours, wanted)) in enumerate(zip(state.items(), target.items(), strict=True)):
        if value.shape != wanted.shape:
            raise UserError(
                f"{source}: tensor {place} is {theirs} {tuple(value.shape)}, but the network has {ours} "
                f"{tuple(wanted.shape)} there: not the same order"
            )
        renamed[ours] = value
    return renamed
