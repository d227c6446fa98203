"""The linter and the type checker have nothing to say; pyproject.toml configures both."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.documented("ruff", "mypy")
def test_it_is_clean(documented):
    for one in documented:
        words = [sys.executable, "-m", one.command.program, *one.words()]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
