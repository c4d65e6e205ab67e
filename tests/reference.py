"""Independent implementations that the tests compare the package with.

`plain_loss` is a scan over `step` with one `where` per rule, differentiated by autodiff.
`outline_bptt` is the algorithm as one writes it on paper: NumPy, one sequence, one step at a time.
`oracle_*` uses neither JAX nor autodiff: NumPy loops, and the complex-step derivative
Im f(theta + i eps) / eps, exact to rounding (Squire and Trapp 1998).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxrnn
from jaxrnn import Batch, Params

ACTIVATIONS = {
    name: getattr(jaxrnn, name) for name in ("tanh", "relu", "sigmoid", "identity", "softplus")
}
LOSSES = {
    name: getattr(jaxrnn, name)
    for name in ("cross_entropy", "squared_error", "binary_cross_entropy")
}


def append_axes(flags, like):
    """Appends axes of length 1, so that the flags broadcast with `like`."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def plain_unroll(params, xs, h_0, mask, reset, activation, leak=None, drive=None):
    """A scan over `step`, which specifies the package's loops; mask and reset are arrays."""
    xs = jnp.where(append_axes(mask, xs), xs, jnp.zeros_like(xs))
    if drive is not None:
        drive = jnp.where(append_axes(mask, drive), drive, jnp.zeros_like(drive))

    def body(h, inputs):
        x, drive_t, valid, reset_t = inputs
        h_prev = jnp.where(reset_t[..., None], jnp.zeros_like(h), h)
        h_new, y = jaxrnn.step(params, h_prev, x, activation=activation, leak=leak, drive=drive_t)
        h = jnp.where(valid[..., None], h_new, h)
        return h, jnp.where(valid[..., None], y, jnp.zeros_like(y))

    return lax.scan(body, h_0, (xs, drive, mask, reset))


def with_defaults(params, batch, h_0):
    """The batch and h_0 with an explicit array for each field that is None."""
    shape = batch.xs.shape if jnp.issubdtype(batch.xs.dtype, jnp.integer) else batch.xs.shape[:-1]
    dtype = params.W_h.dtype
    h_0 = jnp.zeros((*shape[1:], params.W_h.shape[0]), dtype) if h_0 is None else h_0
    mask = jnp.ones(shape, bool) if batch.mask is None else batch.mask
    reset = jnp.zeros(shape, bool) if batch.reset is None else batch.reset
    weights = jnp.ones(shape, dtype) if batch.weights is None else batch.weights
    return batch._replace(mask=mask, reset=reset, weights=weights), h_0


def plain_loss(
    params, batch, h_0=None, *, activation=jaxrnn.tanh, leak=None, loss=jaxrnn.cross_entropy
):
    batch, h_0 = with_defaults(params, batch, h_0)
    h_T, ys = plain_unroll(
        params, batch.xs, h_0, batch.mask, batch.reset, activation, leak, batch.drive
    )
    targets = batch.targets
    targets = jnp.where(append_axes(batch.mask, targets), targets, jnp.zeros_like(targets))
    weights = batch.weights * batch.mask.astype(batch.weights.dtype)
    total = jnp.where(weights.sum() == 0, jnp.ones_like(weights.sum()), weights.sum())
    return (weights * loss.value(ys, targets)).sum() / total, h_T


def separate_pieces_loss(params, batch, h_0, *, loss=jaxrnn.cross_entropy):
    """The loss and last states when each piece between resets of each sequence is run by itself.

    Only valid steps are run, one `step` at a time; mask and reset are NumPy arrays.
    """
    batch_shape = batch.mask.shape[1:]
    total, h_Ts = 0.0, []
    for b in np.ndindex(*batch_shape):
        h = h_0[b]
        for t in np.flatnonzero(batch.mask[(slice(None), *b)]):
            index = (t, *b)
            h = jnp.zeros_like(h) if batch.reset[index] else h
            h, y = jaxrnn.step(params, h, batch.xs[index])
            total += loss.value(y, batch.targets[index])
        h_Ts.append(h)
    return total / max(batch.mask.sum(), 1), jnp.stack(h_Ts).reshape(*batch_shape, -1)


