"""Frames of videos have the pixels, times and orientation that were written; damaged files are reported."""

import struct
import sys
import wave

import numpy as np
import pytest

from fpt_jax.data.records import videos
from fpt_jax.errors import UserError
from tests.data_sets import write_clip


@pytest.mark.parametrize(
  ("ending", "codec"), [("mp4", "mpeg4"), ("avi", "mjpeg"), ("MKV", "mpeg4")]
)
def test_frames_are_those_that_were_written(ending, codec, tmp_path):
  path = tmp_path / f"a: clip.{ending}"
  write_clip(path, codec)
  assert videos.is_video(path) and videos.num_frames(path) == 30
  found = list(videos.frames(path))
  assert [frame.number for frame in found] == list(range(30))
  np.testing.assert_allclose([frame.seconds for frame in found], np.arange(30) / 10, atol=1e-3)
  for i, frame in enumerate(found):
    assert frame.pixels_HWC.shape == (48, 64, 3) and frame.pixels_HWC.dtype == np.uint8
    np.testing.assert_allclose(frame.pixels_HWC[24:].mean(axis=(0, 1)), [8 * i] * 3, atol=3)
    assert frame.pixels_HWC[:16, :16].mean() > 240  # the corner


def test_frames_are_turned_upright(tmp_path):
  path = tmp_path / "clip.mp4"
  write_clip(path)
  data = bytearray(path.read_bytes())
  matrix = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y
  struct.pack_into(">4i", data, matrix, 0, 1 << 16, 0, -1 << 16)
  struct.pack_into(">i", data, matrix + 16, 0)
  path.write_bytes(data)
  turned, stored = (next(videos.frames(path, upright=u)).pixels_HWC for u in (True, False))
  assert turned.shape == (64, 48, 3)
  np.testing.assert_array_equal(turned, stored.transpose(1, 0, 2)[:, ::-1])
  assert turned[:16, -16:].mean() > 240


@pytest.mark.parametrize(
  ("ending", "share", "frames", "message"),
  [
    ("mp4", 0.5, 0, r"is not a readable video \(|has no frames"),
    ("avi", 0.5, 3, r"is damaged after \d+ frames \("),
    ("mkv", 0.5, 10, r"ends after 1\.\d of 3\.0 seconds"),
    ("avi", 0.0, 0, r"is not a readable video \("),
  ],
)
def test_cut_off_files(ending, share, frames, message, tmp_path):
  path = tmp_path / f"clip.{ending}"
  write_clip(path, "mjpeg" if ending == "avi" else "mpeg4")
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  found = []
  with pytest.raises(
    UserError, match=rf"clip\.{ending} ({message}).*; replace it, or skip"
  ) as error:
    for frame in videos.frames(path):
      found.append(frame)
  assert "\n" not in str(error.value)
  assert frames <= len(found) < 30


def test_files_without_frames(tmp_path):
  path = tmp_path / "sound.mp4"
  with wave.open(str(path), "wb") as sound:
    sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
    sound.writeframes(bytes(16000))
  (tmp_path / "folder.mp4").mkdir()
  pytest.importorskip("av")
  for name, message in (("sound", "has no frames"), ("folder", "is not a readable video")):
    with pytest.raises(UserError, match=rf"{name}\.mp4 {message}"):
      list(videos.frames(tmp_path / f"{name}.mp4"))


def test_files_that_name_other_files_do_not_open_them(tmp_path):
  write_clip(tmp_path / "clip.ts", "mpeg2video")
  playlist = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nhttp://localhost:1/clip.ts\n#EXT-X-ENDLIST\n"
  )
  (tmp_path / "list.mp4").write_text(playlist)
  with pytest.raises(UserError, match=r"list\.mp4 is not a readable video|has no frames"):
    list(videos.frames(tmp_path / "list.mp4"))


def test_the_package_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(UserError, match="not installed: pip install av"):
    videos.num_frames(tmp_path / "clip.mp4")
