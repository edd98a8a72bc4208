"""Parquet shards of features as earlier versions of ours wrote them; they are only read now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from dora_vl.backbones.vision_store import FeatureRow


def write_parquet(path: Path, rows: Sequence[FeatureRow], *, group_rows: int = 2) -> None:
    """One shard."""
    halves = [row.features.half() for row in rows if row.features is not None]
    numbers = [half.flatten().numpy() for half in halves]
    ends = np.cumsum([0, *map(len, numbers)], dtype=np.int32)
    table = pa.table(
        {
            "id": pa.array([row.name for row in rows]),
            "features": pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(numbers))),
            "shape": pa.array([list(half.shape) for half in halves], pa.list_(pa.int32())),
            "backend": pa.array([row.backend for row in rows]),
            "frame_indices": pa.array([row.indices for row in rows], pa.list_(pa.int32())),
            "timestamps": pa.array([row.seconds for row in rows], pa.list_(pa.float64())),
            "start_seconds": pa.array([row.part[0] for row in rows], pa.float64()),
            "end_seconds": pa.array([row.part[1] for row in rows], pa.float64()),
        }
    )
    parquet.write_table(table, path, compression="zstd", row_group_size=group_rows, use_dictionary=False)
