"""State dicts saved by torch, and malicious or damaged files."""

import collections
import io
import pickle
import time
import tracemalloc
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


def _legacy(path, content, keys=(b"]",)):
  """Writes a file in torch's older layout around a pickle."""
  header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
  path.write_bytes(b"".join(pickle.dumps(h, 2) for h in header) + content + b"".join(keys))
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
    ({"epoch": 3}, "entry 'epoch' is of type int, not a tensor, and no entry is a dict of tensors"),
    ({"model": collections.OrderedDict()}, "entry 'model' is of type OrderedDict"),
    ({"model": {"model": {}}}, "entry 'model' is of type dict"),
    ({}, "is an empty dict"),
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


def _checkpoint(**entries):
  """A checkpoint in the opcodes torch writes; bytes stand for the pickle of an entry."""
  items = [
    f"S{name!r}\n".encode()
    + (value if isinstance(value, bytes) else pickle.dumps(value, 0)).removesuffix(b".")
    for name, value in entries.items()
  ]
  return b"(" + b"".join(items) + b"d."


# an optimizer's state, whose storage is not in the file
OPTIMIZER = (
  b"(dS'state'\n" + _tensor_pickle(0, (2,), (1,)).replace(b"S'0'\n", b"S'9'\n")[:-1] + b"s."
)
NUMBERS = [("data/0", np.arange(4, dtype=np.float32).tobytes())]


