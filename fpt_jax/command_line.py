"""What every command shares: quiet logs, and mistakes told in one line."""

import logging as python_logging
import sys
from collections.abc import Callable

from absl import app, flags, logging

from fpt_jax.errors import UserError


def run(command: Callable[[], None]) -> None:
  """Parses the flags and runs a command; a `UserError` ends it with one line and status 2."""

  def main(argv: list[str]) -> None:
    quiet_log()
    try:
      if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag; flags begin with --")
      command()
    except UserError as error:
      tell_and_exit(error)

  app.run(main, flags_parser=parse_flags)


def quiet_log() -> None:
  """Our own lines and everybody's warnings, with the time and without the rest of absl's prefix."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(_is_ours_or_a_warning)


def _is_ours_or_a_warning(record: python_logging.LogRecord) -> bool:
  if "orbax" in record.pathname:  # logs what it also raises, with the stack of a thread
    return False
  return record.levelno >= python_logging.WARNING or "fpt_jax" in record.pathname


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with the mistakes in a config or its overrides told in one line."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    tell_and_exit(error)


def tell_and_exit(error: BaseException) -> None:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
