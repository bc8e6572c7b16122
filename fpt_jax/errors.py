"""The one exception whose text is meant for the person at the terminal."""


class UserError(Exception):
  """A mistake the user can mend: one line that says what, where, and what to do.

  `fpt_jax.main` prints the message without a stack trace and exits with status 2.
  """
