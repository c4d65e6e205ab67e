"""A network put through random sequences of changes and calls, against the oracle in NumPy.

Between two calls, hypothesis changes options, values, dtype, devices and parameters, or carries the
last state on. Each call draws a function and a transformation, and its value and gradient equal
those of the oracle, which uses neither JAX nor autodiff. JAXRNN_THOROUGH=1 runs more of them.
"""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from tests.reference import ACTIVATIONS, LOSSES, oracle_value_and_grad, random_case

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.02}
SHAPES = [(1, ()), (3, (2,)), (5, (2, 2)), (7, (4,))]
OPTIONS = ("mask", "reset", "weights", "h_0", "drive", "leak")


def stacked(tree, other):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), tree, other)


def by_autodiff(params, batch, h_0, *, checkpoint_every=None, **keywords):
    loss = partial(jaxrnn.sequence_loss, **keywords)
    loss = loss if checkpoint_every is None else jax.checkpoint(loss)
    return jax.value_and_grad(loss, has_aux=True)(params, batch, h_0)


def by_forward_mode(params, batch, h_0, *, checkpoint_every=None, **keywords):
    loss = partial(jaxrnn.sequence_loss, **keywords)
    grads, h_T = jax.jacfwd(loss, has_aux=True)(params, batch, h_0)
    return (loss(params, batch, h_0)[0], h_T), grads


def by_gradient_of_bptt(params, batch, h_0, **keywords):
    return jax.value_and_grad(lambda *args: jaxrnn.bptt(*args, **keywords)[0], has_aux=True)(
        params, batch, h_0
    )


def by_rtrl(params, batch, h_0, *, checkpoint_every=None, **keywords):
    del checkpoint_every  # its memory does not grow with T
    return jaxrnn.rtrl(params, batch, h_0, **keywords)


def by_two_devices(params, batch, h_0, **keywords):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    return jaxrnn.data_parallel(partial(jaxrnn.bptt, **keywords), mesh)(params, batch, h_0)


def by_update(params, batch, h_0, **keywords):
    """The gradient that one update with a learning rate of 1 subtracts."""
    rule = partial(jaxrnn.sgd, learning_rate=1.0)
    update = jaxrnn.make_update(partial(jaxrnn.bptt, **keywords), rule)
    state, metrics = update(jaxrnn.init_state(params, rule, h_0), batch)
    return (metrics.loss, state.h), jax.tree.map(jnp.subtract, params, state.params)


def mapped(gradient_fn):
    """Of two batches with other values at once; the first is returned."""

    def run(params, batch, h_0):
        flipped = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), batch)
        both = stacked(batch, flipped), None if h_0 is None else jnp.stack([h_0, -h_0])
        axes = None, 0, None if h_0 is None else 0
        result = jax.vmap(gradient_fn, in_axes=axes)(params, *both)
        return jax.tree.map(lambda leaf: leaf[0], result)

    return run


def scanned(gradient_fn):
    """In the body of a scan."""

    def run(params, batch, h_0):
        return jax.lax.map(lambda _: gradient_fn(params, batch, h_0), jnp.arange(2))

    return lambda *args: jax.tree.map(lambda leaf: leaf[1], run(*args))


def chosen(gradient_fn):
    """In a branch of a cond."""
    return lambda params, batch, h_0: jax.lax.cond(
        params.W_h[0, 0] < jnp.inf,
        gradient_fn,
        lambda *args: jax.tree.map(jnp.zeros_like, gradient_fn(*args)),
        *(params, batch, h_0),
    )


FUNCTIONS = {
    "bptt": jaxrnn.bptt,
    "autodiff": by_autodiff,
    "forward mode": by_forward_mode,
    "gradient of bptt": by_gradient_of_bptt,
    "rtrl": by_rtrl,
    "two devices": by_two_devices,
    "update": by_update,
}
TRANSFORMATIONS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.jit(mapped(f)),
    "scan": lambda f: jax.jit(scanned(f)),
    "cond": lambda f: jax.jit(chosen(f)),
}
PLACES = ("default", "batch", "time", "W_h", "explicit", "explicit, mesh not set")


changing = precondition(lambda self: self.changes < 3)
"""At most three changes come between two calls."""


