"""What a gradient costs, read off the compiled program: temporary memory, loops, growth in time."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxrnn
from jaxrnn import Batch
from tests.reference import plain_loss

by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)
by_plain_autodiff = jax.value_and_grad(plain_loss, has_aux=True)


def compiled(fn, T, B=16, I=8, H=64, O=8, tokens=False, **options):
    params = jax.eval_shape(lambda: jaxrnn.init(jax.random.key(0), I, H, O))
    steps = partial(jax.ShapeDtypeStruct, (T, B))
    xs = steps(jnp.int32) if tokens else jax.ShapeDtypeStruct((T, B, I), jnp.float32)
    options = {name: steps(dtype) for name, dtype in options.items()}
    return jax.jit(fn).lower(params, Batch(xs, steps(jnp.int32), **options)).compile()


def temporary(fn, T, **sizes) -> int:
    return compiled(fn, T, **sizes).memory_analysis().temp_size_in_bytes


def near_root(T):
    return partial(jaxrnn.bptt, checkpoint_every=round(T**0.5))


@pytest.mark.parametrize("T", [640, 1024, 2000])
def test_recomputed_it_takes_a_tenth_of_the_plain_scans_memory(T):
    assert temporary(near_root(T), T) <= temporary(by_plain_autodiff, T) / 10


@pytest.mark.parametrize("options", [{}, {"mask": jnp.bool_, "reset": jnp.bool_}])
def test_recomputed_its_memory_grows_like_the_root_of_T(options):
    """Options aside, which are inputs: sixteen times T takes four times the memory."""
    short, long = (temporary(near_root(T), T, **options) for T in (1024, 16 * 1024))
    per_step = 16 * 4 * len(options)  # (T, B) float32 weights where a mask makes them unequal
    assert long - 16 * 1024 * per_step <= 4.5 * short


def test_nothing_is_T_steps_long_but_the_hidden_states():
    T, B, H = 4096, 16, 64
    assert temporary(jaxrnn.bptt, T, B=B, H=H) <= 1.15 * (T * B * H * 4)


def test_tokens_take_no_one_hot_input_and_outputs_stay_in_their_block():
    """(T, B, I) or (T, B, O) would be a thousand times (T, B)."""
    sizes = {"I": 1000, "O": 1000, "H": 16, "tokens": True}
    T, B = 4096, 16
    assert temporary(jaxrnn.bptt, T, **sizes) <= T * B * 1000 * 4 / 10


@pytest.mark.parametrize(
    ("fn", "loops"),
    [
        (jaxrnn.bptt, 4),  # blocks and steps, forward and back
        (partial(jaxrnn.bptt, checkpoint_every=32), 5),  # and the steps once more
        (by_autodiff, 2),
        (by_plain_autodiff, 2),
    ],
    ids=["bptt", "recomputed", "autodiff", "plain"],
)
def test_number_of_loops(fn, loops):
    assert compiled(fn, 256).as_text().count(" while(") == loops


@pytest.mark.parametrize("fn", [jaxrnn.bptt, by_autodiff], ids=["bptt", "autodiff"])
def test_time_grows_linearly(fn):
    """A scan that rewrote its whole stacked output at every step would be quadratic. Sizes that
    stay in cache, and the best of some attempts, since the machine does other things too."""
    for _ in range(5):
        seconds = {}
        for T in (1000, 4000):
            executable = compiled(fn, T, B=1, I=4, H=16, O=4)
            params = jaxrnn.init(jax.random.key(0), 4, 16, 4)
            batch = Batch(jnp.ones((T, 1, 4)), jnp.zeros((T, 1), jnp.int32))
            seconds[T] = min(timed(executable, params, batch) for _ in range(15))
        if seconds[4000] <= 4.6 * seconds[1000]:
            return
    pytest.fail(f"in five attempts: {seconds}")


def timed(executable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(executable(*arguments))
    return time.perf_counter() - start


def test_a_million_steps_train_in_under_a_gigabyte():
    """One sequence, H = 64: everything that the program holds, inputs and outputs included."""
    sizes = {"B": 1, "I": 8, "H": 64, "O": 8}
    for fn in (jaxrnn.bptt, partial(jaxrnn.bptt, checkpoint_every=1000)):
        memory = compiled(fn, 1_000_000, **sizes).memory_analysis()
        held = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        assert held + memory.output_size_in_bytes < 1e9
