"""One stand-in of the store for the tests of a process."""

import os

import pytest

from scir_jax.bucket.objects import Folder
from tests.gcs import Bucket


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    started = Bucket(tmp_path_factory.mktemp("bucket"))
    # TensorStore reads them once.
    os.environ.update(started.environment)
    if any(name.lower() in ("http_proxy", "all_proxy") for name in os.environ):
        os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    yield started
    started.close()


@pytest.fixture
def folder(bucket, request):
    """A folder of the test's own."""
    name = request.node.name.replace("[", "-").replace("]", "").replace(" ", "_")
    yield Folder(f"gs://{bucket.name}/{name}")
    bucket.faults()
