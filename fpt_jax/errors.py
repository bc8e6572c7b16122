"""The exception whose message is written for the user, and other errors in one line."""

from collections.abc import Sequence


class UserError(Exception):
  """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do.

  `fpt_jax.main` prints the message without a stack trace and exits with a status.

  Attributes:
    status: exit status of the process.
  """

  status = 2


class RunAgainError(UserError):
  """The work was interrupted: the same command goes on with it, and nothing else has to be done."""

  status = 75  # EX_TEMPFAIL of sysexits.h


class ResultsNotWrittenError(UserError):
  """The files of a complete evaluation could not be written.

  Attributes:
    metrics: scores of the evaluation by name.
  """

  def __init__(self, message: object, metrics: dict[str, float]):
    super().__init__(f"{message}; the scores are complete, see the log above")
    self.metrics = metrics


def first_of(items: Sequence[str], most: int, separator: str = ", ") -> str:
  """Returns the first items of a list, and how many more there are, for a message."""
  more = f" and {len(items) - most} more" if len(items) > most else ""
  return separator.join(items[:most]) + more


def one_line(error: object, limit: int | None = None) -> str:
  """Returns the text of an error without line breaks, at most its first `limit` characters."""
  return " ".join(str(error).split())[:limit]
