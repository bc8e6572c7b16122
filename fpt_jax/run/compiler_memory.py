"""Returns the memory to the system that a compilation leaves unused."""

import ctypes
import functools

import jax

# JAX's name of the event, which also follows when a program is read from the compilation cache
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LEAST_SECONDS = 0.1


@functools.cache
def give_back_after_compilations() -> None:
  """Makes every compilation in this process end with the return of unused memory; further calls do nothing.

  glibc keeps what the compiler has freed, half a gigabyte after a detector, in pieces that are of no use for
  the large arrays of the program itself. With another C library, nothing is returned.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is None:
    return

  def on_event(event: str, seconds: float, **_) -> None:
    if event == _COMPILED and seconds > _LEAST_SECONDS:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(on_event)
