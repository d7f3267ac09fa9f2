"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Bad input, in one sentence: what was given, what was expected, what to do. The command line exits with 2."""


class RunStopped(RuntimeError):
    """Work that can't go on through no fault of the command, in one sentence. The command line exits with 1."""


class StoppedTogether(RunStopped):
    """The same, raised by all processes of a run at the same place, so that they can still wait for each other."""
