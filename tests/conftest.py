"""Eight CPU devices for every test; a run uses one of them unless it asks for more."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import jax
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # so that configs/ is found, as from a clone

hypothesis.settings.register_profile("at any pace", deadline=None)
hypothesis.settings.load_profile("at any pace")
jax.config.update("jax_num_cpu_devices", 8)
# Most tests compile much and compute little. This takes a quarter off their time, and XLA's older way to make code of
# fused operations, in one piece, compiles four times as fast. Processes that they start inherit it.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
gc.set_threshold(100_000)  # tracing makes many objects, and looking through them as often as usual took a tenth
# And they compile the same programs often. To keep those that take less would take longer than to compile them.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two more than there are cores, because tests of hosts and signals wait much."""
    from jaxclust.runtime import cores

    return cores() + 2


def pytest_collection_modifyitems(items):
    """Files with many tests that take seconds come first, so that no worker has one alone at the end."""
    long = Counter(item.path for item in items if item.get_closest_marker("medium"))
    items.sort(key=lambda item: -long[item.path])


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
