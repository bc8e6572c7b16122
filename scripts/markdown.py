"""Markdown that scripts write: tables, and sections of a page that other people write."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
  """A table whose first columns are texts and whose others are figures.

  Args:
    header: title of each column.
    rows: cells of each row.
    texts: number of columns that are texts.
  """
  rule = ["---"] * texts + ["--:"] * (len(header) - texts)
  return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def with_section(page: str, name: str, section: str, *, writer: str) -> str:
  """The text of a page whose section of a name is replaced, or added at the end.

  Args:
    page: the page's text.
    name: name of the section.
    section: its new text, with a newline at the end.
    writer: the script that writes it, for the readers of the page's source.
  """
  begin, end = f"<!-- {name}, written by {writer} -->", f"<!-- end of {name} -->"
  marked = f"{begin}\n\n{section}\n{end}"
  if begin not in page:
    return f"{page.rstrip()}\n\n{marked}\n".lstrip()
  before, _, rest = page.partition(begin)
  _, found, after = rest.partition(end)
  if not found:
    raise SystemExit(f"error: the page has {begin} without {end}; correct it by hand")
  return before + marked + after
