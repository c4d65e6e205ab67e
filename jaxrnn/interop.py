"""Conversion of Params to and from torch, Flax and .safetensors files.

    torch:  h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)        y_t = h_t W^T + b
    Flax:   h_t = f(x_t K_i + b_i + h_{t-1} K_h)                      y_t = h_t K + b

The weights are exchanged as dictionaries of arrays; neither library is imported. Their activation,
`nonlinearity` in torch and `activation_fn` in Flax, is not among the weights: pass it as
`activation` to the functions of jaxrnn.
"""

from collections.abc import Mapping
from os import PathLike
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrnn.params import Params, check_params

__all__ = ["from_flax", "from_torch", "load_safetensors", "save_safetensors", "to_flax", "to_torch"]

Arrays: TypeAlias = dict[str, NDArray[Any]]
Weights: TypeAlias = Mapping[str, Any]
"""name -> NumPy array, JAX array or torch tensor."""


def _check_names(argument: str, weights: Weights, expected: set[str]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{argument}: expected a mapping from names to arrays, got {type(weights).__name__}"
        )
    if set(weights) != expected:
        raise ValueError(f"{argument}: expected names {sorted(expected)}, got {sorted(weights)}")


def _to_numpy(leaf: Any) -> NDArray[Any]:
    """A NumPy array; a torch tensor may be on any device, require a gradient, or be bfloat16."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        if str(leaf.dtype) == "torch.bfloat16":  # torch converts it to NumPy only by way of float32
            return np.asarray(leaf.float()).astype(jnp.bfloat16)
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # JAX has no other


def _to_params(**arrays: NDArray[Any]) -> Params:
    for name, array in arrays.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise TypeError(
                f"{name}: expected a dtype that JAX does not truncate, got {array.dtype}: enable "
                "jax_enable_x64, or convert the array first"
            )
    params = Params(**{name: jnp.asarray(array) for name, array in arrays.items()})
    check_params(params)
    return params


def from_torch(rnn: Weights, linear: Weights) -> Params:
    """Params from a `torch.nn.RNN` of one layer and the `torch.nn.Linear` after it.

        W_x = weight_ih_l0    W_h = weight_hh_l0    b_h = bias_ih_l0 + bias_hh_l0

    Args:
      rnn: the state_dict of the RNN: weight_ih_l0 (H, I), weight_hh_l0 (H, H), bias_ih_l0 (H,),
        bias_hh_l0 (H,), as torch tensors or arrays.
      linear: the state_dict of the Linear: weight (O, H), bias (O,).

    Returns:
      Params of the same dtype.

    Raises:
      TypeError, ValueError: the names, shapes or dtypes do not match.

    >>> ones = np.ones((1, 1), np.float32)
    >>> rnn = {"weight_ih_l0": ones, "weight_hh_l0": ones, "bias_ih_l0": ones[0],
    ...        "bias_hh_l0": ones[0]}
    >>> from_torch(rnn, {"weight": ones, "bias": ones[0]}).b_h.tolist()
    [2.0]
    """
    _check_names("rnn", rnn, {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"})
    _check_names("linear", linear, {"weight", "bias"})
    return _to_params(
        W_x=_to_numpy(rnn["weight_ih_l0"]),
        W_h=_to_numpy(rnn["weight_hh_l0"]),
        W_y=_to_numpy(linear["weight"]),
        b_h=_to_numpy(rnn["bias_ih_l0"]) + _to_numpy(rnn["bias_hh_l0"]),
        b_y=_to_numpy(linear["bias"]),
    )


def to_torch(params: Params) -> tuple[Arrays, Arrays]:
    """The inverse of `from_torch`, with zeros as bias_hh_l0.

    `rnn.load_state_dict(jax.tree.map(torch.from_numpy, weights))` loads a dictionary into torch.
    `torch.from_numpy` does not accept bfloat16: convert such params to float32, which is exact.

    Args:
      params: Params.

    Returns:
      The arrays of the RNN and of the Linear, as `from_torch` takes them.

    Raises:
      TypeError, ValueError: params are not valid Params.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> rnn, linear = to_torch(params)
    >>> rnn["weight_ih_l0"].shape, linear["weight"].shape
    ((5, 3), (2, 5))
    """
    W_x, W_h, W_y, b_h, b_y = _to_arrays(params)
    rnn = {
        "weight_ih_l0": W_x,
        "weight_hh_l0": W_h,
        "bias_ih_l0": b_h,
        "bias_hh_l0": np.zeros_like(b_h),
    }
    return rnn, {"weight": W_y, "bias": b_y}


def from_flax(cell: Mapping[str, Weights], dense: Weights) -> Params:
    """Params from a Flax `SimpleCell` (without `residual`) and the `Dense` after it.

        W_x = K_i^T        W_h = K_h^T        b_h = b_i        W_y = K^T

    Args:
      cell: {"i": {"kernel": (I, H), "bias": (H,)}, "h": {"kernel": (H, H)}}, as in Flax linen;
        the entries dense_i and dense_h of NNX, under these names.
      dense: {"kernel": (H, O), "bias": (O,)}.

    Returns:
      Params of the same dtype.

    Raises:
      TypeError, ValueError: the names, shapes or dtypes do not match.

    >>> ones = np.ones((1, 1), np.float32)
    >>> cell = {"i": {"kernel": ones, "bias": ones[0]}, "h": {"kernel": 2 * ones}}
    >>> from_flax(cell, {"kernel": ones, "bias": ones[0]}).W_h.tolist()
    [[2.0]]
    """
    _check_names("cell", cell, {"i", "h"})
    _check_names("cell['i']", cell["i"], {"kernel", "bias"})
    _check_names("cell['h']", cell["h"], {"kernel"})
    _check_names("dense", dense, {"kernel", "bias"})
    return _to_params(
        W_x=_to_numpy(cell["i"]["kernel"]).T,
        W_h=_to_numpy(cell["h"]["kernel"]).T,
        W_y=_to_numpy(dense["kernel"]).T,
        b_h=_to_numpy(cell["i"]["bias"]),
        b_y=_to_numpy(dense["bias"]),
    )


def to_flax(params: Params) -> tuple[dict[str, Arrays], Arrays]:
    """The inverse of `from_flax`.

    Args:
      params: Params.

    Returns:
      The arrays of the SimpleCell and of the Dense, as `from_flax` takes them.

    Raises:
      TypeError, ValueError: params are not valid Params.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> cell, dense = to_flax(params)
    >>> cell["i"]["kernel"].shape, dense["kernel"].shape
    ((3, 5), (5, 2))
    """
    W_x, W_h, W_y, b_h, b_y = _to_arrays(params)
    K_i, K_h, K = map(np.ascontiguousarray, (W_x.T, W_h.T, W_y.T))
    return {"i": {"kernel": K_i, "bias": b_h}, "h": {"kernel": K_h}}, {"kernel": K, "bias": b_y}


def _to_arrays(params: Params) -> list[NDArray[Any]]:
    """Copies in C order: safetensors writes the buffer, and torch warns of a read-only view."""
    check_params(params)
    return [np.array(leaf, order="C") for leaf in params]


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the safetensors package is needed to read and write .safetensors files: "
            "pip install safetensors"
        ) from error
    return safetensors.numpy


def save_safetensors(params: Params, path: str | PathLike[str]) -> None:
    """Writes params to a .safetensors file, under the names W_x, W_h, W_y, b_h, b_y.

    Args:
      params: Params.
      path: the file; an existing one is replaced.

    Raises:
      ModuleNotFoundError: the safetensors package is not installed.
      TypeError, ValueError: params are not valid Params.
      safetensors.SafetensorError: the file cannot be written.
    """
    arrays = dict(zip(Params._fields, _to_arrays(params), strict=True))
    _import_safetensors().save_file(arrays, path)


def load_safetensors(path: str | PathLike[str]) -> Params:
    """Reads a file that `save_safetensors` wrote.

    Args:
      path: the file.

    Returns:
      Params of the dtype in the file.

    Raises:
      ModuleNotFoundError: the safetensors package is not installed.
      TypeError, ValueError: the names, shapes or dtypes are not those of Params.
      safetensors.SafetensorError: the file is not a complete .safetensors file.
      FileNotFoundError: there is no such file.
    """
    weights = _import_safetensors().load_file(path)
    _check_names(str(path), weights, set(Params._fields))
    return _to_params(**weights)
