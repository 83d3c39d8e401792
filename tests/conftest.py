"""Every test runs with strict dtype promotion; tests of host code never import JAX."""

import os

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
