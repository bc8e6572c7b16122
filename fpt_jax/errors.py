"""The exception whose message is written for the user."""


class UserError(Exception):
  """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do.

  `fpt_jax.main` prints the message without a stack trace and exits with status 2.
  """
