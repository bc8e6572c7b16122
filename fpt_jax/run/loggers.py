"""Loggers beside TensorBoard, Weights & Biases and MLflow: they get the same metrics and pictures.

Environment variables and files of each package say where it sends them, such as WANDB_MODE and
MLFLOW_TRACKING_URI. The run's folder has the id of the run there, which a resumed run continues.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import io
import json
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import PIL.Image
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.config_file import flattened
from fpt_jax.run.folder import is_remote, read_json, run_folder, write_whole

LOGGERS_FILE = "loggers.json"
MOST_WAITING = 1000  # steps and evaluations that wait for a slow logger
CLOSE_SECONDS = 30
_NEW_RUNS = "delete it to begin new runs there"


class Logger(Protocol):
  """A run of a service.

  Args:
    name: name of the run.
    fields: the config, by the full names of its fields.
    folder: a folder for the logger's own files; None if the run's folder is in a bucket.
    run_id: id of the run to continue; None for a new run.

  Attributes:
    PACKAGE: name of the package for pip.
    ADVICE: what to do if the run cannot be opened.
    run_id: id of the run.
  """

  PACKAGE: str
  ADVICE: str
  run_id: str

  def __init__(
    self, name: str, fields: Mapping[str, Any], folder: str | None, run_id: str | None
  ): ...

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds finite metrics of a step."""

  def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
    """Adds PNG files by name."""

  def close(self, failed: bool) -> None:
    """Ends the run; `failed`: by an error."""


