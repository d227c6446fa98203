"""Command lines as a command reads them."""

import pytest
import yaml

from scir_jax.config import cli
from scir_jax.config.schema import Config
from scir_jax.errors import InputError


def write(tmp_path, content, name="config.yaml") -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def parse(*argv, **arguments) -> Config:
    return cli.parse("test", "a test", argv, **arguments)[0]


def refused(*argv, **arguments) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(InputError) as error:
        parse(*argv, **arguments)
    message = str(error.value)
    assert "\n" not in message
    return message
