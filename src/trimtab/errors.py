"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one sentence: what was given, what was expected, what to do. The command line exits with 2."""
