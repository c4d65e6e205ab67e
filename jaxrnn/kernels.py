"""The loops over time as one GPU kernel each, with W_h kept on the chip.

    from jaxrnn import kernels
    (value, h_T), grads = jaxrnn.bptt(params, batch, loop=kernels.loop)

XLA launches a kernel for each product of each step, which for small H takes longer than the product
(Diamos et al. 2016). Here each block of threads loads W_h once, takes 16 sequences and runs their
steps, up to 8,191 in a launch; no block waits for another. The step is the same function that
`recurrence.scan` runs. The scan runs instead where the kernel does not apply:

- on another platform than CUDA, chosen when the program is compiled for it;
- for H above 128 in float32 or 256 in bfloat16, where W_h does not fit, and for other dtypes;
- if `jax_default_matmul_precision` is set to anything but "default";
- for an activation of other operations than jaxrnn's tanh, relu, sigmoid and identity, or that
  reads arrays;
- for fewer than 16 steps, symbolic sizes or explicit sharding, and if JAX lacks the backend.

Where the scan runs, `bptt` on a GPU still takes one block of all steps, so leave `loop` at its
default for such networks.

The kernel is written in Pallas for its Triton backend, which needs an NVIDIA GPU of compute
capability 8.0 or later; JAX 0.11 and later warn that they will drop it. For H above 128 in bfloat16
the GPU must have 136 KiB of shared memory per block, as an A100 or H100 does. The kernel is tested
in Pallas's interpreter and lowered for CUDA. It is not timed on a GPU, so the scan is the default;
`experiments/kernel_check.py` checks and times it on one. `jax.export` writes it for one platform
alone, with a check disabled:

    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    jax.export.export(fn, platforms=["cuda"], disabled_checks=[check])

To export without a GPU, JAX 0.11 and later need `jax.sharding.use_abstract_mesh` with an abstract
device.
"""

import functools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn.recurrence import LoopNetwork, scan
from jaxrnn.sharding import explicit_sharding
from jaxrnn.tiles import SEQUENCES, in_pieces, with_flat_batch, with_whole_tiles

__all__ = ["loop"]

Step: TypeAlias = Callable[..., tuple[Any, Any]]

LARGEST_H = {"float32": 128, "bfloat16": 256}
"""The units whose W_h fits the memory of one block of threads, by dtype."""

FEWEST_STEPS = 16
"""The least T for which a launch may save time."""

PRIMITIVES = {
    *("add", "sub", "mul", "le", "ne", "tanh", "logistic", "select_n", "dot_general"),
    *("transpose", "reshape", "broadcast_in_dim", "convert_element_type"),
    *("reshard", "jit", "pjit", "custom_jvp_call"),
}
"""What a step may consist of.

The backend lowers only some of JAX's primitives. `max` is left out, because its maximum of NaN and
a number is the number.
"""


@functools.cache
def pallas() -> tuple[ModuleType, ModuleType] | None:
    """Pallas and its Triton backend, or None where JAX lacks them, as later versions will."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return pallas, triton


def primitives(jaxpr: Any) -> set[str]:
    """The names of the primitives of a jaxpr and of the functions that it calls."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    called = [value for equation in jaxpr.eqns for value in equation.params.values()]
    return found.union(*(primitives(value.jaxpr) for value in called if hasattr(value, "jaxpr")))


class OnChip(NamedTuple):
    """W_h as a block of threads holds it, to be read as `h @ W_h` and `h @ W_h.T`.

    As on a tensor core, the factors of the product have the dtype of W_h and the sums are float32.
    Everything else of a step is float32, since the backend has no tanh in bfloat16.
    """

    values: Array
    transposed: bool

    @property
    def T(self) -> "OnChip":
        return OnChip(self.values, not self.transposed)

    def __rmatmul__(self, h: Array) -> Array:
        W = self.values.T if self.transposed else self.values
        return jnp.matmul(h.astype(W.dtype), W, preferred_element_type=jnp.float32)


def step_on_chip(
    step: Step, transposed: bool, network: LoopNetwork, carry: Array, inputs: Any
) -> tuple[Array, Any]:
    """The step of 16 sequences, with flags as int32, and W_h stored transposed if `transposed`."""
    W_h, units = network
    units = jax.tree.map(lambda x: x.astype(jnp.float32), units)
    inputs = jax.tree.map(
        lambda x: x != 0 if x.dtype == jnp.int32 else x.astype(jnp.float32), inputs
    )
    return step((OnChip(W_h, transposed), units), carry, inputs)


def tile(network: LoopNetwork, inputs: Any, H: int) -> tuple[Any, Any, Any]:
    """The shapes of the arguments of `step_on_chip`."""
    W_h, units = network
    flags = jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32)
    h = jax.ShapeDtypeStruct((SEQUENCES, H), W_h.dtype)
    rows = jax.tree.map(lambda _: jax.ShapeDtypeStruct((1, H), W_h.dtype), units)
    steps = jax.tree.map(lambda x: h if x.dtype == W_h.dtype else flags, inputs)
    carry = jax.ShapeDtypeStruct(h.shape, jnp.float32)
    return (jax.ShapeDtypeStruct((H, H), W_h.dtype), rows), carry, steps


