"""The pictures that a row names or holds: paths, bytes, Hugging Face's image objects, data URLs."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dora_vl.errors import BadSample, shown

PICTURE_KEYS = ("images", "image", "image_path", "img", "picture", "jpg", "jpeg", "png", "webp")
"""Where pictures stand in a row; the first of them that holds any counts."""
STORED = "bytes:"


@dataclass
class RowPictures:
    """Pictures in order: `names` are paths, or made of the content where `held` has the bytes."""

    sample_id: str
    names: list[str] = field(default_factory=list)
    held: dict[str, bytes] = field(default_factory=dict)

    def add(self, value: object, key: str) -> None:
        """Takes a path, bytes, an object with `bytes`, `path` or `url`, or a data URL.

        Raises:
            BadSample: anything else, or an address on the web.
        """
        if isinstance(value, Mapping):
            given = [value.get(name) for name in ("bytes", "path", "url")]
            value = next((one for one in given if one is not None), None)
        if isinstance(value, bytes | bytearray) and value:
            self._hold(bytes(value))
        elif isinstance(value, str) and value.startswith("data:"):
            self._hold(self._from_data_url(value))
        elif isinstance(value, str) and value.startswith(("http://", "https://")):
            raise BadSample(self.sample_id, f"{key!r} is on the web, {shown(value)}; fetch it and name the file")
        elif isinstance(value, str) and value:
            self.names.append(value.removeprefix("file://"))
        else:
            raise BadSample(self.sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")

    def _hold(self, data: bytes) -> None:
        name = STORED + hashlib.sha256(data).hexdigest()[:32]
        self.names.append(name)
        self.held[name] = data

    def _from_data_url(self, url: str) -> bytes:
        header, comma, content = url.partition(",")
        try:
            if not comma or not header.endswith(";base64"):
                raise ValueError("it is not base64")
            return base64.b64decode(content, validate=True)
        except (ValueError, binascii.Error) as error:
            raise BadSample(self.sample_id, f"its data URL {shown(url)} cannot be read: {error}") from None


def row_pictures(row: Mapping[str, object], sample_id: str, keys: Sequence[str] = PICTURE_KEYS) -> RowPictures:
    """The pictures under the first of `keys` that holds any; one that is no list counts as a list of one.

    Raises:
        BadSample: see `RowPictures.add`.
    """
    pictures = RowPictures(sample_id)
    for key in keys:
        value = row.get(key)
        if value is None or value == "" or value == [] or value == b"":
            continue
        listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) else [value]
        for one in listed:
            pictures.add(one, key)
        break
    return pictures
