"""Eight CPU devices for every test; a run uses one of them unless it asks for more."""

import gc
import os
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # so that configs/ is found, as from a clone

jax.config.update("jax_num_cpu_devices", 8)
# Most tests compile much and compute little: this takes a quarter off their time. Processes that they start inherit it.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
gc.set_threshold(100_000)  # tracing makes many objects, and looking through them as often as usual took a tenth
# And they compile the same programs often.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def float64():
    """Runs a test with 64-bit JAX."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def optimized():
    """Compiles as usual for a test that computes more than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def slow_tests_compute(request):
    """Tests that take minutes are optimized."""
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("optimized")
