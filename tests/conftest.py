"""Fixtures for all tests. Implicit rank promotion raises an error; all tests share one compilation cache.

Environment variables:
  FPT_REAL_DATA: folder of real images; tests that read it are skipped if the variable is not set.
  FPT_REQUIRE_REAL_DATA: "1" makes those tests fail instead.
  FPT_FUZZ_EXAMPLES: number of inputs of each fuzz test, drawn anew; by default 100, always the same.
  FPT_TEST_CACHE: folder of the compilation cache, by default in the system's temporary folder.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest

pytest_plugins = ["tests.data_sets"]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.environ.get("FPT_TEST_CACHE", os.path.join(tempfile.gettempdir(), "fpt_jax_test_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def quick_compilation():
  """Halves the compilation time of tests of whole runs; the compiled programs are slower."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of real images.

  Without FPT_REAL_DATA the test is skipped, or fails if FPT_REQUIRE_REAL_DATA is 1.
  """
  folder = os.environ.get("FPT_REAL_DATA", "")
  if not folder:
    message = "FPT_REAL_DATA, the folder of real images, is not set"
    if os.environ.get("FPT_REQUIRE_REAL_DATA") == "1":
      pytest.fail(f"{message}, but FPT_REQUIRE_REAL_DATA is 1")
    pytest.skip(message)
  if not os.path.isdir(folder):
    pytest.fail(f"FPT_REAL_DATA={folder} is not a folder")
  return pathlib.Path(folder)
