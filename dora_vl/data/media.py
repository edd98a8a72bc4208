"""Opening a sample's picture: kept inside its folder, decoded as a whole, as plain RGB."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image

from dora_vl.errors import DECODING_ERRORS, BadSample


def open_image(root: Path, relative: str, *, follow_links: bool = False) -> Image.Image:
    """The picture at `relative` under `root`, as RGB, decoded whole.

    As in LLaVA's training: no EXIF rotation, and an alpha channel is dropped, not blended. Two deliberate
    differences: a palette's transparency is removed before conversion (transformers would blend the picture
    with white even afterwards), and 16-bit grey is scaled to 8 bits (Pillow's `convert` clips it to white).

    Args:
        root: the folder that holds all pictures.
        relative: a path inside it, with `/`; an absolute path that lies in it counts as that.
        follow_links: accept a link inside `root` that leads out of it, as in a folder composed of links.

    Raises:
        BadSample: the path leaves `root`, nothing is there, or it cannot be decoded; its `sample_id` is the
            path, because a picture does not know its sample.
    """
    return decode_image(path_inside(root, relative, follow_links=follow_links), relative, str(root))


def decode_image(source: Path | BytesIO, name: str, where: str) -> Image.Image:
    """A picture from a file or from memory; `name` and `where` are what the messages say. See `open_image`.

    Raises:
        BadSample: nothing is there, or it cannot be decoded.
    """
    try:
        with Image.open(source) as image:
            image.load()
    except FileNotFoundError:
        raise BadSample(name, f"picture {name} is missing in {where}") from None
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise BadSample(name, f"picture {name} in {where} cannot be decoded: {_one_line(error)}") from None
    return _plain_rgb(image)


def path_inside(root: Path, relative: str, *, follow_links: bool = False, kind: str = "picture") -> Path:
    """Where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it.

    Raises:
        BadSample: the path leaves `root`, through dots or through a link that may not be followed.
    """
    parts = PurePosixPath(relative)
    absolute = parts.is_absolute() or Path(relative).is_absolute()
    if not relative or "\0" in relative or (absolute and not _is_below(root, Path(relative))):
        raise BadSample(relative, f"{kind} path {relative!r} must be relative to {root}, or lie in it")
    if ".." in parts.parts or ".." in Path(relative).parts:
        raise BadSample(relative, f"{kind} path {relative!r} must not leave {root}")
    path = root / relative
    if follow_links:
        return path
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, or a name too long
        raise BadSample(relative, f"{kind} path {relative!r} cannot be followed: {_one_line(error)}") from None
    if not real.is_relative_to(real_root):
        raise BadSample(relative, f"{kind} {relative} is a link that leads out of {root}, to {real}")
    return path


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Whether any of these paths leads to something from `root`; a root that is another one has none."""
    for name in names:
        try:
            if (root / name).exists():
                return True
        except (OSError, ValueError):  # a name that no file system takes
            continue
    return False


def _is_below(root: Path, path: Path) -> bool:
    """By their names alone; where links lead is seen afterwards."""
    return path.is_relative_to(root.absolute()) or path.is_relative_to(root.resolve())


def _plain_rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)
    if image.mode.startswith("I") and _brightest(image) > 255:
        image = image.point(lambda value: value / 256).convert("L")
    return image.convert("RGB")


def _brightest(image: Image.Image) -> float:
    _, brightest = image.getextrema()
    return float(brightest) if isinstance(brightest, int | float) else 0.0


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
