"""Replaces a model's layers with adapted ones: `apply_dora` finds them by glob patterns of their full names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig, LayerKind
from dora_vl.core.gain import norms_with_grad
from dora_vl.core.layer import AdaptedLayer, count_edits
from dora_vl.core.linear import DoRALinear, TransposedLinear
from dora_vl.core.other_layers import (
    SCALED_EMBEDDINGS,
    AdaptedExperts,
    DoRAConv1d,
    DoRAConv2d,
    DoRAEmbedding,
    expert_projections,
)
from dora_vl.core.quantised import (
    QUANTISED_KINDS,
    TENSOR_SUBCLASS,
    UNKNOWN_LINEAR,
    QuantisedLinear,
    class_path,
    settle_quantised,
)
from dora_vl.core.trainable import (
    Gather,
    adapted_layers,
    choose_trained,
    forget_trained,
    is_adapted,
    match_names,
    no_gather,
    refuse_unmatched,
    train_in_own_dtype,
)
from dora_vl.errors import UserError
from dora_vl.shapes import Float


@dataclass(frozen=True)
class Adaptable:
    """Says what a class of layer counts as in `config.kinds`, and what builds its adapted form."""

    kind: LayerKind
    build: Callable[[Any, DoRAConfig], AdaptedLayer]
    weight_is_readable: bool = True
    """True where the layer's weight can be read, and written for `init="pissa"`; False where it is only called."""


ADAPTABLE: Mapping[str, Adaptable] = {
    "torch.nn.modules.linear.Linear": Adaptable("linear", DoRALinear),
    "transformers.pytorch_utils.Conv1D": Adaptable("linear", TransposedLinear),
    "torch.nn.modules.conv.Conv1d": Adaptable("conv", DoRAConv1d),
    "torch.nn.modules.conv.Conv2d": Adaptable("conv", DoRAConv2d),
    "torch.nn.modules.sparse.Embedding": Adaptable("embedding", DoRAEmbedding),
    **{path: Adaptable("embedding", DoRAEmbedding) for path in SCALED_EMBEDDINGS},
}
"""Keys are class paths, so that nothing of other packages is imported here."""


def adaptable_names(model: nn.Module, config: DoRAConfig) -> list[str]:
    """Lists all that can be adapted, in the model's order: layers, and experts' weights that are one tensor."""
    names: list[str] = []
    for name, module in model.named_modules():
        if find_adaptable(module, config) is not None:
            names.append(name)
        if "experts" in config.kinds:
            names += [f"{name}.{leaf}".lstrip(".") for leaf in expert_projections(module)]
    return names


def find_adaptable(module: nn.Module, config: DoRAConfig) -> Adaptable | None:
    """Returns how a module is adapted; None if it is not, or not of `config.kinds`.

    Classes match exactly. A subclass may use its weight without calling the layer (torch's attention does), and an
    adapter there would silently have no effect.
    """
    path = class_path(module)
    entry, kind = ADAPTABLE.get(path), QUANTISED_KINDS.get(path)
    if kind is None and path in config.opaque_layers:
        kind = UNKNOWN_LINEAR
    if kind is None and entry and isinstance(module, nn.Linear) and is_traceable_wrapper_subclass(module.weight.data):
        kind = TENSOR_SUBCLASS
    if kind is not None:
        entry = Adaptable("linear", partial(QuantisedLinear, kind=kind), weight_is_readable=False)
    return entry if entry is not None and entry.kind in config.kinds else None


SHARED_NAME = "dvora_shared"
"""The module that holds the random matrices has this name at the model's root."""
START_OF_D = 0.1
"""DVoRA's d starts at this value, and b at 0, as in VeRA."""


