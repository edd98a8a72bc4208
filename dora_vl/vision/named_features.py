"""A folder of stored features as an encoder-decoder's samples ask for them: by the path of a picture or video."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import Part
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
            BadSample: there are none, or of another width.
        """
        features = self._source.read(Path(path).stem).float()
        if features.shape[1] != self.shape[1]:
            reason = f"its features in {self.folder} have {features.shape[1]} numbers a token; the model takes "
            raise BadSample(path, f"{reason}{self.shape[1]}")
        return features

    def frames(self, path: str) -> int:
        """How many frames a file's features are of; 1 for a picture.

        Raises:
            BadSample: there are none.
        """
        return self._source.frames(Path(path).stem)

    def part(self, path: str) -> Part | None:
        """The part of a video that a file's features are of; None where nothing says it."""
        return self._source.part(Path(path).stem)
