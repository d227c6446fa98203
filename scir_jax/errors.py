"""The two ways in which a command ends early on purpose."""


class InputError(Exception):
    """Bad input of the user: one clear sentence that says what is wrong, where, and what to do."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved; the message says how to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
