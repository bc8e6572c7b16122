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
  pi_M = mixture_weights(k, w_CM)
  if f"{prefix}.log_temperature" in p:
    q, k = (to_length(x, p[f"{prefix}.log_temperature"]) for x in (q, k))
  out = mixture_of_softmaxes(q, k, v, pi_M, similarity, scale)
  return out.reshape(*query_HWC.shape[:2], -1)


def to_length(x_KC, log_temperature_M):
  """Each part divided by the root mean square of its channels, times the root of its temperature."""
  parts = np.split(x_KC, len(log_temperature_M), axis=1)
  return np.concatenate(
    [
      np.sqrt(np.exp(t)) * x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6)
      for x, t in zip(parts, log_temperature_M, strict=True)
    ],
    axis=1,
  )


def batch_norm(x_HWC, p, name):
  """With the statistics of the image itself, as in the training of a single image."""
  mean, var = x_HWC.mean(axis=(0, 1)), x_HWC.var(axis=(0, 1))
  return (x_HWC - mean) / np.sqrt(var + 1e-5) * p[f"{name}.norm.scale"] + p[f"{name}.norm.bias"]


def self_transformer(x_HWC, p, prefix=""):
  """Eq. 3."""
  return non_local(x_HWC, x_HWC, p, "dot", f"{prefix}interaction")


def grounding_transformer(fine_HWC, coarse_hwC, p, prefix=""):
  """Eq. 5."""
  return non_local(fine_HWC, coarse_hwC, p, "euclidean", f"{prefix}interaction")


def rendering_transformer(coarse_hwC, fine_HWC, p, prefix="", stride=2, sigmoid=False):
  """Eq. 6."""

  def conv(x, name, stride=1):
    kernel = p[f"{prefix}{name}.kernel"]
    return conv3x3(x, kernel, stride, coarse_hwC.shape[:2]) + p[f"{prefix}{name}.bias"]

  w_C = fine_HWC.mean(axis=(0, 1))
  q_att = coarse_hwC * (1 / (1 + np.exp(-w_C)) if sigmoid else w_C)
  v_dow = conv(fine_HWC, "downsample", stride)
  return conv(conv(q_att, "refine") + v_dow, "fuse")


def feature_pyramid_transformer(levels, p, sigmoid=False):
  """Fig. 2: itself, ST, GT from every coarser level, RT from every finer one; a 3x3 convolution.

  Levels, outputs of the transformers and the result are normalised where the parameters say so.
  """

  def normalised(x, name):
    return batch_norm(x, p, name) if f"{name}.norm.scale" in p else x

  seen = [normalised(level, f"level_norms.{i}") for i, level in enumerate(levels)]
  outputs = []
  for i, level in enumerate(levels):
    maps = {"self": self_transformer(seen[i], p, f"self_transformers.{i}.")}
    for j in range(i + 1, len(levels)):
      prefix = f"grounding_transformers.{i}.from_{j}."
      maps[f"grounding_from_{j}"] = grounding_transformer(seen[i], seen[j], p, prefix)
    for j in range(i):
      prefix = f"rendering_transformers.{i}.from_{j}."
      maps[f"rendering_from_{j}"] = rendering_transformer(
        seen[i], seen[j], p, prefix, stride=2 ** (i - j), sigmoid=sigmoid
      )
    parts = [normalised(part, f"output_norms.{i}.{name}") for name, part in maps.items()]
    y = conv3x3(np.concatenate([level, *parts], axis=-1), p[f"fuse.{i}.kernel"], 1, level.shape[:2])
    outputs.append(normalised(y + p.get(f"fuse.{i}.bias", 0), f"norm.{i}"))
  return outputs
