"""The README's code runs as it is written, and its links lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_module_inside_a_users_model():
  (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "nnx.Module" in b]
  names = {"__name__": "readme"}
  exec(block, names)
  assert names["fine"].shape == (1, 16, 24, 256)
  assert names["coarse"].shape == (1, 8, 12, 256)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_links(target):
  assert (ROOT / target).exists()


def test_one_screen_decides():
  assert len(README.splitlines()) <= 150
