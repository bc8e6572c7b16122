"""The checks of scripts/tpu_preflight.py. Each returns its figure as text, or raises an exception.

What a device computes is compared with the CPU of the same host. In float32, products are exact on both
sides: a TPU would round their factors to bfloat16 otherwise.

Shapes: B images, Q queries, K keys, M parts, D channels of a part, C channels, H W rows and columns, N boxes.
"""

import collections
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from fpt_jax import data, models, optim
from fpt_jax.models.state import initial_arrays
from fpt_jax.ops.boxes import iou
from fpt_jax.ops.depthwise import depthwise
from fpt_jax.ops.mos_attention import mos_attention
from fpt_jax.ops.nms import nms
from fpt_jax.ops.roi_align import multilevel_roi_align
from fpt_jax.run import checkpoints, hosts, sharding
from fpt_jax.run.command_line import load_config
from fpt_jax.run.folder import check_writable, run_folder
from fpt_jax.tasks.task import check_config, task_of
from fpt_jax.train_step import make_train_step, training_state
from scripts.preflight_report import DifferenceError, check_same_bits, largest_difference

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ("coco_mask", "cityscapes")  # one of each task
# Rounding of float32 sums in another order, and of bfloat16 operands. Losses and gradients of a step also
# depend on choices among nearly equal scores, which rounding may decide otherwise.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2**-5}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 2e-2
# What makes the demo's networks small; the number of their parts stays the same.
SMALL = {
  "data.builder.image_size": 64,
  "data.builder.train_size": 64,
  "data.builder.val_size": 4,
  "model.backbone.width": 8,
  "model.pyramid.channels": 16,
  "model.fpt.scope": "adjacent",
  "optim.warmup_steps": 0,
}
SMALL_OF_TASK = {
  "rcnn": {
    "data.short_edge": 64,
    "data.long_edge": 64,
    "data.buckets": ((64, 64),),
    "model.rpn.train.pre_nms": 100,
    "model.rpn.train.post_nms": 50,
    "model.box_head.samples": 16,
    "model.box_head.hidden": 32,
    "model.mask_head.hidden": 16,
    "model.mask_head.layers": 1,
  },
  "segmenter": {
    "data.crop": (64, 64),
    "data.buckets": ((64, 64),),
    "model.head.hidden": 16,
    "model.auxiliary.hidden": 16,
  },
}
TIMED_STEPS, READ_BATCHES = 5, 32


def small_config(benchmark: str, words: str, data_dir: str) -> ConfigDict:
  """Returns the demo of a benchmark at a small size, with an image per device.

  Args:
    benchmark: one of `BENCHMARKS`.
    words: more words after the colon, separated by commas.
    data_dir: folder of the records, which are prepared if they do not exist.
  """
  config = load_config(f"{ROOT}/configs/{benchmark}.py:{','.join(filter(None, ('demo', words)))}")
  for path, value in (SMALL | SMALL_OF_TASK[config.model.name]).items():
    *groups, field = path.split(".")
    group = config
    for name in groups:
      group = group[name]
    group[field] = value
  config.data.data_dir = data_dir
  config.batch_size = config.eval.batch_size = jax.device_count()
  check_config(config)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task_of(config).adopt_classes(config, data.info(config.data))
  return config


def check_devices() -> str:
  """JAX does not run on the CPU because it found nothing else, and every host has as many devices."""
  devices = jax.devices()
  platform, kind = devices[0].platform, devices[0].device_kind
  if platform == "cpu" and not (jax.config.jax_platforms or "").startswith("cpu"):
    raise DifferenceError(
      "JAX found no accelerator; is requirements-tpu.txt installed, and does no other process use the TPU? "
      "JAX_PLATFORMS=cpu checks the CPU"
    )
  counts = collections.Counter(device.process_index for device in devices)
  if len(counts) != jax.process_count() or len(set(counts.values())) > 1:
    raise DifferenceError(f"the hosts have different numbers of devices: {dict(counts)}")
  memory = jax.local_devices()[0].memory_stats() or {}
  size = f"{memory['bytes_limit'] / 1e9:.1f} GB each" if "bytes_limit" in memory else "size unknown"
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  return (
    f"{len(devices)} x {kind} ({platform}), {size}; {jax.process_count()} host(s) of {counts[0]}, "
    f"{host:.0f} GB and {os.cpu_count()} cores"
  )


