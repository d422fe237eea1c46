"""Read, check and decode image files: the one place where a picture is decoded, here and in training."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from data_prep.schema import BadSample, type_name

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

MAX_PIXELS = 100_000_000
"""Largest image that is decoded, in pixels: 100 megapixels take 300 MB of memory as RGB."""
MAX_BYTES = 1 << 28
"""Largest image file that is read, in bytes: 256 MiB."""

FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
"""Pillow's name of a format -> the suffix in the shard. The others are refused: for EPS, Pillow starts Ghostscript."""

DECODING = "upright RGB"
"""What decode_image makes of a file, in the words of a cache's fingerprint: to be changed whenever that changes."""

NOTICES = {
    "deep_grey": "more than 8 bits of grey: what is over 255 turns white",
    "float_grey": "floating point grey: what is under 1 turns black",
    "transparent": "transparent pixels: the colour under them is shown, often black",
    "animated": "more than one frame: the first is taken",
}
"""What a picture loses when it is decoded as transformers does, here and in training."""

CONVERTED = ("deep_grey", "float_grey", "transparent")
"""The notices that `convert_image` mends."""


def decode_image(content: bytes) -> Image:
    """Decode an image file to RGB, upright, as transformers' own loader does.

    Of several frames the first. EXIF orientation is applied. Transparency is dropped, and values over 255 are cut off:
    see NOTICES. Raises BadSample: broken_image, image_too_large.
    """
    return _with_image(content, _upright_rgb)


def check_image(content: bytes) -> tuple[str, tuple[str, ...]]:
    """Decode an image file to its last pixel; returns its suffix, such as "png", and the keys of NOTICES that apply.

    Raises as decode_image does.
    """

    def check(image: Image) -> tuple[str, tuple[str, ...]]:
        suffix, notices = _suffix(image), _notices(image)
        _upright_rgb(image)
        return suffix, notices + _frames(image)

    return _with_image(content, check)


def image_suffix(content: bytes) -> str:
    """The suffix alone, from the image file's header. Raises as decode_image does."""
    return _with_image(content, _suffix)


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the file's header, so before it is turned. Raises as decode_image does."""
    return _with_image(content, lambda image: image.size)


def convert_image(content: bytes, background: str) -> bytes:
    """An image file of 8 bits and without transparency, as PNG; unchanged where the file is that already.

    Grey of 16 bits is divided by 257; other deep grey is scaled from its smallest and largest value to 0 and 255,
    except floats that lie in 0 to 1, which are multiplied by 255. Transparent pixels lie on `background`, a colour
    that Pillow knows. Raises as decode_image does.
    """

    def convert(image: Image) -> bytes:
        if not set(CONVERTED) & set(_notices(image)):
            return content
        buffer = io.BytesIO()
        _as_seen(image, background).save(buffer, "PNG")
        return buffer.getvalue()

    return _with_image(content, convert)


def read_image(folder: Path, name: object) -> bytes:
    """Read an image file inside `folder`; the name may be absolute.

    Raises BadSample: wrong_type, image_path_escapes, missing_image, image_too_large. Only the name is checked, so
    symbolic links inside the folder are followed.
    """
    if not isinstance(name, str) or not name:
        raise BadSample("wrong_type", f"an image is {name!r}; expected a path inside the images folder")
    path = PurePosixPath(name)
    inside = not path.is_absolute() or any(path.is_relative_to(base) for base in (folder.absolute(), folder.resolve()))
    if not inside or ".." in path.parts:
        raise BadSample("image_path_escapes", f"{name}: expected a path inside the images folder {folder}, without ..")
    try:
        file = folder / path
        if not file.is_file():
            raise BadSample("missing_image", name)
        if file.stat().st_size > MAX_BYTES:
            raise BadSample("image_too_large", f"{name}: {file.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample("missing_image", f"{name}: {getattr(error, 'strerror', None) or error}") from None


def image_bytes(source: object, folder: Path) -> bytes:
    """The image file that a record names: bytes, a path, a data URI, or an object that holds one of these.

    Objects: {"bytes": ..., "path": ...}, {"url": ...}, {"base64": ...}, {"type": "base64", "data": ...}. Raises
    BadSample as read_image does, broken_image for a data URI that is none, and missing_image for a URL of the network.
    """
    if isinstance(source, dict):
        for name in ("bytes", "base64", "data", "url", "path"):
            if source.get(name) is not None:
                value = source[name]
                return _from_base64(value) if name in ("base64", "data") else image_bytes(value, folder)
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if not isinstance(source, str) or not source:
        raise BadSample("wrong_type", f"an image is {type_name(source)}; expected bytes, a path or a data URI")
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        return _from_data_uri(source)
    if scheme in ("http", "https", "s3", "gs", "hf"):
        raise BadSample("missing_image", f"{source[:200]}: nothing is fetched from the network; download it")
    return read_image(folder, unquote(urlsplit(source).path) if scheme == "file" else source)


def _from_data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSample("broken_image", f"{uri[:40]!r}: expected data:image/...;base64,...")
    return _from_base64(body)


def _from_base64(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True)  # type: ignore[arg-type]  # a TypeError says so
    except (TypeError, ValueError) as error:
        raise BadSample("broken_image", f"an image's base64 cannot be read: {error}") from None


def _with_image(content: bytes, use: Callable[[Image], T]) -> T:
    """Open an image file and use it; whatever is raised becomes a BadSample."""
    import PIL
    from PIL import Image

    known = [name for name in FORMATS if name != "MPO"]  # Pillow's JPEG reader opens these
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are checked here
            with Image.open(io.BytesIO(content), formats=known) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadSample("image_too_large", f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
                return use(image)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from None
    except (BadSample, MemoryError):
        raise
    except PIL.UnidentifiedImageError:
        raise BadSample("broken_image", f"{len(content)} bytes that are none of {', '.join(known)}") from None
    except Exception as error:  # Pillow's readers raise nearly anything on hostile bytes
        raise BadSample("broken_image", f"{len(content)} bytes: {type(error).__name__}: {error}") from None


def _suffix(image: Image) -> str:
    return FORMATS[image.format or ""]


def _upright_rgb(image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def _notices(image: Image) -> tuple[str, ...]:
    if image.mode == "I" or image.mode.startswith("I;"):
        return ("deep_grey",)
    if image.mode == "F":
        return ("float_grey",)
    if image.has_transparency_data and _smallest(image.convert("RGBA").getchannel("A")) < 255:
        return ("transparent",)
    return ()


def _frames(image: Image) -> tuple[str, ...]:
    """To be called last: it may leave the file at its second frame."""
    try:
        animated = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: what phones write
    except Exception:  # the first frame is whole; of the others nothing is used
        return ()
    return ("animated",) if animated else ()


def _smallest(channel: Any) -> float:
    return channel.getextrema()[0]


def _as_seen(image: Image, background: str) -> Image:
    from PIL import Image, ImageOps

    upright: Any = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _eight_bits(upright).convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Grey of any depth as mode L."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values - low) * (255.0 / (high - low or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))
