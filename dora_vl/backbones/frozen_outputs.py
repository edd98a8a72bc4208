"""Stores what frozen vision parts output for a sample's pictures and replays it: same loss, no tower run.

No code here is specific to a family. A frozen part is an outermost module outside the decoder, without trained
weights, that is called with something made of pixels. Its outputs, whatever they are (a tensor, a tuple, a
ModelOutput), are flattened; those that get a gradient are stored, of the others the shape. A pass of one picture and a
pass of two show along which dimension an output grows; every pass ends at the decoder. Outputs are stored for all
pictures of a sample together, because some processors tile a single picture but not two.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dora_vl.backbones.base import decoder_of, model_inputs
from dora_vl.backbones.encoder import Encoder
from dora_vl.data.batches import Collator
from dora_vl.data.example import Clip
from dora_vl.data.samples import Sample
from dora_vl.errors import BadSample

Outputs = Mapping[str, Sequence[Sequence[Any]]]
"""Maps each part to its calls' flattened outputs; `ShapeOnly` replaces a tensor that nobody reads."""
SAMPLES_PER_PASS = 16
"""One pass of the vision parts takes this many samples: on a CPU four times as many take 1.4 times as long each,
since their activations are allocated anew every time."""
TOLERANCE = 0.05
"""Stored outputs may be off by this share of what pictures change at the decoder. Half precision rounds
differently in a batch; pictures in a wrong order or place are off by all of it."""


class NotStorable(Exception):
    """Says why a family's frozen outputs cannot be stored."""


@dataclass(frozen=True)
class ShapeOnly:
    """Replaces a tensor whose numbers nobody reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """Describes what one call of a part returns."""

    spec: Any
    """Holds the tree structure that the flattened outputs came from."""
    read: frozenset[int]
    """The rest of the model reads the outputs at these indices."""
    axes: tuple[int, ...]
    """Lists the dimension along which each output grows with the pictures."""


@dataclass(frozen=True)
class FrozenParts:
    """The frozen parts of a model by name, and how their outputs are joined."""

    calls: Mapping[str, tuple[Call, ...]]
    """Maps a part to its calls; a part that is called once per picture has one entry."""
    batched: Mapping[str, bool]
    """Tells which parts take all pictures of a batch in one call."""

    @torch.no_grad()
    def outputs_of(self, model: Any, inputs: Mapping[str, Any]) -> Outputs:
        """Computes what is stored for one sample's inputs."""

        def kept(leaf: Any, is_read: bool) -> Any:
            return ShapeOnly(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) and not is_read else leaf

        return {
            name: [
                [kept(leaf, index in self._call(name, number).read) for index, leaf in enumerate(leaves)]
                for number, (leaves, _) in enumerate(recorded)
            ]
            for name, recorded in _recorded(model, self.calls, inputs).items()
        }

    def outputs_of_each(self, model: Any, samples: Sequence[Sample], collate: Collator) -> list[Outputs]:
        """Computes what is stored for each sample, `SAMPLES_PER_PASS` at a time; pictures have equal shapes."""
        single = self.outputs_of(model, inputs_of(model, samples[0]))
        if len(samples) == 1:
            return [single]
        each: list[Outputs] = []
        for start in range(0, len(samples), SAMPLES_PER_PASS):
            several = samples[start : start + SAMPLES_PER_PASS]
            joined = self.outputs_of(model, model_inputs(model, collate(several)))
            each += [self._part(joined, number, len(several)) for number in range(len(several))]
            if not _nearly_equal(single, each[0]):
                return [self.outputs_of(model, inputs_of(model, sample)) for sample in samples]
        return each

    def _part(self, joined: Outputs, number: int, count: int) -> Outputs:
        """Cuts one sample's outputs out of those of several samples of the same shapes."""
        part: dict[str, list[list[Any]]] = {}
        for name, calls in joined.items():
            if self.batched[name]:
                part[name] = [
                    [_chunk(leaf, axis, number, count) for leaf, axis in zip(leaves, call.axes, strict=True)]
                    for leaves, call in zip(calls, self.calls[name], strict=True)
                ]
            else:
                size = len(calls) // count
                part[name] = [list(leaves) for leaves in calls[number * size : (number + 1) * size]]
        return part

    @contextlib.contextmanager
    def replaying(self, model: Any, samples: Sequence[Outputs]) -> Iterator[None]:
        """Makes the parts return what is stored for these samples, in the batch's order."""
        modules = {name: model.get_submodule(name) for name in self.calls}
        before = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = self._replay(name, samples, model.device)
        try:
            yield
        finally:
            for name, module in modules.items():
                del module.__dict__["forward"]
                if before[name] is not None:
                    module.forward = before[name]

    def _call(self, name: str, number: int) -> Call:
        return self.calls[name][number if self.batched[name] else 0]

    def _replay(self, name: str, samples: Sequence[Outputs], device: torch.device) -> Callable[..., Any]:
        numbers = itertools.count()

        def forward(*_: Any, **__: Any) -> Any:
            number = next(numbers)
            if self.batched[name]:
                calls = [outputs[name][number] for outputs in samples]
            else:
                calls = [[call for outputs in samples for call in outputs[name]][number]]
            call = self._call(name, number)
            leaves = zip(zip(*calls, strict=True), call.axes, strict=True)
            return pytree.tree_unflatten([_joined(values, axis, device) for values, axis in leaves], call.spec)

        return forward


