"""Params to and from other libraries, as dictionaries of NumPy arrays, without importing any.

    torch:  h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)        y_t = h_t W^T + b
    Flax:   h_t = f(x_t K_i + b_i + h_{t-1} K_h)                      y_t = h_t K + b

The activation is not in their dictionaries: torch's `nonlinearity` and Flax's `activation_fn` are
`activation` here.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.params import Params, check_params

Weights = Mapping[str, Any]


def _check_names(name: str, weights: Weights, expected: set[str]) -> None:
    if set(weights) != expected:
        raise ValueError(f"{name}: expected the names {sorted(expected)}, got {sorted(weights)}")


def _params(**weights) -> Params:
    arrays = {name: np.asarray(leaf) for name, leaf in weights.items()}
    for name, leaf in arrays.items():
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(
                f"{name}: expected a dtype that JAX keeps, got {leaf.dtype}: turn jax_enable_x64 "
                "on, or convert it before"
            )
    params = Params(**{name: jnp.asarray(leaf) for name, leaf in arrays.items()})
    check_params(params)
    return params


def from_torch(rnn: Weights, linear: Weights) -> Params:
    """Params of a `torch.nn.RNN` of one layer and the `torch.nn.Linear` that reads it out.

        W_x = weight_ih_l0    W_h = weight_hh_l0    b_h = bias_ih_l0 + bias_hh_l0

    Args:
      rnn: the layer's state_dict: weight_ih_l0 (H, I), weight_hh_l0 (H, H), bias_ih_l0 (H,),
        bias_hh_l0 (H,), torch tensors or NumPy arrays.
      linear: weight (O, H), bias (O,).

    Returns:
      Params, in the dtype that came.

    Raises:
      TypeError, ValueError: names, shapes or dtypes other than these.

    >>> ones = np.ones((1, 1), np.float32)
    >>> rnn = {"weight_ih_l0": ones, "weight_hh_l0": ones, "bias_ih_l0": ones[0],
    ...        "bias_hh_l0": ones[0]}
    >>> from_torch(rnn, {"weight": ones, "bias": ones[0]}).b_h.tolist()
    [2.0]
    """
    _check_names("rnn", rnn, {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"})
    _check_names("linear", linear, {"weight", "bias"})
    return _params(
        W_x=rnn["weight_ih_l0"],
        W_h=rnn["weight_hh_l0"],
        W_y=linear["weight"],
        b_h=np.asarray(rnn["bias_ih_l0"]) + np.asarray(rnn["bias_hh_l0"]),
        b_y=linear["bias"],
    )


def to_torch(params: Params) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The two dictionaries that `from_torch` takes; bias_hh_l0 is zeros.

    `rnn.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in ...})` loads one.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> rnn, linear = to_torch(params)
    >>> rnn["weight_ih_l0"].shape, linear["weight"].shape
    ((5, 3), (2, 5))
    """
    W_x, W_h, W_y, b_h, b_y = _arrays(params)
    rnn = {
        "weight_ih_l0": W_x,
        "weight_hh_l0": W_h,
        "bias_ih_l0": b_h,
        "bias_hh_l0": np.zeros_like(b_h),
    }
    return rnn, {"weight": W_y, "bias": b_y}


def from_flax(cell: Mapping[str, Weights], dense: Weights) -> Params:
    """Params of a Flax `SimpleCell` (without `residual`) and the `Dense` that reads it out.

        W_x = K_i^T        W_h = K_h^T        b_h = b_i        W_y = K^T

    Args:
      cell: {"i": {"kernel": (I, H), "bias": (H,)}, "h": {"kernel": (H, H)}}, as in Flax linen;
        NNX calls the two dense_i and dense_h.
      dense: {"kernel": (H, O), "bias": (O,)}.

    Returns:
      Params, in the dtype that came.

    Raises:
      TypeError, ValueError: names, shapes or dtypes other than these.

    >>> ones = np.ones((1, 1), np.float32)
    >>> cell = {"i": {"kernel": ones, "bias": ones[0]}, "h": {"kernel": 2 * ones}}
    >>> from_flax(cell, {"kernel": ones, "bias": ones[0]}).W_h.tolist()
    [[2.0]]
    """
    _check_names("cell", cell, {"i", "h"})
    _check_names("cell['i']", cell["i"], {"kernel", "bias"})
    _check_names("cell['h']", cell["h"], {"kernel"})
    _check_names("dense", dense, {"kernel", "bias"})
    return _params(
        W_x=np.asarray(cell["i"]["kernel"]).T,
        W_h=np.asarray(cell["h"]["kernel"]).T,
        W_y=np.asarray(dense["kernel"]).T,
        b_h=cell["i"]["bias"],
        b_y=dense["bias"],
    )


def to_flax(params: Params) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The two dictionaries that `from_flax` takes.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> cell, dense = to_flax(params)
    >>> cell["i"]["kernel"].shape, dense["kernel"].shape
    ((3, 5), (5, 2))
    """
    W_x, W_h, W_y, b_h, b_y = _arrays(params)
    cell = {"i": {"kernel": W_x.T, "bias": b_h}, "h": {"kernel": W_h.T}}
    return cell, {"kernel": W_y.T, "bias": b_y}


def _arrays(params: Params) -> list[np.ndarray]:
    """Copies: a NumPy view of a JAX array is read-only, and torch warns of it."""
    check_params(params)
    return [np.array(leaf) for leaf in params]


def _safetensors():
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the safetensors package is needed to read and write .safetensors files: "
            "pip install safetensors"
        ) from error
    return safetensors.numpy


def save_safetensors(params: Params, path: str | PathLike) -> None:
    """Writes params to a .safetensors file, by name: W_x, W_h, W_y, b_h, b_y.

    Raises:
      ModuleNotFoundError: the safetensors package is not installed.
    """
    arrays = _arrays(params)
    _safetensors().save_file(dict(zip(Params._fields, arrays, strict=True)), path)


def load_safetensors(path: str | PathLike) -> Params:
    """Reads what `save_safetensors` wrote, in the dtype that it had.

    Raises:
      ModuleNotFoundError: the safetensors package is not installed.
      TypeError, ValueError: names, shapes or dtypes that are not those of Params.
      safetensors.SafetensorError: the file is not one, or is cut off.
    """
    weights = _safetensors().load_file(path)
    _check_names("path", weights, set(Params._fields))
    return _params(**weights)
