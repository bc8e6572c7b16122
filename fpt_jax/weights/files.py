"""Reads state dicts (.pth, .safetensors, .npz) into NumPy, without torch.

A .pth file is a pickle, and unpickling can run any code. The unpickler here accepts the few names that
tensors consist of and refuses every other name.
"""

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from fpt_jax.errors import UserError

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")

_STORAGES = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}

# First object of a file in the format before zip files (torch 1.6).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a file.

  Args:
    path: .pth, .pt or .bin file (zip format or the older one), .safetensors or .npz file.

  Returns:
    Arrays by name in the file's dtypes (bfloat16 as ml_dtypes.bfloat16), contiguous and writable.

  Raises:
    UserError: the file is missing, damaged, of another kind, or contains more than tensors.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  if suffix not in (*_TORCH_SUFFIXES, ".safetensors", ".npz"):
    raise UserError(
      f"{path}: cannot read {suffix or 'a file without a suffix'} as a state dict; "
      "give a .pth, .pt, .bin, .safetensors or .npz file"
    )
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  try:
    if suffix == ".safetensors":
      return {name: np.array(value) for name, value in safetensors.numpy.load_file(path).items()}
    if suffix == ".npz":
      with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays}
    return _read_torch(path)
  except UserError:
    raise
  # Damaged bytes can raise nearly any exception in pickle, zipfile or NumPy.
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(
      f"{path}: damaged, truncated or not a {suffix} file ({reason}); download or save it again"
    ) from error


class _Storage(NamedTuple):
  """A reference to a flat array of numbers, which may not be read yet."""

  key: str
  dtype: np.dtype
  numel: int


class _Tensor(NamedTuple):
  """A strided view of a storage."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
  """Builds descriptions of tensors; `storages` collects the storages that they refer to."""

  def __init__(self, file, path: pathlib.Path):
    super().__init__(file, encoding="utf-8")
    self._path = path
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module, name):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return self._tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return self._parameter
    if module == "torch" and name in _STORAGES:
      return name
    raise UserError(
      f"{self._path}: contains {module}.{name}, but only tensors can be read; "
      "save `model.state_dict()` alone with torch.save"
    )

  def persistent_load(self, pid):
    kind, storage_class, key, _, numel, *view = pid
    if kind != "storage" or storage_class not in _STORAGES or any(view):
      raise pickle.UnpicklingError(f"unknown storage {pid!r}")
    storage = _Storage(str(key), _STORAGES[storage_class], int(numel))
    return self.storages.setdefault(storage.key, storage)

  def _tensor(self, storage, offset, shape, strides, *_):
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
      raise pickle.UnpicklingError("a tensor without storage or with mismatched strides")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))

  def _parameter(self, tensor, *_):
    return tensor


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  with path.open("rb") as file:
    if zipfile.is_zipfile(file):
      content, storages = _read_zip(file, path)
    else:
      file.seek(0)
      content, storages = _read_legacy(file, path)
  if not isinstance(content, dict):
    raise UserError(
      f"{path}: contains an object of type {type(content).__name__}, not a dict of tensors"
    )
  for name, value in content.items():
    if not isinstance(name, str) or not isinstance(value, _Tensor):
      raise UserError(
        f"{path}: entry {name!r} is of type {type(value).__name__}, not a tensor; "
        "save `model.state_dict()` alone with torch.save"
      )
  return {name: _to_array(tensor, storages) for name, tensor in content.items()}


def _read_zip(file, path):
  with zipfile.ZipFile(file) as archive:
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    root = pickled.removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
      raise UserError(
        f"{path}: written on a big-endian machine; save it again on a little-endian one"
      )
    content = _TensorUnpickler(io.BytesIO(archive.read(pickled)), path).load()
    data = root + "data/"
    return content, {
      name.removeprefix(data): archive.read(name)
      for name in archive.namelist()
      if name.startswith(data)
    }


def _read_legacy(file, path):
  def load():
    return _TensorUnpickler(file, path).load()

  if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
    raise pickle.UnpicklingError("no torch header")
  if not load()["little_endian"]:
    raise UserError(
      f"{path}: written on a big-endian machine; save it again on a little-endian one"
    )
  unpickler = _TensorUnpickler(file, path)
  content = unpickler.load()
  storages = {}
  for key in load():
    (numel,) = struct.unpack("<q", file.read(8))
    storages[key] = file.read(numel * unpickler.storages[key].dtype.itemsize)
  return content, storages


def _to_array(tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
  numel, dtype = tensor.storage.numel, tensor.storage.dtype
  flat = np.frombuffer(storages[tensor.storage.key], dtype, count=numel)
  if 0 in tensor.shape:
    return np.empty(tensor.shape, dtype)
  reach = sum(
    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
  )
  if min(tensor.offset, *tensor.strides, 0) < 0 or tensor.offset + reach >= numel:
    raise ValueError(f"a tensor exceeds its storage of {numel} numbers")
  strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
  view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
  return np.array(view, order="C")
