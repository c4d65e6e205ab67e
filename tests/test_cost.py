"""The cost of a gradient, read off the compiled program: memory, loops, work inside the loops."""

import math
import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxrnn
from jaxrnn import Batch, backward
from jaxrnn.recurrence import scan
from tests.conftest import default_and_thorough
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


@pytest.mark.parametrize("T", default_and_thorough([640], [640, 1024, 2000]))
def test_checkpointing_takes_a_tenth_of_the_memory_of_the_plain_scan(T):
    assert temporary(near_root(T), T) <= temporary(by_plain_autodiff, T) / 10


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.thorough), {"mask": jnp.bool_, "reset": jnp.bool_}],
)
def test_memory_with_checkpointing_grows_like_the_root_of_T(options):
    """Sixteen times T takes four times the memory, except for the weights that the options add."""
    short, long = (temporary(near_root(T), T, **options) for T in (1024, 16 * 1024))
    per_step = 16 * 4 * len(options)  # (T, B) float32 weights where a mask makes them unequal
    assert long - 16 * 1024 * per_step <= 4.5 * short


def test_only_the_hidden_states_have_length_T():
    T, B, H = 4096, 16, 64
    assert temporary(jaxrnn.bptt, T, B=B, H=H) <= 1.15 * (T * B * H * 4)


@pytest.mark.parametrize(("T", "B", "H"), [(64, 1024, 64), (769, 64, 100)])
def test_only_the_hidden_states_have_length_T_by_blocks(T, B, H):
    """Also where the forward pass goes block by block: no state is stored a second time, also if
    no block divides T."""
    assert temporary(jaxrnn.bptt, T, B=B, H=H) <= 1.15 * (T * B * H * 4)


def test_blocks_without_targets_leave_out_the_output_layer():
    """By one condition, if there are weights, and blocks in which they may all be 0."""

    def conditions(T, **options):
        return compiled(jaxrnn.bptt, T, **options).as_text().count(" conditional(")

    assert conditions(640, weights=jnp.float32) == 1
    assert conditions(640) == conditions(641) == conditions(8, weights=jnp.float32) == 0

    params, xs = jaxrnn.init(jax.random.key(0), 8, 64, 1), jnp.ones((640, 16, 8))
    weights = jnp.zeros((640, 16)).at[-1].set(1)
    targets = jnp.where(jnp.arange(640)[:, None, None] < 320, jnp.nan, jnp.zeros((640, 16, 1)))
    batch = Batch(xs, targets, weights=weights)
    (value, _), _ = jax.jit(partial(jaxrnn.bptt, loss=jaxrnn.squared_error))(params, batch)
    assert jnp.isfinite(value)  # targets of blocks that do not count are not read


@pytest.mark.parametrize("backend", ["gpu", "METAL"])
def test_a_device_does_not_wait_for_a_condition(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    hlo = compiled(partial(jaxrnn.bptt), 640, weights=jnp.float32).as_text()
    assert " conditional(" not in hlo


def test_a_loop_other_than_the_scan_may_be_one_kernel(monkeypatch):
    """One kernel needs no blocks on a GPU."""
    kernels = []

    def recorded(params, batch, one_kernel):
        kernels.append(one_kernel)
        return 8

    monkeypatch.setattr(backward, "block_steps", recorded)
    for loop in (scan, lambda *arguments, **options: scan(*arguments, **options)):
        compiled(partial(jaxrnn.bptt, loop=loop), 64)
    assert kernels == [False, True]


def test_no_one_hot_inputs_or_outputs_of_all_steps_are_stored():
    """(T, B, I) or (T, B, O) would be a thousand times (T, B)."""
    sizes = {"I": 1000, "O": 1000, "H": 16, "tokens": True}
    T, B = 4096, 16
    assert temporary(jaxrnn.bptt, T, **sizes) <= T * B * 1000 * 4 / 10


@pytest.mark.parametrize("H", default_and_thorough([512], [256, 512]))
def test_many_dense_inputs_take_no_more_memory_than_the_plain_scan(H):
    bptt, plain = (temporary(fn, 50, B=32, I=4096, H=H) for fn in (jaxrnn.bptt, by_plain_autodiff))
    assert bptt <= plain


@pytest.mark.parametrize("tokens", [False, True])
def test_no_blocks_each_with_a_gradient_of_many_inputs(tokens):
    T, I = 600, 2000
    params = jaxrnn.init(jax.random.key(0), I, 128, 2)
    xs = jnp.zeros((T, 1), int) if tokens else jnp.zeros((T, 1, I))
    jaxpr = jax.make_jaxpr(jaxrnn.bptt)(params, Batch(xs, jnp.zeros((T, 1), int)))
    assert str(jaxpr).count(" scan[") == 2  # forward and reverse, none over blocks


@pytest.mark.parametrize(
    ("fn", "loops"),
    [
        (jaxrnn.bptt, 3),  # forward, over blocks of the backward pass, over their steps
        (partial(jaxrnn.bptt, checkpoint_every=32), 5),  # and over the recomputed steps
        (by_autodiff, 2),
        (by_plain_autodiff, 2),
    ],
    ids=["bptt", "recomputed", "autodiff", "plain"],
)
def test_number_of_loops(fn, loops):
    assert compiled(fn, 256).as_text().count(" while(") == loops


IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "fusion", "call"}
"""Instructions that write no array; those inside a fusion or a call are looked at one by one."""


