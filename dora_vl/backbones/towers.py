"""Vision networks of timm, open_clip and transformers as one `PreTrainedModel` that yields grid tokens.

transformers' `LlavaForConditionalGeneration` takes a `GridTower` as its `vision_config` unchanged, with
`vision_feature_layer=-1` and `vision_feature_select_strategy="full"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from dora_vl.backbones.tower_config import GridTowerConfig, register_config
from dora_vl.errors import UserError


def build_network(config: GridTowerConfig) -> nn.Module:
    """The library's network of this config, with its random initial weights and no classification head."""
    options: dict[str, Any] = dict(config.options or {})
    if config.library == "timm":
        import timm

        return timm.create_model(config.architecture, pretrained=False, num_classes=0, **options)
    if config.library == "open_clip":
        from open_clip.model import CLIP, CLIPTextCfg

        # Public functions build both towers or none, so the text tower is as small as it can be, and thrown away.
        smallest_text = CLIPTextCfg(context_length=1, vocab_size=2, width=8, heads=1, layers=1)
        quick_gelu = options.get("quick_gelu", False)
        return CLIP(options["embed_dim"], options["vision_cfg"], smallest_text, quick_gelu=quick_gelu).visual
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModel

    network = AutoModel.from_config(AutoConfig.for_model(**options))
    if not isinstance(network, nn.Module):
        raise TypeError(f"AutoModel built a {type(network).__name__} for {config.architecture}")
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
    # Not at the top: importing the table runs the registration's hook, which imports this module.
    from transformers.models.auto.modeling_auto import AutoModel

    register_config()
    AutoModel.register(GridTowerConfig, GridTower, exist_ok=True)


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