@pytest.mark.parametrize("entry", ["model", "state_dict", "state_dict_ema", "teacher"])
@pytest.mark.parametrize("save", [_save, _legacy])
def test_the_entry_of_a_checkpoint_that_has_tensors(tmp_path, save, entry):
  """mmdetection's, DETR's and timm's checkpoints; only one entry is a dict of tensors."""
  content = _checkpoint(
    meta={"epoch": 12, "CLASSES": ("cat", "dog")},
    **{entry: _tensor_pickle(1, (3,), (1,))},
    optimizer={"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    epoch=7,
  )
  extra = [NUMBERS] if save is _save else [[pickle.dumps(["0"], 2), _stored(4)]]
  state = read_state_dict(save(tmp_path / "c.pth", content, *extra))
  assert list(state) == ["w"]
  np.testing.assert_array_equal(state["w"], [1, 2, 3])


def _stored(count):
  """A storage of the numbers 0, 1, 2, ... in torch's older layout."""
  return count.to_bytes(8, "little") + np.arange(count, dtype=np.float32).tobytes()


def test_storages_of_other_entries_are_not_read(tmp_path):
  content = _checkpoint(
    model=_tensor_pickle(1, (3,), (1,)), optimizer=b"(dS'0'\n" + OPTIMIZER[:-1] + b"s."
  )
  path = _save(tmp_path / "c.pth", content, NUMBERS)
  np.testing.assert_array_equal(read_state_dict(path)["w"], [1, 2, 3])
  # the older layout has the storages one behind the other
  keys = [
    pickle.dumps(["9", "0"], 2),
    _stored(4),
    _stored(4)[:8],
    np.float32([9, 5, 6, 7]).tobytes(),
  ]
  path = _legacy(tmp_path / "old.pth", content, keys)
  np.testing.assert_array_equal(read_state_dict(path)["w"], [5, 6, 7])


def test_one_of_several_entries_is_chosen(tmp_path):
  content = _checkpoint(
    epoch=7,
    state_dict=_tensor_pickle(1, (3,), (1,)),
    state_dict_ema=_tensor_pickle(0, (2,), (1,)),
  )
  path = _save(tmp_path / "c.pth", content, NUMBERS)
  message = r"several entries with tensors, state_dict, state_dict_ema; choose one with --entry"
  with pytest.raises(UserError, match=message):
    read_state_dict(path)
  np.testing.assert_array_equal(read_state_dict(path, "state_dict_ema")["w"], [0, 1])
  np.testing.assert_array_equal(read_state_dict(path, "state_dict")["w"], [1, 2, 3])
  with pytest.raises(UserError, match=r"--entry=ema is not an entry with tensors; .*: state_dict"):
    read_state_dict(path, "ema")
  np.savez(tmp_path / "x.npz", a=BASE)
  with pytest.raises(UserError, match=r"\.npz files have no entries"):
    read_state_dict(tmp_path / "x.npz", "model")


# .pkl files of detectron2 and Detectron

ARRAYS = {
  "conv1_w": BASE,
  "column_major": np.asfortranarray(BASE.astype(np.float64)),
  "big_endian": BASE.astype(">f4"),
  "half": BASE.astype(np.float16),
  "counts": np.arange(-3, 300, dtype=np.int64),
  "bytes": np.arange(256, dtype=np.uint8),
  "flags": np.array([True, False]),
  "step": np.float32(2.5),
  "scalar": np.array(7),
  "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("others", [None, {"__author__": "A"}, {"cfg": "MODEL: {}"}])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays(tmp_path, protocol, others):
  path = tmp_path / "R-50.pkl"
  path.write_bytes(pickle.dumps({"model": ARRAYS} | others if others else ARRAYS, protocol))
  state = read_state_dict(path)
  assert list(state) == list(ARRAYS)
  for name, expected in ARRAYS.items():
    assert state[name].dtype == expected.dtype.newbyteorder("=") and state[name].dtype.isnative
    assert state[name].shape == expected.shape
    np.testing.assert_array_equal(state[name], expected, err_msg=name)
    assert state[name].flags.c_contiguous and state[name].flags.writeable


def _python2(data, shape=b"K\x02K\x03\x86", dtype=b"U\x02f4"):
  """{"w": array} as Python 2 and NumPy 1 pickle it with protocol 2: the numbers are a string."""
  array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R"
  number = (
    b"cnumpy\ndtype\nq\x03("
    + dtype
    + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  )
  state = b"(K\x01" + shape + number + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
  return b"\x80\x02}U\x01w" + array + state + b"s."


@pytest.mark.parametrize("numbers", [np.arange(6), np.zeros(6), np.full(6, -1e30), [1e-40] * 6])
def test_pickles_of_python_2(tmp_path, numbers):
  """The bytes of an array may or may not be valid text."""
  expected = np.float32(numbers).reshape(2, 3)
  (tmp_path / "R-50.pkl").write_bytes(_python2(expected.tobytes()))
  np.testing.assert_array_equal(read_state_dict(tmp_path / "R-50.pkl")["w"], expected, strict=True)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (pickle.dumps({"w": np.array(["text", None], object)}), "damaged.* a dtype of something else"),
    (pickle.dumps({"w": np.zeros(2, [("x", "f4")])}), "damaged.* a dtype of something else"),
    (pickle.dumps({"w": np.array(["text"])}), "damaged.* a dtype of something else"),
    (pickle.dumps({"w": np.ma.zeros(3)}), "contains numpy.ma"),
    (pickle.dumps({"w": _Call(eval, "1")}), "contains builtins.eval"),
    (pickle.dumps(np.zeros(2)), "contains an object of type Array"),
    (_python2(bytes(20)), "damaged.* without its 24 bytes"),
    (_python2(bytes(24), shape=b"K\x02\x8a\x09" + bytes(8) + b"\x01\x86"), "an impossible shape"),
    (_python2(bytes(24), shape=b"K\x02\x8a\x07" + bytes(6) + b"\x01\x86"), "its contents need"),
    (_python2(bytes(24), shape=b"K\x02J\xff\xff\xff\xff\x86"), "damaged.* an impossible shape"),
    (_python2(bytes(24), dtype=b"U\x01O"), "damaged.* a dtype of something else"),
    (_python2(bytes(24), dtype=b"U\x03f16"), "damaged.* a dtype of something else"),
    (b"}S'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\ntRs.", "an array without its contents"),
    (b"}S'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\ntRs.", "an array of an unknown class"),
    (b"}S'w'\nc_codecs\nencode\n(S'x'\nS'utf-7'\ntRs.", "bytes in an unknown encoding"),
    (b"}S'w'\ncnumpy\nload\n(S'x'\ntRs.", "contains numpy.load"),
    (b"}S'w'\ncnumpy.core.multiarray\nfromfile\n(S'x'\ntRs.", "contains numpy.core.multiarray.fromfile"),
  ],
)  # fmt: skip
def test_pickles_of_other_things_are_refused(tmp_path, content, message):
  (tmp_path / "bad.pkl").write_bytes(content)
  _refused(tmp_path / "bad.pkl", rf"bad\.pkl.*({message})")


