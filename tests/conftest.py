"""What every test shares."""

import os

# Tests compile a thousand small programs and run each once: spend no time on making them fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


@pytest.fixture
def x64():
    """Judges a derivation: with float64, what is left over is a mistake, not rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
