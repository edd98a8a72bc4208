"""How large a picture or a video may be, and of which formats: everything that is opened for a person holds to these.

A header's numbers are compared before anything is decoded. docs/data.md says the same to people.
"""

from __future__ import annotations

MEBIBYTE = 2**20

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
"""Pillow's names of what is read; it knows formats that start other programs (EPS: Ghostscript), and rarer decoders.
HEIC is read beside them where pillow-heif is installed."""
PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "apng", "mpo",
    "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "avif", "avifs", "heic", "heif", "hif",
)  # fmt: skip
"""How files of these formats end."""
VIDEO_ENDINGS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "ts", "m2ts", "flv", "mpg", "mpeg", "vob", "wmv", "asf", "mxf",
)  # fmt: skip
PICTURE_PIXELS = 178_956_970
"""Most of a picture: the number from which Pillow itself refuses. Decoding it takes 0.6 to 2.2 GB, and seconds."""
PICTURE_ELONGATION = 500
"""How many times longer than the other a picture's side may be: some models bring the shorter one to their own size."""
PICTURE_SIDE = 8_192
"""Pixels of the longer side above which a picture is shrunk when it is read, since many models pad it to a square."""
PICTURE_BYTES = 512 * MEBIBYTE
HEADER_READS_TIMES_BYTES = 10**11
"""Most of what precedes the pixels: 40 MB of EXIF or 4 MB of comment, of which real pictures have some KB."""

FRAME_PIXELS = 36_000_000
"""Most of a video's frame: 8K is 33 million."""
VIDEO_FRAMES = 2_000_000
"""Most of a video: nine hours at 60 a second."""
VIDEO_SECONDS = 60.0
"""Longest time that one file may take its decoder."""
VIDEO_MEMORY = 4_096 * MEBIBYTE
"""Most bytes that the decoder's process may take for one file, beyond what its libraries have."""
