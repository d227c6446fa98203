"""python -m scir_jax.report: the HTML page of a run."""

import sys

from scir_jax.report.page import main

if __name__ == "__main__":
    sys.exit(main())
