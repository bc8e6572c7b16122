"""Reads the pickles of .pth and .pkl files without `pickle`, which runs any code and which files can crash.

The opcodes that plain values, tensors and NumPy arrays consist of are carried out here; all others are
refused. Keys of dictionaries are strings and numbers, so nothing recurses into what a file nests. A limit on
opcodes bounds the time and, with the length of the file, the memory.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fpt_jax.errors import UserError

_STORAGES = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}

# A state dict has about 40 opcodes per tensor, and pickle adds to a container after 1,000 values.
MAX_OPCODES = 500_000
MAX_STACK = 100_000
MAX_MARKS = 100
MAX_ARGUMENTS = 16
MAX_DIMENSIONS = 64
# larger integers can have equal hashes, which makes dictionaries slow
MAX_KEY = 2**60

_VALUES = frozenset(
  ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"]
  + ["UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"]
  + ["SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
  """A reference to a flat array of numbers, which is outside the pickle."""

  key: str
  dtype: np.dtype
  numel: int


class Tensor(NamedTuple):
  """A strided view of a storage."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


@dataclasses.dataclass
class DType:
  """A dtype of numbers, which pickle completes with its order of bytes.

  Attributes:
    code: kind and bytes of a number, such as "f4".
    order: order of bytes, "<", ">" or "|" for single bytes.
  """

  code: str
  order: str = "<"

  def build(self, state: Any) -> None:
    """Takes the order of bytes from what pickle stores."""
    match state:
      case (int(), "<" | ">" | "|" as order, None, None, None, *_):
        self.order = order
      case _:
        raise pickle.UnpicklingError("a dtype of something else than numbers")

  @property
  def dtype(self) -> np.dtype:
    """The dtype in NumPy."""
    return np.dtype(self.order + self.code)


@dataclasses.dataclass
class Array:
  """An array of NumPy, whose bytes are copied only when they are needed.

  Attributes:
    dtype: dtype of the numbers.
    shape: shape of the array.
    column_major: whether the first axis varies fastest.
    data: the bytes.
  """

  dtype: DType | None = None
  shape: tuple[int, ...] = ()
  column_major: bool = False
  data: Any = None

  def build(self, state: Any) -> None:
    """Takes the contents from what pickle stores: a version, shape, dtype, order of the axes and bytes."""
    match state:
      case (int(), tuple() as shape, DType() as dtype, bool() | int() as column_major, data):
        self._set(dtype, shape, bool(column_major), data)
      case _:
        raise pickle.UnpicklingError("an array without its contents")

  def _set(self, dtype: DType, shape: tuple, column_major: bool, data: Any) -> None:
    if len(shape) > MAX_DIMENSIONS or not all(isinstance(n, int) and 0 <= n < 2**63 for n in shape):
      raise pickle.UnpicklingError("an array with an impossible shape")
    self.dtype, self.shape, self.column_major, self.data = dtype, shape, column_major, data

  @property
  def nbytes(self) -> int:
    """The number of bytes that the shape and the dtype need."""
    return math.prod(self.shape) * self.complete().itemsize

  def complete(self) -> np.dtype:
    """Returns the dtype.

    Raises:
      UnpicklingError: pickle never stored the contents.
    """
    if self.dtype is None:
      raise pickle.UnpicklingError("an array without its contents")
    return self.dtype.dtype

  def to_numpy(self) -> np.ndarray:
    """Returns the array: contiguous, writable, in the machine's order of bytes.

    Raises:
      ValueError: the bytes do not have the length that the shape needs.
    """
    data = self.data
    if isinstance(data, Latin1):
      data = data.text.encode("latin-1")
    elif isinstance(data, str):  # of Python 2, see BINSTRING
      data = data.encode()
    if not isinstance(data, bytes | bytearray) or len(data) != self.nbytes:
      raise ValueError(f"an array of shape {self.shape} without its {self.nbytes} bytes")
    dtype = self.complete()
    flat = np.frombuffer(data, dtype).reshape(self.shape, order="F" if self.column_major else "C")
    return np.array(flat, dtype.newbyteorder("="), order="C")


class Latin1(NamedTuple):
  """Bytes, each a character: those of Python 2 and of protocols before 3."""

  text: str


_CLASS = object()  # stands for numpy.ndarray


