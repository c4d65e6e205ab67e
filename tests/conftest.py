"""Shared settings and fixtures.

`JAXRNN_THOROUGH=1` adds the tests marked `thorough`: more cases of tests that run by default, tests
that take long, and the ones that need an idle machine. `JAXRNN_THOROUGH=first` adds one case of
each test that has none by default.
"""

import os
import signal
import tempfile

import hypothesis
import jax
import jaxlib.version
import numpy as np
import pytest
import scipy.io

from tests.char_lm_runs import TEXT

# Tests compile thousands of small programs and run each once, so compilation must be fast. XLA
# reads its flags when the first array is made.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.version.__version_info__ <= (0, 11, 0):
    # The older code generation compiles three times as fast; newer versions do not have it.
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_FLAGS", f"{FAST_COMPILATION} {DEVICES}")

COMPILATION_CACHE = pytest.StashKey[str]()

# The first example compiles; how long that takes says nothing. The same examples every time.
hypothesis.settings.register_profile("jaxrnn", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxrnn")


def default_and_thorough(default, cases, *, unpack=False) -> list:
    """The cases, of which those not in `default` are marked thorough.

    With `unpack`, a case has a value for each of several names.
    """
    cases = list(cases)
    assert all(case in cases for case in default)
    return [
        pytest.param(
            *(case if unpack else (case,)),
            marks=() if case in default else pytest.mark.thorough,
        )
        for case in cases
    ]


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: runs only with JAXRNN_THOROUGH=1")
    # Many tests compile the same program; all processes of a run together compile it once.
    if hasattr(config, "workerinput"):
        folder = config.workerinput["compilation_cache"]
    elif "JAX_COMPILATION_CACHE_DIR" in os.environ:
        folder = config.stash[COMPILATION_CACHE] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    else:
        temporary = tempfile.TemporaryDirectory()
        config.add_cleanup(temporary.cleanup)
        folder = config.stash[COMPILATION_CACHE] = temporary.name
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Hands the folder to a process that pytest-xdist starts."""
    node.workerinput["compilation_cache"] = node.config.stash[COMPILATION_CACHE]


def pytest_collection_modifyitems(config, items):
    level = os.environ.get("JAXRNN_THOROUGH")
    if level == "1":
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    left_out = set(thorough)
    if level == "first":
        # An example of a docstring has no function.
        by_default = {getattr(item, "function", item) for item in items if item not in left_out}
        firsts = {item.function: item for item in reversed(thorough)}
        left_out -= {item for function, item in firsts.items() if function not in by_default}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def x64():
    """Judges a derivation: with float64, what is left over is a mistake, not rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def pieces(rng, count):
    cells = np.empty((1, count), object)
    for n in range(count):
        cells[0, n] = (rng.random((rng.integers(5, 20), 88)) < 0.05).astype(float)
    return cells


@pytest.fixture
def music(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "music.mat"
    parts = {f"{part}data": pieces(rng, n) for part, n in (("train", 6), ("valid", 3), ("test", 3))}
    scipy.io.savemat(path, parts)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file for tiny runs of the character model."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def usual_signals():
    """SIGINT and SIGTERM have Python's default handlers, even if the tests ignore SIGINT."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
