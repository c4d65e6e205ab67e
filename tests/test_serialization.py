"""A state that was saved and loaded continues bit-identically."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, checkpoints
from jaxrnn.checkpoints import CheckpointError
from jaxrnn.serialization import from_arrays, to_arrays
from tests.conftest import default_and_thorough

ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def bits(tree) -> list:
    """The names, dtypes, shapes and bytes of the leaves of a pytree."""
    return [(name, x.dtype, x.shape, x.tobytes()) for name, x in to_arrays(tree).items()]


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 3, 5, 2)


def stream(T=12, B=2):
    xs = jax.random.normal(jax.random.key(1), (T, B, 3))
    return Batch(xs, jax.random.randint(jax.random.key(2), (T, B), 0, 2))


def test_any_state_goes_through_a_file(params, tmp_path):
    tree = {
        "state": jaxrnn.init_state(params, optax.adam(1e-2), h=jnp.ones((2, 5))),
        "half": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
        "float8": [jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(3, jnp.float8_e5m2)],
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "noise": optax.add_noise(0.1, 0.5, jax.random.key(1)).init(params),
        "none": None,
        "nan": jnp.array([jnp.nan, -0.0]),
    }
    path = checkpoints.save(tmp_path, 3, to_arrays(tree))
    found = from_arrays(tree, checkpoints.load(path).arrays)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert bits(found) == bits(tree)
    a, b = (jax.random.normal(x["key"]) for x in (found, tree))
    assert a == b


@pytest.mark.usefixtures("x64")
def test_float64_leaves_go_through_a_file(tmp_path):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    path = checkpoints.save(tmp_path, 3, to_arrays(params))
    assert bits(from_arrays(params, checkpoints.load(path).arrays)) == bits(params)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": np.zeros(2, np.float32)}, "b: expected no array of that name, got one"),
        (
            {"a": np.zeros(2, np.float32), "c": np.zeros(2)},
            r"c: expected an array .* got \['a', 'b'",
        ),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(2)}, r"a: expected float32 of shape \(3,\)"),
        ({"a": np.zeros(2, np.int32), "b": np.zeros(2)}, "a: expected int32 .*, got float32"),
    ],
)
def test_another_structure_is_refused(like, message):
    arrays = to_arrays({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="^" + message):
        from_arrays(like, arrays)


@pytest.mark.parametrize(
    ("leaf", "name", "array", "message"),
    [
        (jax.random.key, "leaf:key<fry>", np.zeros(3, np.uint32), r"uint32 of shape \(2,\), .*3"),
        (jax.random.key, "leaf:key<fry>", np.zeros(2, np.int32), "uint32 .* got int32"),
        (
            lambda _: jnp.zeros(3, jnp.bfloat16),
            "leaf:bfloat16",
            np.zeros(3, np.uint8),
            "uint16 .*8",
        ),
        (
            lambda _: jnp.zeros(3, jnp.bfloat16),
            "leaf:bfloat16",
            np.zeros(6, np.uint16),
            "uint16 .*6",
        ),
    ],
)
def test_integers_that_stand_for_other_numbers_are_checked(leaf, name, array, message):
    with pytest.raises(CheckpointError, match=f"^{name}: expected {message}"):
        from_arrays(leaf(0), {name: array})


def test_what_is_no_fit_is_refused(params, tmp_path):
    with pytest.raises(TypeError, match=r"^result: expected a Fit, got Params$"):
        jaxrnn.save_fit(tmp_path, params)
    result = jaxrnn.Fit(jaxrnn.init_state(params, ADAM), params, (), False)
    with pytest.raises(TypeError, match=r"^keep: expected an integer, got '2'$"):
        jaxrnn.save_fit(tmp_path, result, keep="2")
    with pytest.raises(ValueError, match=r"^keep: expected an integer of at least 1, got 1.5$"):
        checkpoints.save(tmp_path, 0, {}, keep=1.5)
    assert not list(tmp_path.iterdir())


def test_leaves_with_the_same_name_are_refused():
    with pytest.raises(TypeError, match=r"a: expected an array, got float"):
        to_arrays({"a": 0.1})
    with pytest.raises(ValueError, match=r"tree: expected a name for each leaf, got two of a.b"):
        to_arrays({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)})
    assert list(to_arrays(np.zeros(1))) == ["leaf"]


@pytest.mark.thorough
def test_every_step_of_sixty_can_be_the_last_before_a_restart(params, tmp_path):
    """Windows of a stream with the state carried, a key in the optimiser, 15 epochs."""
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), ADAM)
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
    windows = list(jaxrnn.windows(stream(), 3))
    new = partial(jaxrnn.init_state, params, optimizer, h=jnp.zeros((2, 5)))

    def go_on(state, until, each=lambda state: None):
        losses = []
        for number in range(state.step.item(), until):
            if number % len(windows) == 0:
                state = state._replace(h=jnp.zeros((2, 5)))
            state, metrics = update(state, windows[number % len(windows)])
            losses.append(metrics.loss.item())
            each(state)
        return state, losses

    def save(state):
        checkpoints.save(tmp_path, state.step.item(), to_arrays(state), keep=99)

    state = new()
    save(state)
    end, losses = go_on(state, 60, save)
    expected = bits(end)
    assert checkpoints.saved_steps(tmp_path) == list(range(61))
    for step in range(61):
        found = checkpoints.load(checkpoints.checkpoint_path(tmp_path, step))
        resumed, rest = go_on(from_arrays(new(), found.arrays), 60)
        assert bits(resumed) == expected
        assert rest == losses[step:]


@pytest.mark.parametrize("kind", default_and_thorough(["examples"], ["examples", "batches"]))
def test_fit_resumes_at_every_epoch(kind, params, tmp_path):
    """For batches, gradient ascent: the first epoch is the best, and patience ends training."""
    data, optimizer = stream(T=6, B=10), ADAM
    train, valid, settings = data, stream(T=6, B=4), {"batch_size": 3}
    if kind == "batches":
        train = valid = list(jaxrnn.windows(data, 3))
        settings, optimizer = {"h_0": jnp.zeros((10, 5))}, optax.sgd(-0.5)
    settings |= {"optimizer": optimizer, "max_epochs": 5, "patience": 3, "tolerance": 0.01}
    run = partial(jaxrnn.fit, jax.random.key(1), params, train, valid, **settings)
    expected = run(callback=lambda fit: jaxrnn.save_fit(tmp_path / f"{len(fit.history)}", fit))
    assert expected.converged or kind == "examples"
    for epoch in range(1, len(expected.history) + 1):
        found = jaxrnn.load_fit(tmp_path / f"{epoch}", params, optimizer, settings.get("h_0"))
        assert len(found.history) == epoch
        result = run(resume=found)
        assert result.history == expected.history
        assert result.converged == expected.converged
        assert bits((result.state, result.best)) == bits((expected.state, expected.best))
        assert not found.state.params.W_h.is_deleted()


def test_load_fit_of_an_empty_folder_is_none(params, tmp_path):
    assert jaxrnn.load_fit(tmp_path, params, ADAM) is None


def test_load_fit_of_a_file_is_an_error(params, tmp_path):
    file = tmp_path / "run"
    file.touch()
    with pytest.raises(NotADirectoryError, match="run: expected a folder, got a file"):
        jaxrnn.load_fit(file, params, optax.sgd(0.1))


def test_fit_refuses_a_checkpoint_of_another_network(params, tmp_path):
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    run = partial(jaxrnn.fit, jax.random.key(1), train=stream(), optimizer=rule, max_epochs=1)
    result = run(params=params, callback=partial(jaxrnn.save_fit, tmp_path))
    larger = jaxrnn.init(jax.random.key(0), 3, 6, 2)
    message = r"another one; 0.params.W_x: expected float32 of shape \(6, 3\)"
    with pytest.raises(CheckpointError, match=message):
        jaxrnn.load_fit(tmp_path, larger, rule)
    message = f"^{tmp_path}: .* params, optimizer, h_0 and gradient_key given, .* 0.h: expected an"
    with pytest.raises(CheckpointError, match=message):
        jaxrnn.load_fit(tmp_path, params, rule, jnp.zeros((4, 5)))
    message = r"resume: expected float32\[6, 3\] at best.W_x, .* got float32\[5, 3\]"
    with pytest.raises(ValueError, match=message):
        run(params=larger, resume=result)
    with pytest.raises(ValueError, match=r"resume: expected int32\[\] at state.opt.*, got nothing"):
        run(params=params, resume=result, optimizer=ADAM)
    half = result._replace(best=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), result.best))
    with pytest.raises(
        ValueError, match=r"resume: expected float32\[5, 3\] at best.W_x, .*bfloat16"
    ):
        run(params=params, resume=half)
    with pytest.raises(TypeError, match="resume: expected a Fit or None, got tuple"):
        run(params=params, resume=(result.state, result.best))


def test_a_fit_from_numpy_float64_resumes(tmp_path):
    """Without x64 its state is float32 from the start, its best parameters too."""
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch = Batch(jnp.ones((4, 6, 2)), jnp.zeros((4, 6), int))
    save = partial(jaxrnn.save_fit, tmp_path)
    options = {"optimizer": optax.sgd(0.1), "callback": save}
    jaxrnn.fit(jax.random.key(1), wide, batch, max_epochs=2, **options)
    found = jaxrnn.load_fit(tmp_path, wide, optax.sgd(0.1))
    result = jaxrnn.fit(jax.random.key(1), wide, batch, max_epochs=3, resume=found, **options)
    assert len(result.history) == 3
    assert result.best.W_h.dtype == jnp.float32


def test_load_fit_of_another_checkpoint_is_an_error(params, tmp_path):
    checkpoints.save(tmp_path, 3, {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of save_fit, got \['a'\]"):
        jaxrnn.load_fit(tmp_path, params, optax.sgd(0.1))


@pytest.mark.parametrize("leaf", [np.array(2**40), np.array(1e300)], ids=["integer", "float"])
def test_a_leaf_of_64_bits_is_not_narrowed(leaf):
    tree = {"seen": leaf}
    stored = to_arrays(tree)
    with pytest.raises(CheckpointError, match=r"seen.*expected jax_enable_x64 for .*64"):
        from_arrays(tree, stored)
    with jax.enable_x64(True):
        assert from_arrays(tree, stored)["seen"] == leaf


def test_what_is_stored_and_what_is_read_are_copies():
    leaf = np.zeros(4096, np.float32)
    stored = to_arrays({"leaf": leaf})
    leaf[:] = 1
    assert not stored["leaf"].any()
    for offset in range(16):  # JAX may share memory that is aligned
        memory = np.zeros(4112, np.float32)[offset : offset + 4096]
        read = from_arrays({"leaf": jnp.zeros(4096)}, {"leaf": memory})
        memory[:] = 1
        assert not read["leaf"].any()


def test_save_fit_makes_the_folders_and_keeps_as_many_as_it_is_told(params, tmp_path):
    folder = tmp_path / "a" / "b"
    callback = partial(jaxrnn.save_fit, folder, keep=3)
    fit = partial(jaxrnn.fit, jax.random.key(0), params, stream(), optimizer=optax.sgd(0.1))
    fit(max_epochs=4, callback=callback)
    assert checkpoints.saved_steps(folder) == [2, 3, 4]
    with pytest.raises(CheckpointError, match="expected no checkpoint of epoch 4 or later"):
        jaxrnn.save_fit(folder, fit(max_epochs=4))
