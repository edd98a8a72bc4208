"""The way to the scores of a model that computes them inside, its output head at labelled positions alone.

Some models scale or cap what their head gives (Gemma 2, Granite), and sharded weights are whole only in the model's own
forward. So that runs, and a hook hands its head less. `DecoderBackbone.forward` has the way of all others.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.backbones.base import head_of
from dora_vl.errors import BadSample
from dora_vl.heads.next_token import label_losses, losses_of
from dora_vl.shapes import Float, Int

NOT_FOLLOWED = (AttributeError, BadSample, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""A family's own code may raise these over inputs that it does not expect."""
WORDS = (1, 2, 3)
"""Token ids for the probe. A model that refuses one, as a picture's, counts as `inside`, which is right for any."""
HeadPlace = Literal["open", "last", "inside"]
PLACES: Mapping[HeadPlace, str] = {
    "open": "runs on the labelled positions alone",
    "last": "runs within the model's own forward, on the labelled positions alone",
    "inside": "runs within the model's own forward, whose scores are taken whole",
}
"""Says for the log where a model's output head runs."""
ABOUT_SCORES = frozenset({"labels", "logits_to_keep", "output_router_logits", "use_cache"})
"""A model's own forward may take these beside what its base takes."""


def find_head(model: PreTrainedModel) -> HeadPlace:
    """Finds where a model's output head stands, by one pass over a few words.

    Inputs that the base does not know say that the forward around it does something to them.
    """
    base, head = model.base_model, head_of(model)
    if base is model or any(weight.is_meta for weight in model.parameters()):
        return "inside"
    own, of_base = ({*inspect.signature(module.forward).parameters} for module in (model, base))
    outputs, heads = list[Any](), list[tuple[Tensor, Tensor]]()
    hooks = (
        base.register_forward_hook(lambda *seen: outputs.append(seen[2])),
        # A copy: some models write into their scores in place (Chameleon, over the tokens of pictures).
        head.register_forward_hook(lambda *seen: heads.append((seen[1][0], seen[2].clone()))),
    )
    try:
        with torch.no_grad(), whole_weights(model), hooks[0], hooks[1]:
            scores = model(input_ids=torch.tensor([WORDS], device=model.device), use_cache=False).logits
        (hidden, of_head), (output,) = heads[0], outputs
        if not torch.equal(of_head, scores):
            return "inside"
        return "last" if own - of_base - ABOUT_SCORES or not torch.equal(output.last_hidden_state, hidden) else "open"
    except NOT_FOLLOWED:
        return "inside"


def run_capped(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    sequences: Int[Tensor, " labelled"],
    positions: Int[Tensor, " labelled"],
    losses_at: Callable[[Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor],
    *,
    chunked: bool,
) -> tuple[Float[Tensor, "labelled width"], Float[Tensor, "some vocab"], Float[Tensor, " labelled"]]:
    """Runs the model with its head at these positions; returns their hidden states, scores, and losses.

    Args:
        losses_at: applies a loss to hidden states or scores.
        chunked: losses are computed in chunks while the head is called, which then gives the scores of one position, so
            that ZeRO-3 sees it run.
    """
    head, hidden, losses = head_of(model), list[Tensor](), list[Tensor]()

    def only_labelled(_: nn.Module, seen: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(seen[0][sequences, positions])
        if chunked:
            losses.append(losses_at(hidden[0], partial(label_losses, scores=head.forward)))
        return (hidden[0][: 1 if chunked else None].unsqueeze(0), *seen[1:])

    with head.register_forward_pre_hook(only_labelled):
        scores = model(**inputs, use_cache=False).logits.squeeze(0)
    return hidden[0], scores, losses[0] if chunked else losses_at(scores, losses_of)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gathers each module's weights while it runs under ZeRO-3, before the engine is there that will do it."""
    with contextlib.ExitStack() as hooks:
        for module in model.modules() if is_deepspeed_zero3_enabled() else ():
            split: list[Any] = [weight for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
            if split:
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda *_, split=split: split[0].all_gather(split))
                )
                hooks.enter_context(module.register_forward_hook(lambda *_, split=split: split[0].partition(split)))
        yield
