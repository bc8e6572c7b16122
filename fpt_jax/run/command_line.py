"""What every command shares: the config flag, quiet logs, and errors in one line."""

import difflib
import hashlib
import logging as python_logging
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fpt_jax.errors import UserError, one_line
from fpt_jax.run import cluster
from fpt_jax.run.compiler_memory import give_back_after_compilations
from fpt_jax.run.config_upgrade import RENAMED

PACKAGE = pathlib.Path(__file__).resolve().parent.parent

_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  "~/.cache/fpt_jax",
  "Folder of compiled programs, which later runs of the same user read instead of compiling again; off for "
  "none. JAX_COMPILATION_CACHE_DIR has precedence.",
)


def run(command: Callable[[], None], benchmarks: Mapping[str, pathlib.Path]) -> None:
  """Parses the flags and runs a command; a `UserError` ends it with one line and the error's status.

  Args:
    command: the command, without arguments.
    benchmarks: config file of each benchmark by name. `--config=configs/NAME.py` selects one of them if
      no such file exists.
  """

  def main(argv: list[str]) -> None:
    quiet_log()
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
      keep_compiled_programs(_COMPILATION_CACHE.value)
      give_back_after_compilations()
      with cluster.noticing_lost_processes():
        command()
    except UserError as error:
      report_and_exit(error)
    except Exception:
      traceback.print_exc()
      exit_with(1)
    exit_with(0)

  app.run(main, flags_parser=lambda argv: parse_flags(find_config(argv, benchmarks)))


def keep_compiled_programs(folder: str) -> None:
  """Sets the folder of JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR does.

  Programs for CPUs may use every instruction of the machine, so each kind of CPU has a folder of its own:
  hosts of a cluster often share the home of a user.

  Args:
    folder: the folder, or "off".
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder == "off":
    return
  information = pathlib.Path("/proc/cpuinfo")
  text = information.read_text() if information.exists() else platform.processor()
  instructions = sorted(set(re.findall(r"^(?:flags|Features)\s*:.*", text, re.MULTILINE))) or [text]
  kind = hashlib.sha256("\n".join(instructions).encode()).hexdigest()[:8]
  path = os.path.join(os.path.expanduser(folder), f"{platform.machine()}_{kind}")
  jax.config.update("jax_compilation_cache_dir", path)


def quiet_log() -> None:
  """Logs this package's lines and all warnings, with the time but without the rest of absl's prefix."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(_is_ours_or_a_warning)


def _is_ours_or_a_warning(record: python_logging.LogRecord) -> bool:
  # these packages log errors that they also raise
  if "orbax" in record.pathname or "tensorflow_datasets" in record.pathname:
    return False
  ours = (str(PACKAGE) + os.sep, os.path.abspath(sys.argv[0]))
  return record.levelno >= python_logging.WARNING or os.path.abspath(record.pathname).startswith(
    ours
  )


