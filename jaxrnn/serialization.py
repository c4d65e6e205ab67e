"""Pytrees and results of `fit` as the named arrays of a checkpoint, and back."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checkpoints, checks
from jaxrnn.checkpoints import CheckpointError
from jaxrnn.gradients import PyTree
from jaxrnn.training import Evaluation, Fit
from jaxrnn.update import Optimizer, init_state

__all__ = ["from_arrays", "load_fit", "save_fit", "to_arrays"]


def _is_extension(dtype: DTypeLike) -> bool:
    """Whether NumPy lacks the dtype, such as bfloat16. It is stored as unsigned integers."""
    return np.dtype(dtype).isbuiltin == 2


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path. A dtype that NumPy lacks is part of the name."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "leaf"
        checks.check_array(name, leaf)
        if checks.is_key(leaf) or _is_extension(leaf.dtype):
            name = f"{name}:{leaf.dtype}"
        if name in leaves:
            raise ValueError(f"tree: expected a name for each leaf, got two of {name}")
        leaves[name] = leaf
    return leaves


def to_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves of a pytree as NumPy arrays, named by their path, for `checkpoints.save`.

    Keys from `jax.random.key` and bfloat16 numbers become the integers that represent them. If
    arrays span processes, every process must call this function, and gets all values.

    Args:
      tree: a pytree of arrays, such as a TrainState.

    Returns:
      name -> array, each a copy.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: two leaves have the same name.

    >>> list(to_arrays({"h": jnp.zeros(2), "key": jax.random.key(0)}))
    ['h', 'key:key<fry>']
    """

    def to_numpy(leaf: Any) -> np.ndarray:
        if checks.is_key(leaf):
            leaf = jax.random.key_data(leaf)
        array = np.array(checks.to_numpy(leaf))
        return array.view(f"u{array.itemsize}") if _is_extension(array.dtype) else array

    return {name: to_numpy(leaf) for name, leaf in _named_leaves(tree).items()}


def from_arrays(like: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    """The inverse of `to_arrays`.

    Args:
      like: a pytree of the same structure, shapes and dtypes, such as a new `init_state`. Its
        values are not read.
      arrays: the result of `to_arrays`, or `Checkpoint.arrays`.

    Returns:
      The pytree. Each leaf is a new JAX array.

    Raises:
      CheckpointError: names, shapes or dtypes differ from those of `like`, or JAX does not keep a
        dtype of 64 bits.
      TypeError, ValueError: a leaf of `like` is not an array, or two have the same name.

    >>> state = {"h": jnp.arange(2.0), "key": jax.random.key(7)}
    >>> from_arrays(state, to_arrays(state))["h"].tolist()
    [0.0, 1.0]
    """

    def restore(name: str, leaf: Any) -> Array:
        if name not in arrays:
            raise CheckpointError(f"{name}: expected an array of that name, got {sorted(arrays)}")
        array = arrays[name]
        stored: Any = jax.eval_shape(jax.random.key_data, leaf) if checks.is_key(leaf) else leaf
        dtype = np.dtype(stored.dtype)
        if _is_extension(dtype):
            dtype = np.dtype(f"u{dtype.itemsize}")
        if array.shape != stored.shape or array.dtype != dtype:
            raise CheckpointError(
                f"{name}: expected {dtype} of shape {stored.shape}, got {array.dtype} of shape "
                f"{array.shape}"
            )
        kept = jax.dtypes.canonicalize_dtype(array.dtype)
        if kept != array.dtype:
            raise CheckpointError(
                f"{name}: expected jax_enable_x64 for {array.dtype}, which JAX makes {kept} without"
            )
        if checks.is_key(leaf):
            return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(leaf))
        return jnp.array(array.view(leaf.dtype), copy=True)

    leaves = _named_leaves(like)
    restored = [restore(name, leaf) for name, leaf in leaves.items()]
    if unknown := sorted(arrays.keys() - leaves.keys()):
        raise CheckpointError(f"{unknown[0]}: expected no array of that name, got one")
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def save_fit(folder: str | os.PathLike[str], result: Fit, *, keep: int = 2) -> None:
    """Saves a Fit: `callback=functools.partial(save_fit, folder)`.

    If arrays span processes, every process must call this function, and process 0 writes.

    Args:
      folder: the folder to save to; created if it does not exist.
      result: the Fit that `fit` passes to its callback.
      keep: the number of newest checkpoints to keep.

    Raises:
      CheckpointError: the folder holds this epoch or a later one, of a run that was not resumed; or
        the file cannot be written.
      OSError: the folder cannot be created.
      TypeError: result is not a Fit, or keep not an integer.
      ValueError: keep is below 1; two paths in the pytree are equal; or one is not 1 to 200
        printable ASCII characters without space, / and \\.
    """
    if not isinstance(result, Fit):
        raise TypeError(f"result: expected a Fit, got {type(result).__name__}")
    checks.check_size("keep", keep)
    arrays = to_arrays((result.state, result.best)) | {"history": np.array(result.history, float)}
    leaves = jax.tree.leaves((result.state, result.best))
    shared = any(isinstance(x, Array) and not x.is_fully_addressable for x in leaves)
    if shared and jax.process_index() > 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    epoch = len(result.history)
    for saved in checkpoints.saved_steps(folder):
        path = checkpoints.checkpoint_path(folder, saved)
        if saved >= epoch and _is_readable(path):
            raise CheckpointError(
                f"{folder}: expected no checkpoint of epoch {epoch} or later, got {path.name}: "
                "continue that run with fit(resume=load_fit(...)), or use another folder"
            )
    checkpoints.save(folder, epoch, arrays, keep=keep)


