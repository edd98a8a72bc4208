"""What every backbone is: a Hugging Face model that hands features to a head, and generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.generation import ScoreWatch
from dora_vl.data.batches import visible
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError

Model = TypeVar("Model", bound=PreTrainedModel)
Attention = str | Mapping[str, str] | None
"""Attention kernels as transformers takes them: one, or one for each part by its config's name and for the rest as "";
None: its own choice for each class."""


class Backbone(nn.Module, Generic[Model]):
    """Holds a Hugging Face model under `model`; adapters, files and parameter names are that model's."""

    model: Model


class Features(NamedTuple):
    """The positions of a batch that predict a label, one after another, and what they predict.

    `targets` are the token ids that stand one position later; `rows` says which row of the batch each comes
    from, so that a head can normalise per sample. Without labels there is one position a row, its last, and
    `targets` is -100 there. A tuple, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples and not in other
    classes.
    """

    hidden: Float[Tensor, "labelled width"]
    logits: Float[Tensor, "labelled vocab"]
    targets: Int[Tensor, " labelled"]
    rows: Int[Tensor, " labelled"]


def attention_of(model: PreTrainedModel) -> Attention:
    """The kernels that a model was opened with."""
    parts = {type(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    kinds = {name: type(getattr(model.config, name)) for name in model.config.sub_configs}
    kernels: dict[str, Any] = {name: parts[kind]._attn_implementation for name, kind in kinds.items() if kind in parts}
    kernels[""] = model.config._attn_implementation
    return kernels if len({*kernels.values()}) > 1 else kernels[""]


def max_positions(config: Any) -> int | None:
    """How many tokens of text, pictures among them, a model of this config takes; None where it states no number.

    Learnt positions end in an index error there; rotary ones go on, far from anything that was trained.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def labelled_positions(
    labels: Int[Tensor, "batch seq"] | None, attention_mask: Int[Tensor, "batch seq"]
) -> tuple[Int[Tensor, " labelled"], Int[Tensor, " labelled"], Int[Tensor, " labelled"]]:
    """Rows, places and targets of the positions that predict a label; without labels, each row's last token."""
    if labels is None:
        rows = torch.arange(len(attention_mask), device=attention_mask.device)
        length = attention_mask.shape[1]
        last = length - 1 - attention_mask.flip(1).argmax(1)
        return rows, last, torch.full_like(rows, IGNORED_LABEL)
    targets = labels[:, 1:]
    rows, places = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
    return rows, places, targets[rows, places]


@contextlib.contextmanager
def output_layer_sees(model: PreTrainedModel, rows: Tensor, places: Tensor) -> Iterator[list[Tensor]]:
    """Meanwhile the output layer gets these positions alone, as one row; the list receives their hidden states.

    From inside the model's own forward, so that what a model does to its logits (scales, soft caps) stays its own.

    Raises: UserError if the model has no output layer.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output layer; a causal language model is needed")
    seen: list[Tensor] = []

    def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0][rows, places])
        return (seen[0].unsqueeze(0), *inputs[1:])

    handle = cast(nn.Module, head).register_forward_pre_hook(choose)
    try:
        yield seen
    finally:
        handle.remove()


def pad_token_id(model: PreTrainedModel) -> int | None:
    """What fills answers that end early; any id does, and transformers warns at every call without one."""
    stated: Any = model.generation_config
    ends = stated.eos_token_id if isinstance(stated.eos_token_id, list) else [stated.eos_token_id]
    return ends[0] if stated.pad_token_id is None else stated.pad_token_id


def layout_attention(layout: Int[Tensor, "batch 3 seq"], *, kernel: str, dtype: torch.dtype) -> Tensor:
    """The mask of rows that hold several samples (`data.collate`), in the form that the attention kernel takes.

    Raises: UserError for a kernel that takes no mask of its own.
    """
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            "a row of several samples (data.share_pictures, data.packing) needs "
            f"model.attn_implementation sdpa or eager, not {kernel}"
        )
    mask = visible(layout)
    if kernel == "sdpa":
        return mask
    smallest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, smallest)


class WithoutPrompt(BaseStreamer):
    """Hands on what is generated: generate's first call brings the prompt."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then one token after another."""
        if self._prompt_seen:
            self._streamer.put(value)
        self._prompt_seen = True

    def end(self) -> None:
        """Hands on the end."""
        self._streamer.end()


def new_tokens(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    options: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> Int[Tensor, "batch new"]:
    """New token ids of left-padded prompts, greedy unless `options` (of transformers' generate) say otherwise.

    Those of a row whose scores are no numbers are `score_watch.NO_TOKEN`.

    Args:
        streamer: receives the new tokens alone.
        inputs: what else the model's forward takes of the prompts, such as pixels.
    """
    watch = ScoreWatch(model)
    chosen = {"do_sample": False, "pad_token_id": pad_token_id(model), **watch.options, **(options or {})}
    generating: Any = model  # generate is typed for a protocol that pyright cannot match to the class
    with torch.no_grad():
        whole = generating.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            streamer=None if streamer is None else WithoutPrompt(streamer),
            **inputs,
            **chosen,
        )
    return watch.marked(whole[:, input_ids.shape[1] :])
