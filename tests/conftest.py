"""Every test raises on silent rank promotion and shares one compilation cache."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.environ.get("FPT_TEST_CACHE", os.path.join(tempfile.gettempdir(), "fpt_jax_test_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

GOLDEN = pathlib.Path(__file__).parent / "golden"
REAL_DATA = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="module")
def quick_compilation():
  """For tests of whole runs: programs compiled in half the time, and slower to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of real images; absent: skipped, or failed where FPT_REQUIRE_REAL_DATA=1."""
  if not REAL_DATA.is_dir():
    message = f"no real data at {REAL_DATA}"
    if os.environ.get("FPT_REQUIRE_REAL_DATA") == "1":
      pytest.fail(message + ", and FPT_REQUIRE_REAL_DATA=1 asks for it")
    pytest.skip(message)
  return REAL_DATA