def test_arrays_that_share_their_bytes_are_not_much_larger_than_their_file(tmp_path):
  array = pickle.dumps(np.zeros(2**18, np.float32), 2)[2:-1]
  content = b"\x80\x02}(S'0'\n" + array + b"q\xff"
  content += b"".join(b"S'%d'\nh\xff" % i for i in range(1, 100)) + b"u."
  (tmp_path / "b.pkl").write_bytes(content)
  _refused(tmp_path / "b.pkl", "its contents need 104857600 bytes")


def test_one_dict_in_many_entries_is_looked_at_once(tmp_path):
  tensors = pickle.dumps({str(i): np.zeros(0, np.float32) for i in range(2000)}, 2)[2:-1]
  content = b"\x80\x02}(S'0'\n" + tensors + b"r\xff\xff\xff\x00"
  content += b"".join(b"S'%d'\nj\xff\xff\xff\x00" % i for i in range(1, 30_000)) + b"u."
  (tmp_path / "b.pkl").write_bytes(content)
  _refused(tmp_path / "b.pkl", "several entries with tensors, 0, 1, .* and 29992 more")


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


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  np.savez(tmp_path / "x.npz", a=BASE)
  np.testing.assert_array_equal(read_state_dict("~/x.npz")["a"], BASE)


# Hostile files. Each is refused at once, with little memory.


def _refused(path, message, *, seconds=4.0):
  """Checks that a file is refused in one line and in little time."""
  begun = time.process_time()
  with pytest.raises(UserError, match=message) as error:
    read_state_dict(path)
  assert time.process_time() - begun < seconds
  assert "\n" not in str(error.value) and len(str(error.value)) < 700


def _refused_without_reading(path, message):
  """Checks that a file is refused with little memory."""
  tracemalloc.start()
  try:
    _refused(path, message)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 2**23


NESTED = b")" + b"\x85" * 100  # a tuple in a tuple in a tuple ...


@pytest.mark.parametrize("save", [_save, _legacy])
def test_hashing_of_nested_tuples_cannot_crash_python(tmp_path, save):
  content = b"})" + b"\x85" * 300_000 + b"Ns."
  _refused(save(tmp_path / "bad.pth", content), r"bad\.pth: damaged.* a key of type tuple")


def test_names_of_storages_are_text(tmp_path):
  path = _legacy(tmp_path / "bad.pth", _tensor_pickle(0, (4,), (1,)), [b"](" + NESTED + b"e."])
  _refused(path, r"bad\.pth: damaged.* a storage without a name")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"}" + NESTED + b"Ns.", "a key of type tuple"),
    (b"(" + NESTED + b"Nd.", "a key of type tuple"),
    (b"ccollections\nOrderedDict\n(](" + NESTED + b"NlatR.", "a key of type tuple"),
    (b"(" + NESTED + b"N\x91.", "the opcode FROZENSET"),
    (b"(S'storage'\n" + NESTED + b"S'0'\nS'cpu'\nK\x01tQ.", "an unknown storage"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00" + NESTED + b")tR.", "a tensor without"),
    (NESTED + b".", "contains an object of type tuple"),
    # dictionaries are slow with keys of one hash
    (b"(" + b"".join(b"L%dL\nN" % (k * (2**61 - 1)) for k in range(1, 99)) + b"d.", "a key of type int"),
    (b"N" + b"r\x00\x00\x00\x08" + b".", "an object of type NoneType"),  # memo index 2**27
    (b"Np99999999999999999999999\n.", "a memo index out of range"),
    (b"]" * 3_000_000 + b"a" * 2_999_999 + b".", "too many values"),
    (b"(" * 3_000_000 + b"l" * 3_000_000 + b".", "too many values"),
    (b"]" + b"Na" * 3_000_000 + b".", "too many values"),
    (b"X\xff\xff\xff\x7fabc.", "damaged"),  # a text of 2 GB
    (b"\x8d" + b"\xff" * 7 + b"\x7fabc.", "damaged"),
    (b"I" + b"9" * 5000 + b"\n.", "damaged"),
    (b"c" + b"x" * 100_000 + b"\ny\n.", "contains xxx"),
    (b"}X\xa0\x86\x01\x00" + b"x" * 100_000 + b"Ns.", "entry 'xxx"),
    (b"0.", "a value is missing"),
    (b"(0.", "a value is missing"),
    (b"t.", "damaged"),
    (b"}K\x01a.", "values for something else than a list"),
    (b"]K\x01K\x01s.", "items for something else than a dict"),
    (b"]K\x01\x85R.", "a call of something else than a function"),
    (b"ctorch\nFloatStorage\n)\x81.", "the opcode NEWOBJ"),
    (b"(i__main__\nX\n.", "the opcode INST"),
    (b"\x82\x01.", "the opcode EXT1"),
    (b"\x97.", "the opcode NEXT_BUFFER"),
  ],
)  # fmt: skip
def test_hostile_pickles(tmp_path, content, message):
  _refused(_save(tmp_path / "bad.pth", content), rf"bad\.pth.*({message})")


