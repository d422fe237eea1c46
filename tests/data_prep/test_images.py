from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from faulty_input import bomb, picture
from PIL import Image

from data_prep.images import MAX_BYTES, check_image, convert_image, decode_image, image_suffix, read_image
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
    assert check_image(picture(0, format)) == (suffix, ())
    assert image_suffix(picture(0, format)) == suffix


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
    assert read_image(inside, str(inside / "sub/a.png")) == b"bytes"  # absolute, but inside
    for name in ("../a.png", "sub/../../a.png", "/etc/hostname", str(inside / "../images/sub/a.png")):
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


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sideways() -> bytes:
    """A JPEG of 16 x 8 pixels, red on the left and blue on the right, that says: turn me by 90 degrees."""
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", quality=95, exif=exif)


def test_a_picture_is_decoded_upright() -> None:
    upright = decode_image(sideways())
    assert (upright.mode, upright.size) == ("RGB", (8, 16))
    assert upright.getpixel((4, 2))[0] > 200 and upright.getpixel((4, 13))[2] > 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_pictures_are_decoded_as_transformers_does(mode: str, tmp_path: Path) -> None:
    load_image = pytest.importorskip("transformers.image_utils").load_image
    gradient = Image.linear_gradient("L").resize((12, 9))
    image = Image.new(mode, gradient.size) if mode in ("LA", "I;16") else gradient.convert(mode)
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG")
    (tmp_path / "a").write_bytes(content)
    theirs = load_image(str(tmp_path / "a"))
    assert decode_image(content).tobytes() == theirs.tobytes()


def test_no_program_is_started_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen.__init__", start)
    monkeypatch.setattr("os.system", start)
    for use in (decode_image, check_image, image_suffix):
        with pytest.raises(BadSample, match="broken_image"):
            use(encoded(Image.new("RGB", (4, 4)), "EPS"))


def deep_grey() -> bytes:
    return encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)))


def float_grey() -> bytes:
    return encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")


def transparent() -> bytes:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    return encoded(image)


def notices(content: bytes) -> tuple[str, ...]:
    return check_image(content)[1]


def test_what_a_picture_loses_is_noticed() -> None:
    assert notices(picture(0)) == notices(encoded(Image.new("RGBA", (3, 3), "red"))) == ()
    assert notices(deep_grey()) == ("deep_grey",)
    assert notices(float_grey()) == ("float_grey",)
    assert notices(transparent()) == ("transparent",)
    palette = Image.new("P", (3, 1))
    assert notices(encoded(palette, transparency=0)) == ("transparent",)
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    assert notices(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == ("animated",)


def test_converting_writes_what_was_seen() -> None:
    def grey(content: bytes, background: str = "white") -> list[int]:
        return list(decode_image(convert_image(content, background)).convert("L").tobytes())

    assert list(decode_image(deep_grey()).convert("L").tobytes()) == [0, 255, 255]  # as transformers loads it
    assert grey(deep_grey()) == [0, 100, 255]
    assert grey(float_grey()) == [0, 128, 255]
    assert grey(encoded(Image.fromarray(np.array([[-5.0, 0.0, 5.0]], np.float32)), "TIFF")) == [0, 128, 255]
    assert grey(transparent()) == [255, 0, 255] and grey(transparent(), "black") == [0, 0, 0]
    for content in (picture(0), picture(0, "JPEG"), sideways()):
        assert convert_image(content, "white") is content
