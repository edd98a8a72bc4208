"""What frozen vision parts give for a sample's pictures, kept and handed in again: the same loss, no tower run.

Nothing here knows a family. A frozen part is an outermost module outside the decoder, none of whose weights trains,
that is called with something made of pixels. Its outputs, whatever they are (a tensor, a tuple, a ModelOutput), are
flattened; those that a gradient comes back to are kept, of the others the shape. One forward pass of one picture and
one of two say along which dimension an output grows. Outputs are those of a sample's pictures together: some
processors cut a lone picture into tiles and two into none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dora_vl.backbones.vision_store import HASH, keep_settings, save_whole, store_key

Outputs = Mapping[str, Sequence[Sequence[Any]]]
"""Of each part, of each of its calls, the flattened outputs; a tensor that nobody reads is a zero of its shape."""


class NotStorable(Exception):
    """Why a family's frozen outputs cannot be kept."""


class Call(NamedTuple):
    """What one call of a part gives."""

    spec: Any
    """Of the tree that its flattened outputs came from."""
    read: frozenset[int]
    """Which of them the rest of the model reads."""
    axes: tuple[int, ...]
    """Along which dimension each grows with the pictures."""


class _DecoderReached(Exception):
    """Ends a forward pass where the frozen parts are done."""


@dataclass(frozen=True)
class FrozenParts:
    """The frozen parts of one model by name, and how their outputs are joined."""

    model: Any
    calls: Mapping[str, tuple[Call, ...]]
    """Of a part that is called once for each picture, one stands for all."""
    batched: Mapping[str, bool]
    """Whether a part takes all pictures of a batch in one call."""

    @torch.no_grad()
    def outputs_of(self, inputs: Mapping[str, Any]) -> Outputs:
        """What is kept of a model's inputs for one sample."""
        return {
            name: [self._kept(name, number, leaves) for number, (leaves, _) in enumerate(calls)]
            for name, calls in _recorded(self.model, self.calls, inputs).items()
        }

    @contextlib.contextmanager
    def replaying(self, samples: Sequence[Outputs]) -> Iterator[None]:
        """Meanwhile the parts give what was kept of these samples, in the batch's order."""
        before: dict[nn.Module, Any] = {}
        for name in self.calls:
            module = self.model.get_submodule(name)
            before[module] = module.__dict__.get("forward")
            module.forward = self._replay(name, samples)
        try:
            yield
        finally:
            for module, own in before.items():
                del module.__dict__["forward"]
                if own is not None:
                    module.forward = own

    def _call(self, name: str, number: int) -> Call:
        return self.calls[name][number if self.batched[name] else 0]

    def _kept(self, name: str, number: int, leaves: Sequence[Any]) -> list[Any]:
        read = self._call(name, number).read
        return [
            leaf if not isinstance(leaf, Tensor) else leaf.clone() if place in read else _hollow(leaf.shape, leaf.dtype)
            for place, leaf in enumerate(leaves)
        ]

    def _replay(self, name: str, samples: Sequence[Outputs]) -> Callable[..., Any]:
        numbers = iter(range(2**31))

        def forward(*_: Any, **__: Any) -> Any:
            number = next(numbers)
            rows = [[call for outputs in samples for call in outputs[name]][number]]
            if self.batched[name]:
                rows = [outputs[name][number] for outputs in samples]
            call = self._call(name, number)
            leaves = zip(zip(*rows, strict=True), call.axes, strict=True)
            return pytree.tree_unflatten([_joined(values, axis) for values, axis in leaves], call.spec)

        return forward


