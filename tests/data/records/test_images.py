"""Image files become upright RGB arrays of 8 bits, or are refused in one line."""

import io
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from fpt_jax.data.records import images, label_map
from fpt_jax.errors import UserError
from tests.data_sets import UPRIGHT, encode_tagged

FORMATS = {
  "JPEG": {"quality": 100, "subsampling": 0},
  "PNG": {},
  "WEBP": {"lossless": True},
  "TIFF": {},
  "TIFF, compressed": {"compression": "tiff_deflate"},
}


@pytest.fixture
def smooth():
  """RGB of 48 x 80 pixels that JPEG changes little; no two orientations look alike."""
  rows, columns = np.mgrid[:48, :80]
  return np.stack([5 * rows, 3 * columns, 2 * (rows + columns) // 3], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_turned_as_exif_says(name, orientation, smooth, tmp_path):
  data = encode_tagged(smooth, orientation, name.split(",")[0], **FORMATS[name])
  tolerance = 4 if name == "JPEG" else 0
  upright, stored = (images.decode_picture(data, exif=exif) for exif in images.EXIF)
  expected = UPRIGHT[orientation](smooth)
  np.testing.assert_allclose(upright.pixels_HWC, expected, atol=tolerance)
  np.testing.assert_allclose(stored.pixels_HWC, smooth, atol=tolerance)
  assert upright.orientation == stored.orientation == orientation
  assert upright.size == stored.other_size == expected.shape[:2]
  assert stored.size == upright.other_size == smooth.shape[:2]
  path = tmp_path / "tagged"
  path.write_bytes(data)
  np.testing.assert_array_equal(images.read_image(path), upright.pixels_HWC)
  np.testing.assert_array_equal(images.read_image(path, exif="ignore"), stored.pixels_HWC)
  assert images.read_size(path) == (upright.size, orientation)
  assert images.read_size(path, exif="ignore") == (stored.size, orientation)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_labels_are_turned_as_exif_says(orientation, smooth):
  labels = smooth[..., 0]
  png = encode_tagged(labels, orientation, "PNG")
  np.testing.assert_array_equal(label_map.decode_ids(png), UPRIGHT[orientation](labels))
  stored, found = label_map.decode_turned_ids(png, exif="ignore")
  np.testing.assert_array_equal(stored, labels)
  assert found == orientation


def _chunk(kind, body):
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_exif_behind_the_pixels_of_a_png_counts(smooth):
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  end = _chunk(b"IEND", b"")
  png = images.encode_png(smooth).removesuffix(end)
  png += _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end
  np.testing.assert_array_equal(images.decode_image(png), np.rot90(smooth, -1))


def test_a_photo_with_a_second_picture_is_the_first(smooth):
  file = io.BytesIO()
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  first, second = PIL.Image.fromarray(smooth), PIL.Image.fromarray(255 - smooth)
  first.save(file, "MPO", save_all=True, append_images=[second], exif=exif, quality=100)
  picture = images.decode_picture(file.getvalue())
  assert picture.format == "MPO" and picture.orientation == 6
  np.testing.assert_allclose(picture.pixels_HWC, np.rot90(smooth, -1), atol=20)
  assert images.bytes_for_record(file.getvalue(), picture) == file.getvalue()


@pytest.mark.parametrize("kept", [0, 6, 8, 12, 14, 16, 20, 26, 30, 60])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_damaged_exif_is_as_none(name, kept, smooth):
  exif = PIL.Image.Exif()
  exif[0x010F], exif[0x0112] = "a maker with a long name", 6
  content = exif.tobytes()
  assert len(content) > 60
  damaged = content[:kept] if kept else b"Exif\0\0II*\0\xff\xff\xff\x7f"
  file = io.BytesIO()
  PIL.Image.fromarray(smooth).save(file, name, exif=damaged, **FORMATS[name])
  np.testing.assert_allclose(images.decode_image(file.getvalue()), smooth, atol=4)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientations_are_as_none(value, smooth):
  assert images.decode_picture(encode_tagged(smooth, value, "PNG")).orientation == 1


@pytest.mark.parametrize("exif", ["", "upright", None])
def test_other_values_of_exif_raise(exif, smooth):
  with pytest.raises(ValueError, match="expected exif to be one of"):
    images.decode_image(images.encode_png(smooth), exif=exif)


def test_the_size_of_what_is_no_image_raises(tmp_path):
  (tmp_path / "text.jpg").write_bytes(b"text")
  os.mkfifo(tmp_path / "pipe.jpg")
  with pytest.raises(ValueError, match="undecodable image: no image of a known format"):
    images.read_size(tmp_path / "text.jpg")
  for name in ("pipe.jpg", "missing.jpg"):
    with pytest.raises(OSError, match=r"regular file|No such file"):
      images.read_size(tmp_path / name)


@pytest.mark.parametrize(
  "content", [None, b"", b"not an image", b"%PDF-1.4", "truncated", "a folder", "a named pipe"]
)
def test_unreadable_files_are_named(content, smooth, tmp_path):
  path = tmp_path / "bad.jpg"
  if content == "a folder":
    path.mkdir()
  elif content == "a named pipe":
    os.mkfifo(path)
  elif content is not None:
    whole = encode_tagged(smooth, 6, "JPEG")
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
  with pytest.raises(UserError, match=r"bad\.jpg is not a readable image .*skip_bad") as error:
    images.read_image(path)
  assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)
  assert ("not a regular file" in str(error.value)) == str(content).startswith("a ")


@pytest.mark.parametrize(
  ("dtype", "name"),
  [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")],
)
def test_more_than_8_bits_per_channel_raise(dtype, name):
  file = io.BytesIO()
  PIL.Image.fromarray(np.zeros((2, 2), dtype)).save(file, name)
  with pytest.raises(ValueError, match=r"8 bits per channel are needed; convert the file$"):
    images.decode_image(file.getvalue())


def _png_of_16_bits(values_HWC):
  """A PNG with 16 bits per channel, written as the PNG specification says."""
  height, width, channels = values_HWC.shape
  colors = {2: 4, 3: 2, 4: 6}[channels]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
  header = struct.pack(">IIBBBBB", width, height, 16, colors, 0, 0, 0)
  chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_reduced(channels, rng):
  values_HWC = rng.integers(0, 65536, (5, 7, channels), np.uint16)
  rgb = values_HWC[..., [0, 0, 0] if channels == 2 else [0, 1, 2]]
  found = images.decode_image(_png_of_16_bits(values_HWC))
  np.testing.assert_allclose(found, rgb / 257, atol=1)


def _saved(image, name, **options):
  file = io.BytesIO()
  image.save(file, name, **options)
  return file.getvalue()


@pytest.mark.parametrize("name", ["PNG", "TIFF", "GIF", "BMP", "PPM"])
def test_1_bit_becomes_black_and_white(name, rng):
  bits = rng.integers(0, 2, (5, 11)).astype(bool)
  found = images.decode_image(_saved(PIL.Image.fromarray(bits), name))
  np.testing.assert_array_equal(found, np.repeat(255 * bits[..., None], 3, -1))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "GIF", "BMP"])
