"""What the tests of data files have in common."""

import json

import pytest

from scir_jax.errors import InputError
from scir_jax.run import preflight
from tests.chat_templates import turns

CONVERSATION = turns("copy ab=", "ab", "reverse ab=")


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def checked(setup):
    """The content of data.json."""
    return preflight.check_inputs(setup.inputs.config, setup.inputs, setup.programs)


def refused(make, message, **sections):
    with pytest.raises(InputError) as error:
        checked(make(**sections))
    assert str(error.value).startswith(message) and "\n" not in str(error.value), error.value
