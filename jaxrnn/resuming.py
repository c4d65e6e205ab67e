"""From JAX's values to the named arrays of a checkpoint, and back; the same for `fit`."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import checkpoints, checks
from jaxrnn.checkpoints import CheckpointError
from jaxrnn.params import Params
from jaxrnn.training import Evaluation, Fit
from jaxrnn.update import Optimizer, init_state


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree) -> dict:
    """The leaves by their path; a dtype that NumPy does not have is part of the name."""
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "leaf"
        checks.check_array(name, leaf)
        if _is_key(leaf) or np.dtype(leaf.dtype).kind == "V":
            name = f"{name}:{leaf.dtype}"
        if name in leaves:
            raise ValueError(f"tree: expected a name for each leaf, got two of {name}")
        leaves[name] = leaf
    return leaves


def to_arrays(tree) -> dict[str, np.ndarray]:
    """A pytree's leaves as NumPy arrays, by their path in it: what `checkpoints.save` takes.

    Keys from `jax.random.key` and bfloat16 become the integers that represent them.

    Args:
      tree: a pytree of arrays, such as a TrainState.

    Returns:
      name -> array, each a copy.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: two leaves have one name.

    >>> list(to_arrays({"h": jnp.zeros(2), "key": jax.random.key(0)}))
    ['h', 'key:key<fry>']
    """

    def plain(leaf):
        if _is_key(leaf):
            return np.array(jax.random.key_data(leaf))
        array = np.array(leaf)
        return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array

    return {name: plain(leaf) for name, leaf in _named_leaves(tree).items()}


def from_arrays(like, arrays):
    """The pytree that `to_arrays` made the arrays of.

    Args:
      like: a pytree of the same structure, shapes and dtypes, such as a new `init_state`; its
        values are not read.
      arrays: what `to_arrays` returned, or `Checkpoint.arrays`.

    Returns:
      The pytree, every leaf a JAX array in memory of its own.

    Raises:
      CheckpointError: a leaf without its array, an array without its leaf, another shape or dtype.

    >>> state = {"h": jnp.arange(2.0), "key": jax.random.key(7)}
    >>> from_arrays(state, to_arrays(state))["h"].tolist()
    [0.0, 1.0]
    """

    def restore(name, leaf):
        if name not in arrays:
            raise CheckpointError(f"{name}: expected an array of that name, got {sorted(arrays)}")
        array = arrays[name]
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        elif np.dtype(leaf.dtype).kind == "V":
            array = array.view(leaf.dtype)
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise CheckpointError(
                f"{name}: expected {leaf.dtype} of shape {leaf.shape}, got {array.dtype} of shape "
                f"{array.shape}"
            )
        return jnp.array(array, copy=True)

    leaves = _named_leaves(like)
    restored = [restore(name, leaf) for name, leaf in leaves.items()]
    if unknown := sorted(arrays.keys() - leaves.keys()):
        raise CheckpointError(f"{unknown[0]}: expected no such array, got one")
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def save_fit(folder: str | os.PathLike, result: Fit, *, keep: int = 2) -> None:
    """Saves what `fit` has come to: `callback=functools.partial(save_fit, folder)`.

    Args:
      folder: where; it is made if it does not exist.
      result: the Fit that `fit` gives its callback.
      keep: how many of the newest checkpoints stay.

    Raises:
      CheckpointError: it could not be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    arrays = to_arrays((result.state, result.best)) | {"history": np.array(result.history, float)}
    checkpoints.save(folder, len(result.history), arrays, keep=keep)


def load_fit(folder: str | os.PathLike, params: Params, optimizer: Optimizer, h_0=None):
    """The newest Fit of a folder, for `fit(..., resume=)`.

    Args:
      folder: what `save_fit` was given.
      params, optimizer, h_0: what `fit` was given. Only structure and shapes are read.

    Returns:
      Fit, or None where nothing has been saved yet.

    Raises:
      CheckpointError: every checkpoint is damaged, or the newest is of other shapes.

    >>> import tempfile, optax, jaxrnn
    >>> from functools import partial
    >>> folder, optimizer = tempfile.mkdtemp(), optax.adam(1e-2)
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batches = [jaxrnn.Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))]
    >>> arguments = jax.random.key(1), params, batches
    >>> settings = {"optimizer": optimizer, "callback": partial(save_fit, folder)}
    >>> _ = jaxrnn.fit(*arguments, **settings, max_epochs=2)  # and then the machine goes away
    >>> found = load_fit(folder, params, optimizer)
    >>> len(jaxrnn.fit(*arguments, **settings, max_epochs=3, resume=found).history)
    3
    """
    found = checkpoints.newest(folder)
    if found is None:
        return None
    rows = found.arrays.pop("history")
    state, best = from_arrays((init_state(params, optimizer, h_0), params), found.arrays)
    history = [
        Evaluation(int(epoch), train_loss, valid_loss, int(skipped))
        for epoch, train_loss, valid_loss, skipped in rows.tolist()
    ]
    return Fit(state, best, history, converged=False)
