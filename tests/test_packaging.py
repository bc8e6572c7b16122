"""The wheel: what it contains, what it requires, and that the neck works with jax and flax alone."""

import email.message
import email.parser
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The packages of the extra `train` that are not installed with jax and flax.
TRAINING_ONLY = (
  "PIL",
  "array_record",
  "importlib_resources",
  "matplotlib",
  "ml_collections",
  "pycocotools",
  "safetensors",
  "tensorboard",
  "tensorflow",
  "tensorflow_datasets",
)


def project() -> dict:
  return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lower_bounds() -> dict[str, str]:
  """Returns the lower bounds of all dependencies, without accelerators: {requirement name: version}."""
  extras = project()["optional-dependencies"]
  requirements = project()["dependencies"] + extras["train"] + extras["test"] + extras["docs"]
  matches = (re.match(r"([\w\-]+)(?:\[\w+\])?>=([\w.]+)", text) for text in requirements)
  return dict(match.groups() for match in matches)


def pins(name: str) -> dict[str, str]:
  """Returns the versions in a requirements file: {requirement name: version}."""
  return dict(re.findall(r"^([\w\-]+)(?:\[\w+\])?==([\w.]+)", (ROOT / name).read_text(), re.M))


def number(version: str) -> tuple[int, ...]:
  return tuple(map(int, version.split(".")))


def test_the_lowest_versions_are_the_lower_bounds():
  bounds, lowest = lower_bounds(), pins("requirements-lowest.txt")
  assert lowest == {name: bounds[name] for name in lowest}
  extras = project()["optional-dependencies"]
  needed = " ".join(project()["dependencies"] + extras["train"])
  assert set(re.findall(r"([\w\-]+)>=", needed)) <= set(lowest)


def test_the_pinned_versions_are_within_the_ranges():
  bounds = lower_bounds()
  pinned = pins("requirements.txt") | pins("requirements-test.txt")
  assert set(bounds) <= set(pinned)
  for name in bounds:
    assert number(pinned[name]) >= number(bounds[name]), name


def build(*arguments: str, source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Builds a distribution without network access; returns its file."""
  command = [sys.executable, "-m", "build", "--no-isolation", *arguments, "--outdir", str(out), "."]
  subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
  (built,) = out.iterdir()
  return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return build("--wheel", source=ROOT, out=tmp_path_factory.mktemp("wheel"))


def content(wheel: pathlib.Path) -> dict[str, bytes]:
  with zipfile.ZipFile(wheel) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: pathlib.Path) -> email.message.Message:
  files = content(wheel)
  (name,) = [name for name in files if name.endswith(".dist-info/METADATA")]
  return email.parser.Parser().parsestr(files[name].decode())


@pytest.mark.slow
def test_the_wheel_contains_the_package_and_the_benchmark_configs(wheel):
  files = (path for path in (ROOT / "fpt_jax").rglob("*") if path.is_file())
  expected = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
  expected |= {f"fpt_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  assert "fpt_jax/configs/coco_mask.py" in expected
  assert {name for name in content(wheel) if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_requires_jax_and_flax_only(wheel):
  required = [text for text in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in text]
  assert sorted(re.match(r"[\w\-]+", text).group() for text in required) == ["flax", "jax"]
  assert {"train", "tpu", "cuda", "test", "docs"} <= set(metadata(wheel).get_all("Provides-Extra"))


@pytest.mark.slow
def test_the_source_distribution_builds_an_equal_wheel(wheel, tmp_path):
  sdist = build("--sdist", source=ROOT, out=tmp_path / "sdist")
  subprocess.run(["tar", "-xf", sdist, "-C", tmp_path], check=True)
  (source,) = tmp_path.glob("fpt_jax-*")
  assert content(build("--wheel", source=source, out=tmp_path / "wheel")) == content(wheel)


@pytest.mark.slow
def test_configs_are_importable_from_the_wheel(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path)
  program = """
import fpt_jax.configs.coco_mask as module
print(module.__file__)
print(module.get_config().model.name)
"""
  printed = run(program, path=tmp_path).split()
  assert printed == [str(tmp_path / "fpt_jax/configs/coco_mask.py"), "rcnn"]


@pytest.mark.slow
def test_the_neck_needs_jax_and_flax_only(wheel, tmp_path):
  """Imports of anything else raise, as they do where only jax and flax are installed."""
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path)
  program = f"""
import sys
for name in {TRAINING_ONLY}:
  sys.modules[name] = None  # `import name` raises ModuleNotFoundError

import fpt_jax.models
import fpt_jax.ops.local_attention
import fpt_jax.ops.mos_attention
import jax.numpy as jnp
from flax import nnx
from fpt_jax.models import FeaturePyramidTransformer

neck = FeaturePyramidTransformer(in_channels=(4, 8), channels=8, rngs=nnx.Rngs(0))
fine, coarse = neck((jnp.ones((1, 8, 8, 4)), jnp.ones((1, 4, 4, 8))))
print(fine.shape, coarse.shape)
"""
  assert run(program, path=tmp_path) == "(1, 8, 8, 8) (1, 4, 4, 8)\n"


def run(program: str, path: pathlib.Path) -> str:
  """Runs a program in an interpreter whose first import path is `path`; returns what it prints."""
  environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
  finished = subprocess.run(
    [sys.executable, "-c", program], cwd=path, env=environment, capture_output=True, text=True
  )
  assert finished.returncode == 0, finished.stderr
  return finished.stdout
