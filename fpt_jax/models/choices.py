"""The check that a part named by a config exists."""

from collections.abc import Iterable


def check_choice(what: str, value, choices: Iterable) -> None:
  """Raises ValueError unless `value` is one of `choices`.

  Args:
    what: name of the option, for the message.
    value: value to check.
    choices: values that exist.

  Raises:
    ValueError: the value does not exist; the message lists those that do.
  """
  choices = tuple(choices)
  if value not in choices:
    raise ValueError(
      f"{what} {value!r} does not exist; choose one of {', '.join(map(str, choices))}"
    )