def find_config(argv: list[str], benchmarks: Mapping[str, pathlib.Path]) -> list[str]:
  """Replaces `--config=configs/NAME.py` by the benchmark of that name if the file does not exist."""
  found = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition("=")
    if flag not in ("--config", "-config"):
      continue
    if not equals and i + 1 < len(argv):
      value = argv[i + 1]
    file, colon, words = value.partition(":")
    path = pathlib.PurePath(file)
    known = path.suffix == ".py" and path.parts[:-1] == ("configs",) and path.stem in benchmarks
    if known and not os.path.exists(file):
      value = f"{benchmarks[path.stem]}{colon}{words}"
      found[i if equals else i + 1] = f"{flag}={value}" if equals else value
  return found


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags with absl; mistakes in a config file or in its overrides are reported in one line."""
  try:
    _check_config(argv)
    return flags.FLAGS(argv)
  except (
    flags.Error,
    ValueError,
    OSError,
    UserError,
    AttributeError,
    KeyError,
    TypeError,
  ) as error:
    report_and_exit(error)


def _check_config(argv: list[str]) -> None:
  """Raises UserError unless the config file can be loaded and has every field that is set."""
  file: str | None = None
  overrides: list[tuple[str, str | None]] = []
  for i, argument in enumerate(argv):
    if not argument.startswith("-"):
      continue
    flag, equals, value = argument.lstrip("-").partition("=")
    if flag == "config":
      file = value if equals else next(iter(argv[i + 1 :]), None)
    elif flag.startswith(("config.", "noconfig.")):
      overrides.append((flag.partition(".")[2], value if equals else None))
  if "config" not in flags.FLAGS:
    return
  if file is None:
    if overrides:
      raise UserError(
        f"--config.{overrides[0][0]} changes a field of a config; it needs --config=FILE, such as "
        "configs/coco_mask.py"
      )
    return
  config = load_config(file)
  for path, setting in overrides:
    check_field(config, path, setting)


def load_config(file: str) -> ConfigDict:
  """Loads a config file as `--config` does.

  Args:
    file: path of the file, optionally followed by a colon and words.

  Raises:
    UserError: the file does not exist, has no `get_config`, or raises an error.
  """
  path = file.partition(":")[0]
  if not path:
    raise UserError("--config is empty; set it to a config file, such as configs/coco_mask.py")
  if not os.path.exists(path):
    raise UserError(f"--config={file}: {path} does not exist")
  try:
    config = config_flags.config_flags.ConfigFileFlagParser("config").parse(file)
  except UserError as error:
    raise UserError(f"--config={file}: {error}") from error
  except Exception as error:  # whatever a user's file raises
    # ml_collections puts the stack trace of some errors into the message of another
    wrapped = str(error).startswith("Error whilst parsing config file")
    original = (error.__context__ if wrapped else None) or error
    raise UserError(f"--config={file}: {_explain(original, path)}") from error
  if not isinstance(config, ConfigDict) or not isinstance(config.get("model"), ConfigDict):
    raise UserError(f"--config={file}: get_config must return a config, see fpt_jax.configs")
  return config


def _explain(error: BaseException, path: str) -> str:
  """What went wrong in a config file, with the line."""
  if isinstance(error, SyntaxError):
    return f"line {error.lineno}: {error.msg}"
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.abspath(frame.filename) == os.path.abspath(path)
  ]
  where = f"line {frames[-1].lineno}: " if frames else ""
  line = frames[-1].line or "" if frames else ""
  text = one_line(error.args[0] if error.args else error)
  if "has no attribute 'get_config'" in text:
    return "the file has no function get_config"
  # setting an unknown field of a locked config, and reading one
  unknown = re.search(r"Key \"(\w+)\" does not exist", text) or re.match(r"['\"]+(\w+)['\"]", text)
  if renamed := _renamed_in(line, unknown[1] if unknown else ""):
    return f"{where}{renamed}"
  if unknown and isinstance(error, AttributeError):
    hint = re.search(r"Did you mean \"(\w+)\"", text)
    suggestion = f"; did you mean {hint[1]}?" if hint else ""
    return f"{where}the config has no field {unknown[1]}{suggestion}"
  if isinstance(error, ImportError | NameError | AttributeError):
    return f"{where}{text}"
  return f"{where}{type(error).__name__}: {text}"


def _renamed_in(line: str, field: str) -> str:
  """Which field on a line of a config file was renamed; "" for none.

  Args:
    line: the line that raised an error.
    field: name of the field that does not exist, or "".
  """
  paths = [match[1:] for match in re.findall(r"\bconfig((?:\.\w+)+)", line)]
  for path in paths:
    if path in RENAMED:
      return f"config.{path} is now config.{RENAMED[path]}"
  if any(path.split(".")[-1] == field for path in paths):
    return ""
  # the group has another name in the file: `test = config.model.test`
  candidates = [old for old in RENAMED if old.split(".")[-1] == field]
  return "; ".join(f"config.{old} is now config.{RENAMED[old]}" for old in candidates)


def check_field(config: ConfigDict, path: str, value: str | None) -> None:
  """Checks that a config has a field that can be set.

  Args:
    config: a complete config.
    path: names of the field and its groups with dots between them.
    value: the value to set, as text; None for a flag without a value.

  Raises:
    UserError: the field does not exist, was renamed, or is a group.
  """
  renamed = f"--config.{path} is now --config.{RENAMED[path]}" if path in RENAMED else ""
  group, passed = config, []
  for field in path.split("."):
    if not isinstance(group, ConfigDict):
      raise UserError(f"--config.{path}: {'.'.join(passed)} is a value and has no fields")
    passed.append(field)
    if field not in group and renamed:
      raise UserError(renamed)
    if field not in group:
      begun = [name for name in group if name.startswith(field) or field.startswith(name)]
      likely = begun or difflib.get_close_matches(field, group)
      hint = (
        f"did you mean {' or '.join(likely)}?" if likely else f"its fields are {', '.join(group)}"
      )
      raise UserError(f"--config has no field {'.'.join(passed)}; {hint}")
    group = group[field]
  if isinstance(group, ConfigDict) and renamed:
    raise UserError(renamed)
  if isinstance(group, ConfigDict) and value is not None:
    raise UserError(f"--config.{path} is a group; set one of its fields: {', '.join(group)}")


def report_and_exit(error: BaseException) -> NoReturn:
  """Prints an error in one line to standard error and exits with its status, 2 for all but some."""
  print(f"error: {one_line(error)}", file=sys.stderr)
  exit_with(error.status if isinstance(error, UserError) else 2)


def exit_with(status: int) -> NoReturn:
  """Ends the process. After an error, processes that train with it and go on do not hold it up for long."""
  if not cluster.all_leave(seconds=10 if status else 300):
    sys.stdout.flush()
    sys.stderr.flush()
    # JAX makes an ordinary exit wait for the others for minutes, and they may wait for this process
    os._exit(status)
  sys.exit(status)