def outline_bptt(params, xs, labels, h_0, f, f_prime, passed_back=lambda dh, dz: dz):
    """The sums over time of the loss and of the gradient: one sequence, softmax, cross-entropy.

    `passed_back(dh, dz)` is what step t passes to step t - 1 through W_h^T: dz_t.
    """
    W_x, W_h, W_y, b_h, b_y = params
    dW_x, dW_h, dW_y, db_h, db_y = (np.zeros_like(leaf) for leaf in params)
    z, h, y_hat, loss = {}, {-1: h_0}, {}, 0.0
    for t in range(len(xs)):
        z[t] = W_x @ xs[t] + W_h @ h[t - 1] + b_h
        h[t] = f(z[t])
        y = W_y @ h[t] + b_y
        y_hat[t] = np.exp(y) / np.exp(y).sum()
        loss -= np.log(y_hat[t][labels[t]])
    from_next = np.zeros_like(b_h)
    for t in reversed(range(len(xs))):
        dy = y_hat[t] - np.eye(len(b_y))[labels[t]]
        dh = W_y.T @ dy + W_h.T @ from_next
        dz = f_prime(z[t]) * dh
        from_next = passed_back(dh, dz)
        dW_y += np.outer(dy, h[t])
        db_y += dy
        dW_x += np.outer(dz, xs[t])
        dW_h += np.outer(dz, h[t - 1])
        db_h += dz
    return loss, Params(dW_x, dW_h, dW_y, db_h, db_y)


class Case(NamedTuple):
    """A network, a batch, and the options of a run."""

    params: Params
    batch: Batch
    h_0: Any
    activation: str
    loss: str
    checkpoint_every: int | None
    leak: Any = None

    @property
    def keywords(self):
        keywords = {"activation": ACTIVATIONS[self.activation], "loss": LOSSES[self.loss]}
        return keywords if self.leak is None else keywords | {"leak": self.leak}

    @property
    def arguments(self):
        return self.params, self.batch, self.h_0


def random_case(
    structure, *, values=0, largest_T=256, largest_size=6, dtype=np.float64, **fixed
) -> Case:
    """A case with random sizes, activation, loss, batch axes, kind of inputs and options.

    The seed `structure` determines what a compiled function depends on, the seed `values` the
    values of the arrays. `fixed` replaces random choices by name. There is a leak, one for all
    units or one for each, or a drive only if `fixed` has them.
    """
    rng = np.random.default_rng(structure)

    def choose(name, options):
        choice = options[rng.integers(len(options))]
        return fixed.get(name, choice)

    T = choose("T", [1, 2, *np.exp(rng.uniform(0, np.log(largest_T), 6)).astype(int), largest_T])
    batch_shape = choose("batch_shape", [(), (1,), (3,), (2, 2)])
    I, H, O = (int(n) for n in rng.integers(1, largest_size + 1, 3))
    activation = choose("activation", ["tanh", "relu", "sigmoid", "identity"])
    loss = choose("loss", list(LOSSES))
    if loss == "cross_entropy":
        O += 1  # with one class the gradient is zero, and there is nothing to compare
    I, H, O = fixed.get("sizes", (I, H, O))
    shape = (int(T), *batch_shape)
    tokens, labels = choose("tokens", [False, True]), choose("labels", [True, True, False])
    present = {name: choose(name, [False, True]) for name in ("mask", "reset", "weights", "h_0")}
    checkpoint_every = choose("checkpoint_every", [None, None, 1, 3, 16, 300])
    rng = np.random.default_rng([structure, values])

    def normal(*size, scale=1.0):
        return (scale * rng.standard_normal(size)).astype(dtype)

    xs = normal(*shape, I)
    if tokens:
        xs = rng.integers(0, I, shape).astype(np.int32)
    targets = normal(*shape, O)
    if loss == "binary_cross_entropy":
        targets = rng.uniform(size=(*shape, O)).astype(dtype)
    if loss == "cross_entropy":
        targets = rng.dirichlet(np.ones(O), shape).astype(dtype)
        if labels:
            targets = rng.integers(0, O, shape).astype(np.int32)
    mask = rng.uniform(size=shape) < rng.uniform(0.2, 1)
    reset = rng.uniform(size=shape) < rng.uniform(0, 0.5)
    weights = rng.uniform(size=shape).astype(dtype)
    h_0 = normal(*batch_shape, H)
    params = Params(
        W_x=normal(H, I, scale=I**-0.5),
        W_h=normal(H, H, scale=0.8 * H**-0.5),
        W_y=normal(O, H, scale=H**-0.5),
        b_h=normal(H, scale=0.3),
        b_y=normal(O, scale=0.3),
    )
    batch = Batch(
        xs,
        targets,
        mask if present["mask"] else None,
        reset if present["reset"] else None,
        weights if present["weights"] else None,
        normal(*shape, H, scale=0.5) if fixed.get("drive") else None,
    )
    leak = rng.uniform(0.05, 1, H if structure % 2 else ()).astype(dtype)
    return Case(
        params=jax.tree.map(jnp.asarray, params),
        batch=jax.tree.map(jnp.asarray, batch),
        h_0=jnp.asarray(h_0) if present["h_0"] else None,
        activation=activation,
        loss=loss,
        checkpoint_every=checkpoint_every,
        leak=jnp.asarray(leak) if fixed.get("leak") else None,
    )


