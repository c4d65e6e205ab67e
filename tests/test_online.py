"""Gradients forward in time: `rtrl` against `bptt`, what `snap1` leaves out, the mean of `uoro`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, influence, online, streams
from jaxrnn.influence import diagonal, full, rank_one
from tests.conftest import default_and_thorough
from tests.faults import with_fault
from tests.reference import random_case, relative_errors

AGREEMENT = 1e-12
CAUGHT = 1e-3
METHODS = {"rtrl": full, "snap1": diagonal, "uoro": rank_one}


def draw(structure, values=0, **fixed):
    """Three quarters of the structures have a leak, half a drive."""
    fixed = {"leak": structure % 4 > 0, "drive": structure % 4 < 2, "largest_T": 40} | fixed
    return random_case(5000 + structure, values=values, **{"largest_size": 4} | fixed)


def gradient_by(gradient_fn, case):
    """A function of the leak and the other arguments, so that all draws share its compilation."""

    @jax.jit
    def gradient(leak, *arguments):
        return gradient_fn(*arguments, **case.keywords | {"leak": leak})

    return gradient


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough(range(2), range(24)))
def test_rtrl_equals_bptt(structure):
    """Three draws of all values for each structure: sizes, options, batch axes."""
    cases = [draw(structure, values) for values in range(3)]
    forward, by_hand = (gradient_by(fn, cases[0]) for fn in (jaxrnn.rtrl, jaxrnn.bptt))
    for case in cases:
        got = forward(case.leak, *case.arguments)
        assert max(relative_errors(got, by_hand(case.leak, *case.arguments))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough(range(3), range(12)))
def test_snap1_is_exact_for_a_diagonal_W_h(structure):
    case = draw(structure)
    W_h = jnp.diag(jnp.diagonal(case.params.W_h) + 0.3)
    case = case._replace(params=case.params._replace(W_h=W_h))
    got, expected = (
        gradient_by(fn, case)(case.leak, *case.arguments) for fn in (jaxrnn.snap1, jaxrnn.bptt)
    )
    assert max(relative_errors(got, expected)) <= AGREEMENT


SQUARE = {
    "sizes": (3, 3, 3), "batch_shape": (2,), "activation": "tanh", "T": 10,
    "loss": "cross_entropy", "labels": True, "tokens": False, "mask": True, "reset": True,
    "weights": True, "h_0": True, "leak": True, "drive": True,
}  # fmt: skip


@pytest.mark.usefixtures("x64")
def test_snap1_keeps_the_diagonal_of_what_rtrl_advances():
    """One step from the same J: the elements dh_j / dtheta_jn, without the paths through W_ij."""
    rng = np.random.default_rng(0)
    H, N = 3, 7
    W_h, f_prime, u = (jnp.asarray(rng.standard_normal(s)) for s in ((H, H), (2, H), (2, N)))
    D = jnp.asarray(rng.standard_normal((2, H, N)))
    J = D[..., None] * jnp.eye(H)[:, None, :]
    whole = full.advance(J, W_h, f_prime, jnp.array(0.3), u, None)
    kept = diagonal.advance(D, W_h, f_prime, jnp.array(0.3), u, None)
    np.testing.assert_allclose(kept, jnp.einsum("bjnj->bjn", whole), rtol=1e-14)


def deviations(module, case, keys) -> list[float]:
    """The largest deviation of the mean of `uoro` from the gradient, in standard errors."""
    many = jax.jit(jax.vmap(lambda key: module.uoro(*case.arguments, key=key, **case.keywords)[1]))(
        jax.random.split(jax.random.key(7), keys)
    )
    exact = jaxrnn.bptt(*case.arguments, **case.keywords)[1]
    found = []
    for draws, want in zip(many, exact, strict=True):
        error = np.abs(draws.mean(0) - want)
        spread = draws.std(0) / keys**0.5 + 1e-12 * np.abs(want).max()
        found.append(float((error / spread).max()))
    return found


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_the_mean_of_uoro_is_the_gradient():
    case = draw(2, values=1, **SQUARE)
    assert max(deviations(jaxrnn, case, 4000)) <= 4


@pytest.mark.usefixtures("x64")
def test_without_a_key_uoro_is_its_mean():
    case = draw(2, values=1, **SQUARE)
    got, expected = (fn(*case.arguments, **case.keywords) for fn in (jaxrnn.uoro, jaxrnn.bptt))
    assert max(relative_errors(got, expected)) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["rtrl", "snap1"])
def test_a_stream_step_by_step_adds_up_to_the_whole_sequence(name):
    """With fixed parameters, and weights that do not normalise each step by its own count."""
    case = draw(2, values=1, **SQUARE)
    batch, keywords = case.batch, case.keywords
    (value, h_T), grads = getattr(jaxrnn, name)(*case.arguments, **keywords)
    stream_fn = partial(streams.stream_gradient, influence=METHODS[name], **keywords)
    start = streams.start_stream(case.params, case.h_0, METHODS[name])

    def body(stream, now):
        now = jax.tree.map(lambda leaf: leaf[None], now)
        count = (now.weights * now.mask).sum()
        (value, stream), grads = stream_fn(case.params, now, stream)
        return stream, jax.tree.map(lambda leaf: count * leaf, (value, grads))

    stream, sums = jax.lax.scan(body, start, batch)
    count = (batch.weights * batch.mask).sum()
    total = jax.tree.map(lambda leaf: leaf.sum(0) / count, sums)
    assert max(relative_errors((*total, stream.h), (value, grads, h_T))) <= AGREEMENT


@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_one_update_for_each_step_of_a_stream(name):
    """Learns what no single step shows: the input of the step before."""
    key = jax.random.key(0)
    bits = jax.random.bernoulli(key, shape=(600, 8)).astype(jnp.float32)
    batch = Batch(bits[..., None], jnp.roll(bits, 1, 0)[..., None])
    params = jaxrnn.init(key, 1, 6, 1)
    method, optimizer = METHODS[name], optax.adam(0.02)
    gradient_fn = partial(
        streams.stream_gradient, influence=method, loss=jaxrnn.binary_cross_entropy
    )
    update = jaxrnn.make_update(gradient_fn, optimizer)
    stream = streams.start_stream(params, jnp.zeros((8, 6)), method)
    random = {"key": key} if method.random else {}
    state = jaxrnn.init_state(params, optimizer, stream, **random)

    def body(state, now):
        return update(state, jax.tree.map(lambda leaf: leaf[None], now))

    state, metrics = jax.jit(lambda state: jax.lax.scan(body, state, batch))(state)
    losses = metrics.loss
    assert losses[-50:].mean() < 0.6 * losses[1:50].mean()


@pytest.mark.parametrize("name", default_and_thorough(["uoro"], METHODS))
def test_each_is_a_gradient_function_for_fit_and_data_parallel(name):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (5, 4, 3)), jnp.ones((5, 4), int))
    gradient_fn = getattr(jaxrnn, name)
    random = {"gradient_key": jax.random.key(2)} if name == "uoro" else {}
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    fitted = jaxrnn.fit(
        jax.random.key(3), params, batch, optimizer=rule, gradient_fn=gradient_fn, max_epochs=3,
        **random,
    )  # fmt: skip
    assert fitted.history[-1].valid_loss < fitted.history[0].valid_loss
    if name != "uoro":
        mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
        split = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))(params, batch)
        assert max(relative_errors(split, gradient_fn(params, batch))) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_no_steps_and_nan_in_padding(name):
    case = random_case(11, dtype=np.float32, **SQUARE | {"loss": "squared_error"})
    keywords = case.keywords | ({"key": jax.random.key(0)} if name == "uoro" else {})
    gradient_fn = jax.jit(partial(getattr(jaxrnn, name), **keywords))
    mask = case.batch.mask[..., None]
    dirty = case.batch._replace(
        **{
            field: jnp.where(mask, getattr(case.batch, field), jnp.nan)
            for field in ("xs", "targets", "drive")
        },
        weights=jnp.where(case.batch.mask, case.batch.weights, jnp.nan),
    )
    outs = [gradient_fn(case.params, batch, case.h_0) for batch in (case.batch, dirty)]
    for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    none = jax.tree.map(lambda leaf: leaf[:0], case.batch)
    (value, h_T), grads = gradient_fn(case.params, none, case.h_0)
    assert value == 0
    assert (h_T == case.h_0).all()
    assert all((leaf == 0).all() for leaf in grads)


def test_the_memory_of_rtrl_does_not_grow_with_T():
    params = jax.eval_shape(lambda: jaxrnn.init(jax.random.key(0), 2, 8, 2))

    def temporary(T):
        batch = Batch(
            jax.ShapeDtypeStruct((T, 4, 2), jnp.float32), jax.ShapeDtypeStruct((T, 4), jnp.int32)
        )
        compiled = jax.jit(jaxrnn.rtrl).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(500), temporary(1000)
    assert long - short <= 500 * 4 * 4  # the weight of each step


def test_errors_name_the_stream_and_the_key():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    batch = Batch(jnp.ones((1, 2)), jnp.zeros(1, int))
    with pytest.raises(TypeError, match="stream: expected a Stream, got"):
        streams.stream_gradient(params, batch, jnp.zeros(3), influence=diagonal)
    for given, other in ((diagonal, full), (full, diagonal)):
        stream = streams.start_stream(params, jnp.zeros(3), given)
        with pytest.raises(ValueError, match="stream: expected Stream"):
            streams.stream_gradient(params, batch, stream, influence=other)
    with pytest.raises(TypeError, match="positional arguments"):
        streams.stream_gradient(params, batch, stream, full)
    with pytest.raises(ValueError, match=r"h_0: expected shape \(3,\)"):
        streams.start_stream(params, jnp.zeros(2), full)
    stream = streams.start_stream(params, jnp.zeros(3), rank_one)
    with pytest.raises(TypeError, match=r"key: expected one key from jax.random.key, got None"):
        streams.stream_gradient(params, batch, stream, influence=rank_one)


FAULTS = {
    "W_h transposed": ("(J @ W_h.T + direct)", "(J @ W_h + direct)"),
    "no recurrence": ("(J @ W_h.T + direct)", "direct"),
    "f' forgotten": ("f_prime[..., None, None, :] * (J", "(J"),
    "1 - alpha forgotten": ("carried(leak, J, f_prime[..., None, N",
                            "carried(None, J, f_prime[..., None, N"),
    "h_t for h_{t-1}": ("augmented_input(params, x, h_before)",
                        "augmented_input(params, x, leaky(leak, h_before, f_z))"),
    "mask ignored in J": ("stream = jax.tree.map(partial(hold, step.mask), new, stream)",
                          "stream = new._replace(h=hold(step.mask, new.h, stream.h))"),
    "reset ignored in J": ("jax.tree.map(partial(unless_reset, step.reset), stream)",
                           "unless_reset(step.reset, stream.h), stream.influence"),
    "J before the step": ("step_gradient(params, step, stream",
                          "step_gradient(params, step, Stream(stream.h, carry[0].influence)"),
    "columns of theta exchanged": ("Params(dtheta[:, :I], ", "Params(dtheta[:, I:-1], "),
    "weights ignored": ("block_output(params, step,",
                        "block_output(params, step._replace(weights=None),"),
    "divided by all steps": ("weights.sum())", "jnp.asarray(batch.mask.size, dtype))"),
    "drive left out": ("input_zs(params, x, step.drive, step.mask)",
                       "input_zs(params, x, None, step.mask)"),
    "a row of W_h for its diagonal": ("jnp.diagonal(W_h)[:, None]", "W_h[0][:, None]"),
    "diagonal without f'": ("f_prime[..., None] * (W_jj", "(W_jj"),
    "signs of the state forgotten": ("RankOne(signs, (signs", "RankOne(abs(signs), (signs"),
    "signs forgotten": ("jax.random.rademacher(key, f_prime.shape, f_prime.dtype)",
                        "jnp.ones_like(f_prime)"),
    "one sign for all units": ("rademacher(key, f_prime.shape, f_prime.dtype)",
                               "rademacher(key, f_prime.shape[:-1] + (1,), f_prime.dtype)"
                               " * jnp.ones_like(f_prime)"),
    "factors not balanced by inverses": ("1 / jnp.sqrt(ratio)", "jnp.sqrt(ratio)"),
    "one key for all steps": ("jax.random.split(jnp.asarray(key), weights.shape[0])",
                              "jnp.broadcast_to(jnp.asarray(key), weights.shape[0])"),
    "rank one without f'": ("f_prime * (J.a @ W_h.T)", "(J.a @ W_h.T)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fault_cases():
    """A case, and the same with a diagonal W_h."""
    with jax.enable_x64(True):
        case = draw(2, values=1, **SQUARE)
        W_h = jnp.diag(jnp.array([0.8, -0.6, 0.9]))
        return case, case._replace(params=case.params._replace(W_h=W_h))


def agrees(module, fault_cases, tolerance) -> bool:
    case, diagonal_case = fault_cases
    for fn, case_ in ((module.rtrl, case), (module.snap1, diagonal_case)):
        got = jax.jit(partial(fn, **case_.keywords))(*case_.arguments)
        expected = jaxrnn.bptt(*case_.arguments, **case_.keywords)
        if not max(relative_errors(got, expected)) <= tolerance:
            return False
    return max(deviations(module, case, 4000)) <= 5


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault, fault_cases):
    faulty = with_fault([influence, streams, online], *FAULTS[fault])
    assert not agrees(faulty, fault_cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_comparisons_pass(fault_cases):
    assert agrees(jaxrnn, fault_cases, AGREEMENT)