def check_collectives() -> str:
  """Sums over all devices and gathers over all hosts have the known results."""
  count = jax.device_count()
  mesh = sharding.mesh()
  length = 1 << (20 if jax.default_backend() == "cpu" else 24)  # float32 numbers on each device

  def fill(index_1):
    """Integers that float32 holds, different on each device and from place to place."""
    return (index_1[:, None] + 1 + jnp.arange(length)[None] % 7).astype(jnp.float32)

  def wrong(total_1N):
    expected_N = count * (count + 1) // 2 + count * (jnp.arange(length) % 7)
    return jax.lax.psum(jnp.sum(total_1N != expected_N[None]), "data")

  over = {"mesh": mesh, "in_specs": PartitionSpec("data")}
  spread = jax.jit(jax.shard_map(fill, **over, out_specs=PartitionSpec("data")))
  add = jax.jit(
    jax.shard_map(
      lambda x_1N: jax.lax.psum(x_1N, "data"),
      **over,
      out_specs=PartitionSpec("data"),
      check_vma=False,
    )
  )
  compare = jax.jit(jax.shard_map(wrong, **over, out_specs=PartitionSpec()))
  index = np.arange(count, dtype=np.int32)
  part = jax.make_array_from_callback(
    (count,), sharding.over_batch(mesh), lambda where: index[where]
  )
  values = spread(part)
  bad = int(compare(jax.block_until_ready(add(values))))
  if bad:
    raise DifferenceError(
      f"the sum over {count} devices is wrong at {bad} of {count * length} places"
    )
  found = hosts.from_all_hosts({"host": np.array([jax.process_index()], np.int32)})["host"]
  if found.tolist() != list(range(jax.process_count())):
    raise DifferenceError(f"the hosts gathered {found.tolist()} instead of their own indices")
  if count == 1:
    return "one device: nothing is sent"
  seconds = statistics.median(_seconds(add, values) for _ in range(TIMED_STEPS))
  sent = 2 * (count - 1) / count * 4 * length  # bytes that each device sends around a ring
  rate = sent / seconds / 1e9
  return f"sum of {4 * length / 1e6:.0f} MB: {1e3 * seconds:.1f} ms, {rate:.2f} GB/s per device"


def _seconds(function, *arguments) -> float:
  begun = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - begun


def check_attention(similarity: str, dtype: str) -> str:
  """The Pallas kernels, over several blocks and with masked keys, equal the naive formula in float32."""
  B, Q, K, M, D, C = 1, 300, 600, 2, 32, 64
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  # values with a mean: without, the gradient of pi is the little that is left of long sums
  arrays = [normal(B, Q, M, D), normal(B, K, M, D), 0.5 + normal(B, K, C), 0.5 + normal(B, Q, C)]
  q, k, v, out = (np.asarray(jnp.asarray(array, dtype)) for array in arrays)
  pi = np.full((B, M), 1 / M, np.float32)
  valid = rng.random((B, K)) < 0.7

  def results(implementation):
    def run(q, k, v, pi, gradient, valid):
      attention = lambda *x: mos_attention(
        *x,
        similarity=similarity,
        scale=D**-0.5,
        key_valid_BK=valid,
        implementation=implementation,
      )
      value, transpose = jax.vjp(attention, q, k, v, pi)
      return dict(zip(("out", "dq", "dk", "dv", "dpi"), (value, *transpose(gradient)), strict=True))

    return run

  exact = jax.default_matmul_precision("highest" if dtype == "float32" else None)
  with exact:
    got = _on(_device(), results("pallas"), q, k, v, pi, out, valid)
  q, k, v, out = (x.astype(np.float32) for x in (q, k, v, out))
  return _within(got, _on(_cpu(), results("naive"), q, k, v, pi, out, valid), TOLERANCES[dtype])


def check_roi_align() -> str:
  """RoIAlign as matrix products, the form for TPUs, equals the one that gathers."""
  rng = np.random.default_rng(0)
  pyramid = tuple(rng.standard_normal((s, s + 8, 32), np.float32) for s in (64, 32, 16, 8))
  corners_N2 = rng.uniform(-10, 200, (80, 2))
  boxes_N4 = np.concatenate([corners_N2, corners_N2 + rng.uniform(4, 250, (80, 2))], 1)
  valid_N = rng.random(80) < 0.9

  def results(implementation):
    def run(pyramid, boxes_N4, valid_N):
      pool = lambda pyramid: multilevel_roi_align(
        pyramid,
        (4, 8, 16, 32),
        boxes_N4,
        valid_N,
        7,
        sampling_ratio=2,
        aligned=True,
        implementation=implementation,
      )
      value, transpose = jax.vjp(pool, pyramid)
      gradients = transpose(jnp.cos(value))[0]
      return {"out": value} | {f"dP{i + 2}": gradient for i, gradient in enumerate(gradients)}

    return run

  arguments = (pyramid, boxes_N4.astype(np.float32), valid_N)
  got = _on(_device(), results("einsum"), *arguments)
  return _within(got, _on(_cpu(), results("gather"), *arguments), TOLERANCES["float32"])


