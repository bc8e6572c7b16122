"""State dicts saved by torch, and malicious or damaged files."""

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict
from tests.conftest import GOLDEN

FORMATS = ("tensors_zip.pth", "tensors_legacy.pth")

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
EXPECTED = {
  "contiguous": BASE,
  # Views of the same 24 numbers: strides and offsets must be applied.
  "transposed": BASE.transpose(2, 0, 1),
  "slice_of_shared": BASE[:, 1, 1:],
  "strided": BASE.reshape(-1)[5::3],
  "expanded": np.float32([[1.5] * 3, [2.5] * 3]),
  "half": np.float16([0.1, -2, 65504]),
  "bfloat16": np.array([0.1, -2, 3e38], ml_dtypes.bfloat16),
  "double": np.float64([[0.1]]),
  "int64": np.int64(7),
  "int32": np.int32([-1, 2]),
  "uint8": np.uint8([0, 255]),
  "bool": np.array([True, False]),
  "empty": np.zeros((0, 3), np.float32),
  "parameter": np.float32([1, 2]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_torch(name):
  state = read_state_dict(GOLDEN / name)
  assert list(state) == list(EXPECTED)
  for key, expected in EXPECTED.items():
    assert (state[key].dtype, state[key].shape) == (expected.dtype, expected.shape), key
    np.testing.assert_array_equal(state[key], expected, err_msg=key)
    assert state[key].flags.c_contiguous and state[key].flags.writeable


def test_safetensors_and_npz(tmp_path):
  arrays = {"a.weight": BASE, "b": np.array([0.5], ml_dtypes.bfloat16)}
  safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
  np.savez(tmp_path / "x.npz", **{"a.weight": BASE, "n": np.int64(3)})
  state = read_state_dict(tmp_path / "x.safetensors")
  assert state["b"].dtype == ml_dtypes.bfloat16 and state["b"][0] == 0.5
  np.testing.assert_array_equal(state["a.weight"], BASE)
  state = read_state_dict(str(tmp_path / "x.npz"))
  assert list(state) == ["a.weight", "n"] and state["n"] == 3


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, name, part):
  content = (GOLDEN / name).read_bytes()
  path = tmp_path / name
  path.write_bytes(content[: int(len(content) * part)])
  with pytest.raises(UserError, match=f"{name}: damaged") as error:
    read_state_dict(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_other_content_is_refused(tmp_path, suffix):
  path = tmp_path / f"page{suffix}"
  path.write_bytes(b"<html>404 Not Found</html>" * 9)
  with pytest.raises(UserError, match=rf"page\{suffix}: damaged"):
    read_state_dict(path)


def test_missing_and_unknown_files(tmp_path):
  with pytest.raises(UserError, match=r"gone\.pth: no such file"):
    read_state_dict(tmp_path / "gone.pth")
  (tmp_path / "model.onnx").touch()
  with pytest.raises(UserError, match=r"model\.onnx: cannot read \.onnx"):
    read_state_dict(tmp_path / "model.onnx")


def _save(path, content, storages=(), **extra):
  """Writes a zip file in torch's layout around any pickle."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content))
    for key, data in [*storages, *extra.items()]:
      archive.writestr(f"x/{key}", data)
  return path


class _Call:
  """An object whose pickle is a function call."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  ("content", "name"),
  [
    (_Call(eval, "open('harmed', 'w')"), "builtins.eval"),
    (_Call(collections.Counter, "abc"), "collections.Counter"),
    ({"args": collections.deque()}, "collections.deque"),
    (b"cos\nsystem\n(S'touch harmed'\ntR.", "os.system"),
    # Protocol 4 can request an attribute of an accepted name.
    (b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.", "__globals__"),
  ],
)
def test_names_other_than_tensors_are_refused(tmp_path, monkeypatch, content, name):
  monkeypatch.chdir(tmp_path)
  path = _save(tmp_path / "evil.pth", content)
  with pytest.raises(UserError, match=rf"evil\.pth: contains .*{name}"):
    read_state_dict(path)
  assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([1, 2], "contains an object of type list"),
    ({"epoch": 3}, "entry 'epoch' is of type int"),
    ({"model": collections.OrderedDict()}, "entry 'model' is of type OrderedDict"),
  ],
)
def test_checkpoints_other_than_state_dicts_are_refused(tmp_path, content, message):
  with pytest.raises(UserError, match=rf"c\.pth: {message}"):
    read_state_dict(_save(tmp_path / "c.pth", content))


def _tensor_pickle(offset, shape, strides, numel=4):
  """{"w": tensor} in the opcodes torch writes."""
  ints = lambda values: b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"
  storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n" + b"I%d\ntQ" % numel
  arguments = storage + b"I%d\n" % offset + ints(shape) + ints(strides) + b"I00\nNt"
  return b"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"Rs."


@pytest.mark.parametrize(
  ("offset", "shape", "strides", "numel"),
  [(0, (2, 3), (3, 1), 4), (4, (1,), (1,), 4), (0, (2,), (-1,), 4), (-1, (2,), (1,), 4)]
  + [(0, (5,), (1,), 5)],
)
def test_tensors_stay_within_their_storage(tmp_path, offset, shape, strides, numel):
  numbers = np.arange(4, dtype=np.float32).tobytes()
  good = _save(tmp_path / "good.pth", _tensor_pickle(1, (3,), (1,)), [("data/0", numbers)])
  np.testing.assert_array_equal(read_state_dict(good)["w"], [1, 2, 3])
  content = _tensor_pickle(offset, shape, strides, numel)
  with pytest.raises(UserError, match=r"bad\.pth: damaged"):
    read_state_dict(_save(tmp_path / "bad.pth", content, [("data/0", numbers)]))


def test_big_endian_is_refused(tmp_path):
  numbers = np.arange(4, dtype=">f4").tobytes()
  content = _tensor_pickle(0, (4,), (1,))
  path = _save(tmp_path / "b.pth", content, [("data/0", numbers)], byteorder=b"big")
  with pytest.raises(UserError, match="big-endian"):
    read_state_dict(path)
