"""Feature Pyramid Transformer in JAX/Flax.

restored = fpt_jax.restore("/runs/coco_mask")
detections = restored.predict([image_HWC])
"""

__all__ = ["Restored", "restore"]


def __getattr__(name: str):
  # `import fpt_jax.ops.nms` alone should not load TensorFlow and Orbax.
  if name in __all__:
    from fpt_jax import restored

    return getattr(restored, name)
  raise AttributeError(f"module 'fpt_jax' has no attribute {name!r}")
