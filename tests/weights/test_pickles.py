"""Pickles of tensors and arrays, and malicious ones, each of which is refused at once."""

import collections
import pickle

import numpy as np
import pytest

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict
from tests.weights.torch_files import (
  BASE,
  Call,
  legacy,
  refused,
  save,
  tensor_pickle,
)


@pytest.mark.parametrize(
  ("content", "name"),
  [
    (Call(eval, "open('harmed', 'w')"), "builtins.eval"),
    (Call(collections.Counter, "abc"), "collections.Counter"),
    ({"args": collections.deque()}, "collections.deque"),
    (b"cos\nsystem\n(S'touch harmed'\ntR.", "os.system"),
    # Protocol 4 can request an attribute of an accepted name.
    (b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.", "__globals__"),
  ],
)
def test_names_other_than_tensors_are_refused(tmp_path, monkeypatch, content, name):
  monkeypatch.chdir(tmp_path)
  path = save(tmp_path / "evil.pth", content)
  with pytest.raises(UserError, match=rf"evil\.pth: contains .*{name}"):
    read_state_dict(path)
  assert not (tmp_path / "harmed").exists()


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
    (pickle.dumps({"w": Call(eval, "1")}), "contains builtins.eval"),
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
  refused(tmp_path / "bad.pkl", rf"bad\.pkl.*({message})")


def test_arrays_that_share_their_bytes_are_not_much_larger_than_their_file(tmp_path):
  array = pickle.dumps(np.zeros(2**18, np.float32), 2)[2:-1]
  content = b"\x80\x02}(S'0'\n" + array + b"q\xff"
  content += b"".join(b"S'%d'\nh\xff" % i for i in range(1, 100)) + b"u."
  (tmp_path / "b.pkl").write_bytes(content)
  refused(tmp_path / "b.pkl", "its contents need 104857600 bytes")


NESTED = b")" + b"\x85" * 100  # a tuple in a tuple in a tuple ...


@pytest.mark.parametrize("write", [save, legacy])
def test_hashing_of_nested_tuples_cannot_crash_python(tmp_path, write):
  content = b"})" + b"\x85" * 300_000 + b"Ns."
  refused(write(tmp_path / "bad.pth", content), r"bad\.pth: damaged.* a key of type tuple")


def test_names_of_storages_are_text(tmp_path):
  path = legacy(tmp_path / "bad.pth", tensor_pickle(0, (4,), (1,)), [b"](" + NESTED + b"e."])
  refused(path, r"bad\.pth: damaged.* a storage without a name")


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
  refused(save(tmp_path / "bad.pth", content), rf"bad\.pth.*({message})")


def test_one_list_that_is_read_many_times(tmp_path):
  items = b"(" + b"".join(b"(I%d\nNl" % i for i in range(5_000)) + b"l\x85q\x00"
  content = items + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00R0" * 100_000 + b"."
  refused(save(tmp_path / "bad.pth", content), "too many values")


def test_other_forms_of_pickles_are_read(tmp_path):
  tensor = tensor_pickle(0, (2,), (1,))[5:-2].replace(b"dS'w'\n", b"")  # without its dict
  tensor = tensor[tensor.index(b"ctorch._utils") :]
  numbers = np.arange(4, dtype=np.float32).tobytes()
  for content in (
    b"}(S'w'\n" + tensor + b"u.",
    b"ccollections\nOrderedDict\n(](S'w'\n" + tensor + b"latR.",  # of Python 2
    b"ccollections\nOrderedDict\n)RS'w'\n" + tensor + b"s}S'_metadata'\nNsb.",
    b"\x80\x04}U\x01wq\x05" + tensor + b"s\x94.",
  ):
    (array,) = read_state_dict(save(tmp_path / "x.pth", content, [("data/0", numbers)])).values()
    np.testing.assert_array_equal(array, [0, 1])