def whole_writes_in_loops(text: str, size: int) -> list[str]:
    """The instructions in the loops of an HLO module that write an array of at least `size`
    elements as a whole; a `dynamic-update-slice` writes only a slice of it."""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            computations[name] = []
        elif computations:
            computations[name].append(line)
    found, seen, pending = [], set(), re.findall(r"body=%?([\w.-]+)", text)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            pending += re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
            written = re.search(r" = (\(.*?\)|\w+\[[\d,]*\]\S*) ([\w-]+)\(", line)
            if written and written[2] not in {*IN_PLACE, "dynamic-update-slice"}:
                shapes = re.findall(r"\[([\d,]+)\]", written[1])
                if any(math.prod(map(int, shape.split(","))) >= size for shape in shapes):
                    found.append(line.strip())
    return found


def shift_register_loss(params, batch):
    """A network that moves all of its stored states on by one at every step."""

    def body(hs, x):
        h, _ = jaxrnn.step(params, hs[0], x)
        return jnp.roll(hs, 1, axis=0).at[0].set(h), None

    T, B, _ = batch.xs.shape
    hs, _ = jax.lax.scan(body, jnp.zeros((T, B, params.W_h.shape[0])), batch.xs)
    return hs.sum()


SMALL = {"B": 1, "I": 4, "H": 16, "O": 4}


@pytest.mark.parametrize("fn", [jaxrnn.bptt, by_autodiff], ids=["bptt", "autodiff"])
def test_no_step_writes_an_array_of_all_steps(fn):
    """Such a write at each of T steps would make the time quadratic in T. The smallest array of all
    steps is xs, of 4 T numbers; a block has fewer."""
    assert whole_writes_in_loops(compiled(fn, 4000, **SMALL).as_text(), 4 * 4000) == []


def test_the_search_for_whole_writes_finds_a_shift_register():
    text = compiled(shift_register_loss, 4000, **SMALL).as_text()
    assert whole_writes_in_loops(text, 4 * 4000)


@pytest.mark.thorough
@pytest.mark.parametrize("fn", [jaxrnn.bptt, by_autodiff], ids=["bptt", "autodiff"])
def test_time_grows_linearly_with_T(fn):
    """Also where code generation rewrites a whole stacked output at every step, which the HLO
    does not show, as in jaxlib 0.11.1. The best of some attempts counts."""
    for _ in range(5):
        seconds = {}
        for T in (1000, 4000):
            executable = compiled(fn, T, **SMALL)
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


def test_a_million_steps_take_less_than_a_gigabyte():
    """One sequence, H = 64; inputs, outputs and temporary memory."""
    sizes = {"B": 1, "I": 8, "H": 64, "O": 8}
    for fn in (jaxrnn.bptt, partial(jaxrnn.bptt, checkpoint_every=1000)):
        memory = compiled(fn, 1_000_000, **sizes).memory_analysis()
        held = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        assert held + memory.output_size_in_bytes < 1e9