def test_one_list_that_is_read_many_times(tmp_path):
  items = b"(" + b"".join(b"(I%d\nNl" % i for i in range(5_000)) + b"l\x85q\x00"
  content = items + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00R0" * 100_000 + b"."
  _refused(_save(tmp_path / "bad.pth", content), "too many values")


def test_other_forms_of_pickles_are_read(tmp_path):
  tensor = _tensor_pickle(0, (2,), (1,))[5:-2].replace(b"dS'w'\n", b"")  # without its dict
  tensor = tensor[tensor.index(b"ctorch._utils") :]
  numbers = np.arange(4, dtype=np.float32).tobytes()
  for content in (
    b"}(S'w'\n" + tensor + b"u.",
    b"ccollections\nOrderedDict\n(](S'w'\n" + tensor + b"latR.",  # of Python 2
    b"ccollections\nOrderedDict\n)RS'w'\n" + tensor + b"s}S'_metadata'\nNsb.",
    b"\x80\x04}U\x01wq\x05" + tensor + b"s\x94.",
  ):
    (array,) = read_state_dict(_save(tmp_path / "x.pth", content, [("data/0", numbers)])).values()
    np.testing.assert_array_equal(array, [0, 1])


@pytest.mark.parametrize(
  ("shape", "strides"),
  [((500_000_000,), (0,)), ((1, 2**40), (1, 0)), ((2**62, 2**62), (0, 0)), ((5_000, 5_000), (0, 0))]
  + [((2**64,), (0,)), ((1,) * 100, (1,) * 100)],
)
def test_tensors_are_not_much_larger_than_their_file(tmp_path, shape, strides):
  content = _tensor_pickle(0, shape, strides)
  _refused_without_reading(
    _save(tmp_path / "b.pth", content, [("data/0", bytes(16))]), "its contents need|damaged"
  )


def test_many_views_are_not_much_larger_than_their_file(tmp_path):
  size = 2**18
  tensor = _tensor_pickle(0, (size,), (1,), size)
  tensor = tensor[tensor.index(b"ctorch._utils") : -2]
  content = b"(" + b"".join(b"S'%d'\n" % i + tensor for i in range(100)) + b"d."
  path = _save(tmp_path / "b.pth", content, [("data/0", bytes(4 * size))])
  _refused_without_reading(path, "its contents need 104857600 bytes")


@pytest.mark.parametrize("name", ["b.pth", "b.npz"])
def test_zip_bombs(tmp_path, name):
  path = tmp_path / name
  content = _tensor_pickle(0, (4,), (1,), 2**28)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("x/data.pkl", content)
    with archive.open("x/data/0", "w") as file:
      for _ in range(100):
        file.write(bytes(2**20))
  _refused_without_reading(path, "its contents need")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("x/data.pkl", bytes(2**25))
  _refused_without_reading(path, "its contents need")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
    archive.writestr("x/data.pkl", content)
  _refused_without_reading(path, "another method than deflate")
  with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
    for _ in range(2):
      archive.writestr("x/byteorder" if name == "b.pth" else "a.npy", b"little")
    archive.writestr("x/data.pkl", content)
  _refused_without_reading(path, "two entries of one name")


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
  _refused(path, rf"x\.npz.*{message}")


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
  _refused(path, r"x\.safetensors: damaged")
