#!/usr/bin/env python3
"""Images per second from prepared records to the device, by stage, beside a torch DataLoader.

    python scripts/benchmark_input.py                       # generated images of 640 x 640 pixels
    python scripts/benchmark_input.py --config=configs/coco_mask.py --config.data.source=/data/coco

Training batches of a detection config, with masks. First the stages one after another on one core, then the
whole loader, with as many threads as cores that it may use. A torch DataLoader with as many worker processes
decodes and unpacks the same images with the same functions, from memory, resizes them with torch, and
collates them; only where torch is installed. Medians of interleaved repetitions, each in a process of its own
on these cores. "CPU" is the time of all cores per image, which depends less on other programs than the rate.
Memory is the growth of the process's peak, and the private memory of the workers.

Data that are not prepared are prepared first. Linux only.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from fpt_jax import configs, data
from fpt_jax.data import canvases, crops, transforms
from fpt_jax.data.reader import Reader
from fpt_jax.data.records.images import decode_image
from fpt_jax.data.records.instances import Record
from fpt_jax.data.records.label_map import LabelRecord
from fpt_jax.errors import UserError
from fpt_jax.run import command_line, sharding
from fpt_jax.tasks.detection.examples import example_of, load_image
from fpt_jax.tasks.task import check_config, task_of
from scripts import markdown
from scripts.machine import allowed_cores, cpu
from scripts.process_memory import peak_growth, private

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOADERS = ("fpt_jax", "DataLoader")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Detection config; by default configs/coco_mask.py with generated images."
)
_WORKERS = flags.DEFINE_list(
  "workers", [], "Numbers of cores, such as 1,8; by default 1, 2, 4, ... and all cores."
)
_IMAGES = flags.DEFINE_integer("images", 320, "Images of a repetition.", lower_bound=16)
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Repetitions.", lower_bound=1)
_MEASURE = flags.DEFINE_string("measure", "", "Used by the script itself.")


def main() -> None:
  config = _CONFIG.value or generated()
  check_config(config)
  if config.model.name != "rcnn":
    raise UserError("--config must be of detection, such as configs/coco_mask.py")
  logging.set_verbosity(logging.WARNING if _MEASURE.value else logging.INFO)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task_of(config).adopt_classes(config, data.info(config.data))
  if _MEASURE.value:
    name, workers = _MEASURE.value.split(",")
    measure = {"stages": stages, "fpt_jax": our_loader, "DataLoader": their_loader}[name]
    print(json.dumps(measure(config, int(workers))))
    return
  counts = [int(count) for count in _WORKERS.value] or numbers_of_cores()
  if max(counts) > len(allowed_cores()):
    raise UserError(f"--workers: there are {len(allowed_cores())} cores")
  loaders = LOADERS if importlib.util.find_spec("torch") else LOADERS[:1]
  found: dict[tuple[str, int], list[dict]] = {}
  for _ in range(_REPETITIONS.value):
    for name, workers in [("stages", 1), *itertools.product(loaders, counts)]:
      found.setdefault((name, workers), []).append(in_own_process(name, workers))
  report(config, found, loaders, counts)


def generated() -> ConfigDict:
  """configs/coco_mask.py with generated images about as large as those of COCO."""
  config = command_line.load_config(f"{ROOT}/configs/coco_mask.py")
  config.data.name = "context_shapes"
  config.data.builder.update(dict(image_size=640, train_size=64, val_size=1))
  config.data.buckets = ((800, 800),)
  return config


def numbers_of_cores() -> list[int]:
  most = len(allowed_cores())
  return [*(1 << i for i in range(most.bit_length() - (most.bit_count() == 1))), most]


def in_own_process(name: str, workers: int) -> dict:
  """Runs one measurement on the first `workers` of the allowed cores; returns what it prints."""
  command = [sys.executable, __file__, *sys.argv[1:], f"--measure={name},{workers}"]
  cores = set(allowed_cores()[:workers])
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    check=False,
    preexec_fn=lambda: os.sched_setaffinity(0, cores),
  )
  if done.returncode:
    raise UserError(f"{name} on {workers} core(s) failed: {done.stderr.splitlines()[-1:]}")
  return json.loads(done.stdout.splitlines()[-1])


def report(config: ConfigDict, found, loaders, counts) -> None:
  """Prints the tables."""
  medians = {
    key: {field: statistics.median(run[field] for run in runs) for field in runs[0]}
    for key, runs in found.items()
  }
  with contextlib.closing(Reader(config.data, config.data.train_split)) as reader:
    height, width = np.median(reader.sizes_N2, axis=0)
  print(
    f"{config.data.name}, images of {height:.0f} x {width:.0f} pixels (median), shorter edge "
    f"{config.data.short_edge}, batches of {config.batch_size}; {cpu()}"
  )
  of_stages = medians["stages", 1]
  whole = sum(of_stages.values())
  rows = [
    [stage, f"{1e3 * seconds:.2f} ms", f"{seconds / whole:.0%}"]
    for stage, seconds in of_stages.items()
  ]
  rows.append(["sum", f"{1e3 * whole:.2f} ms", ""])
  print(f"\n{markdown.table(['stage, one core', 'CPU per image', 'share'], rows)}")
  header = [
    "loader",
    "cores",
    "images/s",
    "per core",
    "CPU per image",
    "memory",
    "share of our rate",
  ]
  rows = []
  for name, workers in itertools.product(loaders, counts):
    run = medians[name, workers]
    share = run["rate"] / medians[LOADERS[0], workers]["rate"]
    cells = [f"{run['rate']:.1f}", f"{run['rate'] / workers:.1f}", f"{1e3 * run['cpu']:.1f} ms"]
    rows.append([name, str(workers), *cells, f"{run['memory']:.0f} MB", f"{share:.2f}"])
  print(f"\n{markdown.table(header, rows)}")
  if len(loaders) == 1:
    print("\ntorch is not installed; only fpt_jax is measured")


def stages(config: ConfigDict, workers: int) -> dict[str, float]:
  """CPU seconds per image of each stage, one after another."""
  import tensorflow as tf

  del workers
  seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def timed(stage: str) -> Iterator[None]:
    begun = time.process_time()
    yield
    seconds[stage] = seconds.get(stage, 0) + time.process_time() - begun

  class TimedReader(Reader):
    def read(self, index):
      with timed("read"):
        return super().read(index)

    def decode(self, index, record):
      with timed("decode"):
        return super().decode(index, record)

  reader = TimedReader(config.data, config.data.train_split)
  mesh = sharding.mesh(batch_sizes=(config.batch_size,))
  count, keys = config.batch_size, task_of(config).BATCH_KEYS
  form = (config.data.resize, config.data.image_dtype)
  batches = batches_of_one_canvas(config, reader.sizes_N2)
  rounds = 1 + _IMAGES.value // count
  with contextlib.closing(reader):
    for turn, (indices, canvas) in enumerate(itertools.islice(batches, rounds)):
      if turn == 1:  # the first batch warms up
        seconds.clear()
      examples = []
      for index in indices:
        with timed("read, decode and instances"):
          window = crops.whole(canvases.resized_size(config.data, *reader.sizes_N2[index]), False)
          example = example_of(config.data, load_image(reader, index, window), set())
        with timed("resize"):
          size = example["size_B2"]
          resized = transforms.resize_and_pad(example["image_BHWC"], size, size, *form)
        with timed("resize and pad"):
          image = transforms.resize_and_pad(example["image_BHWC"], size, canvas, *form)
        del resized
        examples.append(example | {"image_BHWC": image})
      with timed("batch"):
        stack = lambda arrays: tf.raw_ops.Pack(values=arrays, axis=0).numpy()
        batch = {n: stack([example[n] for example in examples]) for n in keys}
      with timed("to device"):
        jax.block_until_ready(sharding.to_devices(batch, mesh))
  together, padded = seconds.pop("read, decode and instances"), seconds.pop("resize and pad")
  seconds["instances"] = together - seconds["read"] - seconds["decode"]
  seconds["pad"] = max(0.0, padded - seconds["resize"])
  order = ("read", "decode", "instances", "resize", "pad", "batch", "to device")
  return {stage: seconds[stage] / ((rounds - 1) * count) for stage in order}


def batches_of_one_canvas(
  config: ConfigDict, sizes_N2: np.ndarray
) -> Iterator[tuple[list[int], tuple[int, int]]]:
  """Yields indices of images that share a canvas, and the canvas, without end."""
  by_canvas: dict[tuple[int, int], list[int]] = {}
  for index in itertools.cycle(range(len(sizes_N2))):
    canvas = canvas_of(config.data, sizes_N2[index])
    members = by_canvas.setdefault(canvas, [])
    members.append(index)
    if len(members) == config.batch_size:
      yield by_canvas.pop(canvas), canvas


def canvas_of(settings: ConfigDict, size) -> tuple[int, int]:
  """Returns (height, width) of the canvas of an image whose file has this size."""
  resized = canvases.resized_size(settings, *map(int, size))
  return transforms.smallest_canvas(resized, settings.buckets, settings.canvas_multiple)


def rate_of(batches: Iterator, warm_up: int, count: int) -> dict[str, float]:
  """Images per second, and seconds of all cores per image, of `count` batches after the first ones."""
  for _ in range(warm_up):
    next(batches)
  images, begun, cpu_begun = 0, time.perf_counter(), cpu_seconds()
  for _ in range(count):
    images += len(next(batches)["size_B2"])
  return {
    "rate": images / (time.perf_counter() - begun),
    "cpu": (cpu_seconds() - cpu_begun) / images,
  }


def cpu_seconds() -> float:
  """CPU time of this process and of its running children."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
  return total