def read_pickle(file: io.BytesIO, path: object, storages: dict[str, Storage]) -> Any:
  """Reads one pickle.

  Args:
    file: the bytes from the position of the pickle; afterwards at the position behind it.
    path: the file, for messages.
    storages: gets the storages that the tensors refer to, by key.

  Returns:
    Plain values, lists, tuples and dictionaries of them, `Tensor` and `Array`.

  Raises:
    UserError: the pickle has something else.
    Exception: it is damaged, or not the pickle of a state dict.
  """
  machine = _Machine(path, storages)
  for opcode, argument, _ in pickletools.genops(file):
    if (
      machine.work > MAX_OPCODES or len(machine.stack) > MAX_STACK or len(machine.marks) > MAX_MARKS
    ):
      raise UserError(
        f"{path}: has too many values, or too deeply nested ones, for a state dict; "
        "save `model.state_dict()` alone with torch.save"
      )
    machine.step(opcode.name, argument)
  return machine.pop()


class _Machine:
  """The stack machine of pickle, as far as tensors need it."""

  def __init__(self, path: object, storages: dict[str, Storage]):
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.work = 0  # opcodes, and values that an opcode copied
    self._memo: dict[int, Any] = {}
    self._path, self._storages = path, storages

  def step(self, name: str, argument: Any) -> None:
    """Carries out one opcode."""
    push = self.stack.append
    self.work += 1
    match name:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case _ if name in _VALUES:
        push(argument)
      case _ if name in _CONSTANTS:
        push(_CONSTANTS[name])
      case _ if name in _EMPTY:
        push(_EMPTY[name]())
      case _ if name in _TUPLES:
        push(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
      case "BINSTRING" | "SHORT_BINSTRING":  # text or bytes of Python 2
        try:
          push(argument.encode("latin-1").decode())
        except UnicodeDecodeError:
          push(Latin1(argument))
      case "MARK":
        self.marks.append(len(self.stack))
      case "POP":
        self.pop()
      case "POP_MARK":
        self._pop_marked()
      case "DUP":
        push(self._top())
      case "TUPLE":
        push(tuple(self._pop_marked()))
      case "LIST":
        push(self._pop_marked())
      case "DICT":
        push(_set_items({}, self._pop_marked()))
      case "APPEND":
        value = self.pop()
        _extend(self._top(), [value])
      case "APPENDS":
        values = self._pop_marked()
        _extend(self._top(), values)
      case "SETITEM":
        value, key = self.pop(), self.pop()
        _set_items(self._top(), [key, value])
      case "SETITEMS":
        values = self._pop_marked()
        _set_items(self._top(), values)
      case "PUT" | "BINPUT" | "LONG_BINPUT":
        if not 0 <= argument <= MAX_KEY:
          raise pickle.UnpicklingError("a memo index out of range")
        self._memo[argument] = self._top()
      case "MEMOIZE":
        self._memo[len(self._memo)] = self._top()
      case "GET" | "BINGET" | "LONG_BINGET":
        push(self._memo[argument])
      case "GLOBAL":
        push(self._find(*argument.split(" ", 1)))
      case "STACK_GLOBAL":
        attribute, module = self.pop(), self.pop()
        push(self._find(module, attribute))
      case "REDUCE":
        arguments, function = self.pop(), self.pop()
        if not callable(function) or not isinstance(arguments, tuple):
          raise pickle.UnpicklingError("a call of something else than a function")
        if len(arguments) > MAX_ARGUMENTS:
          raise pickle.UnpicklingError("a call with too many arguments")
        push(function(*arguments))
      case "BUILD":
        state, target = self.pop(), self._top()
        if isinstance(target, Array | DType):
          target.build(state)
        # else attributes, such as `_metadata` of torch's state dicts
      case "BINPERSID":
        push(self._storage(self.pop()))
      case _:
        raise pickle.UnpicklingError(f"the opcode {name}")

  def pop(self) -> Any:
    """Removes and returns the newest value."""
    self._top()
    return self.stack.pop()

  def _top(self) -> Any:
    if len(self.stack) <= (self.marks[-1] if self.marks else 0):
      raise pickle.UnpicklingError("a value is missing")
    return self.stack[-1]

  def _pop_marked(self) -> list[Any]:
    mark = self.marks.pop()
    values = self.stack[mark:]
    del self.stack[mark:]
    return values

  def _find(self, module: Any, name: Any) -> Any:
    """Returns what stands for a name of another module."""
    if module == "collections" and name == "OrderedDict":
      return self._ordered_dict
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
      return _tensor
    if module == "torch._utils" and name == "_rebuild_parameter":
      return _parameter
    if not isinstance(module, str) or not isinstance(name, str):
      raise pickle.UnpicklingError("a name that is not text")
    if module == "torch" and name in _STORAGES:
      return name
    found = _NUMPY.get((module.replace("numpy._core", "numpy.core"), name))
    if found is not None:
      return found
    raise UserError(
      f"{self._path}: contains {module[:80]}.{name[:80]}, but only tensors and arrays can be read; "
      "save `model.state_dict()` alone with torch.save"
    )

  def _ordered_dict(self, items: Any = ()) -> dict:
    if not isinstance(items, list | tuple):
      raise pickle.UnpicklingError("a dict of something else than pairs")
    self.work += len(items)  # one list of items can be given many times
    flat = []
    for item in items:
      if not isinstance(item, list | tuple) or len(item) != 2:
        raise pickle.UnpicklingError("a dict of something else than pairs")
      flat += item
    return _set_items(collections.OrderedDict(), flat)

  def _storage(self, pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) > MAX_ARGUMENTS:
      raise pickle.UnpicklingError("an unknown storage")
    match pid:
      case ("storage", str(name), str() | int() as key, _, int(numel), *view) if (
        name in _STORAGES and numel >= 0 and view in ([], [None])
      ):
        storage = Storage(str(key), _STORAGES[name], numel)
        return self._storages.setdefault(storage.key, storage)
    raise pickle.UnpicklingError("an unknown storage")


def _extend(container: Any, values: list[Any]) -> None:
  if not isinstance(container, list):
    raise pickle.UnpicklingError("values for something else than a list")
  container.extend(values)


def _set_items(container: Any, values: list[Any]) -> Any:
  """Sets key, value, key, value, ..."""
  if not isinstance(container, dict):
    raise pickle.UnpicklingError("items for something else than a dict")
  for key, value in zip(values[::2], values[1::2], strict=True):
    if not (isinstance(key, str) or (isinstance(key, int) and abs(key) <= MAX_KEY)):
      raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")
    container[key] = value
  return container


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
  match storage, offset, shape, strides:
    case Storage(), int(), tuple(), tuple() if len(shape) == len(strides) <= MAX_DIMENSIONS and all(
      isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *shape, *strides)
    ):
      return Tensor(storage, offset, shape, strides)
  raise pickle.UnpicklingError(
    "a tensor without storage or with a shape or strides that do not fit"
  )


