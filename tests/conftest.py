"""What every test shares."""

import os
import signal

# Tests compile a thousand small programs and run each once: spend no time on making them fast.
# Eight devices to split a batch over.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
)

import hypothesis
import jax
import numpy as np
import pytest
import scipy.io

from tests.char_lm_runs import TEXT

# The first example compiles; how long that takes says nothing. The same examples every time.
hypothesis.settings.register_profile("jaxrnn", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxrnn")


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