def weighed(work: Callable[[], dict[str, float]]) -> dict[str, float]:
  """What `work` returns, and the memory that it needs in MB under "memory"."""
  found: dict[str, float] = {}
  growth = peak_growth(lambda: found.update(work()))
  return found | {"memory": found.pop("workers_memory", 0.0) + growth}


def our_loader(config: ConfigDict, workers: int) -> dict[str, float]:
  import tensorflow as tf  # now, so that its own memory is not counted

  tf.constant(0)
  config.data.num_workers = workers
  mesh, task = sharding.mesh(batch_sizes=(config.batch_size,)), task_of(config)
  jax.block_until_ready(sharding.to_devices({"x": np.zeros(config.batch_size)}, mesh))

  def work() -> dict[str, float]:
    with task.train_batches(config, 0) as batches:
      put = (
        jax.block_until_ready(
          sharding.to_devices({name: batch[name] for name in task.BATCH_KEYS}, mesh)
        )
        for batch in batches
      )
      return rate_of(put, config.data.prefetch + 2, _IMAGES.value // config.batch_size)

  return weighed(work)


def their_loader(config: ConfigDict, workers: int) -> dict[str, float]:
  import torch
  from torch.nn import functional
  from torch.utils.data import DataLoader, Dataset

  class InMemory:
    """The part of a `Reader` that `load_image` uses, without files."""

    def __init__(self):
      with contextlib.closing(Reader(config.data, config.data.train_split)) as reader:
        self.sizes_N2 = reader.sizes_N2
        self.records = [reader.read(index) for index in range(len(reader))]

    def read(self, index: int) -> Record | LabelRecord:
      return self.records[index]

    def decode(self, index: int, record: Record | LabelRecord) -> np.ndarray:
      del index
      return decode_image(record.image, exif=config.data.exif)

  class Images(Dataset):
    def __init__(self, reader):
      self.reader = reader

    def __len__(self):
      return len(self.reader.records)

    def __getitem__(self, index):
      settings = config.data
      mirrored = bool(np.random.default_rng(index).integers(2)) and settings.flip
      resized = canvases.resized_size(settings, *self.reader.sizes_N2[index])
      loaded = load_image(self.reader, index, crops.whole(resized, mirrored))
      example = example_of(settings, loaded, set())
      image_1CHW = torch.from_numpy(example["image_BHWC"]).permute(2, 0, 1)[None].float()
      height, width = map(int, example["size_B2"])
      image_1CHW = functional.interpolate(image_1CHW, (height, width), mode="bilinear")
      rows, columns = canvas_of(settings, example["original_size_B2"])
      image_1CHW = functional.pad(image_1CHW, (0, columns - width, 0, rows - height))
      return example | {"image_BHWC": image_1CHW[0]}

  reader = InMemory()
  indices = [
    indices for indices, _ in itertools.islice(batches_of_one_canvas(config, reader.sizes_N2), 99)
  ]
  warm_up, count = 2 * workers, _IMAGES.value // config.batch_size
  order = list(itertools.islice(itertools.cycle(indices), warm_up + count + 2 * workers))

  def work() -> dict[str, float]:
    batches = iter(DataLoader(Images(reader), batch_sampler=order, num_workers=workers))
    found = rate_of(batches, warm_up, count)
    workers_memory = sum(
      private(child.pid) for child in multiprocessing.active_children() if child.pid
    )
    return found | {"workers_memory": workers_memory}

  return weighed(work)


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
