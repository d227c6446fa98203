"""The ways in which a command ends early on purpose."""

DIVERGED = 5
"""exit code of a run that diverged"""
UNAVAILABLE = 6
"""exit code where a store does not answer, or a run in it was lost to another process"""


class InputError(Exception):
    """Bad input of the user: one clear sentence that says what is wrong, where, and what to do."""


class Diverged(InputError):
    """A run whose losses or gradients stay non-finite: its settings are at fault, and trying again will not help."""


class Unavailable(Exception):
    """A store that does not answer: what was saved is intact, and trying again may help."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved; the message says how to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
