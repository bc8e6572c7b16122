"""What every command shares: quiet logs, and mistakes told in one line."""

import argparse
import difflib
import logging as python_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

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
  # These log what they also raise, or what is none of the user's business.
  if "orbax" in record.pathname or "tensorflow_datasets" in record.pathname:
    return False
  ours = (os.path.dirname(__file__) + os.sep, os.path.abspath(sys.argv[0]))
  return record.levelno >= python_logging.WARNING or os.path.abspath(record.pathname).startswith(
    ours
  )


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with the mistakes in a config or its overrides told in one line."""
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.is_parsed():
      _check_config_file()
    return rest
  except (flags.Error, ValueError, OSError, UserError) as error:
    tell_and_exit(error)
  except (AttributeError, KeyError, TypeError) as error:
    tell_and_exit(UserError(_explained(error, argv)))


def _explained(error: Exception, argv: list[str]) -> str:
  """What an error says that came of the config's file or of an override of its fields."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--config")
  options, others = parser.parse_known_args(argv)
  if options.config is None:
    return str(error)
  try:
    config = flags.FLAGS["config"].parser.parse(options.config)
  except type(error):
    return f"--config={options.config}: {type(error).__name__}: {error}"
  overrides = [a.removeprefix("--config.") for a in others if a.startswith("--config.")]
  complaints = (_complaint(config, override.split("=")[0]) for override in overrides)
  return next(filter(None, complaints), str(error))


def _complaint(config: ConfigDict, path: str) -> str | None:
  """Why a config has no field at `path`, names with dots between them; None where it has."""
  group, passed = config, []
  for field in path.split("."):
    if not isinstance(group, ConfigDict):
      return f"--config.{path}: {'.'.join(passed)} is a value and has no fields"
    passed.append(field)
    if field not in group:
      begun = [name for name in group if name.startswith(field) or field.startswith(name)]
      likely = begun or difflib.get_close_matches(field, group)
      hint = f"did you mean {' or '.join(likely)}?" if likely else f"there are {', '.join(group)}"
      return f"--config has no field {'.'.join(passed)}; {hint}"
    group = group[field]
  return None


def _check_config_file() -> None:
  """Raises UserError if the config's file does not exist: the flag itself stays silent until used."""
  if flags.FLAGS["config"].present:
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if file and not os.path.exists(file.rsplit(":", 1)[0]):
      raise UserError(f"--config={file} does not exist")


def tell_and_exit(error: BaseException) -> None:
  """Prints one line and exits; of a stack trace that a library put in its message, the last line."""
  message = str(error)
  if "Traceback (most recent call last)" in message:
    flag, trace = message.split("Error whilst parsing config file", 1)
    message = flag + trace.strip().splitlines()[-1]
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(2)