def _is_readable(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        checkpoints.load(path)
        return True
    return False


def load_fit(
    folder: str | os.PathLike[str],
    params: PyTree,
    optimizer: Optimizer,
    h_0: PyTree = None,
    *,
    gradient_key: Array | None = None,
) -> Fit | None:
    """The newest Fit in a folder, for `fit(..., resume=)`.

    Args:
      folder: the folder given to `save_fit`.
      params, optimizer, h_0, gradient_key: as given to `fit`. Only structure, shapes and dtypes are
        read.

    Returns:
      Fit, or None if the folder holds no checkpoint. `converged` is False until `fit` resumes it.

    Raises:
      CheckpointError: every checkpoint is damaged, or the newest has other shapes or dtypes.
      NotADirectoryError: the folder is a file.
      TypeError: params or optimizer do not fit, as in `init_state`.

    Warns:
      UserWarning: a newer checkpoint is damaged.

    >>> import tempfile, optax, jaxrnn
    >>> from functools import partial
    >>> params, optimizer = jaxrnn.init(jax.random.key(0), 3, 5, 2), optax.adam(1e-2)
    >>> batches = [jaxrnn.Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))]
    >>> arguments = jax.random.key(1), params, batches
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     settings = {"optimizer": optimizer, "callback": partial(save_fit, folder)}
    ...     _ = jaxrnn.fit(*arguments, **settings, max_epochs=2)  # then the process ends
    ...     found = load_fit(folder, params, optimizer)
    ...     print(len(jaxrnn.fit(*arguments, **settings, max_epochs=3, resume=found).history))
    3
    """
    found = checkpoints.newest(folder)
    if found is None:
        if Path(folder).is_file():
            raise NotADirectoryError(f"{folder}: expected a folder, got a file")
        return None
    arrays = dict(found.arrays)
    if "history" not in arrays:
        raise CheckpointError(f"{folder}: expected a checkpoint of save_fit, got {sorted(arrays)}")
    rows = arrays.pop("history")
    initial = init_state(params, optimizer, h_0, key=gradient_key)
    like = initial, initial.params
    try:
        state, best = from_arrays(like, arrays)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: expected a state of the params, optimizer, h_0 and gradient_key given, got "
            f"another one; {error}"
        ) from None
    history = tuple(
        Evaluation(int(epoch), train_loss, valid_loss, int(skipped))
        for epoch, train_loss, valid_loss, skipped in rows.tolist()
    )
    return Fit(state, best, history, converged=False)
