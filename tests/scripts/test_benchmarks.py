"""The pages that benchmarks write; the figures themselves are not tested."""

import pathlib
import re
import subprocess

import pytest

from scripts import markdown

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def benchmark_all(*arguments):
  return subprocess.run(
    ["bash", ROOT / "scripts" / "benchmark_all.sh", *arguments], capture_output=True, text=True
  )


def test_tables():
  text = markdown.table(
    ["layer", "program", "ms"], [["a", "forward", "1"], ["b", "gradient", "2"]], texts=2
  )
  assert text.splitlines() == [
    "| layer | program | ms |",
    "| --- | --- | --: |",
    "| a | forward | 1 |",
    "| b | gradient | 2 |",
  ]


def test_sections_are_replaced_in_their_place():
  page = markdown.with_section("# Results\n\nText.\n", "one", "ONE\n", writer="a.py")
  page = markdown.with_section(page, "two", "TWO\n", writer="a.py")
  again = markdown.with_section(page, "one", "NEW\n", writer="a.py")
  assert page.startswith("# Results\n\nText.\n\n<!-- one") and again == page.replace("ONE", "NEW")
  assert markdown.with_section("", "one", "ONE\n", writer="a.py").startswith("<!-- one")
  with pytest.raises(SystemExit, match="without <!-- end of one -->"):
    markdown.with_section(page.replace("<!-- end of one -->", ""), "one", "NEW\n", writer="a.py")


def test_a_benchmark_writes_its_section(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("# Page\n\nText.\n")
  done = benchmark_all("--quick", f"--page={page}", "startup")
  assert done.returncode == 0, done.stderr
  found = re.search(
    r"^# Page\n\nText\.\n\n<!-- startup, .*benchmark_all\.sh -->\n\n.*; Python .*, jax .*; 20\d\d-.*\.\n\n"
    r"```bash\npython scripts/benchmark_startup\.py .*\n```\n\nOn \d+ core\(s\) of .*:\n\n(.*)\n\n<!-- end",
    page.read_text(),
    re.DOTALL,
  )
  assert found, page.read_text()
  rows = [line.split(" | ")[1] for line in found[1].splitlines()[2:]]
  assert len(rows) == 2 and all(0.1 < float(row.removesuffix(" s |")) < 300 for row in rows)


def test_the_page_has_a_place_for_each_benchmark(tmp_path):
  (names,) = re.findall(
    r"^benchmarks=\((.*)\)$", (ROOT / "scripts" / "benchmark_all.sh").read_text(), re.MULTILINE
  )
  text = (ROOT / "docs" / "performance.md").read_text()
  for name in names.split():
    assert text.count(f"<!-- {name}, written by scripts/benchmark_all.sh -->") == 1, name
    assert text.count(f"<!-- end of {name} -->") == 1 and f"`{name}`" in text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["stepp"], "unexpected argument 'stepp'; the benchmarks are startup convolution"),
    (["--quick"], "the figures of --quick mean nothing; add --page=FILE"),
  ],
)
def test_mistakes_are_reported_in_one_line(arguments, message):
  done = benchmark_all(*arguments)
  assert done.returncode == 2
  assert (
    done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and message in done.stderr
  )
