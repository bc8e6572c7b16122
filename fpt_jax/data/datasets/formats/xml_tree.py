"""XML files as trees whose elements know their lines."""

import dataclasses
import pathlib
import xml.parsers.expat
from collections.abc import Iterator

from fpt_jax.data.datasets.checks import BadRecordError, quoted
from fpt_jax.data.records.images import read_bytes


@dataclasses.dataclass
class Element:
  """An element of an XML file.

  Attributes:
    tag: name of the element.
    attributes: its attributes by name.
    place: file and line, for messages.
    children: the elements in it, in the order of the file.
    text: the text in it, without that of its children.
  """

  tag: str
  attributes: dict[str, str]
  place: str
  children: list["Element"] = dataclasses.field(default_factory=list)
  text: str = ""

  def all(self, tag: str) -> Iterator["Element"]:
    """Returns the children with a tag."""
    return (child for child in self.children if child.tag == tag)

  def first(self, tag: str) -> "Element | None":
    """Returns the first child with a tag, None if there is none."""
    return next(self.all(tag), None)

  def child_text(self, tag: str) -> str:
    """Returns the text of the first child with a tag, without the space around it.

    Raises:
      BadRecordError: there is none.
    """
    child = self.first(tag)
    if child is None:
      raise BadRecordError(f"element {self.tag} has no {tag}", "add it", self.place)
    return child.text.strip()

  def attribute(self, name: str) -> str:
    """Returns an attribute.

    Raises:
      BadRecordError: there is none.
    """
    if name not in self.attributes:
      raise BadRecordError(f"element {self.tag} has no attribute {name}", "add it", self.place)
    return self.attributes[name]


def read(path: pathlib.Path, tag: str) -> Element:
  """Reads an XML file.

  Args:
    path: the file.
    tag: name of its outermost element.

  Raises:
    BadRecordError: the file cannot be read, is not well-formed, declares entities, which can expand to any
      length, or its outermost element is another.
  """
  top = Element("", {}, str(path))
  stack = [top]
  parser = xml.parsers.expat.ParserCreate()
  parser.buffer_text = True

  def start(name: str, attributes: dict[str, str]) -> None:
    element = Element(name, attributes, f"{path}, line {parser.CurrentLineNumber}")
    stack[-1].children.append(element)
    stack.append(element)

  def end(name: str) -> None:
    del name
    stack.pop()

  def text(data: str) -> None:
    stack[-1].text += data

  def entity(*declaration: object) -> None:
    raise BadRecordError("entities are not read", f"it declares {declaration[0]}", path)

  parser.StartElementHandler, parser.EndElementHandler = start, end
  parser.CharacterDataHandler, parser.EntityDeclHandler = text, entity
  try:
    parser.Parse(read_bytes(path), True)
  except OSError as error:
    raise BadRecordError("file cannot be read", str(error.strerror), path) from error
  except (xml.parsers.expat.ExpatError, ValueError, LookupError) as error:  # also of encodings
    raise BadRecordError("not valid XML", str(error), path) from error
  (root,) = top.children
  if root.tag != tag:
    raise BadRecordError(f"its outermost element is not {tag}", quoted(root.tag), root.place)
  return root
