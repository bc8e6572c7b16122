"""Measures time and memory of fpt_jax's attention and of other implementations of the same formula.

    python scripts/benchmark_attention.py                      # 1k, 4k and 16k tokens, and local
    python scripts/benchmark_attention.py --tokens 51200 --only chunked --repetitions 1
    JAX_PLATFORMS=cuda python scripts/benchmark_attention.py --dtype bfloat16

The others are `naive`, our einsum, and, if torch is installed, `torch naive`; `torch sdpa`, its
scaled_dot_product_attention with one head per part (the fastest of three forms; dot product only);
`torch shared`, our algorithm in torch; and `torch unfold` for the local attention. A number in brackets is
the share of ours in what the other takes. Times are medians of interleaved repetitions. Memory is the growth
of the process's peak beyond the inputs, each implementation in a process of its own. All run on the CPU, or
on a GPU with JAX_PLATFORMS=cuda. There, memory is not measured, and float32 products are those of TF32 in
both libraries, which is JAX's default.
"""

import argparse
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from fpt_jax.ops.local_attention import local_mos_attention
from fpt_jax.ops.mos_attention import mos_attention
from scripts import markdown
from scripts.process_memory import peak_growth
from scripts.timing import device, matrix_product, medians, number_printed_by, run_of, turns
from scripts.torch_device import torch_device

try:
  import torch
  import torch.nn.functional as F
except ImportError:
  torch = None

DEVICE = torch_device(torch) if torch else "cuda" if jax.default_backend() == "gpu" else "cpu"

CHANNELS = 256
WINDOW = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SDPA = ("wide", "padded", "split")

# One run of an implementation on its inputs; it returns when the result is ready.
Run = Callable[[], object]


def main() -> None:
  arguments = _parse_arguments()
  if arguments.weigh:
    implementation, similarity, tokens, parts = arguments.weigh
    print(_weigh_here(implementation, similarity, int(tokens), int(parts), arguments))
    return
  print(f"{CHANNELS} channels on {device()}")
  if torch is None:
    print("\ntorch is not installed; only the implementations of fpt_jax are measured")
  cases = [
    (similarity, tokens, parts)
    for tokens in arguments.tokens
    for parts in arguments.parts
    for similarity in arguments.similarities
  ]
  for similarity, tokens, parts in cases:
    names = _names(similarity, arguments.only)
    runs = {name: _global_runs(name, similarity, tokens, parts, arguments.dtype) for name in names}
    title = f"{tokens} tokens, N={parts}, {similarity}, {arguments.dtype}"
    _report(title, runs, arguments, (similarity, tokens, parts), unit=2 * tokens**2 * CHANNELS)
  if arguments.local_side:
    side = arguments.local_side
    names = [n for n in ("tiled", "torch unfold") if not arguments.only or n in arguments.only]
    runs = {
      name: _local_runs(name, side, 2, arguments.dtype)
      for name in names
      if torch or name == "tiled"
    }
    title = f"local, {side} x {side}, window {WINDOW}, N=2, dot, {arguments.dtype}"
    _report(title, runs, arguments, ("dot", 0, 2), unit=None)


def _parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096, 16384])
  parser.add_argument("--parts", type=int, nargs="+", default=[2])
  parser.add_argument("--similarities", nargs="+", default=["dot", "euclidean"])
  parser.add_argument("--only", nargs="+", help="names of the implementations to measure")
  parser.add_argument("--local-side", type=int, default=121, help="0: no local attention")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument(
    "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of all cores, for busy machines"
  )
  parser.add_argument("--no-memory", action="store_true", help="times only")
  parser.add_argument("--weigh", nargs=4, help=argparse.SUPPRESS)
  return parser.parse_args()


def _names(similarity, only) -> list[str]:
  names = ["chunked", "naive"]
  if torch:
    names += ["torch naive", "torch shared"]
    if similarity == "dot":
      names += [f"torch sdpa {phrasing}" for phrasing in SDPA]
  return [name for name in names if not only or name in only]


def _report(title, runs, arguments, case, unit) -> None:
  """Prints a table of one case: seconds and memory, and the first row's ratio to each."""
  if not runs:
    return
  seconds, product_rate = _times(runs, arguments)
  memory = {}
  if not arguments.no_memory and DEVICE == "cpu":
    memory = {name: _weigh(name, case, arguments) for name in runs}
  ours = next(iter(runs))
  rows = []
  for name in runs:
    cells = [_cell(seconds[name, kind], seconds[ours, kind], "s") for kind in ("forward", "both")]
    rows.append([name, *cells, *([_cell(memory[name], memory[ours], "MB")] if memory else [])])
  header = [title, "forward", "forward + backward", *(["memory, both"] if memory else [])]
  print(f"\n{markdown.table(header, rows)}\n", flush=True)
  phrasings = [name for name in runs if "sdpa" in name]
  if phrasings:
    for kind in ("forward", "both"):
      best = min(seconds[name, kind] for name in phrasings)
      print(f"- {ours} / torch sdpa at its best, {kind}: {seconds[ours, kind] / best:.2f}")
  if unit:
    for kind, products in (("forward", 2), ("both", 7)):
      rate = products * unit / seconds[ours, kind] / 1e9
      print(
        f"- {ours}, {kind}: {rate:.0f} GFLOP/s, {rate / product_rate:.2f} of this machine's matrix "
        f"product ({product_rate:.0f})"
      )


