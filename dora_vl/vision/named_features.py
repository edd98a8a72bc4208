"""A folder of stored features as an encoder-decoder's samples ask for them: by the path of a picture or video."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import Part, Stored
from dora_vl.errors import BadSample
from dora_vl.vision.feature_files import open_features


class NamedFeatures:
    """Features by a file's name without its folder and ending.

    Args:
        folder: see `feature_files.open_features`.
        tokens: how many tokens every input gets.
        width: numbers of each token, as the model takes them.
    """

    def __init__(self, folder: Path, *, tokens: int, width: int) -> None:
        self.folder = folder
        self.shape = (tokens, width)
        self._source = open_features(folder)

    def read(self, path: str) -> Float[Tensor, "tokens channels"]:
        """The features of one file, in float32.

        Raises:
            BadSample: there are none, or of another width, or they are no numbers.
        """
        features = self._source.read(Path(path).stem).float()
        self._refuse_other_width(path, features.shape[1])
        if not bool(torch.isfinite(features).all()):
            raise BadSample(path, f"its features in {self.folder} hold NaN or infinity; compute them again")
        return features

    def stored(self, path: str) -> Stored:
        """What a file's features are, without reading them; a picture's are of one frame.

        Raises:
            BadSample: there are none, or of another width.
        """
        found = self._source.stored(Path(path).stem)
        self._refuse_other_width(path, found.width)
        return found

    def _refuse_other_width(self, path: str, width: int) -> None:
        if width != self.shape[1]:
            reason = f"its features in {self.folder} have {width} numbers a token; the model takes {self.shape[1]}"
            raise BadSample(path, reason)

    def part(self, path: str) -> Part | None:
        """The part of a video that a file's features are of; None where nothing says it."""
        return self._source.part(Path(path).stem)
