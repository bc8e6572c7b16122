"""FPT in its literal form in torch, written from the paper's equations with all pairs of positions.

`benchmark_growth.py` compares with it: no blocks, no shared values, softmaxes that are kept. It takes the
arrays of our `FeaturePyramidTransformer(literal=True)` by name and gives the same values.

Shapes: B batch, C channels, H W rows and columns, Q queries, K keys, M parts, D channels of a part.
"""

import torch
from torch.nn import functional

Arrays = dict[str, torch.Tensor]
SELF_PARTS, GROUNDING_PARTS = 2, 4


def convolved(arrays: Arrays, name: str, x_BCHW: torch.Tensor, stride: int = 1) -> torch.Tensor:
  """Applies the convolution `name`, whose kernel is [rows, columns, in, out]."""
  kernel = arrays[f"{name}.kernel"].permute(3, 2, 0, 1)
  bias = arrays.get(f"{name}.bias")
  return functional.conv2d(x_BCHW, kernel, bias, stride, padding=kernel.shape[-1] // 2)


def attended(
  arrays: Arrays, name: str, query_BCHW: torch.Tensor, source_BChw: torch.Tensor, parts: int
) -> torch.Tensor:
  """Equations 1 to 5; the Euclidean distance for maps of two levels, the dot product for one map."""
  B, C, H, W = query_BCHW.shape

  def projected(kind: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    return convolved(arrays, f"{name}.interaction.{kind}", x_BCHW).flatten(2).mT  # [B, H * W, C]

  divided = lambda x_BQC: x_BQC.unflatten(-1, (parts, C // parts)).transpose(1, 2)  # [B, M, Q, D]
  k_BKC = projected("key", source_BChw)
  q_BMQD, k_BMKD = divided(projected("query", query_BCHW)), divided(k_BKC)
  scores_BMQK = q_BMQD @ k_BMKD.mT
  if query_BCHW is not source_BChw:
    squares = lambda x_BMQD: (x_BMQD**2).sum(-1)
    scores_BMQK = 2 * scores_BMQK - squares(q_BMQD)[..., None] - squares(k_BMKD)[:, :, None]
  weights_BMQK = torch.softmax(scores_BMQK * (C // parts) ** -0.5, -1)
  pi_BM = torch.softmax(k_BKC.mean(1) @ arrays[f"{name}.interaction.mixture.kernel"], -1)
  mixed_BQK = (pi_BM[:, :, None, None] * weights_BMQK).sum(1)
  return (mixed_BQK @ projected("value", source_BChw)).mT.reshape(B, C, H, W)


def rendered(
  arrays: Arrays, name: str, coarse_BCHW: torch.Tensor, fine_BCHW: torch.Tensor
) -> torch.Tensor:
  """Equation 6."""
  stride = fine_BCHW.shape[-1] // coarse_BCHW.shape[-1]
  weight_BC11 = fine_BCHW.mean((2, 3), keepdim=True)
  refined = convolved(arrays, f"{name}.refine", coarse_BCHW * weight_BC11)
  return convolved(
    arrays, f"{name}.fuse", refined + convolved(arrays, f"{name}.downsample", fine_BCHW, stride)
  )


def transformed(arrays: Arrays, levels: list[torch.Tensor]) -> list[torch.Tensor]:
  """Transforms the levels, fine to coarse, [B, C, H, W] each, with batch statistics and without DropBlock."""
  outputs = []
  for i, level in enumerate(levels):
    parts = [level, attended(arrays, f"self_transformers.{i}", level, level, SELF_PARTS)]
    for j in range(i + 1, len(levels)):
      name = f"grounding_transformers.{i}.from_{j}"
      parts.append(attended(arrays, name, level, levels[j], GROUNDING_PARTS))
    for j in range(i):
      parts.append(rendered(arrays, f"rendering_transformers.{i}.from_{j}", level, levels[j]))
    fused = convolved(arrays, f"fuse.{i}", torch.cat(parts, 1))
    norm = f"norm.{i}.norm"
    outputs.append(
      functional.batch_norm(
        fused, None, None, arrays[f"{norm}.scale"], arrays[f"{norm}.bias"], training=True
      )
    )
  return outputs
