"""Settings of the fuzz tests: the same inputs in each run of the suite, or more and other ones."""

import os

import hypothesis

_EXAMPLES = os.environ.get("FPT_FUZZ_EXAMPLES", "")

fuzzed = hypothesis.settings(
  max_examples=int(_EXAMPLES or 100),
  derandomize=not _EXAMPLES,
  database=None,
  deadline=None,
)
