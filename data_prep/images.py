"""Read and check image files. Nothing here encodes an image again: files stay as they came."""

from __future__ import annotations

import io
import warnings
from pathlib import Path, PurePosixPath

from data_prep.schema import BadSample

MAX_PIXELS = 100_000_000
"""Largest image that is decoded, in pixels: 100 megapixels take 300 MB of memory as RGB."""
MAX_BYTES = 1 << 28
"""Largest image file that is read, in bytes: 256 MiB."""

FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
"""Pillow's name of a format -> the suffix in the shard. Others stay closed: some of Pillow's readers start programs."""


def check_image(content: bytes) -> str:
    """Decode an image file's (first) picture to its last pixel; returns the suffix, such as "png".

    Raises BadSample: broken_image, image_too_large.
    """
    return _open(content, decode=True)


def image_suffix(content: bytes) -> str:
    """The suffix alone, from the image file's head. Raises as check_image does."""
    return _open(content, decode=False)


def read_image(folder: Path, name: object) -> bytes:
    """Read an image file inside `folder`.

    Raises BadSample: wrong_type, image_path_escapes, missing_image, image_too_large. Only the
    name is checked, so symbolic links inside the folder are followed.
    """
    if not isinstance(name, str) or not name:
        raise BadSample("wrong_type", f"an image is {name!r}; expected a path inside the images folder")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadSample("image_path_escapes", f"{name}: expected a path inside the images folder, without ..")
    try:
        file = folder / path
        if not file.is_file():
            raise BadSample("missing_image", name)
        if file.stat().st_size > MAX_BYTES:
            raise BadSample("image_too_large", f"{name}: {file.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample("missing_image", f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _open(content: bytes, decode: bool) -> str:
    import PIL
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are judged here
            with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name != "MPO"]) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadSample("image_too_large", f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
                if decode:
                    image.load()
                return FORMATS[image.format or ""]
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from None
    except (BadSample, MemoryError):
        raise
    except PIL.UnidentifiedImageError:
        known = ", ".join(name for name in FORMATS if name != "MPO")
        raise BadSample("broken_image", f"{len(content)} bytes that are none of {known}") from None
    except Exception as error:  # Pillow's readers raise nearly anything on hostile bytes
        raise BadSample("broken_image", f"{len(content)} bytes: {type(error).__name__}: {error}") from None
