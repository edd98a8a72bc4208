"""Describes an adapter by one frozen dataclass, for every backbone and the `adapter:` section of a run."""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dora_vl.errors import UserError, short_repr

Method = Literal["dora", "lora", "full", "magnitude", "dvora"]
DropoutMode = Literal["low_rank", "whole_change"]
RankScaling = Literal["linear", "sqrt"]
Init = Literal["kaiming", "gaussian", "pissa"]
LayerKind = Literal["linear", "embedding", "conv", "experts"]
Quantisation = Literal["nf4", "int8"]
"""`nf4` is 4-bit NormalFloat, its block scales quantised too (QLoRA); `int8` is LLM.int8."""

Value = TypeVar("Value", int, float)

MAIN_PART = "dora"
"""The part that the layers of `targets` belong to has this name."""
MOST_ALPHA = 1e12
"""Norms hold the square of the scale in float32, which ends at 3e38."""
RESERVED = frozenset((MAIN_PART, "full", "magnitude"))
"""A part that a user adds may not have these names: what trains is called `dora.A`, `vision.magnitude`, `full`."""


def is_of_type(value: Any, kind: Any) -> bool:
    """Tells whether a value has its annotation's type. numpy's numbers count as numbers, booleans do not.

    A string is refused where a tuple is expected: `targets="*.q_proj"` would otherwise be eight one-letter globs, one
    of them `*`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (UnionType, Union):
        return any(is_of_type(value, option) for option in inner)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(is_of_type(item, inner[0]) for item in value)
    if origin in (abc.Mapping, dict):
        return isinstance(value, Mapping) and all(is_of_type(item, inner[1]) for item in value.values())
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind)) and isinstance(value, bool) == (kind is bool)


def check_types(settings: Any) -> None:
    """Raises a `UserError` where a setting has the wrong type, or is not one of its choices."""
    kinds = get_type_hints(type(settings))
    for setting in fields(settings):
        value, kind = getattr(settings, setting.name), kinds[setting.name]
        if not is_of_type(value, kind):
            choices = next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal), ())
            nearest = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.0)
            expected = f"there are {choices} (nearest: {nearest[0]})" if nearest else f"it must be {setting.type}"
            raise UserError(f"adapter: {setting.name} is {short_repr(value)}; {expected}")


@dataclass(frozen=True, kw_only=True)
class AdaptedPart:
    """Layers that are adapted under a name of their own, with their own rank, alpha and learning rate."""

    targets: tuple[str, ...]
    """Full-name globs of the part's modules; each must hit, and `targets` leaves these modules to the part."""
    rank: int | None = None
    """Rows of A; null takes the adapter's rank."""
    alpha: float | None = None
    """Numerator of the scale; null takes the adapter's alpha."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Says how a model is adapted; `DoRAConfig` and a run's `adapter:` section add which layers.

    A field that is added here is in both, in `--help` and in the adapter folder.
    """

    method: Method = "dora"
    """`dora`: A, B and magnitude; `lora`: A and B; `magnitude`: magnitude only; `full`: the targets' own weights;
    `dvora`: frozen random A and B shared by all layers, with trained vectors (VeRA) and magnitudes."""
    rank: int = 16
    """Rows of A (columns of B); the change of a weight has at most this rank before normalisation."""
    alpha: float = 32.0
    """Numerator of the scale s that multiplies B A; see `rank_scaling`."""
    dropout: float = 0.05
    """Probability of dropping an element of the input of the path named by `dropout_mode`, in training."""
    dropout_mode: DropoutMode = "low_rank"
    """`low_rank`: dropout only on B A x, one frozen product; `whole_change`: as PEFT and the reference, two."""
    detach_norm: bool = True
    """Takes no gradient through the norm (paper section 4.3, 12-24 % less memory); False is the full equation."""
    rank_scaling: RankScaling = "linear"
    """`linear`: s = alpha / rank; `sqrt`: s = alpha / sqrt(rank) (rsLoRA)."""
    kinds: tuple[LayerKind, ...] = ("linear",)
    """The globs of `targets` may hit these kinds; embeddings, convolutions and experts that are one tensor (by its
    name, `*.experts.down_proj`) must be named here."""
    magnitude_targets: tuple[str, ...] = ()
    """Full-name globs of further layers that get only a magnitude, beside the full ones (paper table 6)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Maps full-name globs to ranks, for layers that differ; the first glob that matches counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Maps full-name globs to alphas, for layers that differ; the first glob that matches counts."""
    parts: Mapping[str, AdaptedPart] = field(default_factory=dict)
    """Further adapted parts by name, beside `targets`: {targets, rank, alpha} each."""
    init: Init = "kaiming"
    """How A and B start: `kaiming` and `gaussian` with B = 0; `pissa` from the weight's largest singular vectors, which
    leave the frozen weight. The model's output is unchanged at the start."""
    random_seed: int = 0
    """Seed of the random matrices that `dvora` shares."""
    opaque_layers: tuple[str, ...] = ()
    """Class paths of further linear layers to adapt through their own forward pass, e.g. `package.module.Class`."""
    also_train: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Trains whole weights as further parts: maps a part's name to full-name globs of parameters; each must hit."""
    also_keep: tuple[str, ...] = ()
    """Full-name globs of frozen tensors that the result depends on, carried by the adapter folder as well; with rows
    at the end (`*.shared.weight[-200:]`) no others of the tensor are."""

    def __post_init__(self) -> None:
        check_types(self)
        ranks = [self.rank, *self.rank_pattern.values(), *(part.rank for part in self.parts.values() if part.rank)]
        reserved = [name for name in (*self.parts, *self.also_train) if name in RESERVED or not name or "." in name]
        in_both = sorted(set(self.parts) & set(self.also_train))
        no_targets = [name for name, part in self.parts.items() if not part.targets]
        low_rank = [name for name, part in self.parts.items() if part.rank is not None and part.rank < 1]
        alphas = {"alpha": self.alpha} | {f"alpha_pattern.{name}": alpha for name, alpha in self.alpha_pattern.items()}
        alphas |= {f"parts.{name}.alpha": part.alpha for name, part in self.parts.items() if part.alpha is not None}
        bad_alphas = [f"{name} is {alpha}" for name, alpha in alphas.items() if not 0 < alpha <= MOST_ALPHA]
        names_rule = f"{', '.join(sorted(RESERVED))} are reserved, and a name must not be empty or contain a dot"
        problems = (
            (self.rank < 1, f"rank is {self.rank}; it must be 1 or more"),
            (bad_alphas, f"{', '.join(bad_alphas[:1])}; it must be above 0 and at most {MOST_ALPHA:g}"),
            (not 0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1"),
            (any(rank < 1 for rank in self.rank_pattern.values()), "rank_pattern holds a rank below 1"),
            (reserved, f"a part may not be called {reserved[:1]}: {names_rule}"),
            (in_both, f"{in_both[:1]} is in parts (adapted) and in also_train (whole); choose one"),
            (no_targets, f"parts.{no_targets[:1]} has no targets"),
            (low_rank, f"parts.{low_rank[:1]} has a rank below 1"),
            (self.method == "full" and self.parts, "method: full adapts nothing: name parts in also_train"),
            (
                self.method == "dvora" and (self.init != "kaiming" or len(set(ranks)) > 1),
                "method: dvora shares one random A and B: no init, and one rank",
            ),
        )
        if messages := [message for wrong, message in problems if wrong]:
            raise UserError("adapter: " + "; ".join(messages))


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(AdapterSettings):
    """Says how and where a model is adapted; comparisons between methods differ only in `method`."""

    targets: tuple[str, ...]
    """Full-name globs of the modules to adapt, e.g. `*language_model*.q_proj`; each must hit at least one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.targets or self.parts):
            raise UserError("adapter: targets is empty; name at least one module, e.g. '*.q_proj'")

    def part_of(self, name: str) -> str:
        """Returns the part that a layer belongs to: the first whose globs match, else `dora`."""
        patterns = ((part, glob) for part, settings in self.parts.items() for glob in settings.targets)
        return next((part for part, glob in patterns if fnmatchcase(name, glob)), MAIN_PART)

    def for_layer(self, name: str, *, magnitude_only: bool = False) -> DoRAConfig:
        """Resolves the settings of one layer, its patterns and its part; a pattern wins over a part."""
        part = self.parts.get(self.part_of(name))
        rank = first_match(self.rank_pattern, name, (part and part.rank) or self.rank)
        alpha = first_match(self.alpha_pattern, name, (part and part.alpha) or self.alpha)
        method: Method = "magnitude" if magnitude_only else self.method
        if (rank, alpha, method) == (self.rank, self.alpha, self.method):
            return self
        return replace(self, rank=rank, alpha=alpha, method=method, rank_pattern={})

    @property
    def drops_whole_change(self) -> bool:
        """Tells whether training takes a second product of W, since dropout is on the input of (g - 1) W x as well."""
        return self.method in ("dora", "dvora") and self.dropout > 0 and self.dropout_mode == "whole_change"

    @property
    def scale(self) -> float:
        """Returns s, the factor of B A; DVoRA has 1, since its vectors take the place of a scale."""
        if self.method == "dvora":
            return 1.0
        return self.alpha / (self.rank if self.rank_scaling == "linear" else math.sqrt(self.rank))


def first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Returns the value of the first full-name glob that matches."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)
