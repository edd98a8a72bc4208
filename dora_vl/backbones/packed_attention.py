"""Makes transformers' models attend along packed sequences, each a forest of segments (`data.packing`).

Nothing here knows a family. The masks are the family's own, restricted to each token's path: a hook at transformers'
mask interface gets the family's mask function (causal, sliding windows, chunks, blocks of pictures that see each other)
and calls it with distances along the path. Layers of plain causal attention go segment by segment instead, each
segment's queries against the keys of its path, without a mask of all positions. Layers with a running state (gated
delta rule, short convolutions, Mamba) run each path by itself.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dora_vl.shapes import Bool, Int

MASKED = ("sdpa", "eager", "flex_attention")
"""These attention kernels take a mask function; flash attention's take none."""
MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""Takes the sequence's number, head, query and key position; returns whether the query sees the key."""
MATH_KERNEL_KEYS = 64
"""Up to this many keys plain products take a CPU less time than its flash attention, mainly in the backward pass."""


class Forest(NamedTuple):
    """A batch of packed sequences, each as in `data.packing.Packed`; `segment` is -1 at padding."""

    segment: Int[Tensor, "sequences seq"]
    steps: Int[Tensor, "sequences seq"]
    sees: Bool[Tensor, "sequences segments segments"]


class Span(NamedTuple):
    """A segment: its first and last position, and all positions of its path, its own last."""

    start: int
    stop: int
    path: Int[Tensor, " path"]


class Paths(NamedTuple):
    """All paths of a batch, padded at the end; `writes` is False for positions that an earlier path writes."""

    sequences: Int[Tensor, " paths"]
    positions: Int[Tensor, "paths longest"]
    writes: Bool[Tensor, "paths longest"]


class SegmentGroup(NamedTuple):
    """Segments of similar lengths, padded at the end, that attend in one call."""

    sequences: Int[Tensor, "segments 1"]
    queries: Int[Tensor, "segments queries"]
    keys: Int[Tensor, "segments keys"]
    sees: Bool[Tensor, "segments 1 queries keys"] | None
    """Marks the keys that each query sees; None if all lengths are equal and causal attention suffices."""
    filled: Bool[Tensor, "segments queries"]
    """False marks padding."""


def group_segments(spans: Sequence[Sequence[Span]]) -> list[SegmentGroup]:
    """Groups the segments of all sequences by their lengths and those of their paths, and pads each group."""
    by_lengths: dict[tuple[int, int], list[tuple[int, Span]]] = {}
    for sequence, of_sequence in enumerate(spans):
        for span in of_sequence:
            lengths = _rounded_up(span.stop - span.start), _rounded_up(len(span.path))
            by_lengths.setdefault(lengths, []).append((sequence, span))
    groups = []
    for members in by_lengths.values():
        device = members[0][1].path.device
        lengths = torch.tensor([span.stop - span.start for _, span in members], device=device)
        paths = [span.path for _, span in members]
        keys = nn.utils.rnn.pad_sequence(paths, batch_first=True)
        shared = torch.tensor([len(path) for path in paths], device=device) - lengths
        count, key_index = torch.arange(int(lengths.max()), device=device), torch.arange(keys.shape[1], device=device)
        filled = count < lengths[:, None]
        queries = keys.gather(1, (shared[:, None] + count).clamp_max(keys.shape[1] - 1))
        # Also where nothing is: every query must see something.
        sees = key_index <= (shared[:, None] + count)[..., None]
        is_even = bool(filled.all()) and not bool(shared.any())
        sequences = torch.tensor([[sequence] for sequence, _ in members], device=device)
        groups.append(SegmentGroup(sequences, queries, keys, None if is_even else sees[:, None], filled))
    return groups


