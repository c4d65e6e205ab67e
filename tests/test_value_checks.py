"""`check_values` and `mask_from_lengths`: what only values show is named with its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Activation, Batch
from tests.test_checks import BATCH, KEY, LABELS, NAN, PARAMS, RULE, XS, B, H, O, T, numpy_xs, zeros

EYE = np.eye(4, dtype=int)
HALF = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)


def check_values(**fields):
    return lambda: jaxrnn.check_values(PARAMS, BATCH._replace(**fields))


def lengths(values, T=T):
    return lambda: jaxrnn.mask_from_lengths(values, T)


WRONG = {
    "label too large": (
        check_values(targets=LABELS.at[3, 1].set(2)),
        ValueError, r"targets: expected integers in \[0, 2\).*got 2 at \(3, 1\); 1 of 28",
    ),
    "label -1": (check_values(targets=LABELS - 1), ValueError, r"targets: .*got -1.*28 of 28"),
    "token too large": (
        check_values(xs=LABELS.at[0, 2].set(3)), ValueError, r"xs: .*\[0, 3\).*got 3 at \(0, 2\)"
    ),
    "token below 0": (check_values(xs=LABELS - 7), ValueError, r"xs: .*got -7"),
    "NaN in xs": (check_values(xs=NAN), ValueError, r"xs: expected finite.*nan at \(2, 1, 0\)"),
    "infinite target": (
        check_values(targets=zeros(T, B, O) + jnp.inf), ValueError, r"targets: .*finite.*inf"
    ),
    "weights below 0": (check_values(weights=zeros(T, B) - 1), ValueError, r"weights: .*-1.0"),
    "weights NaN": (check_values(weights=zeros(T, B) * jnp.nan), ValueError, r"weights: .*finite"),
    "mask of numbers": (check_values(mask=np.ones((T, B))), TypeError, r"mask: .*bool.*float64"),
    "mask of integers": (check_values(mask=LABELS), TypeError, r"mask: expected bool, got int32"),
    "mask of other steps": (
        check_values(mask=np.ones((T, 1), bool)), ValueError, r"mask: expected shape \(7, 4\)"
    ),
    "reset of numbers": (check_values(reset=XS[..., 0]), TypeError, r"reset: expected bool.*float"),
    "labels of text": (
        check_values(targets=np.full((T, B), "a")), TypeError, r"targets: expected real .* got <U1"
    ),
    "complex targets": (
        check_values(targets=np.ones((T, B, 2), "c8")), TypeError, r"targets: .* got complex64"
    ),
    "labels of objects": (
        check_values(targets=np.full((T, B), None)), TypeError, r"targets: .*numbers, got object"
    ),
    "labels of dates": (
        check_values(targets=np.zeros((T, B), "M8[s]")), TypeError, r"targets: .*got datetime64"
    ),
    "values of list": (check_values(xs=[[1.0]]), TypeError, r"xs: expected an array, got list"),
    "values of bool": (check_values(xs=XS > 0), TypeError, r"xs: expected a floating-point.*bool"),
    "values without batch": (check_values(targets=LABELS[0]), ValueError, r"targets: .*got \(4,\)"),
    "values of tuple": (
        lambda: jaxrnn.check_values(PARAMS, (XS, LABELS)), TypeError, r"batch: expected Batch"
    ),
    "values for no params": (
        lambda: jaxrnn.check_values(None, BATCH), TypeError, r"params: .*got an empty NoneType"
    ),
    "NaN in parameters": (
        lambda: jaxrnn.check_values(PARAMS._replace(b_h=zeros(H) + jnp.nan), BATCH),
        ValueError, r"params.b_h: expected finite numbers, got nan at \(0,\); 5 of 5 are not",
    ),
    "infinite state": (
        lambda: jaxrnn.check_values(PARAMS, BATCH, zeros(B, H) - jnp.inf),
        ValueError, r"h_0: expected finite numbers, got -inf at \(0, 0\); 20 of 20",
    ),
    "state as a list": (
        lambda: jaxrnn.check_values(PARAMS, BATCH, [[0.0] * H]),
        TypeError, r"h_0\[0\]\[0\]: expected an array, got float",
    ),
    "state of another H": (
        lambda: jaxrnn.check_values(PARAMS, BATCH, zeros(B, 9)), ValueError, r"h_0: .*got \(4, 9\)"
    ),
    "label beyond int32": (
        check_values(targets=np.full((T, B), 2**40 + 1)), ValueError, r"targets: .*got 10995116277"
    ),
    "token of uint64": (
        check_values(xs=np.full((T, B), 2**63, np.uint64)), ValueError, r"xs: .*got 922337203685477"
    ),
    "count beyond int32": (
        check_values(targets=np.full((T, B, O), 2**40 + 5)),
        ValueError, r"targets: expected values that fit int32.*1099511627781 at .* becomes 5",
    ),
    "float64 beyond float32": (
        check_values(xs=numpy_xs(1e300)),
        ValueError, r"xs: expected .* fit float32, .*1e\+300 at \(2, 1, 0\).* inf; 1 of 84",
    ),
    "float64 rounded": (
        check_values(xs=numpy_xs(2.0**24 + 1)),
        UserWarning, r"xs: .*float32.*16777217.0 at .* becomes 16777216.0.*astype",
    ),
    "weights rounded": (
        check_values(weights=np.full((T, B), 0.1)), UserWarning, r"weights: .*0.1.*28 of 28 change"
    ),
    "negative weight": (
        check_values(weights=zeros(T, B).at[2, 3].set(-1)),
        ValueError, r"weights: expected none below 0, got -1.0 at \(2, 3\)",
    ),
    "weights whose sum is infinite": (
        check_values(weights=zeros(T, B) + 2e37),
        ValueError, r"weights: expected a sum and a maximum that fit float32, got 5\.\d*e\+38",
    ),
    "xs beyond float16": (
        lambda: jaxrnn.check_values(HALF, BATCH._replace(xs=XS.at[2, 1, 0].set(-7e4))),
        ValueError, r"xs: .*fit float16, which follows .*, got -70000.0 at \(2, 1, 0\); 1 of 84",
    ),
    "drive beyond float16": (
        lambda: jaxrnn.check_values(HALF, BATCH._replace(drive=zeros(T, B, H) + 7e4)),
        ValueError, r"drive: .*float16.* 140 of 140 do not fit",
    ),
    "h_0 beyond float16": (
        lambda: jaxrnn.check_values(HALF, BATCH, zeros(B, H) + 7e4), ValueError, r"h_0: .*float16"
    ),
    "one-hot rows as integers": (
        lambda: jaxrnn.check_values(jaxrnn.init(jax.random.key(0), 4, H, 4), Batch(EYE, EYE)),
        UserWarning, r"xs: integers of shape \(4, 4\) are tokens, .* Convert features with",
    ),
    "length beyond T": (
        lengths(jnp.array([3, 8, 9])), ValueError, r"lengths: .*\(0..T\), got 8 at \(1,\); 2 of 3"
    ),
    "length below 0": (lengths(np.array(-1)), ValueError, r"lengths: .*got -1 at \(\); 1 of 1"),
    "length of bool": (lengths(np.array([True])), TypeError, r"lengths: .*integers, got bool"),
    "T of float": (lengths(np.array([1]), 2.5), TypeError, r"T: expected an integer.*got 2.5"),
    "T below 0": (lengths(np.array([0]), -1), ValueError, r"T: .*at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_a_wrong_value_is_named(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match="^" + message):
        call()


def test_values_that_the_mask_excludes_are_not_checked():
    mask = jnp.ones((T, B), bool).at[2, 1].set(False)
    bad = Batch(NAN, LABELS.at[2, 1].set(99), mask=mask, weights=jnp.where(mask, 1.0, jnp.nan))
    jaxrnn.check_values(PARAMS, bad)


def test_targets_and_weights_beyond_float16_are_used_in_float32():
    batch = BATCH._replace(targets=zeros(T, B, O) + 7e4, weights=zeros(T, B) + 7e4)
    jaxrnn.check_values(HALF, batch)


def test_the_sum_of_weights_leaves_out_what_the_mask_excludes():
    mask = jnp.zeros((T, B), bool).at[0, 0].set(True)
    jaxrnn.check_values(PARAMS, BATCH._replace(weights=zeros(T, B) + 1e38, mask=mask))


@pytest.mark.parametrize("weight", [1e300, 1e-60, 1e-38])
def test_weights_of_float64_fit_the_dtype_of_the_loss(weight):
    with jax.enable_x64(True):
        batch = BATCH._replace(weights=jnp.full((T, B), weight))
        with pytest.raises(
            ValueError, match=r"^weights: expected a sum and a maximum that fit float32"
        ):
            jaxrnn.check_values(PARAMS, batch)
        jaxrnn.check_values(jax.tree.map(lambda leaf: leaf.astype(float), PARAMS), batch)


def test_a_warning_names_the_line_that_called():
    with pytest.warns(UserWarning, match="float32") as caught:
        jaxrnn.check_values(PARAMS, BATCH._replace(weights=np.full((T, B), 0.1)))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid", "identity", "softplus"])
def test_the_derivatives_of_the_activations_pass_their_check(name):
    jaxrnn.check_values(PARAMS, BATCH, activation=getattr(jaxrnn, name))
    jaxrnn.check_values(PARAMS, BATCH, activation=Activation(jax.nn.gelu))
    jaxrnn.check_values(PARAMS, BATCH, activation=Activation(jnp.sqrt, lambda h: 0.5 / h))


@pytest.mark.parametrize(
    "activation",
    [
        Activation(jax.nn.gelu, jaxrnn.relu.df),
        Activation(jnp.tanh, lambda h: 1 - h),
        Activation(jnp.tanh, lambda h: h * jnp.nan),
    ],
)
def test_a_df_that_is_not_the_derivative_of_f_is_named(activation):
    with pytest.raises(ValueError, match=r"^activation.df: expected f'\(z\) = .* at z = "):
        jaxrnn.check_values(PARAMS, BATCH, activation=activation)


@pytest.mark.parametrize("f", [lambda z: z - z.mean(), lambda z: z / jnp.linalg.norm(z)])
def test_an_f_that_is_not_elementwise_is_named(f):
    with pytest.raises(ValueError, match=r"^activation.f: expected an elementwise function, got"):
        jaxrnn.check_values(PARAMS, BATCH, activation=Activation(f))


@pytest.mark.parametrize("loss", [jaxrnn.cross_entropy, jaxrnn.squared_error])
def test_the_error_of_a_loss_is_checked_where_steps_exist(loss):
    targets = LABELS if loss is jaxrnn.cross_entropy else jnp.full((T, B, O), 0.3)
    batch = BATCH._replace(targets=targets, mask=jnp.ones((T, B), bool).at[1, 2].set(False))
    if loss is jaxrnn.squared_error:
        batch = batch._replace(targets=targets.at[1, 2].set(jnp.nan))
    jaxrnn.check_values(PARAMS, batch, loss=loss)
    for error in (lambda y, target: loss.g(y), lambda y, target: 2 * loss.error(y, target)):
        with pytest.raises(ValueError, match=r"^loss.error: expected dl/dy = .* at y = .*, got"):
            jaxrnn.check_values(PARAMS, batch, loss=loss._replace(error=error))


@pytest.mark.parametrize("function", [jax.jit, jax.grad], ids=["jit", "grad"])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda p: jaxrnn.evaluate(p, BATCH), "params"),
        (lambda p: jaxrnn.evaluate(PARAMS, BATCH._replace(drive=zeros(T, B, H) + p.b_h)), "batch"),
        (lambda p: jaxrnn.fit(KEY, p, BATCH, optimizer=RULE).state.params.b_y[0], "params"),
        (lambda p: jaxrnn.check_values(p, BATCH), "params"),
    ],
    ids=["evaluate", "evaluate batch", "fit", "check_values"],
)
def test_traced_values_are_refused_where_the_host_reads_them(call, name, function):
    """The primal value of a traced loss would have a gradient of zeros."""
    with pytest.raises(TypeError, match=rf"^{name}.*: expected arrays with values, got traced"):
        function(call)(PARAMS)


def test_a_state_may_hold_a_key_and_a_target_must_fit_its_dtype():
    jaxrnn.check_values(PARAMS, BATCH, {"key": KEY})
    tiny = np.full((T, B), np.finfo(np.float32).tiny, np.float32)
    jaxrnn.check_values(PARAMS, BATCH._replace(weights=tiny))
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"^targets: .* that fit float32"):
        jaxrnn.check_values(PARAMS, BATCH._replace(targets=jnp.full((T, B, O), 1e300)))
    with pytest.raises(TypeError, match=r"^activation: expected an Activation"):
        jaxrnn.check_values(PARAMS, BATCH, activation=jnp.tanh)


def test_one_hot_rows_of_three_warn_and_tokens_are_called_tokens():
    rows = np.eye(3, dtype=int)
    with pytest.warns(UserWarning, match="^xs: integers of shape"):
        jaxrnn.check_values(jaxrnn.init(KEY, 3, H, 3), Batch(rows, rows))
    with pytest.raises(ValueError, match="I tokens"):
        jaxrnn.check_values(PARAMS, Batch(np.full((T, B), 3), LABELS))


def test_the_error_of_a_loss_is_checked_for_targets_split_by_explicit_sharding():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))
    targets = jax.device_put(LABELS, NamedSharding(mesh, P(None, "batch")))
    batch = BATCH._replace(targets=targets)
    jaxrnn.check_values(PARAMS, batch, loss=jaxrnn.cross_entropy)
    wrong = jaxrnn.cross_entropy._replace(error=lambda y, target: y)
    with pytest.raises(ValueError, match=r"^loss.error: expected dl/dy"):
        jaxrnn.check_values(PARAMS, batch, loss=wrong)