class SharedRandom(nn.Module):
    """DVoRA's frozen A and B, large enough for every layer; buffers that the base's checkpoint does not know of."""

    random_A: Tensor
    random_B: Tensor

    def __init__(self, layers: list[nn.Linear], config: DoRAConfig) -> None:
        super().__init__()
        weight, generator = layers[0].weight, torch.Generator().manual_seed(config.random_seed)
        shape_A = config.rank, max(layer.in_features for layer in layers)
        shape_B = max(layer.out_features for layer in layers), config.rank
        for name, shape in (("random_A", shape_A), ("random_B", shape_B)):
            matrix = torch.empty(shape, dtype=functional.accumulation_dtype(weight.dtype))
            # VeRA's start; fan-in is the second axis of either matrix.
            nn.init.kaiming_uniform_(matrix, generator=generator)
            self.register_buffer(name, matrix.to(weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input: a root that calls its children in turn, `nn.Sequential`, calls this one too."""
        return x


class DVoRALinear(DoRALinear):
    """DoRA over VeRA: trains d [rank], b [out] and the magnitude over a frozen random A and B that layers share.

    V = W + diag(b) B diag(d) A, with A and B cut to the layer's size (arXiv 2402.09353 section 5.5; VeRA is arXiv
    2310.11454). Both vectors fold into B, so the layer is an ordinary one with the factors A and diag(b) B diag(d).
    """

    FILE_LEAVES: ClassVar[Mapping[str, str]] = {
        "lambda_d": "vera_lambda_d",
        "lambda_b": "vera_lambda_b",
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, base: nn.Linear, config: DoRAConfig, shared: SharedRandom) -> None:
        self._shared_matrices = (shared,)  # in a tuple: the module is the model's, not this layer's
        super().__init__(base, config)

    def create_parameters(self) -> None:
        """Creates d = 0.1 and b = 0: nothing changes yet."""
        dtype, device = functional.accumulation_dtype(self.weight.dtype), self.weight.device
        self.lambda_d = nn.Parameter(torch.full((self.adapter.rank,), START_OF_D, dtype=dtype, device=device))
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))

    def factors(self) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
        """Returns A, and B with both vectors folded in."""
        (shared,) = self._shared_matrices
        b = shared.random_B[: self.out_features] * self.lambda_d * self.lambda_b.unsqueeze(1)
        return shared.random_A[:, : self.in_features], b


def apply_dora(model: nn.Module, config: DoRAConfig, *, gather: Gather = no_gather) -> list[str]:
    """Adapts the layers that `config.targets` names and decides what trains; returns the adapted layers' names.

    With `method="full"` no layer changes: the targets' own parameters train, and the names returned are theirs.
    On the meta device everything is counted and nothing has values. Under ZeRO-3 pass a `gather`, since the
    magnitude is the norm of the whole weight.
    """
    if is_adapted(model):
        raise UserError("the model is adapted already; load it again before applying another adapter")
    refuse_unmatched(model, config.also_train, config.also_keep)
    settle_quantised(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        return _apply(model, config, gather)
    except Exception:
        _put_plain_layers_back(model)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def _apply(model: nn.Module, config: DoRAConfig, gather: Gather) -> list[str]:
    also_keep, full_modules, pissa = config.also_keep, [], {}
    if config.method == "full":
        names = full_modules = match_names((name for name, _ in model.named_modules()), config.targets, "targets")
    else:
        layers = _plan(model, config)
        names = list(layers)
        refuse_unwritable(model, config)
        if config.method == "dvora":
            linears = [_experts_of(model, name) or model.get_submodule(name) for name in names]
            if other := next((layer for layer in linears if type(layer) is not nn.Linear), None):
                raise UserError(f"method: dvora adapts only nn.Linear, and targets hit a {type(other).__name__}")
            shared = SharedRandom(cast("list[nn.Linear]", linears), config)
            model.add_module(SHARED_NAME, shared)
        for name, layer_config in layers.items():
            _adapt(model, name, layer_config, gather)
            cast(AdaptedLayer, model.get_submodule(name)).name = name
        _disable_fused_encoders(model)
        for name, layer in adapted_layers(model):
            if layer.adapter.init == "pissa" and layer.lora_A is not None and layer.lora_A.device.type != "meta":
                pissa[name] = layer
        for name, layer in pissa.items():
            _start_from_weight(name, layer)
        also_keep = (*also_keep, *(name for name, _ in model.named_buffers() if name.startswith(f"{SHARED_NAME}.")))
    choose_trained(
        model,
        full_modules=full_modules,
        also_train=config.also_train,
        also_keep=also_keep,
        gather=gather,
        part_of=config.part_of,
    )
    with torch.no_grad():  # last, because what is taken out of the weights is not put back
        for layer in pissa.values():
            subtract_start(layer, cast(Tensor, layer.lora_A), cast(Tensor, layer.lora_B))
            if layer.magnitude is not None:  # the norm of what is left and what was taken
                layer.magnitude.copy_(norms_with_grad(layer))
    return names


def _disable_fused_encoders(model: nn.Module) -> None:
    """Makes torch's encoders call adapted layers; in eval their fused pass only reads the weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(adapted_layers(module)):
            vars(module).update(activation_relu_or_gelu=0, use_nested_tensor=False)  # a layer's, and an encoder's


@torch.no_grad()
def _start_from_weight(name: str, layer: AdaptedLayer) -> None:
    """Gives A and B the principal factors of W, so that s B A is nearest to it at that rank; W stays as it is.

    Its singular values are shared evenly (PiSSA, arXiv 2404.02948).
    """
    a, b = cast("tuple[Tensor, Tensor]", (layer.lora_A, layer.lora_B))
    rank, shape = layer.adapter.rank, layer.matrix_shape()
    if rank > min(shape):
        raise UserError(f"init: pissa: {name} has rank {rank}, above the smaller side of its weight {list(shape)}")
    try:
        left, singular, right = torch.linalg.svd(layer.frozen_matrix().detach().to(a.dtype), full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise UserError(f"init: pissa: {name}'s weight has no singular vectors ({error}); is it damaged?") from error
    root = (singular[:rank] / layer.adapter.scale).sqrt()
    a.copy_((root.unsqueeze(1) * right[:rank]).view_as(a))
    b.copy_((left[:, :rank] * root).view_as(b))


def subtract_start(layer: AdaptedLayer, a: Tensor, b: Tensor) -> None:
    """Subtracts s B A from the frozen weight and remembers A and B, which the adapter folder then needs as well."""
    weight = layer.as_matrix(layer.weight)
    residual = functional.dense_direction(weight, a.flatten(1), b.flatten(1), -layer.adapter.scale)
    layer.weight.copy_(layer.from_matrix(residual).to(layer.weight.dtype))
    layer.register_buffer("start_A", a.detach().clone(), persistent=False)
    layer.register_buffer("start_B", b.detach().clone(), persistent=False)


def matching_layers(model: nn.Module, patterns: tuple[str, ...], config: DoRAConfig, what: str) -> list[str]:
    """Lists the layers that the globs match, of the kinds that `config` admits."""
    names = adaptable_names(model, config)
    for name, module in model.named_modules() if "conv" in config.kinds else ():
        hits = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
        if isinstance(module, _ConvNd) and name not in names and any(not fnmatch.filter(names, hit) for hit in hits):
            raise UserError(
                f"{what}: {name} is a {type(module).__name__}, and of convolutions only nn.Conv1d and nn.Conv2d "
                "have one filter per output channel and PEFT's file format; take it out"
            )
    return match_names(names, patterns, f"{what} ({', '.join(config.kinds)} layers)")


def refuse_unwritable(model: nn.Module, config: DoRAConfig) -> None:
    """Raises a `UserError` if `init="pissa"` would write to a weight that is quantised, sharded or shared."""
    if config.init != "pissa" or config.method not in ("dora", "lora"):
        return
    patterns = (*config.targets, *(glob for part in config.parts.values() for glob in part.targets))
    names = matching_layers(model, patterns, config, "targets")
    if experts := [name for name in names if _experts_of(model, name) is not None]:
        raise UserError(f"init: pissa rewrites {experts[0]}, experts that are one tensor; use kaiming or gaussian")
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        entry = find_adaptable(layer, config)
        if entry is not None and not entry.weight_is_readable:
            raise UserError(
                f"init: pissa rewrites {name}'s weight, and a {type(layer).__name__} has none that can be written; use "
                "kaiming or gaussian"
            )
        if any(parameter.numel() == 0 for parameter in layer.parameters(recurse=False)):
            raise UserError(f"init: pissa rewrites {name}'s weight, which ZeRO-3 holds in shards; use ZeRO-2 or less")
    _refuse_shared_weights(model, layers, "init: pissa would change both")


def _plan(model: nn.Module, config: DoRAConfig) -> dict[str, DoRAConfig]:
    main = matching_layers(model, config.targets, config, "targets")
    full = set(main)
    for part, settings in config.parts.items():
        names = matching_layers(model, settings.targets, config, f"parts.{part}")
        if twice := [name for name in names if config.part_of(name) != part]:
            first = config.part_of(twice[0])
            raise UserError(f"{twice[0]} (and {len(twice) - 1} more) is in parts.{first} and in parts.{part}")
        full.update(names)
    if main and all(config.part_of(name) in config.parts for name in main):
        raise UserError(f"targets: all {len(main)} layers that they match are in parts; leave targets empty: []")
    magnitude_only = set(matching_layers(model, config.magnitude_targets, config, "magnitude_targets"))
    if both := sorted(full & magnitude_only):
        raise UserError(f"{both[0]} (and {len(both) - 1} more) is in targets and in magnitude_targets; name it once")
    if magnitude_only and config.method not in ("dora", "dvora"):
        raise UserError(f"magnitude_targets need method dora or dvora, not {config.method}")
    match_names(full, config.rank_pattern, "rank_pattern (adapted layers)")
    match_names(full, config.alpha_pattern, "alpha_pattern (adapted layers)")
    names = [name for name in adaptable_names(model, config) if name in magnitude_only or name in full]
    return {name: config.for_layer(name, magnitude_only=name in magnitude_only) for name in names}


def merge_dora(model: nn.Module, *, keep_base: bool = True) -> None:
    """Folds every adapter into its layer's weight, in float32; forward then costs what the base costs.

    `keep_base` holds a copy of each base weight so that `unmerge_dora` restores it bit by bit; without it the
    merge needs no second copy of the model and cannot be undone.
    """
    layers = dict(adapted_layers(model))
    for name, layer in layers.items():
        layer.refuse_merging(name)
    _refuse_shared_weights(model, layers, "merging would change both")
    with torch.no_grad():
        for layer in layers.values():
            if not layer.merged:
                layer.base_weight = layer.weight.detach().clone() if keep_base else None
                layer.weight.copy_(layer.from_matrix(_merged_matrix(layer)))
                layer.merged = True


def _merged_matrix(layer: AdaptedLayer) -> Float[Tensor, "*experts out in_"]:
    """Computes W' of the adapter as it is now, of experts one at a time."""
    weight, (a, b) = layer.as_matrix(layer.weight), layer.factors() or (None, None)
    if not layer.experts:
        return functional.merged_weight(weight, a, b, layer.magnitude, layer.adapter.scale)
    nothing = [None] * layer.experts
    a, b, magnitude = (nothing if tensor is None else tensor for tensor in (a, b, layer.magnitude))
    experts = zip(weight, a, b, magnitude, strict=True)
    return torch.stack([functional.merged_weight(*expert, layer.adapter.scale) for expert in experts])


def unmerge_dora(model: nn.Module) -> None:
    """Takes every adapter out of its layer's weight again, bit by bit."""
    layers = [layer for _, layer in adapted_layers(model) if layer.merged]
    if any(layer.base_weight is None for layer in layers):
        raise RuntimeError("the base weight was not kept when merging; load the base model again")
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(cast(Tensor, layer.base_weight))
            layer.base_weight, layer.merged = None, False
            layer.forget_norms()


def strip_adapters(model: nn.Module) -> None:
    """Puts the original layers back, with the weights as they are (merged or not), ready to be saved.

    What trains in float32 over a half-precision base gets its module's dtype back, rounded as a merge rounds.
    """
    residual = [name for name, layer in adapted_layers(model) if "start_A" in layer._buffers and not layer.merged]
    if residual:
        raise UserError(
            f"{residual[0]} (and {len(residual) - 1} more) holds what init: pissa left of a weight; merge_dora first"
        )
    _put_plain_layers_back(model)


def _put_plain_layers_back(model: nn.Module) -> None:
    train_in_own_dtype(model)  # while the layers that hold trained biases still know their original dtypes
    for module in list(model.modules()):
        if isinstance(module, AdaptedExperts):
            replace_module(model, module, module.original_layer())
    for name, layer in list(adapted_layers(model)):
        count_edits(layer.tensors(), counted=False)
        replace_module(model, model.get_submodule(name), layer.original_layer())
    if SHARED_NAME in dict(model.named_children()):
        delattr(model, SHARED_NAME)
    forget_trained(model)


def _adapt(model: nn.Module, name: str, config: DoRAConfig, gather: Gather) -> None:
    experts = _experts_of(model, name)
    base = experts or model.get_submodule(name)
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UserError(f"{name}: torch's attention reads this layer's weight and never calls it; take it out")
    with gather(list(base.parameters(recurse=False))):
        if experts is not None:
            adapted = experts if isinstance(experts, AdaptedExperts) else AdaptedExperts(experts)
            adapted.adapt(name.rpartition(".")[2], config)
        elif config.method == "dvora":
            adapted = DVoRALinear(cast(nn.Linear, base), config, cast(SharedRandom, model.get_submodule(SHARED_NAME)))
        else:
            entry = find_adaptable(base, config)
            assert entry is not None
            try:
                adapted = entry.build(base, config)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        if adapted is not base:
            replace_module(model, base, adapted)


def _experts_of(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the module of experts whose weight has this full name; None for a layer's name."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    return parent if leaf in expert_projections(parent) else None


def _refuse_shared_weights(model: nn.Module, layers: Mapping[str, nn.Module], reason: str) -> None:
    """Refuses a weight that another module uses too (a tied output head): it would change there as well."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        sharing = users.get(id(layer.weight), ())
        if len({id(model.get_submodule(user.rpartition(".")[0])) for user in sharing}) > 1:
            raise UserError(f"{name} shares its weight with {sharing}; {reason}")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module under every name it has."""
    owners = [(owner, leaf) for owner in model.modules() for leaf, child in owner._modules.items() if child is old]
    for owner, leaf in owners:
        setattr(owner, leaf, new)
