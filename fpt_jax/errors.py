"""The exception whose message is written for the user, and other errors in one line."""


class UserError(Exception):
  """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do.

  `fpt_jax.main` prints the message without a stack trace and exits with status 2.
  """


def one_line(error: object, limit: int | None = None) -> str:
  """Returns the text of an error without line breaks, at most its first `limit` characters."""
  return " ".join(str(error).split())[:limit]
