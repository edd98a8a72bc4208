"""Models of every family, their prompts and inputs, and LLaVAs composed of parts."""

from __future__ import annotations


def register_towers() -> None:
    """Makes transformers' auto classes open a composed LLaVA, whose vision network is a `GridTower`.

    Every door here calls it; call it yourself before `AutoModelForImageTextToText.from_pretrained` of such a folder.
    """
    from transformers import AutoConfig, AutoModel

    from dora_vl.backbones.towers import GridTower, GridTowerConfig

    AutoConfig.register(GridTowerConfig.model_type, GridTowerConfig, exist_ok=True)
    AutoModel.register(GridTowerConfig, GridTower, exist_ok=True)
