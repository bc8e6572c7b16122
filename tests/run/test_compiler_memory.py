"""Memory that is free in this process after a compilation."""

import ctypes
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from fpt_jax.run.compiler_memory import give_back_after_compilations


def resident_megabytes() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compilation_ends_with_the_return_of_free_memory(monkeypatch):
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  pieces = [libc.malloc(4000) for _ in range(50_000)]
  for piece in pieces:
    ctypes.memset(piece, 1, 4000)
  for piece in pieces[:-1]:  # the last one keeps glibc from returning the others
    libc.free(piece)
  monkeypatch.setattr("fpt_jax.run.compiler_memory._LEAST_SECONDS", 0)
  give_back_after_compilations()
  before = resident_megabytes()
  jax.jit(lambda x: jnp.sin(x) + 17).lower(1.0).compile()
  assert resident_megabytes() < before - 150
  libc.free(pieces[-1])