def _hollow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def _is_hollow(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and not any(tensor.stride())


def _joined(values: Sequence[Any], axis: int) -> Any:
    """Tensors of samples one behind another, other dimensions filled up; what is no tensor is the same of all."""
    first = values[0]
    if not isinstance(first, Tensor) or len(values) == 1:
        return first
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    shape[axis] = sum(value.shape[axis] for value in values)
    if _is_hollow(first):
        return _hollow(shape, first.dtype)
    whole, start = first.new_zeros(shape), 0
    for value in values:
        sizes = [slice(0, size) for size in value.shape]
        sizes[axis] = slice(start, start := start + value.shape[axis])
        whole[tuple(sizes)] = value
    return whole


SAME = 1e-2
"""Of the largest logit, how far those of stored outputs may be off: half precision rounds otherwise in a batch."""


def find_parts(
    model: Any,
    one: Mapping[str, Any],
    two: Mapping[str, Any],
    mixed: tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]] | None = None,
) -> FrozenParts:
    """The frozen parts of a model in eval mode, found by forward passes of one sample and of a batch of it twice.

    `mixed` is a batch to prove them by besides, such as one of samples with one, two and no pictures, and those of its
    samples that have pictures, each alone.

    Raises:
        NotStorable: there is none, its outputs do not grow with the pictures along one dimension, or what is handed in
            gives other logits.
    """
    names = _frozen_modules(model, one)
    if not names:
        raise NotStorable("no frozen module takes pixels")
    with torch.no_grad():
        alone, pair = _recorded(model, names, one), _recorded(model, names, two)
    batched: dict[str, bool] = {}
    for name in names:
        counts = len(alone[name]), len(pair[name])
        if counts[0] == 0 or counts[1] not in (counts[0], 2 * counts[0]):
            raise NotStorable(f"{name} is called {counts[0]} times for a picture and {counts[1]} times for two")
        batched[name] = counts[0] == counts[1]
    read = _read_leaves(model, batched, one)
    calls: dict[str, tuple[Call, ...]] = {}
    for name in names:
        numbers = range(len(alone[name]) if batched[name] else 1)
        found = []
        for number in numbers:
            (leaves, spec), others = alone[name][number], pair[name][number][0]
            kept = frozenset(read.get((name, number), ()))
            found.append(Call(spec, kept, _axes(name, leaves, others, kept) if batched[name] else (0,) * len(leaves)))
        calls[name] = tuple(found)
    if not any(call.read for found in calls.values() for call in found):
        raise NotStorable(f"nothing is read of {', '.join(names)}")
    parts = FrozenParts(model, calls, batched)
    for batch, samples in ((two, (one, one)), *([mixed] if mixed else [])):
        _prove(parts, batch, samples)
    return parts


@torch.no_grad()
def _prove(parts: FrozenParts, batch: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    plain = parts.model(**batch, use_cache=False).logits
    try:
        with parts.replaying([parts.outputs_of(sample) for sample in samples]):
            stored = parts.model(**without_pixels(batch), use_cache=False).logits
    except (RuntimeError, ValueError, IndexError) as error:
        raise NotStorable(f"the model cannot take the stored outputs of {', '.join(parts.calls)}: {error}") from error
    off = float((stored - plain).abs().max() / plain.abs().max())
    if not off < SAME:
        raise NotStorable(f"the stored outputs of {', '.join(parts.calls)} give logits that are {off:.1%} off")


def _axes(name: str, alone: Sequence[Any], pair: Sequence[Any], kept: frozenset[int]) -> tuple[int, ...]:
    axes = [0] * len(alone)
    for place, (one, two) in enumerate(zip(alone, pair, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            continue
        grown = [axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis]]
        if place in kept and (one.dim() != two.dim() or len(grown) != 1):
            raise NotStorable(f"{name} gives {[*one.shape]} for a picture, {[*two.shape]} for two")
        axes[place] = grown[0] if len(grown) == 1 else 0
    return tuple(axes)


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop_at_decoder(model: Any) -> Any:
    """A hook that ends a forward pass before the decoder's first layer."""
    decoder = model.get_decoder()
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module))
    first = next((layers[0] for layers in lists), decoder)

    def stop(*_: Any) -> None:
        raise _DecoderReached

    return first.register_forward_pre_hook(stop)


