"""Eight CPU devices for every test; a run uses one of them unless it asks for more."""

import os
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # so that configs/ is found, as from a clone

jax.config.update("jax_num_cpu_devices", 8)
# Tests compile the same programs often.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def float64():
    """Runs a test with 64-bit JAX."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