def _cell(value, ours, unit) -> str:
  return f"{value:.3g} {unit} ({ours / value:.2f})"


def _times(runs: dict[str, dict[str, Run]], arguments) -> tuple[dict, float]:
  """Medians by (name, kind), and the rate of a large matrix product in GFLOP/s, all in turns."""
  product, operations = matrix_product(arguments.dtype)
  everything = {(name, kind): run for name, kinds in runs.items() for kind, run in kinds.items()}
  everything["product", ""] = product
  count = arguments.repetitions
  seconds = medians(
    turns(everything, count, warm_ups=min(count - 1, 1), clock=CLOCKS[arguments.clock])
  )
  return seconds, operations / seconds.pop(("product", "")) / 1e9


def _weigh(name, case, arguments) -> float:
  """MB of a process that runs one implementation forward and backward."""
  options = ["--local-side", str(arguments.local_side), "--dtype", arguments.dtype]
  return number_printed_by(__file__, *options, "--weigh", name, *map(str, case))


def _weigh_here(name, similarity, tokens, parts, arguments) -> float:
  runs = (
    _global_runs(name, similarity, tokens, parts, arguments.dtype)
    if tokens
    else _local_runs(name, arguments.local_side, parts, arguments.dtype)
  )
  return peak_growth(runs["both"])


def _draw(*shapes) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def _global_runs(name, similarity, tokens, parts, dtype) -> dict[str, Run]:
  D = CHANNELS // parts
  part_shape, shape = (1, tokens, parts, D), (1, tokens, CHANNELS)
  inputs = _draw(part_shape, part_shape, shape, shape)
  inputs.insert(3, np.full((1, parts), 1 / parts, np.float32))
  scale = D**-0.5
  if not name.startswith("torch"):
    return _jax_runs(
      lambda *x: mos_attention(*x, similarity=similarity, scale=scale, implementation=name),
      inputs,
      dtype,
    )
  if "sdpa" in name:
    return _torch_runs(
      functools.partial(_torch_sdpa, scale=scale, phrasing=name.split()[-1]), inputs, dtype
    )
  if name == "torch shared":
    return _torch_runs(
      functools.partial(_torch_shared, scale=scale, similarity=similarity), inputs, dtype
    )
  return _torch_runs(
    functools.partial(_torch_naive, scale=scale, similarity=similarity), inputs, dtype
  )


def _local_runs(name, side, parts, dtype) -> dict[str, Run]:
  D = CHANNELS // parts
  part_shape, shape = (1, side, side, parts, D), (1, side, side, CHANNELS)
  inputs = _draw(part_shape, part_shape, shape, shape)
  inputs.insert(3, np.full((1, parts), 1 / parts, np.float32))
  if name == "tiled":
    return _jax_runs(
      lambda *x: local_mos_attention(*x, window=WINDOW, scale=D**-0.5, implementation="tiled"),
      inputs,
      dtype,
    )
  return _torch_runs(functools.partial(_torch_unfold, scale=D**-0.5), inputs, dtype)


def _jax_runs(attention, inputs, dtype) -> dict[str, Run]:
  inputs = [jnp.asarray(x, dtype) for x in inputs]
  gradient = lambda *x: jax.vjp(attention, *x[:-1])[1](x[-1])
  forward = jax.jit(attention).lower(*inputs[:-1]).compile()
  both = jax.jit(gradient).lower(*inputs).compile()
  return {
    "forward": run_of(forward, *inputs[:-1]),
    "both": run_of(both, *inputs),
  }


def _torch_runs(attention, inputs, dtype) -> dict[str, Run]:
  *inputs, dout = [torch.from_numpy(x).to(DEVICE, getattr(torch, dtype)) for x in inputs]
  leaves = [x.requires_grad_() for x in inputs]
  wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

  def forward():
    with torch.no_grad():
      attention(*leaves)
    wait()

  def both():
    torch.autograd.grad(attention(*leaves), leaves, dout)
    wait()

  return {"forward": forward, "both": both}


def _torch_scores(q_BQMD, k_BKMD, scale, similarity):
  s_BMQK = torch.einsum("bqmd,bkmd->bmqk", q_BQMD, k_BKMD)
  if similarity == "euclidean":
    qq_BMQ1 = (q_BQMD**2).sum(-1).transpose(1, 2)[:, :, :, None]
    kk_BM1K = (k_BKMD**2).sum(-1).transpose(1, 2)[:, :, None]
    s_BMQK = 2 * s_BMQK - qq_BMQ1 - kk_BM1K
  return scale * s_BMQK