def _recorded(model: Any, names: Sequence[str] | Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Each part's flattened outputs, with their spec, in a forward pass that ends at the decoder."""
    recorded: dict[str, list[Any]] = {name: [] for name in names}

    def record(name: str) -> Callable[..., None]:
        # Flattened at once: some models write into an output that they were given.
        return lambda module, args, output: recorded[name].append(pytree.tree_flatten(output))

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    with _hooked([*handles, _stop_at_decoder(model)]), contextlib.suppress(_DecoderReached):
        model(**inputs, use_cache=False)
    return recorded


def _read_leaves(model: Any, batched: Mapping[str, bool], inputs: Mapping[str, Any]) -> dict[tuple[str, int], set[int]]:
    """Which outputs the rest of the model reads: those that a gradient comes back to.

    Every part's outputs are cut off from what made them, so that a part that only feeds another one is read by nobody.
    """
    seen: list[tuple[str, int, int, Tensor]] = []
    counts = dict.fromkeys(batched, 0)

    def track(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            number, counts[name] = counts[name] if batched[name] else 0, counts[name] + 1
            leaves, spec = pytree.tree_flatten(output)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    fresh = leaf.detach().clone().requires_grad_()
                    leaves[place] = fresh * 1  # no leaf of the graph: some models write into it
                    seen.append((name, number, place, fresh))
            return pytree.tree_unflatten(leaves, spec)

        return hook

    with (
        _hooked([model.get_submodule(name).register_forward_hook(track(name)) for name in batched]),
        torch.enable_grad(),
    ):
        total = model(**inputs, use_cache=False).logits.float().square().sum()
        gradients = torch.autograd.grad(total, [fresh for *_, fresh in seen], allow_unused=True)
    read: dict[tuple[str, int], set[int]] = {}
    for (name, number, place, _), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            read.setdefault((name, number), set()).add(place)
    return read


def _frozen_modules(model: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Outermost modules with weights, none of which trains, called with something made of pixels before the decoder."""
    decoder = set(model.get_decoder().modules())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    ids, called = {id(weight) for weight in trained}, dict[nn.Module, None]()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            called[module] = None

    handles = [_stop_at_decoder(model)]
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(id(weight) in ids for weight in weights) and decoder.isdisjoint(module.modules()):
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        for weight in trained:  # so that what asks for a gradient comes from pixels
            weight.requires_grad_(False)
        with _hooked(handles), torch.enable_grad(), contextlib.suppress(_DecoderReached):
            pixels = {k: v.detach().clone().requires_grad_() * 1 if is_pixels(v) else v for k, v in inputs.items()}
            model(**pixels, use_cache=False)
    finally:
        for weight in trained:
            weight.requires_grad_(True)
    inside = {child for module in called for child in module.modules() if child is not module}
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[module] for module in called if module not in inside)


def is_pixels(value: Any) -> bool:
    """Whether a processor's input holds numbers of pictures; grids and sizes are whole numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs whose pixels are a one of their shape, which models still ask for (idefics takes zeros for padding)."""
    return {k: torch.ones((), dtype=v.dtype).expand(v.shape) if is_pixels(v) else v for k, v in inputs.items()}


# The store: outputs by the pictures' content, in a folder named after all that decides them.


def pictures_key(pictures: Sequence[Image.Image]) -> str:
    """The content of a sample's pictures in order, as the processor gets them, wherever they lie."""
    digest = hashlib.sha256()
    for picture in pictures:
        rgb = picture.convert("RGB")
        digest.update(f"{rgb.size}".encode() + rgb.tobytes())
    return digest.hexdigest()


class OutputStore:
    """Outputs by `pictures_key`, in shards that appear whole; several processes may fill one folder.

    Args:
        cache: the folder of stores; the one in it is named after the parts' weights and `settings`.
        settings: what else decides the outputs: the processor's.
    """

    def __init__(self, cache: Path, parts: FrozenParts, settings: Mapping[str, Any]) -> None:
        decided = {**settings, "parts": [*parts.calls], "transformers": transformers.__version__}
        name = store_key(nn.ModuleList([parts.model.get_submodule(part) for part in parts.calls]), decided)
        self.folder = cache / name
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(self.folder, {**decided, HASH: name})
        self._waiting: dict[str, Outputs] = {}
        self._shards: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Looks again at what the folder holds, whichever process wrote it."""
        for path in sorted(self.folder.glob("outputs-*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                self._shards |= dict.fromkeys(json.loads(shard.metadata()["index"]), path)

    def __contains__(self, key: str) -> bool:
        return key in self._shards or key in self._waiting

    def add(self, key: str, outputs: Outputs) -> None:
        """Takes what was kept of a sample's pictures; it is on disk after `flush`."""
        self._waiting[key] = outputs

    def flush(self) -> None:
        """Writes what was added as one shard."""
        if not self._waiting:
            return
        tensors: dict[str, Tensor] = {"": torch.zeros(0)}

        def described(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return {"value": leaf}
            if _is_hollow(leaf):
                return {"shape": [*leaf.shape], "dtype": str(leaf.dtype).removeprefix("torch.")}
            name = str(len(tensors))
            tensors[name] = leaf.cpu().contiguous()
            return {"tensor": name}

        index = {
            key: {part: [[described(leaf) for leaf in call] for call in calls] for part, calls in outputs.items()}
            for key, outputs in self._waiting.items()
        }
        path = self.folder / f"outputs-{hashlib.sha256(''.join(index).encode()).hexdigest()[:20]}.safetensors"
        save_whole(path, tensors, {"index": json.dumps(index)})
        self._shards |= dict.fromkeys(index, path)
        self._waiting = {}

    def read(self, key: str) -> Outputs:
        """What was kept of a sample's pictures."""
        if key in self._waiting:
            return self._waiting[key]
        with safe_open(self._shards[key], framework="pt") as shard:

            def leaf_of(described: Mapping[str, Any]) -> Any:
                if "tensor" in described:
                    return shard.get_tensor(described["tensor"])
                if "shape" in described:
                    return _hollow(described["shape"], getattr(torch, described["dtype"]))
                return described["value"]

            parts: Mapping[str, Any] = json.loads(shard.metadata()["index"])[key]
            return {name: [[leaf_of(leaf) for leaf in call] for call in calls] for name, calls in parts.items()}
