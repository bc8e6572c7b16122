"""The paper's three transformers in float64 NumPy, written from its equations, one loop per index.

Parameters come by the names of `models.state.arrays_of`; images are single: H W C, no batch.
"""

import numpy as np


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def conv1x1(x_HWC, p, name):
  return x_HWC @ p[f"{name}.kernel"][0, 0] + p[f"{name}.bias"]


def conv3x3(x_HWC, kernel, stride, size):
  """3x3 convolution; output (i, j) is centred on input (i * stride, j * stride), with zero padding."""
  height, width, _ = x_HWC.shape
  out = np.zeros((*size, kernel.shape[-1]))
  for i in range(size[0]):
    for j in range(size[1]):
      for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
          y, x = i * stride + di, j * stride + dj
          if 0 <= y < height and 0 <= x < width:
            out[i, j] += x_HWC[y, x] @ kernel[di + 1, dj + 1]
  return out


def mixture_weights(k_KC, w_CM):
  """pi of eq. 2."""
  return softmax(k_KC.mean(axis=0) @ w_CM)


def mixture_of_softmaxes(q_QC, k_KC, v_KC, pi_M, similarity, scale):
  """Eq. 2 to 5: the weight of every pair, then the sum over values."""
  parts = len(pi_M)
  q_QMD, k_KMD = (x.reshape(len(x), parts, -1) for x in (q_QC, k_KC))
  out = np.zeros((len(q_QC), v_KC.shape[1]))
  for i in range(len(q_QC)):
    w_K = np.zeros(len(k_KC))
    for n in range(parts):
      if similarity == "dot":
        s_K = np.array([q_QMD[i, n] @ k for k in k_KMD[:, n]])
      else:
        s_K = np.array([-np.sum((q_QMD[i, n] - k) ** 2) for k in k_KMD[:, n]])
      w_K += pi_M[n] * softmax(scale * s_K)
    out[i] = w_K @ v_KC
  return out


def non_local(query_HWC, source_hwC, p, similarity, prefix="interaction"):
  q, k, v = (
    conv1x1(x, p, f"{prefix}.{name}").reshape(-1, p[f"{prefix}.{name}.bias"].size)
    for x, name in ((query_HWC, "query"), (source_hwC, "key"), (source_hwC, "value"))
  )
  w_CM = p[f"{prefix}.mixture.kernel"]
  scale = 1 / np.sqrt(q.shape[1] // w_CM.shape[1])
  out = mixture_of_softmaxes(q, k, v, mixture_weights(k, w_CM), similarity, scale)
  return out.reshape(*query_HWC.shape[:2], -1)


def self_transformer(x_HWC, p, prefix=""):
  """Eq. 3."""
  return non_local(x_HWC, x_HWC, p, "dot", f"{prefix}interaction")


def grounding_transformer(fine_HWC, coarse_hwC, p, prefix=""):
  """Eq. 5."""
  return non_local(fine_HWC, coarse_hwC, p, "euclidean", f"{prefix}interaction")


def rendering_transformer(coarse_hwC, fine_HWC, p, prefix="", stride=2):
  """Eq. 6."""

  def conv(x, name, stride=1):
    kernel = p[f"{prefix}{name}.kernel"]
    return conv3x3(x, kernel, stride, coarse_hwC.shape[:2]) + p[f"{prefix}{name}.bias"]

  w_C = fine_HWC.mean(axis=(0, 1))
  q_att = coarse_hwC * w_C
  v_dow = conv(fine_HWC, "downsample", stride)
  return conv(conv(q_att, "refine") + v_dow, "fuse")


def feature_pyramid_transformer(levels, p):
  """Fig. 2: itself, ST, GT from every coarser level, RT from every finer one; a 3x3 convolution."""
  outputs = []
  for i, level in enumerate(levels):
    maps = [level, self_transformer(level, p, f"self_transformers.{i}.")]
    for j in range(i + 1, len(levels)):
      prefix = f"grounding_transformers.{i}.from_{j}."
      maps.append(grounding_transformer(level, levels[j], p, prefix))
    for j in range(i):
      prefix = f"rendering_transformers.{i}.from_{j}."
      maps.append(rendering_transformer(level, levels[j], p, prefix, stride=2 ** (i - j)))
    kernel, bias = p[f"fuse.{i}.kernel"], p[f"fuse.{i}.bias"]
    outputs.append(conv3x3(np.concatenate(maps, axis=-1), kernel, 1, level.shape[:2]) + bias)
  return outputs
