"""Label files are read as numbers, and label maps are stored losslessly."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from fpt_jax.data.records import label_map
from fpt_jax.data.records.images import encode_png


def _grey_png(ids_HW, bits):
  """A grey PNG with `bits` bits per pixel, written as the PNG specification says."""
  height, width = ids_HW.shape
  rows = b""
  for row in ids_HW:
    unpacked = np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, 8 - bits :]
    rows += b"\0" + np.packbits(unpacked.reshape(-1)).tobytes()
  chunks = [
    (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
    (b"IDAT", zlib.compress(rows)),
    (b"IEND", b""),
  ]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in chunks
  )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_greys_of_few_bits_are_read_as_numbers(rng, bits):
  ids_HW = rng.integers(0, 2**bits, (5, 7), np.uint8)
  np.testing.assert_array_equal(label_map.decode_ids(_grey_png(ids_HW, bits)), ids_HW)


@pytest.mark.parametrize("colors", [2, 4, 16, 256])
def test_palettes_are_read_as_numbers(rng, colors):
  ids_HW = rng.integers(0, colors, (5, 7), np.uint8)
  image = PIL.Image.fromarray(ids_HW).convert("P")
  image.putdata(ids_HW.ravel().tolist())
  image.putpalette(rng.integers(0, 256, 3 * colors).tolist())
  file = io.BytesIO()
  image.save(file, "PNG")
  np.testing.assert_array_equal(label_map.decode_ids(file.getvalue()), ids_HW)


def test_label_maps_are_stored_losslessly(rng):
  label_HW = rng.integers(0, 256, (13, 8), np.uint8)
  png = encode_png(label_HW)
  np.testing.assert_array_equal(label_map.decode_ids(png), label_HW)