def check_nms() -> str:
  """NMS by tiles, the form for TPUs, keeps the same boxes as one box after the other."""
  rng = np.random.default_rng(0)
  corners_N2 = rng.uniform(0, 300, (600, 2))
  boxes_N4 = np.concatenate([corners_N2, corners_N2 + rng.uniform(20, 90, (600, 2))], 1)
  boxes_N4 = boxes_N4.astype(np.float32)
  scores_N = rng.permutation(600).astype(np.float32)
  # a threshold that no overlap is near, so that rounding does not decide
  overlaps = np.sort(np.asarray(_on(_cpu(), iou, boxes_N4, boxes_N4)).ravel())
  overlaps = overlaps[(overlaps > 0.4) & (overlaps < 0.6)]
  widest = np.diff(overlaps).argmax()
  threshold = float(overlaps[widest : widest + 2].mean())

  def results(implementation):
    def run(boxes_N4, scores_N):
      indices, valid = nms(boxes_N4, scores_N, threshold, 300, implementation=implementation)
      return {"indices": indices, "valid": valid}

    return run

  got = _on(_device(), results("tiled"), boxes_N4, scores_N)
  want = _on(_cpu(), results("sequential"), boxes_N4, scores_N)
  check_same_bits(got, want)
  return f"the same {int(want['valid'].sum())} of {len(scores_N)} boxes"


def check_depthwise() -> str:
  """The depthwise convolution of this device equals XLA's grouped convolution on the CPU."""
  rng = np.random.default_rng(0)
  x_BHWC = rng.standard_normal((2, 19, 24, 64), np.float32)
  kernel_hw1C = rng.standard_normal((5, 5, 1, 64), np.float32)

  def results(convolution):
    def run(x_BHWC, kernel_hw1C):
      convolve = lambda x_BHWC, kernel_hw1C: convolution(
        x_BHWC,
        kernel_hw1C,
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=64,
      )
      value, transpose = jax.vjp(convolve, x_BHWC, kernel_hw1C)
      return dict(zip(("out", "dx", "dkernel"), (value, *transpose(value)), strict=True))

    return run

  with jax.default_matmul_precision("highest"):
    got = _on(_device(), results(depthwise), x_BHWC, kernel_hw1C)
  want = _on(_cpu(), results(jax.lax.conv_general_dilated), x_BHWC, kernel_hw1C)
  return _within(got, want, TOLERANCES["float32"])


def check_step(benchmark: str, words: str, data_dir: str) -> str:
  """A training step on all devices has the losses and the gradient of the same step on one CPU device."""
  config = small_config(benchmark, words, data_dir)
  task = task_of(config)
  with task.train_batches(config, 0) as batches:
    batch = next(batches)
  batch = {name: batch[name] for name in task.BATCH_KEYS}
  mesh, cpu = sharding.mesh(batch_sizes=(config.batch_size,)), SingleDeviceSharding(_cpu())
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(config.seed)), cpu)
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  numbers = {"step": np.int32(0), "key": np.asarray(jax.random.key_data(jax.random.key(0)))}

  with jax.default_matmul_precision("highest"):
    run = _step_of(config)
    on_devices = (
      sharding.replicate(arrays, mesh),
      sharding.to_devices(batch, mesh),
      sharding.replicate(numbers, mesh),
    )
    losses, update = jax.device_get(run(*on_devices))
    times = [_seconds(run, *on_devices) for _ in range(TIMED_STEPS)]
    config.model.fpt.implementation = "naive"
    whole = {name: np.asarray(part) for name, part in hosts.from_all_hosts(batch).items()}
    want_losses, want_update = _on(_cpu(), _step_of(config), arrays, whole, numbers)
  loss = largest_difference(losses, want_losses, LOSS_TOLERANCE)
  got, want = (
    np.concatenate([np.ravel(state[name]) for name in sorted(want_update)])
    for state in (update, want_update)
  )
  gradient = float(np.linalg.norm(got - want) / np.linalg.norm(want))
  if not gradient <= GRADIENT_TOLERANCE:
    worst = max(want_update, key=lambda name: np.linalg.norm(update[name] - want_update[name]))
    raise DifferenceError(
      f"the gradient differs by {gradient:.1e} of its norm, more than {GRADIENT_TOLERANCE}, most in {worst}"
    )
  return (
    f"losses differ by {loss:.1e} of {LOSS_TOLERANCE}, gradient by {gradient:.1e} of {GRADIENT_TOLERANCE}; "
    f"{1e3 * statistics.median(times):.1f} ms per step of {config.batch_size} image(s)"
  )


