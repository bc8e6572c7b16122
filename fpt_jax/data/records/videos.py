"""Frames of video files, read with PyAV, which is installed by itself.

Shapes: H W rows and columns of a frame.
"""

import contextlib
import errno
import pathlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fpt_jax.errors import UserError, one_line

# endings of file names, in lower case
ENDINGS = (
  ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
  ".wmv",
)  # fmt: skip
ENDS_EARLY = 1.0  # seconds that may be missing at the end of a video


class Frame(NamedTuple):
  """A frame of a video.

  Attributes:
    number: its place in the video, from 0.
    seconds: when it is shown, after the first frame.
    pixels_HWC: uint8 RGB.
  """

  number: int
  seconds: float
  pixels_HWC: np.ndarray


def is_video(path: pathlib.Path) -> bool:
  """Returns whether a file has one of `ENDINGS`, in upper or lower case."""
  return path.suffix.lower() in ENDINGS


def pyav() -> ModuleType:
  """Returns the module `av`.

  Raises:
    UserError: it is not installed.
  """
  try:
    import av
  except ImportError as error:
    raise UserError("videos need a package that is not installed: pip install av") from error
  return av


def num_frames(path: pathlib.Path) -> int:
  """Counts the frames of a video without decoding them, up to where the file is damaged.

  Raises:
    UserError: the file is not a video, or PyAV is not installed.
  """
  count = 0
  with _opened(path) as (container, stream), contextlib.suppress(pyav().error.FFmpegError):
    for packet in container.demux(stream):
      count += packet.size > 0
  return count


def frames(path: pathlib.Path, *, upright: bool = True) -> Iterator[Frame]:
  """Yields the frames of a video in the order in which they are shown.

  Args:
    path: the file.
    upright: whether frames are turned as the file says, such as those of a phone that was held upright.

  Raises:
    UserError: the file is not a video with frames, or is damaged or ends early, after the frames that can be
      read; or PyAV is not installed.
  """
  number, start, seconds = 0, 0.0, 0.0
  with _opened(path) as (container, stream):
    stream.thread_type = "AUTO"
    try:
      for frame in container.decode(stream):
        seconds = float(frame.time or 0)
        start = start if number else seconds
        pixels_HWC = frame.to_ndarray(format="rgb24")
        if upright:
          pixels_HWC = np.rot90(pixels_HWC, round(frame.rotation / 90))
        yield Frame(number, seconds - start, np.ascontiguousarray(pixels_HWC))
        number += 1
    except pyav().error.FFmpegError as error:
      raise _bad(path, f"is damaged after {number} frames ({one_line(error.strerror)})") from error
    announced = _announced_seconds(stream)
    # a header may count some frames that are never shown
    if announced - (seconds - start) > ENDS_EARLY:
      raise _bad(path, f"ends after {seconds - start:.1f} of {announced:.1f} seconds")
    if not number:
      raise _bad(path, "has no frames")


def _announced_seconds(stream: Any) -> float:
  """Returns how long the header says that a stream of frames is; 0 if it does not."""
  if stream.frames and stream.average_rate:
    return float(stream.frames / stream.average_rate)
  # Matroska: of the stream, since that of the file is that of the longest stream
  parts = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
  if not parts:
    return 0.0
  hours, minutes, seconds = map(float, parts.groups())
  return 3600 * hours + 60 * minutes + seconds


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[Any, Any]]:
  """Context of a video's container and its first stream of frames."""
  av = pyav()
  try:
    if not path.is_file():
      raise OSError(errno.EINVAL, "not a regular file")
    # a name with a colon is not an address, and a file that lists others opens none of a network
    container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
  except (OSError, av.error.FFmpegError) as error:
    raise _bad(path, f"is not a readable video ({one_line(error.strerror)})") from error
  with container:
    if not container.streams.video:
      raise _bad(path, "has no frames")
    yield container, container.streams.video[0]


def _bad(path: pathlib.Path, what: str) -> UserError:
  return UserError(f"{path} {what}; replace it, or skip such files with --config.data.skip_bad")
