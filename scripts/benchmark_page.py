#!/usr/bin/env python3
"""Writes what benchmarks have printed into a section of a page, for `scripts/benchmark_all.sh`.

    python scripts/benchmark_step.py | python scripts/benchmark_page.py docs/performance.md step

The arguments are the page and the name of the section, which begins with the machine, the versions and the
date.
"""

import datetime
import importlib.metadata
import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from scripts.machine import this_machine
from scripts.markdown import with_section

PACKAGES = ("jax", "flax", "tensorflow", "torch", "torchvision")


def main() -> None:
  page, name = pathlib.Path(sys.argv[1]), sys.argv[2]
  section = f"{where_and_when()}\n\n{sys.stdin.read().strip()}\n"
  old = page.read_text() if page.exists() else ""
  page.write_text(with_section(old, name, section, writer="scripts/benchmark_all.sh"))
  print(section)


def where_and_when() -> str:
  """The machine, the versions of the libraries that are installed, and the date."""
  versions = [f"Python {platform.python_version()}"]
  for package in PACKAGES:
    try:
      versions.append(f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return f"{this_machine().name}; {', '.join(versions)}; {datetime.date.today()}."


if __name__ == "__main__":
  main()