def relative_errors(tree, reference) -> list[float]:
    """The largest difference of each leaf, divided by the largest magnitude in the reference."""
    errors = []
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        difference = np.abs(got - want).max(initial=0.0)
        errors.append(0.0 if difference == 0 else float(difference / np.abs(want).max(initial=0)))
    return errors


NUMPY_ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda z: np.where(z.real > 0, z, 0),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
    "softplus": lambda z: np.log(1 + np.exp(z)),
}


def oracle_step_loss(loss, y, target):
    if loss == "squared_error":
        return ((y - target) ** 2).sum() / 2
    if loss == "binary_cross_entropy":
        y_hat = 1 / (1 + np.exp(-y))
        return -(target * np.log(y_hat) + (1 - target) * np.log(1 - y_hat)).sum()
    log_y_hat = y - np.log(np.exp(y).sum())
    return -log_y_hat[target] if np.ndim(target) == 0 else -(target * log_y_hat).sum()


def oracle_loss(params, case: Case):
    """The mean loss, one sequence and one step at a time; the parameters may be complex."""
    W_x, W_h, W_y, b_h, b_y = params
    batch, h_0 = with_defaults(case.params, case.batch, case.h_0)
    xs, targets, mask, reset, weights = (np.asarray(leaf) for leaf in batch[:5])
    drive = np.zeros((*mask.shape, len(b_h))) if batch.drive is None else np.asarray(batch.drive)
    leak = 1 if case.leak is None else np.asarray(case.leak)
    total, count = 0.0, 0.0
    for b in np.ndindex(mask.shape[1:]):
        h = np.asarray(h_0)[b].astype(complex)
        for t in range(mask.shape[0]):
            index = (t, *b)
            if not mask[index]:
                continue
            if reset[index]:
                h = np.zeros_like(h)
            x = np.eye(W_x.shape[1])[xs[index]] if xs.dtype == np.int32 else xs[index]
            z = W_x @ x + W_h @ h + b_h + drive[index]
            h = (1 - leak) * h + leak * NUMPY_ACTIVATIONS[case.activation](z)
            total += weights[index] * oracle_step_loss(case.loss, W_y @ h + b_y, targets[index])
            count += weights[index]
    return total / count if count else total


def oracle_value_and_grad(case: Case):
    params = [np.asarray(leaf, complex) for leaf in case.params]
    grads = [np.zeros(leaf.shape) for leaf in params]
    eps = 1e-30
    for leaf, grad in zip(params, grads, strict=True):
        for i in np.ndindex(leaf.shape):
            leaf[i] += 1j * eps
            grad[i] = np.imag(oracle_loss(params, case)) / eps
            leaf[i] -= 1j * eps
    return np.real(oracle_loss(params, case)), Params(*grads)
