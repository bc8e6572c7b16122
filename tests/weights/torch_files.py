"""Files as torch writes them, made byte by byte, and the check that a file is refused."""

import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def save(path, content, storages=(), **extra):
  """Writes a zip file in torch's layout around any pickle."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content))
    for key, data in [*storages, *extra.items()]:
      archive.writestr(f"x/{key}", data)
  return path


def legacy(path, content, keys=(b"]",)):
  """Writes a file in torch's older layout around a pickle."""
  header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
  path.write_bytes(b"".join(pickle.dumps(h, 2) for h in header) + content + b"".join(keys))
  return path


class Call:
  """An object whose pickle is a function call."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def tensor_pickle(offset, shape, strides, numel=4):
  """{"w": tensor} in the opcodes torch writes."""
  ints = lambda values: b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"
  storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n" + b"I%d\ntQ" % numel
  arguments = storage + b"I%d\n" % offset + ints(shape) + ints(strides) + b"I00\nNt"
  return b"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"Rs."


def refused(path, message, *, seconds=4.0):
  """Checks that a file is refused in one line and in little time."""
  begun = time.process_time()
  with pytest.raises(UserError, match=message) as error:
    read_state_dict(path)
  assert time.process_time() - begun < seconds
  assert "\n" not in str(error.value) and len(str(error.value)) < 700


def refused_without_reading(path, message):
  """Checks that a file is refused with little memory."""
  tracemalloc.start()
  try:
    refused(path, message)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 2**23
