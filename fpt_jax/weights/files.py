"""Reads state dicts (.pth, .pkl, .safetensors, .npz) into NumPy, without torch.

Files are not trusted: memory and time are bounded by the length of the file, whatever it says of itself.
"""

import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from fpt_jax.errors import UserError, first_of, one_line
from fpt_jax.weights.pickles import Array, Storage, Tensor, read_pickle

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")

# First object of a file in the format before zip files (torch 1.6).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Contents may be larger than their file: compressed, or a tensor that repeats numbers by a stride of 0.
MAX_EXPANSION = 16
ALWAYS_ALLOWED = 2**24  # bytes


def read_state_dict(path: str | os.PathLike, entry: str = "") -> dict[str, np.ndarray]:
  """Reads the tensors of a file.

  Args:
    path: .pth, .pth.tar, .pt or .bin file (zip format or the older one), .pkl file of NumPy arrays
      (detectron2, Detectron), .safetensors or .npz file.
    entry: the entry of a checkpoint that has the tensors; "" if they are not in an entry, or if only one
      entry is a dictionary of tensors, whatever its name ("model", "state_dict", "blobs").

  Returns:
    Arrays by name in the file's dtypes (bfloat16 as ml_dtypes.bfloat16), contiguous and writable.

  Raises:
    UserError: the file is missing, damaged, of another kind, or contains objects other than plain values
      and tensors; several entries have tensors, or the one that is named has none; or the contents are
      much larger than the file.
  """
  path = pathlib.Path(os.path.expanduser(path))
  suffix = path.suffix.lower()
  if path.name.lower().endswith(".pth.tar"):  # many checkpoints are called so, but are not archives
    suffix = ".pth"
  if suffix not in (*_TORCH_SUFFIXES, ".pkl", ".safetensors", ".npz"):
    raise UserError(
      f"{path}: cannot read {suffix or 'a file without a suffix'} as a state dict; "
      "give a .pth, .pt, .bin, .pkl, .safetensors or .npz file"
    )
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  if entry and suffix in (".safetensors", ".npz"):
    raise UserError(f"{path}: {suffix} files have no entries; leave out --entry={entry}")
  try:
    if suffix == ".safetensors":
      return {name: np.array(value) for name, value in safetensors.numpy.load_file(path).items()}
    with path.open("rb") as file:
      if suffix == ".npz":
        return _read_npz(file, path)
      tensors, storages = (_read_pkl if suffix == ".pkl" else _read_torch)(file, path, entry)
    return {
      name: tensor.to_numpy() if isinstance(tensor, Array) else _to_array(tensor, storages)
      for name, tensor in tensors.items()
    }
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{path} cannot be read ({one_line(error.strerror or error, 200)})") from error
  # Damaged bytes can raise nearly any exception in pickletools, zipfile or NumPy.
  except Exception as error:
    reason = f"{type(error).__name__}: {one_line(error, 200)}"
    raise UserError(
      f"{path}: damaged, truncated or not a {suffix} file ({reason}); download or save it again"
    ) from error


def _check_size(size: int, path: pathlib.Path) -> None:
  """Raises UserError if the contents of a file are much larger than the file."""
  length = path.stat().st_size
  if size > max(ALWAYS_ALLOWED, MAX_EXPANSION * length):
    raise UserError(
      f"{path}: its contents need {size} bytes, but the file has {length}; that is more than "
      f"{MAX_EXPANSION} times as much, and no file of weights does this; download or save it again"
    )


def _read_npz(file, path):
  with zipfile.ZipFile(file) as archive:
    _check_entries(archive, archive.namelist(), path)
    return {
      name.removesuffix(".npy"): _read_npy(archive.read(name), name, path)
      for name in archive.namelist()
    }


def _check_entries(archive: zipfile.ZipFile, names: list[str], path: pathlib.Path) -> None:
  """Raises UserError unless entries of a zip file can be read in memory bounded by the file's length."""
  if len(set(names)) != len(names):
    raise UserError(f"{path}: has two entries of one name; save it again")
  entries = [archive.getinfo(name) for name in names]
  _check_size(sum(entry.file_size for entry in entries), path)
  for entry in entries:
    # the dictionary of other methods can be much larger than the entry
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UserError(f"{path}: compressed by another method than deflate; save it again")


def _read_npy(data: bytes, name: str, path: pathlib.Path) -> np.ndarray:
  file = io.BytesIO(data)
  if not name.endswith(".npy") or not data.startswith(np.lib.format.MAGIC_PREFIX):
    raise UserError(
      f"{path}: entry {name[:80]!r} is not an array; save arrays of numbers with np.savez"
    )
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  version = np.lib.format.read_magic(file)
  # version 3 is for names of fields
  if version not in readers:
    raise ValueError(f"{name[:80]}: .npy version {version}")
  shape, column_major, dtype = readers[version](file)
  if dtype.kind not in "biuf":
    raise UserError(
      f"{path}: entry {name[:80]!r} has the dtype {str(dtype)[:80]}; save arrays of numbers with np.savez"
    )
  if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
    raise ValueError(f"{name[:80]}: {len(data) - file.tell()} bytes for the shape {shape}")
  flat = np.frombuffer(data, dtype, offset=file.tell())
  array = flat.reshape(shape, order="F" if column_major else "C")
  return np.array(array, dtype.newbyteorder("="), order="C")


