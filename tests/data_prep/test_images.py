from __future__ import annotations

import io
from pathlib import Path

import pytest
from faulty_input import bomb, picture
from PIL import Image

from data_prep.images import MAX_BYTES, check_image, image_suffix, read_image
from data_prep.schema import BadSample


@pytest.mark.parametrize(
    "format, suffix",
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
        ("MPO", "jpg"),
    ],
)
def test_known_formats_have_their_suffix(format: str, suffix: str) -> None:
    assert check_image(picture(0, format)) == image_suffix(picture(0, format)) == suffix


def reason(content: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        check_image(content)
    return caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_that_ends_early_is_broken(format: str) -> None:
    content = picture(0, format, size=(64, 64))
    assert reason(content[: len(content) // 2]) == "broken_image"


def test_what_is_no_image_or_of_a_format_that_stays_closed_is_broken() -> None:
    postscript = io.BytesIO()
    Image.new("RGB", (4, 4)).save(postscript, "EPS")  # Pillow would start Ghostscript to read it
    for content in (b"", b"words", postscript.getvalue()):
        assert reason(content) == "broken_image"


def test_a_bomb_is_not_decoded() -> None:
    assert reason(bomb()) == "image_too_large"
    assert reason(bomb(10_001, 10_000)) == "image_too_large"  # where Pillow only warns


def test_images_are_read_inside_the_folder_only(tmp_path: Path) -> None:
    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("sub/a.png", "linked/b.png"):
        (inside / name).write_bytes(b"bytes")
        assert read_image(inside, name) == b"bytes"
    for name in ("../a.png", "sub/../../a.png", "/etc/hostname", str(inside / "sub/a.png")):
        with pytest.raises(BadSample, match="image_path_escapes.*inside the images folder"):
            read_image(inside, name)
    for name in ("none.png", "sub", "x" * 5000, "a\0b"):
        with pytest.raises(BadSample, match="missing_image"):
            read_image(inside, name)
    for name in (None, 3, "", ["a.png"]):
        with pytest.raises(BadSample, match="wrong_type"):
            read_image(inside, name)
    with open(inside / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadSample, match="image_too_large"):
        read_image(inside, "huge.png")
