"""The list of imported arrays is read, or its damage is reported."""

import pytest

from fpt_jax.errors import UserError
from fpt_jax.weights.imported import pretrained_shapes, write_imported


def test_names_are_read_back(tmp_path):
  assert pretrained_shapes(str(tmp_path), {"a": 1, "b": 2}) == {"a": 1, "b": 2}
  write_imported(str(tmp_path), ["b", "c"])
  assert pretrained_shapes(str(tmp_path), {"a": 1, "b": 2}) == {"b": 2}


@pytest.mark.parametrize("content", [b"", b"{}", b"[[1]]", b"\xff", b"[" * 100_000])
def test_damage_is_reported(content, tmp_path):
  (tmp_path / "imported.json").write_bytes(content)
  with pytest.raises(UserError, match=r"imported\.json.*; (restore|import)"):
    pretrained_shapes(str(tmp_path), {"a": 1})
