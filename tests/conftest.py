"""Fixtures for all tests. Implicit rank promotion raises an error; all tests share one compilation cache.

Environment variables:
  FPT_REAL_DATA: folder of real images; tests that read it are skipped if the variable is not set.
  FPT_REQUIRE_REAL_DATA: "1" makes those tests fail instead.
  FPT_FUZZ_SECONDS: duration of each fuzz test, see `tests.fuzz`.
  FPT_TEST_CACHE: folder of the compilation cache, by default in the system's temporary folder.
"""

import contextlib
import os
import pathlib
import resource
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest
from etils import epath

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


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> pathlib.Path:
  """A local folder that stands for all buckets: gs://name/file is the file name/file in it."""
  root = tmp_path / "buckets"

  def local(path) -> str:
    path = str(path)
    assert path.startswith("gs://"), path
    return path.replace("gs://", f"{root}/", 1)

  class Gfile:
    def __getattr__(self, name):
      function = getattr(epath.backend.tf_backend.tf.io.gfile, name)
      two_paths = name in ("rename", "copy")

      def call(path, *args, **options):
        if name == "GFile":  # buckets have no folders
          pathlib.Path(local(path)).parent.mkdir(parents=True, exist_ok=True)
        rest = (local(args[0]), *args[1:]) if two_paths else args
        return function(local(path), *rest, **options)

      return call

  class Bucket(type(epath.backend.tf_backend)):
    gfile = Gfile()

  monkeypatch.setattr(epath.backend, "tf_backend", Bucket())
  return root


@pytest.fixture
def full_disk():
  """A context in which files cannot grow beyond a number of bytes, as on a disk that becomes full."""

  @contextlib.contextmanager
  def limited(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)

  return limited
