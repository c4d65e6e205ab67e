"""What the package is judged against, each derived in another way than the package does it.

`plain_loss` is a scan over `step` with one `where` for each rule; autodiff does the rest.
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

ACTIVATIONS = {name: getattr(jaxrnn, name) for name in ("tanh", "relu", "sigmoid", "identity")}
LOSSES = {
    name: getattr(jaxrnn, name)
    for name in ("cross_entropy", "squared_error", "binary_cross_entropy")
}


def expand(flags, like):
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def plain_unroll(params, xs, h_0, mask, reset, activation):
    """A scan over `step`: the specification. mask and reset are arrays."""
    xs = jnp.where(expand(mask, xs), xs, jnp.zeros_like(xs))

    def body(h, now):
        x, exists, cut = now
        before = jnp.where(cut[..., None], jnp.zeros_like(h), h)
        h_new, y = jaxrnn.step(params, before, x, activation=activation)
        h = jnp.where(exists[..., None], h_new, h)
        return h, jnp.where(exists[..., None], y, jnp.zeros_like(y))

    return lax.scan(body, h_0, (xs, mask, reset))


def filled(params, batch, h_0):
    """The same batch and state with every default written out."""
    shape = batch.xs.shape if jnp.issubdtype(batch.xs.dtype, jnp.integer) else batch.xs.shape[:-1]
    dtype = params.W_h.dtype
    h_0 = jnp.zeros((*shape[1:], params.W_h.shape[0]), dtype) if h_0 is None else h_0
    mask = jnp.ones(shape, bool) if batch.mask is None else batch.mask
    reset = jnp.zeros(shape, bool) if batch.reset is None else batch.reset
    weights = jnp.ones(shape, dtype) if batch.weights is None else batch.weights
    return Batch(batch.xs, batch.targets, mask, reset, weights), h_0


def plain_loss(params, batch, h_0=None, *, activation=jaxrnn.tanh, loss=jaxrnn.cross_entropy):
    batch, h_0 = filled(params, batch, h_0)
    h_T, ys = plain_unroll(params, batch.xs, h_0, batch.mask, batch.reset, activation)
    targets = batch.targets
    targets = jnp.where(expand(batch.mask, targets), targets, jnp.zeros_like(targets))
    counts = batch.weights * batch.mask.astype(batch.weights.dtype)
    total = jnp.where(counts.sum() == 0, jnp.ones_like(counts.sum()), counts.sum())
    return (counts * loss.value(ys, targets)).sum() / total, h_T


def pieces_apart(params, batch, h_0, *, loss=jaxrnn.cross_entropy):
    """Loss and last states, each sequence alone, each piece between resets alone, only the steps
    that exist, one `step` after the other; mask and reset are NumPy arrays."""
    batch_shape = batch.mask.shape[1:]
    total, h_Ts = 0.0, []
    for b in np.ndindex(*batch_shape):
        h = h_0[b]
        for t in np.flatnonzero(batch.mask[(slice(None), *b)]):
            at = (t, *b)
            h = jnp.zeros_like(h) if batch.reset[at] else h
            h, y = jaxrnn.step(params, h, batch.xs[at])
            total += loss.value(y, batch.targets[at])
        h_Ts.append(h)
    return total / max(batch.mask.sum(), 1), jnp.stack(h_Ts).reshape(*batch_shape, -1)


class Case(NamedTuple):
    """A network, a batch, and how to run it."""

    params: Params
    batch: Batch
    h_0: Any
    activation: str
    loss: str
    checkpoint_every: int | None

    @property
    def keywords(self):
        return {"activation": ACTIVATIONS[self.activation], "loss": LOSSES[self.loss]}

    @property
    def arguments(self):
        return self.params, self.batch, self.h_0


def random_case(
    structure, *, values=0, largest_T=256, largest_size=6, dtype=np.float64, **fixed
) -> Case:
    """Any sizes, activation, loss, batch axes, tokens or numbers, with or without each option.

    `structure` draws all that is compiled, `values` all that is not; `fixed` overrides by name.
    """
    rng = np.random.default_rng(structure)

    def choose(name, options):
        drawn = options[rng.integers(len(options))]
        return fixed.get(name, drawn)

    T = choose("T", [1, 2, *np.exp(rng.uniform(0, np.log(largest_T), 6)).astype(int), largest_T])
    batch_shape = choose("batch_shape", [(), (1,), (3,), (2, 2)])
    I, H, O = (int(n) for n in rng.integers(1, largest_size + 1, 3))
    activation = choose("activation", list(ACTIVATIONS))
    loss = choose("loss", list(LOSSES))
    if loss == "cross_entropy":
        O += 1  # over one class there is no gradient, and nothing to compare
    I, H, O = fixed.get("sizes", (I, H, O))
    shape = (int(T), *batch_shape)
    tokens, labels = choose("tokens", [False, True]), choose("labels", [True, True, False])
    given = {name: choose(name, [False, True]) for name in ("mask", "reset", "weights", "h_0")}
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
        mask if given["mask"] else None,
        reset if given["reset"] else None,
        weights if given["weights"] else None,
    )
    return Case(
        params=jax.tree.map(jnp.asarray, params),
        batch=jax.tree.map(jnp.asarray, batch),
        h_0=jnp.asarray(h_0) if given["h_0"] else None,
        activation=activation,
        loss=loss,
        checkpoint_every=checkpoint_every,
    )


def relative_errors(tree, reference) -> list[float]:
    """For each leaf, the largest difference over the reference's largest magnitude."""
    errors = []
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        difference = np.abs(got - want).max(initial=0.0)
        errors.append(0.0 if difference == 0 else float(difference / np.abs(want).max(initial=0)))
    return errors


F = {
    "tanh": np.tanh,
    "relu": lambda z: np.where(z.real > 0, z, 0),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
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
    """The mean loss, one sequence and one step at a time; parameters may be complex."""
    W_x, W_h, W_y, b_h, b_y = params
    filled_batch, h_0 = filled(case.params, case.batch, case.h_0)
    xs, targets, mask, reset, weights = (np.asarray(leaf) for leaf in filled_batch)
    total, count = 0.0, 0.0
    for b in np.ndindex(mask.shape[1:]):
        h = np.asarray(h_0)[b].astype(complex)
        for t in range(mask.shape[0]):
            at = (t, *b)
            if not mask[at]:
                continue
            if reset[at]:
                h = np.zeros_like(h)
            x = np.eye(W_x.shape[1])[xs[at]] if xs.dtype == np.int32 else xs[at]
            h = F[case.activation](W_x @ x + W_h @ h + b_h)
            total += weights[at] * oracle_step_loss(case.loss, W_y @ h + b_y, targets[at])
            count += weights[at]
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