def _rounded_up(length: int) -> int:
    """Rounds up to a power of two, or 1.5 times one, which pads by a third at most."""
    power = 1 << max(2, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 else power


def spans_of(forest: Forest) -> list[list[Span]]:
    """Lists the segments of each sequence."""
    sequences = []
    for segment, sees in zip(forest.segment, forest.sees, strict=True):
        ends = torch.bincount(segment[segment >= 0]).cumsum(0).tolist()
        paths = sees[: len(ends), segment.clamp_min(0)] & (segment >= 0)
        ranges = zip([0, *ends[:-1]], ends, paths, strict=True)
        sequences.append([Span(start, stop, path.nonzero()[:, 0]) for start, stop, path in ranges])
    return sequences


def paths_of(forest: Forest, sequence_spans: Sequence[Sequence[Span]]) -> Paths:
    """Lists the paths from each root to each leaf."""
    sequences, positions, writes = [], [], []
    for sequence, spans in enumerate(sequence_spans):
        seen_by = forest.sees[sequence, : len(spans), : len(spans)].sum(0)
        written = torch.zeros(forest.segment.shape[1], dtype=torch.bool, device=forest.segment.device)
        for leaf in (seen_by == 1).nonzero()[:, 0].tolist():
            path = spans[leaf].path
            sequences.append(sequence)
            positions.append(path)
            writes.append(~written[path])
            written[path] = True
    longest = max(map(len, positions))
    filled = [nn.functional.pad(path, (0, longest - len(path)), value=int(path[-1])) for path in positions]
    first = [nn.functional.pad(path, (0, longest - len(path)), value=False) for path in writes]
    return Paths(torch.tensor(sequences, device=forest.segment.device), torch.stack(filled), torch.stack(first))


class PackedAttention:
    """Makes a decoder attend along a forest in its model's next forward pass.

    A recomputed forward (gradient checkpointing) comes later than the forward itself and must see the same forest, so
    the forest stays until the model is called again. Layers of the decoder with a running state are hooked.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        _install()
        self.config: Any = getattr(decoder, "config", None)
        self.forest: Forest | None = None
        self.groups: list[SegmentGroup] = []
        self.paths: Paths | None = None
        self.blocks_are_whole = False
        """True once the forest is known to cut no block of the family's mask."""
        self._states = [
            layer for layer in decoder.modules() if any(isinstance(part, nn.Conv1d) for part in layer.children())
        ]
        for layer in self._states:
            layer.register_forward_pre_hook(self._split_paths, with_kwargs=True)
            layer.register_forward_hook(self._merge_paths)
        _instances[id(self.config)] = self
        self._is_next = False
        getattr(model, "base_model", model).register_forward_pre_hook(self._reset_forest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Registers a copy for the copied model's config."""
        vars(self).update(state)
        _instances[id(self.config)] = self

    def _reset_forest(self, *_: object) -> None:
        """Drops the previous call's forest if this call set none, for example when the model is called directly."""
        if not self._is_next and self.forest is not None:
            self.set_forest(None)
        self._is_next = False

    def set_forest(self, forest: Forest | None) -> None:
        """Sets the forest of the next forward pass; None attends as usual."""
        self.forest, self.blocks_are_whole, self._is_next = forest, False, True
        spans = [] if forest is None else spans_of(forest)
        self.groups = group_segments(spans)
        self.paths = paths_of(forest, spans) if forest is not None and self._states else None

    def _split_paths(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Passes each path as a sequence of its own to a layer with a running state."""
        if self.paths is None:
            return None
        # Paths have none of these, which belong to whole sequences.
        of_sequences = ("attention_mask", "position_ids", "cache_params", "past_key_values", "cache")
        kwargs = {name: None if name in of_sequences else value for name, value in kwargs.items()}
        hidden, *rest = args or (kwargs["hidden_states"],)
        hidden = hidden[self.paths.sequences[:, None], self.paths.positions]
        if not args:
            return (), {**kwargs, "hidden_states": hidden}
        return (hidden, *(None if isinstance(value, Tensor) else value for value in rest)), kwargs

    def _merge_paths(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Scatters its output back to the sequences; positions shared by several paths get the first one's."""
        if self.paths is None or self.forest is None:
            return None
        hidden, writes = output[0] if isinstance(output, tuple) else output, self.paths.writes
        sequences = self.paths.sequences[:, None].expand_as(writes)
        scattered = hidden.new_zeros(*self.forest.segment.shape, hidden.shape[-1])
        scattered = scattered.index_put((sequences[writes], self.paths.positions[writes]), hidden[writes])
        return (scattered, *output[1:]) if isinstance(output, tuple) else scattered


_instances: WeakValueDictionary[int, PackedAttention] = WeakValueDictionary()
"""Finds the instance by the id of its decoder's config, which masks and attention functions receive."""


@cache
def _install() -> None:
    """Wraps transformers' masks and attention, once per process."""
    for kind in MASKED:
        ALL_MASK_ATTENTION_FUNCTIONS.register(kind, _along_paths(ALL_MASK_ATTENTION_FUNCTIONS[kind]))
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _by_segment(ALL_ATTENTION_FUNCTIONS["sdpa"]))


def _along_paths(build: Callable[..., Any]) -> Callable[..., Any]:
    """Restricts a family's mask function to each token's path."""

    def mask(*args: Any, mask_function: MaskFunction, config: Any = None, **options: Any) -> Any:
        packed = _instances.get(id(config))
        if packed is None or packed.forest is None:
            return build(*args, mask_function=mask_function, config=config, **options)
        if mask_function is causal_mask_function and config._attn_implementation == "sdpa":
            return None  # `_by_segment` does it
        size, device = options.pop("local_size", None), options.get("device", "cpu")
        forest = Forest(*(tensor.to(device) for tensor in packed.forest))
        chunked = size is not None and getattr(config, "attention_chunk_size", None) == size
        options |= {name: False for name in options if name.startswith("allow_is_")}
        options["attention_mask"] = None  # padding belongs to no segment
        if not packed.blocks_are_whole:
            blocks = sdpa_mask(*args, mask_function=_into_branches(forest, mask_function), **options)
            if blocks is not None and bool(blocks.any()):
                crossing = "crosses from a shared segment into a branch"
                raise ValueError(f"a block of tokens that attend to each other {crossing}")
            packed.blocks_are_whole = True
        along = _visible(forest, mask_function, size, chunked=chunked)
        return build(*args, mask_function=along, config=config, **options)

    return mask


def _on_path(forest: Forest, b: Any, q: Any, kv: Any) -> Any:
    """Tells whether `kv` is in the segment of `q` or above it."""
    of_q, of_kv = forest.segment[b, q], forest.segment[b, kv]
    return forest.sees[b, of_q, of_kv] & (of_q >= 0) & (of_kv >= 0)


def _visible(forest: Forest, family: MaskFunction, size: int | None, *, chunked: bool) -> MaskFunction:
    """Applies the family's function within a segment, and above it at the distance along the path.

    Args:
        size: length of the windows or, where `chunked`, chunks that the family's layers look back.
    """
    segment, steps, _ = forest

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        distance = steps[b, q] - steps[b, kv]
        if size is None:
            near, far = family(b, h, q, kv), family(b, h, q, torch.minimum((q - distance).clamp(min=0), q))
        elif chunked:
            far = (steps[b, q] // size == steps[b, kv] // size) & (kv <= q)
            near = far | (family(b, h, q, kv) & (steps[b, q] // size == steps[b, kv] // size))
        else:
            near, far = family(b, h, q, kv), (distance < size) & (kv <= q)
        own = segment[b, q] == segment[b, kv]
        return (_on_path(forest, b, q, kv) & ((own & near) | (~own & far))) | (q == kv)

    return visible


def _into_branches(forest: Forest, family: MaskFunction) -> MaskFunction:
    """Tells what the family would let a token see in the branches after its segment."""
    segment = forest.segment

    def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return _on_path(forest, b, kv, q) & (segment[b, q] != segment[b, kv]) & family(b, h, q, kv)

    return seen


def _by_segment(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Computes a forest's plain causal attention: each segment's queries against the keys and values of its path.

    Segments of similar lengths share a call; one each would cost more than the attention.
    """

    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **named: Any
    ) -> Any:
        packed = _instances.get(id(getattr(module, "config", None)))
        is_causal = getattr(module, "is_causal", False)
        if packed is None or packed.forest is None or attention_mask is not None or not is_causal:
            return attend(module, query, key, value, attention_mask, *args, **named)
        states = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # positions before heads
        output = query.new_zeros(*states[0].shape[:3], value.shape[-1])
        for group in packed.groups:
            positions = group.queries, group.keys, group.keys
            parts = [
                state[group.sequences, chosen].transpose(1, 2) for state, chosen in zip(states, positions, strict=True)
            ]
            short = query.device.type == "cpu" and group.keys.shape[1] <= MATH_KERNEL_KEYS
            with sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext():
                attended = attend(module, *parts, group.sees, *args, **named)[0]
            sequences = group.sequences.expand_as(group.queries)[group.filled]
            attended = attended[group.filled].to(output.dtype)  # under autocast it is in half precision
            output = output.index_put((sequences, group.queries[group.filled]), attended)
        return output, None

    return run


class OwnPositions:
    """Positions of a family that counts along several axes (M-RoPE), by its own model's rule; it needs no weights."""

    def __init__(self, model: nn.Module, *, axes: int) -> None:
        self._model, self._axes = _position_model(model), axes

    @classmethod
    def by_sample(cls, model: nn.Module, ids: Int[Tensor, " seq"], inputs: Mapping[str, Any]) -> OwnPositions | None:
        """Measures a model's axes on a sample with a picture; None if it counts along one."""
        if not hasattr(_position_model(model), POSITION_METHOD):
            return None
        positions = cls(model, axes=1).of(ids, inputs)
        return cls(model, axes=len(positions)) if len(positions) > 1 else None

    def of(self, ids: Int[Tensor, " seq"], inputs: Mapping[str, Any]) -> Int[Tensor, "axes seq"]:
        """Returns the positions of a sample's tokens."""
        arguments = {**inputs, "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        arguments["inputs_embeds"] = torch.zeros(1, len(ids), 1)
        count = getattr(self._model, POSITION_METHOD)
        positions = count(**{name: arguments.get(name) for name in inspect.signature(count).parameters})
        self._model.rope_deltas = None  # what decoding would go on from
        return torch.arange(len(ids)).expand(self._axes, -1) if positions is None else positions[:, 0]


POSITION_METHOD = "compute_3d_position_ids"
"""transformers computes a model's positions along several axes by a method of this name."""


def _position_model(model: nn.Module) -> Any:
    return getattr(model, "model", model)
