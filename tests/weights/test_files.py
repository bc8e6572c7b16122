"""State dicts saved by torch, and malicious or damaged files."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict
from tests.conftest import GOLDEN
from tests.weights.torch_files import BASE, refused, refused_without_reading, save, tensor_pickle

FORMATS = ("tensors_zip.pth", "tensors_legacy.pth")

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


def test_a_checkpoint_may_be_called_a_tar_file(tmp_path):
  (tmp_path / "x.pth.tar").write_bytes((GOLDEN / FORMATS[0]).read_bytes())
  assert list(read_state_dict(tmp_path / "x.pth.tar")) == list(EXPECTED)
  with pytest.raises(UserError, match=r"cannot read \.tar as a state dict"):
    read_state_dict(tmp_path / "x.tar")


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


@pytest.mark.parametrize(
  ("offset", "shape", "strides", "numel"),
  [(0, (2, 3), (3, 1), 4), (4, (1,), (1,), 4), (0, (2,), (-1,), 4), (-1, (2,), (1,), 4)]
  + [(0, (5,), (1,), 5)],
)
def test_tensors_stay_within_their_storage(tmp_path, offset, shape, strides, numel):
  numbers = np.arange(4, dtype=np.float32).tobytes()
  good = save(tmp_path / "good.pth", tensor_pickle(1, (3,), (1,)), [("data/0", numbers)])
  np.testing.assert_array_equal(read_state_dict(good)["w"], [1, 2, 3])
  content = tensor_pickle(offset, shape, strides, numel)
  with pytest.raises(UserError, match=r"bad\.pth: damaged"):
    read_state_dict(save(tmp_path / "bad.pth", content, [("data/0", numbers)]))


def test_big_endian_is_refused(tmp_path):
  numbers = np.arange(4, dtype=">f4").tobytes()
  content = tensor_pickle(0, (4,), (1,))
  path = save(tmp_path / "b.pth", content, [("data/0", numbers)], byteorder=b"big")
  with pytest.raises(UserError, match="big-endian"):
    read_state_dict(path)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  np.savez(tmp_path / "x.npz", a=BASE)
  np.testing.assert_array_equal(read_state_dict("~/x.npz")["a"], BASE)


@pytest.mark.parametrize(
  ("shape", "strides"),
  [((500_000_000,), (0,)), ((1, 2**40), (1, 0)), ((2**62, 2**62), (0, 0)), ((5_000, 5_000), (0, 0))]
  + [((2**64,), (0,)), ((1,) * 100, (1,) * 100)],
)
def test_tensors_are_not_much_larger_than_their_file(tmp_path, shape, strides):
  content = tensor_pickle(0, shape, strides)
  refused_without_reading(
    save(tmp_path / "b.pth", content, [("data/0", bytes(16))]), "its contents need|damaged"
  )


def test_many_views_are_not_much_larger_than_their_file(tmp_path):
  size = 2**18
  tensor = tensor_pickle(0, (size,), (1,), size)
  tensor = tensor[tensor.index(b"ctorch._utils") : -2]
  content = b"(" + b"".join(b"S'%d'\n" % i + tensor for i in range(100)) + b"d."
  path = save(tmp_path / "b.pth", content, [("data/0", bytes(4 * size))])
  refused_without_reading(path, "its contents need 104857600 bytes")


@pytest.mark.parametrize("name", ["b.pth", "b.npz"])
def test_zip_bombs(tmp_path, name):
  path = tmp_path / name
  content = tensor_pickle(0, (4,), (1,), 2**28)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("x/data.pkl", content)
    with archive.open("x/data/0", "w") as file:
      for _ in range(100):
        file.write(bytes(2**20))
  refused_without_reading(path, "its contents need")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("x/data.pkl", bytes(2**25))
  refused_without_reading(path, "its contents need")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
    archive.writestr("x/data.pkl", content)
  refused_without_reading(path, "another method than deflate")
  with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
    for _ in range(2):
      archive.writestr("x/byteorder" if name == "b.pth" else "a.npy", b"little")
    archive.writestr("x/data.pkl", content)
  refused_without_reading(path, "two entries of one name")


def test_compressed_files_are_read(tmp_path):
  np.savez_compressed(tmp_path / "x.npz", zeros=np.zeros((1000, 1000), np.float32), column=BASE.T)
  state = read_state_dict(tmp_path / "x.npz")
  assert state["zeros"].shape == (1000, 1000)
  np.testing.assert_array_equal(state["column"], BASE.T)
  assert state["column"].flags.c_contiguous and state["column"].flags.writeable


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ({"a.npy": b"not an array"}, "entry 'a.npy' is not an array"),
    ({"a": b"bytes"}, "entry 'a' is not an array"),
    ({"a.npy": np.array(["text"])}, "entry 'a.npy' has the dtype"),
    ({"a.npy": np.array([None])}, "entry 'a.npy' has the dtype object"),
    ({"a.npy": np.zeros(2, [("x", "f4")])}, "entry 'a.npy' has the dtype"),
    ({"a.npy": np.array(["2020-01-01"], "M8[D]")}, "entry 'a.npy' has the dtype"),
    ({"a.npy": ("(1099511627776,)", bytes(8))}, "damaged"),
    ({"a.npy": ("(-1,)", bytes(8))}, "damaged"),
    ({"a.npy": ("(0, 4611686018427387904)", b"")}, "damaged"),
    ({"a.npy": ("(" * 3000 + ")" * 3000, bytes(8))}, "damaged"),
    ({"a.npy": ("(1,)", bytes(9))}, "damaged"),
  ],
)
def test_other_contents_of_npz_files_are_refused(tmp_path, members, message):
  path = tmp_path / "x.npz"
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      if isinstance(content, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, content)
        content = stream.getvalue()
      elif isinstance(content, tuple):
        shape, data = content
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
      archive.writestr(name, content)
  refused(path, rf"x\.npz.*{message}")


def test_big_endian_arrays_are_converted(tmp_path):
  np.savez(tmp_path / "x.npz", a=BASE.astype(">f4"))
  array = read_state_dict(tmp_path / "x.npz")["a"]
  assert array.dtype == np.float32 and array.dtype.isnative
  np.testing.assert_array_equal(array, BASE)


@pytest.mark.parametrize(
  "header",
  [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}',
  ],
)
@pytest.mark.parametrize("length", [None, 2**63, 99_999_999, 2**32])
def test_hostile_safetensors(tmp_path, header, length):
  path = tmp_path / "x.safetensors"
  path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
  refused(path, r"x\.safetensors: damaged")