class Wandb:
  """A run of Weights & Biases. See `Logger`.

  `step` is a metric of its own and the horizontal axis of the others: Weights & Biases leaves out steps
  before the newest one, which a resumed run may do again.
  """

  PACKAGE = "wandb"
  ADVICE = "run `wandb login`, or set WANDB_MODE=offline"

  def __init__(self, name: str, fields: Mapping[str, Any], folder: str | None, run_id: str | None):
    import wandb

    # by default, a process without network never ends
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(CLOSE_SECONDS))
    self.run_id = run_id or uuid.uuid4().hex
    self._run = wandb.init(id=self.run_id, name=name, dir=folder, resume="allow")
    self._run.config.update(dict(fields), allow_val_change=True)
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")
    self._image = wandb.Image

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log({"step": step, **metrics})

  def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
    images = {name: self._image(_opened_image(data)) for name, data in pictures.items()}
    self._run.log({"step": step, **images})

  def close(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class MLflow:
  """A run of MLflow. See `Logger`.

  The characters of a name that MLflow refuses, such as @, become _. MLflow keeps the parameters that a run
  began with.
  """

  PACKAGE = "mlflow-skinny"
  ADVICE = "check MLFLOW_TRACKING_URI; for a folder, MLFLOW_ALLOW_FILE_STORE=true is needed as well"

  def __init__(self, name: str, fields: Mapping[str, Any], folder: str | None, run_id: str | None):
    del folder
    import mlflow

    self._mlflow = mlflow  # the active run belongs to the thread
    self.run_id = mlflow.start_run(run_id=run_id, run_name=name).info.run_id
    if run_id is None:
      mlflow.log_params(dict(fields))

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    named = {_name_for_mlflow(name): value for name, value in metrics.items()}
    self._mlflow.log_metrics(named, step=step)

  def log_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
    for name, data in pictures.items():
      image = _opened_image(data)
      self._mlflow.log_image(image, key=_name_for_mlflow(name), step=step, synchronous=True)

  def close(self, failed: bool) -> None:
    self._mlflow.end_run("FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Logger]] = {"wandb": Wandb, "mlflow": MLflow}  # by module


class Sender:
  """Calls a logger in a thread of its own, so that no service stops or slows a training.

  The first error of the logger is logged; the calls that follow are made nevertheless.

  Args:
    name: name of the logger, for messages.
    make: function that makes the logger.
    is_new: whether the logger's run is new: then this waits until it is open.

  Raises:
    Exception: the new run cannot be opened. A run that goes on does so without the logger.
  """

  def __init__(self, name: str, make: Callable[[], Logger], *, is_new: bool):
    self._name = name
    self._is_new = is_new
    self._has_failed = False
    self._calls: queue.SimpleQueue[Callable[[Logger], None] | None] = queue.SimpleQueue()
    self._run_id: concurrent.futures.Future[str] = concurrent.futures.Future()
    # a thread that waits for a network does not keep the process from ending
    self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
    self._thread.start()
    if is_new:
      self._run_id.result()

  def run_id(self) -> str:
    """Returns the id of the run once it is open."""
    return self._run_id.result()

  def send(self, call: Callable[[Logger], None]) -> None:
    """Calls the logger soon, after the earlier calls."""
    if not self._thread.is_alive():
      return
    if self._calls.qsize() < MOST_WAITING:
      self._calls.put(call)
    else:
      self._report(f"{MOST_WAITING} lines wait for it, and later ones are left out")

  def close(self, *, failed: bool) -> None:
    """Waits until all calls are done, for a limited time, and ends the run."""
    self._calls.put(lambda logger: logger.close(failed))
    self._calls.put(None)
    self._thread.join(CLOSE_SECONDS)
    if self._thread.is_alive():
      self._report(f"not all was sent in {CLOSE_SECONDS} s")

  def _work(self, make: Callable[[], Logger]) -> None:
    try:
      logger = make()
    except Exception as error:  # of another package
      if not self._is_new:
        self._report(f"{_text_of(error)}; to begin a new run there, delete {LOGGERS_FILE}")
      self._run_id.set_exception(error)
      return
    self._run_id.set_result(logger.run_id)
    while call := self._calls.get():
      try:
        call(logger)
      except Exception as error:
        self._report(_text_of(error))

  def _report(self, what: str) -> None:
    if not self._has_failed:
      logging.warning("config.loggers: %s: %s; the training goes on", self._name, what)
    self._has_failed = True


def check_installed(names: Sequence[str]) -> None:
  """Checks that the packages of loggers can be imported.

  Raises:
    UserError: one is not installed.
  """
  for name in names:
    try:
      importlib.import_module(name)
    except ImportError as error:
      raise UserError(
        f"config.loggers: {name!r} needs a package that is not installed: pip install "
        f"{LOGGERS[name].PACKAGE}"
      ) from error


def open_loggers(config: ConfigDict, workdir: str) -> list[Sender]:
  """Opens the loggers of `config.loggers` and writes the ids of their runs to `loggers.json`.

  Args:
    config: config of the run; `config.name`, or else the name of its folder, names it.
    workdir: folder of the run.

  Raises:
    UserError: a logger that is new to the run cannot be opened, or `loggers.json` is damaged.
  """
  folder = run_folder(workdir)
  path = folder / LOGGERS_FILE
  ids = read_json(path, f"restore the file, or {_NEW_RUNS}") if path.exists() else {}
  if not isinstance(ids, dict) or not all(isinstance(run_id, str) for run_id in ids.values()):
    raise UserError(f"{path} does not name a run of each logger; restore the file, or {_NEW_RUNS}")
  own_files = None if is_remote(folder) else str(folder)
  senders: list[Sender] = []
  for name in dict.fromkeys(config.loggers):
    known = ids.get(name)
    arguments = config.name or folder.name, flattened(config), own_files, known
    make = functools.partial(LOGGERS[name], *arguments)
    try:
      senders.append(Sender(name, make, is_new=known is None))
    except Exception as error:
      for sender in senders:
        sender.close(failed=True)
      raise UserError(
        f"config.loggers: {name} cannot open a run ({_text_of(error)}); {LOGGERS[name].ADVICE}, or leave "
        "it out"
      ) from error
    if known is None:
      ids[name] = senders[-1].run_id()
      write_whole(path, json.dumps(ids, indent=2) + "\n")
  return senders


def _text_of(error: Exception) -> str:
  return f"{type(error).__name__}: {one_line(error, 200)}"


def _opened_image(data: bytes) -> PIL.Image.Image:
  return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def _name_for_mlflow(name: str) -> str:
  return re.sub(r"[^\w\-. /]", "_", name)
