"""Whatever the bytes of a file of weights: it is read, or a UserError in one line says why not."""

import io
import pickle
import pickletools
import tempfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict
from tests.conftest import GOLDEN
from tests.fuzz import damage, fuzz

ARRAYS = {"a.weight": np.arange(24, dtype=np.float32).reshape(4, 6), "n": np.int64(3)}
EDITS = st.lists(
  st.tuples(st.integers(0, 2**16), st.integers(0, 9), st.binary(max_size=9)), max_size=4
)


def _npz() -> bytes:
  file = io.BytesIO()
  np.savez(file, **ARRAYS)
  return file.getvalue()


FILES = {
  "zip.pth": (GOLDEN / "tensors_zip.pth").read_bytes(),
  "legacy.pth": (GOLDEN / "tensors_legacy.pth").read_bytes(),
  "x.npz": _npz(),
  "x.pkl": pickle.dumps({"blobs": ARRAYS}, 2),
  "x.safetensors": safetensors.numpy.save({"a.weight": ARRAYS["a.weight"]}),
}


def _check(name: str, data: bytes) -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/{name}"
    with open(path, "wb") as file:
      file.write(data)
    try:
      arrays = read_state_dict(path)
    except UserError as error:
      assert "\n" not in str(error)
    else:
      assert all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in arrays.items())


def _zip_with(pickled: bytes) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("x/data.pkl", pickled)
    archive.writestr("x/data/0", bytes(16))
  return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name):
  fuzz(EDITS.map(lambda edits: damage(FILES[name], edits)), lambda data: _check(name, data))


@pytest.mark.parametrize("name", FILES)
def test_any_bytes(name):
  # what a file of this kind begins with, so that its reader goes on
  start = FILES[name][:8] if name != "x.safetensors" else b""
  fuzz(st.binary(max_size=200), lambda data: _check(name, start + data))


# opcodes with their arguments
PIECES = st.one_of(
  st.sampled_from([code.code.encode("latin-1") for code in pickletools.opcodes if code.arg is None]),
  st.sampled_from(
    [b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    + [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n"]
    + [b"S'storage'\n", b"S'0'\n", b"S'w'\n", b"I4\n", b"I01\n", b"q\x00", b"h\x00", b"K\x01"]
    + [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"]
    + [b"cnumpy.core.numeric\n_frombuffer\n", b"cnumpy.core.multiarray\nscalar\n", b"U\x02f4"]
    + [b"c_codecs\nencode\n", b"S'latin1'\n", b"(cnumpy\nndarray\ntR", b"U\x04\x00\x00\x80\xff"]
    + [b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", b"(I2\nt", b"(I1\nt", b"\x80\x02"]
  ),
  st.integers(-(2**70), 2**70).map(lambda n: b"L%dL\n" % n),
  st.binary(max_size=3),
)  # fmt: skip


def test_pickles_of_any_opcodes():
  programs = st.lists(PIECES, max_size=30).map(lambda pieces: b"".join(pieces) + b".")
  fuzz(programs, lambda program: _check("zip.pth", _zip_with(program)))
  fuzz(programs, lambda program: _check("x.pkl", program))


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(),
  lambda inner: (
    st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
  ),
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_values(protocol):
  pickles = VALUES.map(lambda value: pickle.dumps(value, protocol))
  fuzz(pickles, lambda pickled: _check("zip.pth", _zip_with(pickled)))
