"""The base class of what training drives: a Hugging Face model, and a forward pass that training can afford."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


class Backbone(nn.Module, Generic[Model]):
    """Holds a Hugging Face model under `model`; adapters, files and parameter names are that model's."""

    model: Model