def _chunk(leaf: Any, axis: int, number: int, count: int) -> Any:
    if not isinstance(leaf, Tensor | ShapeOnly) or not leaf.shape or leaf.shape[axis] % count:
        return leaf
    if isinstance(leaf, Tensor):
        return leaf.chunk(count, axis)[number].clone()
    return ShapeOnly((*leaf.shape[:axis], leaf.shape[axis] // count, *leaf.shape[axis + 1 :]), leaf.dtype)


def _nearly_equal(outputs: Outputs, other: Outputs) -> bool:
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(outputs), pytree.tree_flatten(other)
    return spec == other_spec and all(
        a.shape == b.shape and float((a.double() - b.double()).norm()) <= TOLERANCE * float(a.double().norm())
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def _joined(values: Sequence[Any], axis: int, device: torch.device) -> Any:
    """Concatenates samples' tensors, other dimensions padded; values that are not tensors are equal in all."""
    first = values[0]
    if not isinstance(first, Tensor | ShapeOnly) or (len(values) == 1 and isinstance(first, Tensor)):
        return first
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    if shape:
        shape[axis] = sum(value.shape[axis] for value in values)
    if isinstance(first, ShapeOnly):
        return torch.zeros((), dtype=first.dtype, device=device).expand(shape)
    joined, start = first.new_zeros(shape), 0
    for value in values:
        sizes = [slice(0, size) for size in value.shape]
        sizes[axis] = slice(start, start := start + value.shape[axis])
        joined[tuple(sizes)] = value
    return joined


def find_parts(model: Any, inputs: Mapping[str, Any], doubled: Mapping[str, Any]) -> FrozenParts:
    """Finds a model's frozen parts, in eval mode, from inputs of one sample and of a batch that holds it twice.

    Raises: NotStorable if there is none, or its outputs do not grow with the pictures along one dimension.
    """
    names = _frozen_modules(model, inputs)
    with torch.no_grad():
        single, pair = _recorded(model, names, inputs), _recorded(model, names, doubled)
    batched: dict[str, bool] = {}
    for name in names:
        counts = len(single[name]), len(pair[name])
        if counts[0] == 0 or counts[1] not in (counts[0], 2 * counts[0]):
            raise NotStorable(f"{name} is called {counts[0]} times for a picture and {counts[1]} times for two")
        batched[name] = counts[0] == counts[1]
    read = _read_leaves(model, batched, inputs)
    calls: dict[str, tuple[Call, ...]] = {}
    for name in names:
        described = []
        for number in range(len(single[name]) if batched[name] else 1):
            (leaves, spec), others = single[name][number], pair[name][number][0]
            used = frozenset(read.get((name, number), ()))
            axes = _axes(name, leaves, others, used) if batched[name] else (0,) * len(leaves)
            described.append(Call(spec, used, axes))
        calls[name] = tuple(described)
    if not read:
        raise NotStorable(f"nothing is read of {', '.join(names)}")
    return FrozenParts(calls, batched)


@torch.no_grad()
def _verify(model: Any, parts: FrozenParts, samples: Sequence[Sample], collate: Collator) -> None:
    """Compares a decoder's inputs with those from stored outputs. Raises NotStorable: they differ, or never change."""
    plain = _decoder_inputs(model, model_inputs(model, collate(samples)))
    outputs = [
        parts.outputs_of(model, inputs_of(model, sample))
        for sample in samples
        if any(map(_is_float, sample.inputs.values()))
    ]
    blank = [replace(sample, inputs=without_pixels(sample.inputs)) for sample in samples]
    batch = model_inputs(model, collate(blank))
    others = pytree.tree_map(lambda leaf: 1 - leaf if _is_float(leaf) else leaf, outputs)
    names, pictures_matter = ", ".join(parts.calls), False
    with parts.replaying(model, outputs):
        stored = _decoder_inputs(model, batch)
    with parts.replaying(model, others):
        changed = _decoder_inputs(model, batch)
    for live, replayed, other in zip(plain, stored, changed, strict=True):
        if not isinstance(live, Tensor):
            continue
        if live.shape != replayed.shape:
            raise NotStorable(f"with stored outputs of {names} the decoder gets {[*replayed.shape]}, {[*live.shape]}")
        change = float((replayed.double() - other.double()).abs().max()) if live.numel() else 0.0
        off = float((replayed.double() - live.double()).abs().max()) if live.numel() else 0.0
        if not off <= TOLERANCE * change:
            raise NotStorable(f"stored outputs of {names} are {off:.2g} off where they change {change:.2g}")
        pictures_matter = pictures_matter or change > 0
    if not pictures_matter:
        raise NotStorable(f"nothing is read of {names}")


def find_verified_parts(model: Any, encoder: Encoder) -> FrozenParts:
    """Finds frozen parts, and verifies them on pictures of several sizes and on text. Raises NotStorable."""
    rng = random.Random(0)  # all different wherever they are, and never taken for padding
    pictures = [
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in ((40, 24), (18, 35), (64, 64))
    ]
    sample, samples = encoder.media_sample(pictures[:1]), [encoder.media_sample(pictures[:1])]
    for shown in (pictures[1:], []):
        with contextlib.suppress(BadSample):  # some families take only one picture, or no words without
            samples.append(encoder.media_sample(shown))
    pair = model_inputs(model, encoder.collate([sample, sample]))
    try:
        parts = find_parts(model, inputs_of(model, sample), pair)
        for shown_together in ([sample, sample], samples):
            _verify(model, parts, shown_together, encoder.collate)
    except (RuntimeError, ValueError, IndexError) as error:
        raise NotStorable(f"the model cannot run the frozen parts, or feed their outputs back: {error}") from error
    return parts


def inputs_of(model: Any, sample: Sample) -> dict[str, Any]:
    """Collates one sample for the model."""
    return model_inputs(model, {"input_ids": sample.input_ids[None], **sample.inputs})


def _axes(name: str, single: Sequence[Any], pair: Sequence[Any], read: frozenset[int]) -> tuple[int, ...]:
    axes = [0] * len(single)
    for index, (one, two) in enumerate(zip(single, pair, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            continue
        grown = [axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis]]
        if index in read and (one.dim() != two.dim() or len(grown) != 1):
            raise NotStorable(f"{name} gives {[*one.shape]} for a picture, {[*two.shape]} for two")
        axes[index] = grown[0] if len(grown) == 1 else 0
    return tuple(axes)


class _DecoderReached(Exception):
    """Ends a forward pass where the frozen parts are done."""


def _decoder_inputs(model: Any, inputs: Mapping[str, Any], hooks: Sequence[Any] = ()) -> list[Any]:
    """Runs the model up to its decoder and returns the decoder's flattened arguments; the hooks are removed."""
    reached: list[Any] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        reached.extend(pytree.tree_leaves((args, kwargs)))
        raise _DecoderReached

    with contextlib.ExitStack() as hooked, contextlib.suppress(_DecoderReached):
        for hook in (*hooks, decoder_of(model).register_forward_pre_hook(stop, with_kwargs=True)):
            hooked.enter_context(hook)
        model(**inputs, use_cache=False)
    if not reached:
        raise NotStorable("the model runs its decoder's layers by itself")
    return reached


def _recorded(model: Any, names: Sequence[str] | Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    recorded: dict[str, list[Any]] = {name: [] for name in names}

    def record(name: str, _: nn.Module, __: Any, output: Any) -> None:
        # Copied at once: some models write into an output that they were given.
        recorded[name].append(pytree.tree_flatten(pytree.tree_map_only(Tensor, Tensor.clone, output)))

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(record, name)) for name in names]
    _decoder_inputs(model, inputs, hooks)
    return recorded


def _read_leaves(model: Any, batched: Mapping[str, bool], inputs: Mapping[str, Any]) -> dict[tuple[str, int], set[int]]:
    """Finds the outputs that the rest of the model reads: those that get a gradient.

    Every part's outputs are detached from what made them, so a part that only feeds another part is read by nobody.
    """
    seen: list[tuple[str, int, int, Tensor]] = []
    counts = dict.fromkeys(batched, 0)

    def cut_off(name: str, _: nn.Module, __: Any, output: Any) -> Any:
        number = counts[name] if batched[name] else 0
        counts[name] += 1
        leaves, spec = pytree.tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                fresh = leaf.detach().clone().requires_grad_()
                leaves[index] = fresh * 1  # no leaf of the graph: some models write into it
                seen.append((name, number, index, fresh))
        return pytree.tree_unflatten(leaves, spec)

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(cut_off, name)) for name in batched]
    with torch.enable_grad():
        reached = [leaf for leaf in _decoder_inputs(model, inputs, hooks) if isinstance(leaf, Tensor)]
        total = sum(leaf.float().square().sum() for leaf in reached if leaf.requires_grad)
        if not isinstance(total, Tensor):
            return {}
        gradients = torch.autograd.grad(total, [fresh for *_, fresh in seen], allow_unused=True)
    read: dict[tuple[str, int], set[int]] = {}
    for (name, number, index, _), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            read.setdefault((name, number), set()).add(index)
    return read


def _frozen_modules(model: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Lists outermost frozen modules that are called, before the decoder, with something made of pixels."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trained_ids = frozenset(id(weight) for weight in trained)
    names = {module: name for name, module in model.named_modules()}
    if late := [names[module] for module in _called_with_gradients(model, inputs, trained_ids)]:
        raise NotStorable(f"{late[0]} takes the output of trainable weights")
    try:
        for weight in trained:
            weight.requires_grad_(False)
        batch = {k: v.detach().clone().requires_grad_() * 1 if _is_float(v) else v for k, v in inputs.items()}
        called = _called_with_gradients(model, batch, trained_ids)
    finally:
        for weight in trained:
            weight.requires_grad_(True)
    inside = {child for module in called for child in module.modules() if child is not module}
    outermost = tuple(names[module] for module in called if module not in inside)
    if not outermost:
        raise NotStorable("no frozen module takes pixels")
    return outermost


def _called_with_gradients(model: Any, batch: Mapping[str, Any], trained_ids: frozenset[int]) -> dict[nn.Module, None]:
    """Lists frozen modules outside the decoder that are called with something that requires a gradient."""
    decoder = set(decoder_of(model).modules())
    modules = dict[nn.Module, None]()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            modules[module] = None

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if (weights := list(module.parameters()))
        and not any(id(weight) in trained_ids for weight in weights)
        and decoder.isdisjoint(module.modules())
    ]
    with torch.enable_grad():
        _decoder_inputs(model, batch, hooks)
    return modules


def _is_float(value: Any) -> bool:
    """Tells pixels among a processor's inputs from grids and sizes, which are whole numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces pixels by ones of their shape, which models still ask for (idefics takes zeros for padding)."""
    return {
        name: torch.ones((), dtype=value.dtype, device=value.device).expand(value.shape) if _is_float(value) else value
        for name, value in inputs.items()
    }


def with_stored_outputs(sample: Any, outputs: Outputs) -> Any:
    """Replaces the pixels of a `Sample` or `Encoded` by stored outputs."""
    return replace(sample, inputs=without_pixels(sample.inputs), stored=(outputs,))


class PictureOutputCache:
    """Runs a model's frozen vision parts only once for pictures that recur in a batch or in the next one.

    Raises NotStorable: the parts do not give the same when what they gave is handed in again.
    """

    def __init__(self, backbone: Any, encoder: Encoder) -> None:
        self._backbone, self._collate = backbone, encoder.collate
        backbone.frozen_parts = backbone.frozen_parts or find_verified_parts(backbone.model, encoder)
        self._outputs: dict[tuple[str | Clip, ...], Outputs] = {}

    def replace_pixels(self, samples: Sequence[Sample]) -> list[Sample]:
        """Puts the parts' outputs in the place of each sample's pixels."""
        firsts = {sample.media: sample for sample in reversed(samples) if sample.media}
        new = {media: sample for media, sample in firsts.items() if media not in self._outputs}
        if new:
            parts, model = self._backbone.frozen_parts, self._backbone.model
            given = parts.outputs_of_each(model, [*new.values()], self._collate)
            self._outputs |= dict(zip(new, given, strict=True))
        self._outputs = {media: self._outputs[media] for media in firsts}  # the next batch goes on with the last
        return [
            with_stored_outputs(sample, self._outputs[sample.media]) if sample.media else sample for sample in samples
        ]