def _parameter(tensor: Any, *_: Any) -> Tensor:
  if not isinstance(tensor, Tensor):
    raise pickle.UnpicklingError("a parameter without a tensor")
  return tensor


def _new_array(kind: Any, *_: Any) -> Array:
  if kind is not _CLASS:
    raise pickle.UnpicklingError("an array of an unknown class")
  return Array()


def _dtype(code: Any, *_: Any) -> DType:
  if not isinstance(code, str) or not re.fullmatch("b1|[iu][1248]|f[248]", code):
    raise pickle.UnpicklingError("a dtype of something else than numbers")
  return DType(code)


def _scalar(dtype: Any, data: Any) -> Array:
  array = Array()
  array.build((1, (), dtype, False, data))
  return array


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
  array = Array()
  array.build((1, shape, dtype, order == "F", data))
  return array


def _encoded(text: Any, encoding: Any) -> Latin1:
  if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
    raise pickle.UnpicklingError("bytes in an unknown encoding")
  return Latin1(text)


def _no_bytes(*arguments: Any) -> bytes:
  if arguments:
    raise pickle.UnpicklingError("bytes from something else than nothing")
  return b""


# what the pickles of arrays call; NumPy 2 has `numpy._core` instead of `numpy.core`
_NUMPY: dict[tuple[str, str], Any] = {
  ("numpy", "ndarray"): _CLASS,
  ("numpy", "dtype"): _dtype,
  ("numpy.core.multiarray", "_reconstruct"): _new_array,
  ("numpy.core.multiarray", "scalar"): _scalar,
  ("numpy.core.numeric", "_frombuffer"): _from_buffer,
  ("_codecs", "encode"): _encoded,
  ("__builtin__", "bytes"): _no_bytes,
}
