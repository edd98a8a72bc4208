"""Has a model of transformers follow rows that are forests of segments (`data.rows`).

Nothing here knows a family. The masks are the family's own, restricted to each token's path: a hook at transformers'
mask interface gets the family's mask function (causal, sliding windows, chunks, blocks of pictures that see each other)
and asks it for distances along the path. Layers of plain causal attention go segment by segment instead, each segment's
queries against the keys of its path, without a mask of all places. Layers with a running state (gated delta rule, short
convolutions, Mamba) run each path by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MASKED = ("sdpa", "eager", "flex_attention")
"""Ways to attend that take a mask function; flash attention's kernels look at none."""


MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""Of a batch's row, a head, a query's place and a key's: whether it is seen."""


class Forest(NamedTuple):
    """Rows of a batch, as `data.rows.Row` says it of one; `segment` is -1 at padding."""

    segment: Int[Tensor, "rows seq"]
    steps: Int[Tensor, "rows seq"]
    sees: Bool[Tensor, "rows segments segments"]


class _Followed(NamedTuple):
    """What a forward follows, for the decoder of this config; `checked` once no block of a mask is cut."""

    forest: Forest
    config: Any
    spans: list[list[tuple[int, int, Tensor]]]
    checked: set[bool]


class BlockIsCut(ValueError):
    """The family lets a token see later ones that stand in a branch behind its segment: such rows cannot be shared."""


_followed: ContextVar[_Followed | None] = ContextVar("followed", default=None)


@contextlib.contextmanager
def following(forest: Forest, decoder: nn.Module) -> Iterator[None]:
    """The decoder's masks, attention and running states follow the forest inside; also in a recomputed forward."""
    masks, kernels = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    before, attend = dict(masks), kernels["sdpa"]
    masks.update({kind: _along_paths(before[kind]) for kind in MASKED})
    kernels["sdpa"] = _by_segment(attend)
    config: Any = getattr(decoder, "config", None)
    token = _followed.set(_Followed(forest, config, spans(forest), set()))
    mixers = [layer for layer in decoder.modules() if any(isinstance(part, nn.Conv1d) for part in layer.children())]
    forwards = [mixer.forward for mixer in mixers]
    try:
        if mixers:
            paths = paths_of(forest)
            for mixer, forward in zip(mixers, forwards, strict=True):
                mixer.forward = _path_by_path(forward, paths)
        yield
    finally:
        for mixer in mixers:
            vars(mixer).pop("forward", None)
        _followed.reset(token)
        kernels["sdpa"] = attend
        masks.update(before)


def spans(forest: Forest) -> list[list[tuple[int, int, Tensor]]]:
    """Of each row its segments: where each begins and ends, and the places of its path."""
    rows = []
    for segment, sees in zip(forest.segment, forest.sees, strict=True):
        ends = torch.bincount(segment[segment >= 0]).cumsum(0).tolist()
        paths = sees[: len(ends), segment.clamp_min(0)] & (segment >= 0)
        starts = [0, *ends[:-1]]
        rows.append([(a, b, path.nonzero()[:, 0]) for a, b, path in zip(starts, ends, paths, strict=True)])
    return rows


def _along_paths(build: Callable[..., Any]) -> Callable[..., Any]:
    """A family's masks, built of its own mask functions and restricted to what stands on each token's path."""

    def mask(*args: Any, mask_function: MaskFunction, config: Any = None, **options: Any) -> Any:
        followed = _followed.get()
        if followed is None or config is not followed.config:
            return build(*args, mask_function=mask_function, config=config, **options)
        if mask_function is causal_mask_function and config._attn_implementation == "sdpa":
            return None  # `_by_segment` does it
        size, device = options.pop("local_size", None), options.get("device", "cpu")
        forest = Forest(*(tensor.to(device) for tensor in followed.forest))
        chunked = size is not None and getattr(config, "attention_chunk_size", None) == size
        options |= {name: False for name in options if name.startswith("allow_is_")}
        options["attention_mask"] = None  # padding is no segment
        if not followed.checked:
            followed.checked.add(True)
            blocks = sdpa_mask(*args, mask_function=_into_branches(forest, mask_function), **options)
            if blocks is not None and bool(blocks.any()):
                raise BlockIsCut("tokens that see each other stand in a shared segment and in a branch behind it")
        along = _visible(forest, mask_function, size, chunked=chunked)
        return build(*args, mask_function=along, config=config, **options)

    return mask


