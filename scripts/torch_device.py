"""Where the benchmarks run torch: on the device that JAX runs on."""

import sys
from types import ModuleType

import jax

from scripts.machine import allowed_cores


def torch_device(torch: ModuleType) -> str:
  """Returns "cpu" or "cuda", and sets torch up to compute as JAX does there.

  On a GPU, float32 products are those of TF32, JAX's default, and cuDNN tries its algorithms. On the CPU,
  torch has as many threads as the process may use cores, like XLA.
  """
  if jax.default_backend() != "gpu":
    torch.set_num_threads(len(allowed_cores()))
    return "cpu"
  if not torch.cuda.is_available():
    sys.exit("error: JAX sees a GPU and torch does not; install torch for CUDA, or uninstall it")
  torch.set_float32_matmul_precision("high")
  torch.backends.cudnn.benchmark = True
  return "cuda"