def _torch_naive(q_BQMD, k_BKMD, v_BKC, pi_BM, scale, similarity):
  p_BMQK = torch.softmax(_torch_scores(q_BQMD, k_BKMD, scale, similarity), -1)
  return (p_BMQK * pi_BM[:, :, None, None]).sum(1) @ v_BKC


def _torch_sdpa(q_BQMD, k_BKMD, v_BKC, pi_BM, scale, phrasing):
  """A part is a head whose values are all of V: as they are, beside padded keys, or in pieces."""
  B, Q, M, D = q_BQMD.shape
  K, C = v_BKC.shape[1:]
  q, k = q_BQMD.transpose(1, 2), k_BKMD.transpose(1, 2)
  v = v_BKC[:, None].expand(-1, M, -1, -1)
  if phrasing == "padded":
    q, k = F.pad(q, (0, C - D)), F.pad(k, (0, C - D))
  if phrasing == "split":
    pieces = C // D
    q, k = q.repeat_interleave(pieces, 1), k.repeat_interleave(pieces, 1)
    v = v_BKC.view(B, K, pieces, D).transpose(1, 2).repeat(1, M, 1, 1)
  out = F.scaled_dot_product_attention(q, k, v, scale=scale)
  if phrasing == "split":
    out = out.view(B, M, pieces, Q, D).permute(0, 1, 3, 2, 4).reshape(B, M, Q, C)
  return torch.einsum("bm,bmqc->bqc", pi_BM, out)


def _torch_shared(q_BQMD, k_BKMD, v_BKC, pi_BM, scale, similarity):
  """As `chunked`: scores as a dot product with a bias, then one value product for all parts."""
  bias_BMK = k_BKMD.new_zeros(pi_BM.shape[0], pi_BM.shape[1], k_BKMD.shape[1])
  if similarity == "euclidean":
    bias_BMK = -scale * (k_BKMD**2).sum(-1).transpose(1, 2)
    scale = 2 * scale
  return _shared_function().apply(q_BQMD * scale, k_BKMD, v_BKC, pi_BM, bias_BMK)


def _shared_function(block=256):
  class Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pi, bias):
      outs, lses = [], []
      for start in range(0, q.shape[1], block):
        w, lse = 0, []
        for m in range(q.shape[2]):
          s = q[:, start : start + block, m] @ k[:, :, m].mT + bias[:, m, None]
          lse.append(torch.logsumexp(s, -1))
          w = w + pi[:, m, None, None] * s.sub_(lse[m][..., None]).exp_()
        outs.append(w @ v)
        lses.append(lse)
      ctx.save_for_backward(q, k, v, pi, bias)
      ctx.lses = lses
      return torch.cat(outs, 1)

    @staticmethod
    def backward(ctx, dout):
      q, k, v, pi, bias = ctx.saved_tensors
      dq, dk, dv, dpi, dbias = (torch.zeros_like(x) for x in (q, k, v, pi, bias))
      for start, lse in zip(range(0, q.shape[1], block), ctx.lses, strict=True):
        rows = slice(start, start + block)
        dw = dout[:, rows] @ v.mT
        w: Any = 0
        for m in range(q.shape[2]):
          s = q[:, rows, m] @ k[:, :, m].mT + bias[:, m, None]
          p = s.sub_(lse[m][..., None]).exp_()
          w = w + pi[:, m, None, None] * p
          delta = torch.einsum("bqk,bqk->bq", p, dw)
          ds = p.mul_(dw - delta[..., None]).mul_(pi[:, m, None, None])
          dq[:, rows, m] = ds @ k[:, :, m]
          dk[:, :, m] += ds.mT @ q[:, rows, m]
          dbias[:, m] += ds.sum(1)
          dpi[:, m] += delta.sum(1)
        dv += w.mT @ dout[:, rows]
      return dq, dk, dv, dpi, dbias

  return Shared


def _torch_unfold(q_BHWMD, k_BHWMD, v_BHWC, pi_BM, scale):
  B, H, W, M, D = q_BHWMD.shape
  patch = lambda x: F.unfold(
    x.reshape(B, H, W, -1).permute(0, 3, 1, 2), WINDOW, padding=WINDOW // 2
  )
  k = patch(k_BHWMD).view(B, M, D, WINDOW**2, H * W)
  v = patch(v_BHWC).view(B, -1, WINDOW**2, H * W)
  p = torch.softmax(torch.einsum("blmd,bmdnl->blmn", q_BHWMD.reshape(B, -1, M, D), k) * scale, -1)
  w = torch.einsum("bm,blmn->bln", pi_BM, p)
  return torch.einsum("bln,bcnl->blc", w, v).reshape(B, H, W, -1)


if __name__ == "__main__":
  main()