class Network(RuleBasedStateMachine):
    @initialize(structure=st.integers(0, 999), shape=st.sampled_from(SHAPES))
    def start(self, structure, shape):
        self.dtype, self.place, self.structure, self.seed = "float64", "default", structure, 0
        self.fixed = dict(zip(("T", "batch_shape"), shape, strict=True)) | {
            "sizes": (3, 4, 2), "activation": "tanh", "loss": "cross_entropy", "tokens": False,
            "labels": True,
        }  # fmt: skip
        self.fixed |= dict.fromkeys(OPTIONS, False)
        self.carried, self.moved, self.changes = None, None, 0

    @changing
    @rule(option=st.sampled_from(OPTIONS))
    def toggle(self, option):
        self.changes += 1
        self.fixed[option] = not self.fixed[option]

    @changing
    @rule(name=st.sampled_from([*ACTIVATIONS, *LOSSES, "tokens", "labels"]))
    def change_structure(self, name):
        self.changes += 1
        if name in ("tokens", "labels"):
            self.fixed[name] = not self.fixed[name]
        else:
            self.fixed["activation" if name in ACTIVATIONS else "loss"] = name

    @changing
    @rule(dtype=st.sampled_from(list(TOLERANCE)), place=st.sampled_from(PLACES))
    def move(self, dtype, place):
        self.changes += 1
        self.dtype, self.place = dtype, place

    @changing
    @rule(seed=st.integers(0, 999))
    def redraw(self, seed):
        self.changes += 1
        self.seed, self.carried, self.moved = seed, None, None

    def case(self):
        """The case in float64, with values that the dtype represents."""
        case = random_case(self.structure, values=self.seed, **self.fixed)
        if self.moved is not None:
            case = case._replace(params=self.moved)
        if self.carried is not None:
            case = case._replace(h_0=self.carried)

        def rounded(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return leaf.astype(self.dtype).astype(jnp.float64)

        return jax.tree.map(lambda x: rounded(x) if hasattr(x, "dtype") else x, case)

    def placed(self, case):
        """The arguments in the dtype, on the devices of the place, or on one if they do not fit."""
        arguments = jax.tree.map(
            lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            case.arguments,
        )
        params, batch, h_0 = arguments
        explicit = self.place.startswith("explicit")
        axis = 1 if explicit else {"batch": 1, "time": 0}.get(self.place)
        steps = case.batch.xs.shape if self.fixed["tokens"] else case.batch.xs.shape[:-1]
        if axis is not None and (len(steps) <= axis or steps[axis] % 2):
            return arguments, None
        kind = AxisType.Explicit if explicit else AxisType.Auto
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
        if self.place == "W_h":
            split = jax.device_put(params.W_h, NamedSharding(mesh, P(None, "x")))
            return (params._replace(W_h=split), batch, h_0), None
        if axis is None:
            return arguments, None
        batch = jax.device_put(batch, NamedSharding(mesh, P(*[None] * axis, "x")))
        if self.place == "explicit, mesh not set":
            params = jax.device_put(params, NamedSharding(mesh, P()))
        return (params, batch, h_0), mesh if self.place == "explicit" else None

    @rule(
        function=st.sampled_from(list(FUNCTIONS)),
        transformation=st.sampled_from(list(TRANSFORMATIONS)),
        checkpoint_every=st.sampled_from([None, 2, 3]),
        then=st.sampled_from(["stay", "carry", "update"]),
    )
    def compare(self, function, transformation, checkpoint_every, then):
        self.changes, case = 0, self.case()
        if function == "two devices":  # it has a mesh of its own, and needs a batch axis
            self.place = "default"
            function = function if self.fixed["batch_shape"] else "bptt"
        if transformation == "eager" and self.place.startswith("explicit"):
            # Without a mesh, JAX's own autodiff fails; with one, after the same on an Auto mesh.
            transformation = "jit"
        keywords = dict(case.keywords, checkpoint_every=checkpoint_every)
        if case.leak is not None:
            keywords["leak"] = case.leak.astype(self.dtype)
        arguments, mesh = self.placed(case)
        call = TRANSFORMATIONS[transformation](partial(FUNCTIONS[function], **keywords))
        with jax.set_mesh(mesh) if mesh is not None else jax.numpy_dtype_promotion("standard"):
            (value, h_T), grads = call(*arguments)
        expected, expected_grads = oracle_value_and_grad(case)
        scale = max(1.0, *(float(np.abs(leaf).max()) for leaf in expected_grads))
        errors = [abs(float(value) - expected) / max(1.0, abs(expected))]
        for got, want in zip(grads, expected_grads, strict=True):
            errors.append(np.abs(np.asarray(got, np.float64) - want).max() / scale)
        print(f"{function}, {transformation}, {self.dtype}, {self.place}: {errors}")
        assert max(errors) <= TOLERANCE[self.dtype]
        if then == "carry" and h_T is not None:
            self.carried = jnp.asarray(np.asarray(h_T, np.float64))
        if then == "update":
            moved = jax.tree.map(lambda p, d: p - 0.1 * jnp.asarray(d), case.params, expected_grads)
            self.moved = moved


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("examples", "steps"), [(2, 6), pytest.param(100, 20, marks=pytest.mark.thorough)]
)
def test_every_sequence_of_changes_and_calls_agrees_with_the_oracle(examples, steps):
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Network, settings=settings)