def applies(step: Step, network: LoopNetwork, carry: Array, inputs: Any) -> bool:
    """Whether the kernel applies; the module's docstring says where it does not."""
    W_h, H, leaves = network[0], carry.shape[-1], jax.tree.leaves((network, carry, inputs))
    if pallas() is None or not all(isinstance(n, int) for leaf in leaves for n in leaf.shape):
        return False
    config: Any = jax.config
    if not (
        LARGEST_H.get(W_h.dtype.name, 0) >= H
        and len(inputs[0]) >= FEWEST_STEPS
        and carry.size > 0
        and all(leaf.dtype in (W_h.dtype, jnp.bool_) for leaf in leaves)
        and config.jax_default_matmul_precision in (None, "default")
        and explicit_sharding(carry) is None
    ):
        return False
    traced = jax.make_jaxpr(partial(step_on_chip, step, False))(*tile(network, inputs, H))
    return not traced.consts and primitives(traced.jaxpr) <= PRIMITIVES


def loop(
    step: Step,
    network: LoopNetwork,
    carry: Array,
    inputs: Any,
    *,
    reverse: bool = False,
    interpret: bool = False,
    num_warps: int | None = None,
) -> tuple[Any, Any]:
    """`recurrence.scan` as one GPU kernel where it applies, with the derivatives of the scan.

    It is the argument `loop` of `hidden_states`, `unroll`, `sequence_loss` and `bptt`.

    Args:
      step, network, carry, inputs, reverse: given by the function that runs the loop.
      interpret: run the kernel by Pallas's interpreter, on any platform: slow, for tests.
      num_warps: the threads of a block, divided by 32. None chooses.

    Returns:
      The last carry, and the outputs of all steps.

    >>> import jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> xs = jnp.ones((20, 4, 3))
    >>> h_T, hs = jaxrnn.hidden_states(params, xs, loop=partial(loop, interpret=True))
    >>> bool(jnp.allclose(hs, jaxrnn.hidden_states(params, xs)[1], atol=1e-6))
    True
    """
    plain = partial(scan, step, reverse=reverse)
    if not applies(step, network, carry, inputs):
        return plain(network, carry, inputs)
    run = partial(launch, step, reverse=reverse, interpret=interpret, num_warps=num_warps)
    kernel = with_flat_batch(with_whole_tiles(in_pieces(run, reverse=reverse)))

    @jax.custom_jvp
    def accelerated(network: LoopNetwork, carry: Array, inputs: Any) -> tuple[Any, Any]:
        if interpret:
            return kernel(network, carry, inputs)
        return lax.platform_dependent(network, carry, inputs, cuda=kernel, default=plain)

    @accelerated.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return accelerated(network, carry, inputs)


def launch(
    step: Step,
    network: LoopNetwork,
    carry: Array,
    inputs: Any,
    *,
    reverse: bool,
    interpret: bool,
    num_warps: int | None,
) -> tuple[Any, Any]:
    """All steps, in one kernel.

    Args:
      network: W_h (N, H, H), and b_h and alpha (N, 1, H) or None, of N networks.
      carry: (N, B, H), B a multiple of 16 and H a power of 2.
      inputs: (T, N, B, H) numbers, and flags (T, N, B) int32.
    """
    modules = pallas()
    assert modules is not None
    pl, triton = modules
    (N, B, H), T = carry.shape, len(inputs[0])
    W_h, units = network
    # The backend reads the second factor of a product faster if it is stored transposed.
    network = jnp.swapaxes(W_h, 1, 2) if reverse else W_h, units

    def kernel(network: Any, carry: Any, inputs: Any, last: Any, outputs: Any) -> None:
        """What a block of threads does; the arguments are references to memory."""
        n, rows = pl.program_id(0), pl.ds(SEQUENCES * pl.program_id(1), SEQUENCES)
        network = jax.tree.map(lambda ref: ref[n], network)

        def body(k: Array, state: Any) -> Any:
            carry, now = state
            t = T - 1 - k if reverse else k
            following = load(jnp.maximum(t - 1, 0) if reverse else jnp.minimum(t + 1, T - 1))
            carry, output = step_on_chip(step, reverse, network, carry, now)
            jax.tree.map(partial(store, (t, n, rows)), outputs, output)
            return carry, following

        def load(t: Any) -> Any:
            """The inputs of step t, one step before it needs them."""
            return jax.tree.map(lambda ref: ref[t, n, rows], inputs)

        def store(index: Any, ref: Any, x: Array) -> None:
            ref[index] = x.astype(ref.dtype)

        state = carry[n, rows].astype(jnp.float32), load(T - 1 if reverse else 0)
        h, _ = lax.fori_loop(0, T, body, state)
        store((n, rows), last, h)

    like = partial(jax.ShapeDtypeStruct, dtype=carry.dtype)
    like = partial(like, manual_axis_type=jax.typeof(carry).manual_axis_type)
    _, output = jax.eval_shape(partial(step_on_chip, step, reverse), *tile(network, inputs, H))
    outputs = jax.tree.map(lambda _: like((T, N, B, H)), output)
    call = pl.pallas_call(
        kernel,
        grid=(N, B // SEQUENCES),
        out_shape=(like(carry.shape), outputs),
        compiler_params=triton.CompilerParams(
            num_warps=num_warps or (4 if H <= 64 else 8), num_stages=1
        ),
        interpret=interpret,
    )
    return call(network, carry, inputs)
