"""What a program is traced for, where its form depends on it: a platform, or to be counted.

`jax.lax.platform_dependent` chooses when a program is lowered, and needs nothing else. This module is for
choices of shapes and of custom derivatives, which are made while a program is traced.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform")
_WRITTEN_OUT: contextvars.ContextVar[bool] = contextvars.ContextVar("written_out", default=False)


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": that of `tracing_for`, or else of this process's devices."""
  return _PLATFORM.get(None) or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
  """Context in which programs are built and traced for a platform that this machine need not have.

  Args:
    name: "cpu", "gpu" or "tpu".
  """
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
  """Context in which attention and convolutions are traced as their formulas, to be counted."""
  token = _WRITTEN_OUT.set(True)
  try:
    yield
  finally:
    _WRITTEN_OUT.reset(token)


def is_written_out() -> bool:
  """Returns whether a program is traced inside `written_out`."""
  return _WRITTEN_OUT.get()
