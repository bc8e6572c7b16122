"""Image files become RGB arrays; those of users are upright."""

import io

import numpy as np
import PIL.Image
import pytest

from fpt_jax.data.records import images
from fpt_jax.errors import UserError


@pytest.fixture
def tagged():
  """A JPEG of a wide black image with a white left half, and its bytes tagged as rotated by 90 degrees."""
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, :16] = 255
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # the camera was turned: rotate clockwise by 90 degrees
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "JPEG", exif=exif, quality=95)
  return pixels, file.getvalue()


def test_records_are_decoded_as_stored_and_users_files_upright(tagged, tmp_path):
  pixels, file = tagged
  np.testing.assert_allclose(images.decode_image(file), pixels, atol=2)
  upright = images.decode_image(file, upright=True)
  np.testing.assert_allclose(upright, np.rot90(pixels, -1), atol=2)
  path = tmp_path / "tagged.jpg"
  path.write_bytes(file)
  np.testing.assert_array_equal(images.read_image(path), upright)


@pytest.mark.parametrize("content", [None, b"", b"not an image", "truncated"])
def test_unreadable_files_are_named(content, tagged, tmp_path):
  path = tmp_path / "bad.jpg"
  if content is not None:
    path.write_bytes(tagged[1][:200] if content == "truncated" else content)
  with pytest.raises(UserError, match=r"bad\.jpg is not a readable image .*skip_bad") as error:
    images.read_image(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_per_channel_raise(dtype):
  file = io.BytesIO()
  PIL.Image.fromarray(np.zeros((2, 2), dtype)).save(file, "TIFF")
  with pytest.raises(ValueError, match="8 bits per channel are needed"):
    images.decode_image(file.getvalue())


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_is_lossless(rng, shape):
  pixels = rng.integers(0, 256, shape, np.uint8)
  with PIL.Image.open(io.BytesIO(images.encode_png(pixels))) as image:
    assert image.format == "PNG"
    np.testing.assert_array_equal(image, pixels)