@pytest.mark.filterwarnings("error")
def test_palettes_become_their_colours(name, rng):
  indices = rng.integers(0, 256, (9, 12), np.uint8)
  palette = rng.integers(0, 256, (256, 3), np.uint8)
  image = PIL.Image.fromarray(indices)
  image.putpalette(palette.tobytes())  # its mode becomes P
  more = [{"transparency": bytes(range(256))}, {"transparency": 3}] if name == "PNG" else []
  for options in [{"lossless": True} if name == "WEBP" else {}, *more]:
    found = images.decode_image(_saved(image, name, **options))
    np.testing.assert_array_equal(found, palette[indices])


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [2, 4])
def test_opacity_is_dropped(channels, name, rng):
  pixels = rng.integers(0, 256, (5, 7, channels), np.uint8)
  found = images.decode_image(_saved(PIL.Image.fromarray(pixels), name))
  np.testing.assert_array_equal(found, pixels[..., [0, 0, 0] if channels == 2 else [0, 1, 2]])


def test_cmyk_becomes_rgb(rng):
  inks = rng.integers(0, 256, (5, 7, 4), np.uint8)
  found = images.decode_image(_saved(PIL.Image.fromarray(inks, "CMYK"), "TIFF"))
  expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
  np.testing.assert_allclose(found, expected, atol=1.5)


def test_of_several_frames_the_first_is_read(rng):
  frames = [PIL.Image.fromarray(np.full((4, 6), 60 * i, np.uint8)) for i in (1, 2, 3)]
  for name in ("GIF", "TIFF", "WEBP", "PNG"):
    options = {"lossless": True} if name == "WEBP" else {}
    data = _saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert (images.decode_image(data) == 60).all(), name


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_records_keep_jpeg_and_png_files_and_the_pixels_of_others(name, smooth):
  data = _saved(PIL.Image.fromarray(smooth), name)
  picture = images.decode_picture(data)
  kept = images.bytes_for_record(data, picture)
  assert (kept == data) == (name in ("JPEG", "PNG"))
  np.testing.assert_array_equal(images.decode_image(kept), picture.pixels_HWC)
  with PIL.Image.open(io.BytesIO(kept)) as image:
    assert image.format in ("JPEG", "PNG")


def test_folders_have_images_and_files_that_are_passed_over(tmp_path, caplog):
  good = [
    "a.jpg",
    "b.JPEG",
    "c.jfif",
    "d.jpe",
    "e.png",
    "f.WebP",
    "g.bmp",
    "h.tif",
    "i.TIFF",
    "j.gif",
  ]
  for name in [*good, "._a.jpg", ".DS_Store", "k.heic", "l.HEIC", "m.txt", "README"]:
    (tmp_path / name).touch()
  for name in ("more", "n.jpg", ".git"):
    (tmp_path / name).mkdir()
  assert [path.name for path in images.list_images(tmp_path)] == good
  (line,) = caplog.messages
  assert line == (
    f"{tmp_path}: 10 images; passed over: 2 .heic, 1 .txt, 3 hidden, 1 without ending, "
    "the sub-folders 'more', 'n.jpg'"
  )


def test_many_sub_folders_are_counted(tmp_path, caplog):
  for i in range(8):
    (tmp_path / f"s{i}").mkdir()
  assert images.list_images(tmp_path) == []
  assert caplog.messages[0].endswith("the sub-folders 's0', 's1', 's2', 's3', 's4' and 3 more")


def test_nothing_passed_over_is_not_logged(tmp_path, caplog):
  (tmp_path / "a.jpg").touch()
  images.list_images(tmp_path)
  assert not caplog.messages


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_is_lossless(rng, shape):
  pixels = rng.integers(0, 256, shape, np.uint8)
  with PIL.Image.open(io.BytesIO(images.encode_png(pixels))) as image:
    assert image.format == "PNG"
    np.testing.assert_array_equal(image, pixels)
