"""Training decodes pictures with the function that data_prep checks them with."""

import io

import pytest
from PIL import Image

from pipeline.errors import SampleError
from pipeline.vlm.processing import decode_image


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=exif)).size == (8, 16)


@pytest.mark.parametrize("content", [b"", b"words", encoded(Image.new("RGB", (4, 4)), "EPS")])
def test_what_data_prep_refuses_is_refused(content, monkeypatch):
    monkeypatch.setattr("subprocess.Popen.__init__", None)  # EPS would start Ghostscript
    with pytest.raises(SampleError, match="image cannot be decoded: broken_image"):
        decode_image(content)
