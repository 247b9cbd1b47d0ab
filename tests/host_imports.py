"""What hosts of tests are forked with (see host_runs.py)."""

import faiss  # noqa: F401

import jaxclust.jobs.train  # noqa: F401
from jaxclust import runtime

runtime.tensorflow()