def _on_path(forest: Forest, b: Any, q: Any, kv: Any) -> Any:
    """Whether `kv` stands in the segment of `q` or above it."""
    of_q, of_kv = forest.segment[b, q], forest.segment[b, kv]
    return forest.sees[b, of_q, of_kv] & (of_q >= 0) & (of_kv >= 0)


def _visible(forest: Forest, family: MaskFunction, size: int | None, *, chunked: bool) -> MaskFunction:
    """What the family's function says within a segment, and above it at the distance along the path.

    Args:
        size: of the windows or, where `chunked`, chunks that the family's layers look back.
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
    """What the family would let a token see in the branches behind its segment."""
    segment = forest.segment

    def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return _on_path(forest, b, kv, q) & (segment[b, q] != segment[b, kv]) & family(b, h, q, kv)

    return seen


def _by_segment(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Plain causal attention of a forest: each segment's queries against the keys and values of its path."""

    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **named: Any
    ) -> Any:
        followed = _followed.get()
        if (
            followed is None
            or attention_mask is not None
            or query.shape[2] != followed.forest.segment.shape[1]
            or not getattr(module, "is_causal", False)
        ):
            return attend(module, query, key, value, attention_mask, *args, **named)
        rows = []
        for row, segments in enumerate(followed.spans):
            q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
            parts = []
            for start, stop, path in segments:
                alone = len(path) == stop - start
                seen = None
                if not alone:
                    seen = torch.ones(stop - start, len(path), dtype=torch.bool, device=q.device)
                    seen = seen.tril(len(path) - (stop - start))[None, None]
                chosen = slice(start, stop) if alone else path
                keys, values = k[:, :, chosen], v[:, :, chosen]
                parts.append(attend(module, q[:, :, start:stop], keys, values, seen, *args, **named)[0])
            if (padding := query.shape[2] - segments[-1][1]) > 0:
                parts.append(parts[0].new_zeros(1, padding, *parts[0].shape[2:]))
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows), None

    return run


class Paths(NamedTuple):
    """Every path of a batch, filled up at its end: its row, its places, and which of them no other path writes."""

    rows: Int[Tensor, " paths"]
    places: Int[Tensor, "paths longest"]
    writes: Bool[Tensor, "paths longest"]


def paths_of(forest: Forest) -> Paths:
    """From each root to each leaf; what several share is written by the first."""
    rows, places, writes = [], [], []
    for row, segments in enumerate(spans(forest)):
        sees = forest.sees[row, : len(segments), : len(segments)]
        written = torch.zeros(forest.segment.shape[1], dtype=torch.bool, device=sees.device)
        for number in (sees.sum(0) == 1).nonzero()[:, 0].tolist():
            path = segments[number][2]
            rows.append(row)
            places.append(path)
            writes.append(~written[path])
            written[path] = True
    longest = max(map(len, places))
    filled = [nn.functional.pad(path, (0, longest - len(path)), value=int(path[-1])) for path in places]
    own = [nn.functional.pad(path, (0, longest - len(path)), value=False) for path in writes]
    return Paths(torch.tensor(rows, device=forest.segment.device), torch.stack(filled), torch.stack(own))


def _path_by_path(forward: Callable[..., Any], paths: Paths) -> Callable[..., Any]:
    """A layer with a running state runs each path as a row of its own; what it gives goes back to its places."""
    rows = paths.rows[:, None].expand_as(paths.places)
    to_row, to_place = rows[paths.writes], paths.places[paths.writes]

    def run(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        # Rows have no padding inside, and no state is carried on.
        named = {name: None if name in _OF_ROWS else value for name, value in named.items()}
        args = tuple(None if isinstance(value, Tensor) else value for value in args)
        output = forward(hidden_states[rows, paths.places], *args, **named)
        first = output[0] if isinstance(output, tuple) else output
        whole = torch.zeros_like(hidden_states, dtype=first.dtype).index_put((to_row, to_place), first[paths.writes])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return run


_OF_ROWS = frozenset({"attention_mask", "position_ids", "cache_params", "past_key_values", "cache"})
"""What a mixer is told of whole rows, which its paths are not."""
