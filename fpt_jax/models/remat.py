"""Rematerialisation: what the backward pass computes again instead of keeping it in memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from fpt_jax.models.choices import check_choice

F = TypeVar("F", bound=Callable)

# "none", or the name of a policy in `jax.checkpoint_policies`
POLICIES = ("none", "dots_saveable", "nothing_saveable")
# Each part has units that are computed again as a whole: a residual block, the pyramid, a transformer, the
# fusion of a level, a head.
PARTS = ("backbone", "pyramid", "fpt", "heads")


def policy_of(config, part: str, *, train: bool = True) -> str:
  """Returns the policy of a part of the model.

  Args:
    config: `model` part of a config.
    part: one of `PARTS`.
    train: whether there is a backward pass; without it, the policy is "none".
  """
  return config.remat if train and part in config.remat_parts else "none"


def recomputed(function: F, policy: str) -> F:
  """Returns a function whose intermediate values are computed again in the backward pass.

  Values, gradients and batch statistics are those of `function`; its forward pass runs twice. The backward
  pass keeps the arguments, the result and what the policy saves.

  Args:
    function: function of modules, feature maps, arrays and keys. A module whose batch statistics it updates
      must be an argument; other modules may be closed over.
    policy: one of `POLICIES`. "dots_saveable" saves the outputs of convolutions and matrix products, so that
      only cheap operations run twice; "nothing_saveable" saves nothing; "none" returns `function` itself.

  Raises:
    ValueError: the policy does not exist.
  """
  check_choice("remat", policy, POLICIES)
  if policy == "none":
    return function
  return nnx.remat(function, policy=getattr(jax.checkpoint_policies, policy))
