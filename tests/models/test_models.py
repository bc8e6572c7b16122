"""Models by name, their dtype, and what importing them needs."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.layers import DTYPES
from fpt_jax.tasks.task import TASKS

# None of these is a requirement of jax or flax.
NOT_NEEDED = ("ml_collections", "tensorflow", "pycocotools", "safetensors", "PIL", "grain")


def test_every_model_has_a_task():
  assert models.MODELS.keys() == TASKS.keys()


@pytest.mark.parametrize("spelling", DTYPES)
def test_dtypes(spelling):
  config = coco_mask.get_config("demo,fpt=none")
  config.model.dtype = spelling
  model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0)))
  assert model.config.dtype == DTYPES[spelling]
  assert model.box_head.fc6.dtype == jnp.dtype(DTYPES[spelling])
  assert config.model.dtype == spelling


def test_unknown_names_are_refused():
  config = coco_mask.get_config("demo")
  config.model.dtype = "float16"
  with pytest.raises(
    ValueError, match="dtype 'float16' does not exist; choose one of float32, bfl"
  ):
    models.build(config, nnx.Rngs(0))
  config.model.name = "yolo"
  with pytest.raises(ValueError, match="model 'yolo' does not exist; choose one of rcnn, segm"):
    models.build(config, nnx.Rngs(0))


@pytest.mark.parametrize("head", ["augmented", "zigzag"])
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("box_head.convs", 4),
    ("box_head.linears", 1),
    ("box_head.norm", "group_norm"),
    ("mask_head.norm", "frozen_bn"),
  ],
)
def test_fields_that_a_head_does_not_have_are_refused(head, field, value):
  config = coco_mask.get_config(f"demo,fpt=none,head={head}")
  config.update_from_flattened_dict({f"model.{field}": value})
  with pytest.raises(
    UserError, match=rf"head '{head}' has no {field}={value!r}; set it to "
  ) as error:
    models.structure_of(config)
  assert "\n" not in str(error.value)


def test_importing_models_and_ops_needs_jax_and_flax_only():
  program = f"""
import importlib, pkgutil, sys

for name in {NOT_NEEDED!r}:
  sys.modules[name] = None  # importing it raises
import fpt_jax.ops
from fpt_jax.models import FeaturePyramidTransformer

for module in pkgutil.iter_modules(fpt_jax.ops.__path__):
  importlib.import_module(f"fpt_jax.ops.{{module.name}}")
"""
  subprocess.run([sys.executable, "-c", program], check=True)
