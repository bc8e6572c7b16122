"""Builds the list of config fields: defaults from the configs, meanings from the comments in their source.

A field's comment is behind its assignment or in the lines directly above it. A field without one
is a warning, which fails `mkdocs build --strict`.
"""

import ast
import importlib
import io
import logging
import pathlib
import sys
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = ("detection", "segmentation")
MODULES = ("base", *TASKS)
PAGE, PLACE = "config_fields.md", "<!-- config fields -->"
log = logging.getLogger("mkdocs.hooks.config_fields")


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Puts the tables into the page of config fields; called by MkDocs for every page."""
  del config, files
  return markdown.replace(PLACE, tables()) if page.file.src_uri == PAGE else markdown


def tables() -> str:
  """Returns one table per group of fields, in Markdown, in the order of the source."""
  meanings: dict[str, str] = {}
  for module in MODULES:
    path = ROOT / "fpt_jax" / "configs" / f"{module}.py"
    for field, comment in fields_of(path.read_text(encoding="utf-8"), module):
      meanings[field] = meanings.get(field) or comment
  defaults = {task: default_config(task) for task in TASKS}
  groups: dict[str, list[str]] = {}
  for field in dict.fromkeys([*meanings, *(name for task in TASKS for name in defaults[task])]):
    if any(field in defaults[task] for task in TASKS):
      groups.setdefault(field.rpartition(".")[0], []).append(field)
  lines = []
  for group, members in groups.items():
    title = f"`{group}`" if group else "Run"
    lines += ["", f"## {title}", "", "| field | default | meaning | task |", "|---|---|---|---|"]
    for field in members:
      meaning = meanings.get(field) or meanings.get(group, "")
      if not meaning:
        log.warning("config field %s has no comment in fpt_jax/configs", field)
      default_of = {task: defaults[task][field] for task in TASKS if field in defaults[task]}
      lines.append(row(field, meaning, default_of))
  return "\n".join(lines)


def row(field: str, meaning: str, default_of: dict[str, str]) -> str:
  """Returns a field's line of a table."""
  values = list(dict.fromkeys(default_of.values()))
  if len(values) == 1:
    default = f"`{values[0]}`"
  else:
    default = "<br>".join(f"`{value}` ({task})" for task, value in default_of.items())
  task = "all" if len(default_of) == len(TASKS) else ", ".join(default_of)
  return f"| `{field}` | {default} | {escaped(meaning)} | {task} |"


def escaped(text: str) -> str:
  for character in "|<*_":
    text = text.replace(character, "\\" + character)
  return text


def default_config(task: str) -> dict[str, str]:
  """Returns the text of each field's default by the field's full name."""
  sys.path.insert(0, str(ROOT))
  try:
    module = importlib.import_module(f"fpt_jax.configs.{task}")
  finally:
    sys.path.remove(str(ROOT))
  return dict(flattened(getattr(module, task)()))


def flattened(config, prefix: str = "") -> Iterator[tuple[str, str]]:
  """Yields (full name, text of the value) for every field of a ConfigDict."""
  for name in config:
    value = config[name]
    if isinstance(value, type(config)):
      yield from flattened(value, f"{prefix}{name}.")
    else:
      yield prefix + name, "unset" if value is None else repr(value)


def fields_of(source: str, module: str) -> Iterator[tuple[str, str]]:
  """Yields each field that the functions of a module assign, with its comment or "".

  These are the function with the module's name and those called `add_...`; the others are variants.

  Args:
    source: the module's text.
    module: its name.
  """
  behind, above = comments_by_line(source)
  for function in ast.parse(source).body:
    if isinstance(function, ast.FunctionDef) and (
      function.name == module or function.name.startswith("add_")
    ):
      for field, node in assigned_fields(function):
        lines = range(node.lineno, node.end_lineno + 1)
        comment = next((behind[line] for line in lines if line in behind), "")
        yield field, comment or above.get(node.lineno - 1, "")


def comments_by_line(source: str) -> tuple[dict[int, str], dict[int, str]]:
  """Returns comments behind code by line, and blocks of comment lines by their last line."""
  behind, above = {}, {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      line, text = token.start[0], token.string.lstrip("# ").strip()
      if token.line.lstrip().startswith("#"):
        above[line] = f"{above.pop(line - 1)} {text}" if line - 1 in above else text
      else:
        behind[line] = text
  return behind, above


def assigned_fields(function: ast.FunctionDef) -> Iterator[tuple[str, ast.Assign]]:
  """Yields (full name, statement) for every assignment to a field of `config` or of a group of it."""
  groups = {"config": ""}  # local names of groups

  def full_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
      return groups.get(node.id)
    if isinstance(node, ast.Attribute):
      group = full_name(node.value)
      return None if group is None else f"{group}.{node.attr}".lstrip(".")
    return None

  for node in (n for n in ast.walk(function) if isinstance(n, ast.Assign)):
    for target in node.targets:
      if isinstance(target, ast.Attribute) and full_name(target):
        yield full_name(target), node
    for name, value in aliases(node):
      group = full_name(value)
      if group is not None:
        groups[name] = group


def aliases(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
  """Yields the plain names of an assignment with what they stand for.

  `data = config.data = ConfigDict()`, `data = config.data` and `data, model = config.data, config.model`.
  """
  for target in node.targets:
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
      for name, value in zip(target.elts, node.value.elts, strict=True):
        if isinstance(name, ast.Name):
          yield name.id, value
    elif isinstance(target, ast.Name):
      for other in (*node.targets, node.value):
        if isinstance(other, ast.Attribute):
          yield target.id, other