def _read_pkl(file, path: pathlib.Path, entry: str):
  return _state_dict(read_pickle(io.BytesIO(file.read()), path, {}), path, entry), {}


def _read_torch(file, path: pathlib.Path, entry: str):
  if zipfile.is_zipfile(file):
    return _read_zip(file, path, entry)
  file.seek(0)
  return _read_legacy(io.BytesIO(file.read()), path, entry)


def _state_dict(content: Any, path: pathlib.Path, entry: str) -> dict[str, Tensor | Array]:
  """Returns the tensors of a checkpoint by name, see `read_state_dict`."""
  if not isinstance(content, dict):
    raise UserError(
      f"{path}: contains an object of type {type(content).__name__}, not a dict of tensors"
    )
  # one dict can stand in many entries
  distinct = {id(value): value for value in content.values()}
  good = {key for key, value in distinct.items() if _has_tensors(value)}
  entries = {str(key): value for key, value in content.items() if id(value) in good}
  listed = first_of([name[:80] for name in entries], 8) or "none"
  if entry:
    if entry not in entries:
      raise UserError(
        f"{path}: --entry={entry} is not an entry with tensors; those that have any: {listed}"
      )
    tensors = entries[entry]
  elif _has_tensors(content):
    tensors = content
  elif len(entries) == 1:
    ((name, tensors),) = entries.items()
    logging.info("%s: the weights are its entry %r", path, name[:80])
  elif entries:
    raise UserError(f"{path}: has several entries with tensors, {listed}; choose one with --entry")
  else:
    if not content:
      raise UserError(f"{path}: is an empty dict; save `model.state_dict()` with torch.save")
    name, value = next(item for item in content.items() if not _is_named_tensor(*item))
    raise UserError(
      f"{path}: entry {str(name)[:80]!r} is of type {type(value).__name__}, not a tensor, and no entry is "
      "a dict of tensors; save `model.state_dict()` alone with torch.save"
    )
  _check_size(sum(_nbytes(tensor) for tensor in tensors.values()), path)
  return tensors


def _has_tensors(content: Any) -> bool:
  """Returns whether `content` is a dict of tensors by name, and not an empty one."""
  return (
    isinstance(content, dict)
    and bool(content)
    and all(_is_named_tensor(name, value) for name, value in content.items())
  )


def _is_named_tensor(name: Any, value: Any) -> bool:
  return isinstance(name, str) and isinstance(value, Tensor | Array)


def _nbytes(tensor: Tensor | Array) -> int:
  if isinstance(tensor, Array):
    return tensor.nbytes
  return math.prod(tensor.shape) * tensor.storage.dtype.itemsize


def _keys(tensors: Mapping[str, Tensor | Array]) -> set[str]:
  """Returns the keys of the storages of tensors; those of a checkpoint's optimizer are not read."""
  return {tensor.storage.key for tensor in tensors.values() if isinstance(tensor, Tensor)}


def _read_zip(file, path, entry):
  with zipfile.ZipFile(file) as archive:
    (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    root = pickled.removesuffix("data.pkl")
    order = [name for name in archive.namelist() if name == root + "byteorder"]
    _check_entries(archive, [pickled, *order], path)
    if order and archive.read(order[0]) != b"little":
      raise UserError(
        f"{path}: written on a big-endian machine; save it again on a little-endian one"
      )
    storages: dict[str, Storage] = {}
    content = read_pickle(io.BytesIO(archive.read(pickled)), path, storages)
    tensors = _state_dict(content, path, entry)
    names = {key: f"{root}data/{key}" for key in _keys(tensors)}
    _check_entries(archive, list(names.values()), path)
    return tensors, {key: archive.read(name) for key, name in names.items()}


def _read_legacy(file: io.BytesIO, path, entry):
  def load(storages: dict[str, Storage] | None = None):
    return read_pickle(file, path, {} if storages is None else storages)

  if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
    raise pickle.UnpicklingError("no torch header")
  if not load()["little_endian"]:
    raise UserError(
      f"{path}: written on a big-endian machine; save it again on a little-endian one"
    )
  storages: dict[str, Storage] = {}
  tensors = _state_dict(load(storages), path, entry)
  needed, data = _keys(tensors), {}
  for key in load():
    if not isinstance(key, str):
      raise pickle.UnpicklingError("a storage without a name")
    (numel,) = struct.unpack("<q", file.read(8))
    if numel < 0:
      raise ValueError(f"a storage of {numel} numbers")
    size = numel * storages[key].dtype.itemsize
    if key in needed:
      data[key] = file.read(size)
    else:
      file.seek(size, io.SEEK_CUR)
  return tensors, data


def _to_array(tensor: Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
  numel, dtype = tensor.storage.numel, tensor.storage.dtype
  flat = np.frombuffer(storages[tensor.storage.key], dtype, count=numel)
  if 0 in tensor.shape:
    return np.empty(tensor.shape, dtype)
  reach = sum(
    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
  )
  if tensor.offset + reach >= numel:
    raise ValueError(f"a tensor exceeds its storage of {numel} numbers")
  strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
  view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
  return np.array(view, order="C")
