"""How transformers is asked for a base with its language model quantised, and what is done after."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.configuration_utils import PreTrainedConfig

from dora_vl.adapters.quantised_base import SCHEMES, Quantisation, here, kept_whole, quantised_layers
from dora_vl.core.opaque import quantised_in, settle_quantised
from dora_vl.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantisedLoading:
    """What to give `from_pretrained`, and the layers that are to come out quantised; by default nothing and none."""

    kind: Quantisation | None = None
    dtype: torch.dtype = torch.float32
    layers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def finish(self, model: nn.Module) -> None:
        """Quantises what transformers does not, and checks that it is those layers.

        Raises:
            UserError: other layers are quantised than were meant to be.
        """
        if self.kind == "hqq":
            self._replace_layers(model)
        settle_quantised(model)
        found = {name for name, _, _ in quantised_in(model)}
        if other := sorted(found ^ set(self.layers)):
            raise UserError(
                f"model.quantisation: {len(found)} layers are quantised instead of {len(self.layers)}, first "
                f"{other[:2]}; this model cannot be quantised here, set model.quantisation: null"
            )

    def _replace_layers(self, model: nn.Module) -> None:
        """transformers 5.24 opens folders that HQQ wrote, but quantises none with it while loading."""
        for name in self.layers:
            parent, _, leaf = name.rpartition(".")
            linear: Any = model.get_submodule(name)
            setattr(model.get_submodule(parent), leaf, SCHEMES["hqq"].layer(linear, self.dtype, here()))


def quantised_loading(
    folder_or_id: str, quantisation: Quantisation | None, *, dtype: torch.dtype, revision: str | None
) -> QuantisedLoading:
    """How a base is loaded for `model.quantisation`; nothing but its config is read.

    Raises:
        UserError: the base cannot be quantised.
    """
    if quantisation is None:
        return QuantisedLoading()
    config: Any = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision or "main")[0]
    found = quantised_layers(config, quantisation, folder_or_id)
    layers = found.quantised
    if found.whole:
        log.warning(
            "%d of the language model's %d linear layers stay whole, first %s: %s takes widths that are multiples "
            "of %d",
            len(found.whole),
            len(found.whole) + len(layers),
            found.whole[0],
            quantisation,
            SCHEMES[quantisation].width,
        )
    options: dict[str, Any] = {}
    if quantisation != "hqq":
        whole = kept_whole(config, layers, folder_or_id)
        options["quantization_config"] = _bits_and_bytes(quantisation, dtype, whole)
    return QuantisedLoading(quantisation, dtype, layers, options)


def _bits_and_bytes(kind: Quantisation, dtype: torch.dtype, whole: list[str]) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=whole,
    )