def _step_of(config: ConfigDict):
  """Returns the first step of a training: (arrays, batch, numbers) -> losses, and the gradient by name."""
  structure = models.structure_of(config)
  trained, optimizer = optim.trainable(config, structure.parameters()), optim.optimizer(config)
  step = make_train_step(structure, optimizer, optim.total_steps(config))

  def run(arrays, batch, numbers):
    begun = {name: arrays[name] for name in trained}
    state = training_state(arrays, trained, optimizer.init(begun))
    key = jax.random.wrap_key_data(numbers["key"])
    state, losses, _ = step(state, batch, numbers["step"], key, jnp.bool_(False))
    # what was subtracted; the first step of the schedule has the full rate
    return losses, {name: begun[name] - state["trained"][name] for name in trained}

  return jax.jit(run)


def check_input(data_dir: str) -> str:
  """The loader gives whole batches; its rate."""
  config = small_config("coco_mask", "", data_dir)
  config.batch_size = 8 * jax.device_count()
  shapes = task_of(config).batch_shapes(config, 8 * jax.local_device_count(), (64, 64))
  with task_of(config).train_batches(config, 0) as batches:
    batch = next(batches)
    for name, shape in shapes.items():
      if (batch[name].shape, batch[name].dtype) != (shape.shape, shape.dtype):
        raise DifferenceError(f"{name} is {batch[name].dtype} {batch[name].shape}, not {shape}")
    begun = time.perf_counter()
    for _ in range(READ_BATCHES):
      next(batches)
    seconds = time.perf_counter() - begun
  images = READ_BATCHES * len(batch["size_B2"])
  return (
    f"{images / seconds:.0f} images/s of 64 x 64 pixels with masks on this host; for full sizes see "
    "scripts/benchmark_input.py"
  )


def check_checkpoint(workdir: str) -> str:
  """What is saved in the run's folder is restored bit for bit."""
  folder = run_folder(workdir) / "preflight"
  check_writable(folder)
  hosts.on_first_host(lambda: folder.exists() and folder.rmtree())
  rng = np.random.default_rng(0)
  bits = rng.integers(
    0, 1 << 32, 1 << 22, dtype=np.uint32
  )  # NaN, infinities and denormals among them
  arrays = {
    "float32": bits.view(np.float32).reshape(1024, -1),
    "bfloat16": bits.view(jnp.bfloat16),
    "scalar": np.float32(-0.0),
  }
  mesh = sharding.mesh()
  placed = sharding.replicate(arrays, mesh)
  saved = checkpoints.manager(str(folder))
  with checkpoints.closing(saved):
    begun = time.perf_counter()
    checkpoints.save(saved, 1, placed, {"count": placed["scalar"]})
    checkpoints.finish(saved)
    written = time.perf_counter() - begun
    begun = time.perf_counter()
    restored = checkpoints.restore_model(saved, 1, sharding.laid_out(placed, mesh))
    jax.block_until_ready(restored)
    read = time.perf_counter() - begun
  found = {name: np.asarray(array.addressable_data(0)) for name, array in restored.items()}
  check_same_bits(found, {name: np.asarray(array) for name, array in arrays.items()})
  hosts.on_first_host(lambda: folder.rmtree())
  size = sum(array.nbytes for array in arrays.values()) / 1e6
  return f"{size:.0f} MB written in {written:.1f} s and read in {read:.1f} s, bit for bit"


def _device() -> jax.Device:
  return jax.local_devices()[0]


def _cpu() -> jax.Device:
  return jax.local_devices(backend="cpu")[0]


def _on(device: jax.Device, function, *arguments):
  """Compiles a function for a device and returns its results as NumPy arrays."""
  return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


def _within(got, want, tolerance: float) -> str:
  return f"differ by {largest_difference(got, want, tolerance):.1e} of {tolerance:.1e}"
