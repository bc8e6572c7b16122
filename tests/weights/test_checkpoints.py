"""Checkpoints whose tensors are in an entry, beside an optimizer or settings."""

import collections
import pickle

import numpy as np
import pytest

from fpt_jax.errors import UserError
from fpt_jax.weights.files import read_state_dict
from tests.weights.torch_files import (
  BASE,
  legacy,
  refused,
  save,
  tensor_pickle,
)


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
    read_state_dict(save(tmp_path / "c.pth", content))


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
  b"(dS'state'\n" + tensor_pickle(0, (2,), (1,)).replace(b"S'0'\n", b"S'9'\n")[:-1] + b"s."
)

NUMBERS = [("data/0", np.arange(4, dtype=np.float32).tobytes())]


@pytest.mark.parametrize("entry", ["model", "state_dict", "state_dict_ema", "teacher"])
@pytest.mark.parametrize("write", [save, legacy])
def test_the_entry_of_a_checkpoint_that_has_tensors(tmp_path, write, entry):
  """mmdetection's, DETR's and timm's checkpoints; only one entry is a dict of tensors."""
  content = _checkpoint(
    meta={"epoch": 12, "CLASSES": ("cat", "dog")},
    **{entry: tensor_pickle(1, (3,), (1,))},
    optimizer={"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    epoch=7,
  )
  extra = [NUMBERS] if write is save else [[pickle.dumps(["0"], 2), _stored(4)]]
  state = read_state_dict(write(tmp_path / "c.pth", content, *extra))
  assert list(state) == ["w"]
  np.testing.assert_array_equal(state["w"], [1, 2, 3])


def _stored(count):
  """A storage of the numbers 0, 1, 2, ... in torch's older layout."""
  return count.to_bytes(8, "little") + np.arange(count, dtype=np.float32).tobytes()


def test_storages_of_other_entries_are_not_read(tmp_path):
  content = _checkpoint(
    model=tensor_pickle(1, (3,), (1,)), optimizer=b"(dS'0'\n" + OPTIMIZER[:-1] + b"s."
  )
  path = save(tmp_path / "c.pth", content, NUMBERS)
  np.testing.assert_array_equal(read_state_dict(path)["w"], [1, 2, 3])
  # the older layout has the storages one behind the other
  keys = [
    pickle.dumps(["9", "0"], 2),
    _stored(4),
    _stored(4)[:8],
    np.float32([9, 5, 6, 7]).tobytes(),
  ]
  path = legacy(tmp_path / "old.pth", content, keys)
  np.testing.assert_array_equal(read_state_dict(path)["w"], [5, 6, 7])


def test_one_of_several_entries_is_chosen(tmp_path):
  content = _checkpoint(
    epoch=7,
    state_dict=tensor_pickle(1, (3,), (1,)),
    state_dict_ema=tensor_pickle(0, (2,), (1,)),
  )
  path = save(tmp_path / "c.pth", content, NUMBERS)
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


def test_one_dict_in_many_entries_is_looked_at_once(tmp_path):
  tensors = pickle.dumps({str(i): np.zeros(0, np.float32) for i in range(2000)}, 2)[2:-1]
  content = b"\x80\x02}(S'0'\n" + tensors + b"r\xff\xff\xff\x00"
  content += b"".join(b"S'%d'\nj\xff\xff\xff\x00" % i for i in range(1, 30_000)) + b"u."
  (tmp_path / "b.pkl").write_bytes(content)
  refused(tmp_path / "b.pkl", "several entries with tensors, 0, 1, .* and 29992 more")
