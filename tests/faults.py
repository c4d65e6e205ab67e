"""Faults: what is replaced in the source of the package, and by what."""

import inspect
import re
import types

BACKWARD = {
    "f' forgotten": ("f_prime * dh)", "dh)"),
    "f' forgotten in what flows back, as textbooks print it": ("dz @ W_h", "dh @ W_h"),
    "f' of another quantity": ("derivatives(activation, leak, hs, fs, partial",
                                "derivatives(activation, leak, dhs_y, fs, partial"),
    "W_h transposed": ("dz @ W_h", "dz @ W_h.T"),
    "W_y transposed": ("dys @ params.W_y, output", "dys @ params.W_y.T, output"),
    "dW_h transposed": ("outer_sum(dzs, hs_before, dtype)",
                        "outer_sum(dzs, hs_before, dtype).T"),
    "forward in time": ("f_primes, mask, reset), reverse=True)", "f_primes, mask, reset))"),
    "blocks forward in time": ("K, saved, states, reverse=True)", "K, saved, states)"),
    "no recurrence": ("dh = dh_y + dh_next", "dh = dh_y"),
    "no output error": ("dh = dh_y + dh_next", "dh = dh_next"),
    "mask ignored in dz": ("where_exists(valid, f_prime * dh)", "f_prime * dh"),
    "gradient not held over a masked step": (
        "hold(valid, unless_reset(reset_t, dh_before), dh)", "unless_reset(reset_t, dh_before)"
    ),
    "mask a step late": ("f_primes, leak, block.mask,",
                         "f_primes, leak, jnp.roll(block.mask, 1, 0),"),
    "reset ignored": ("unless_reset(reset_t, dh_before)", "dh_before"),
    "reset a step late": ("dh_y + dh_next", "dh_y + unless_reset(reset_t, dh_next)"),
    "reset ignored in h_{t-1}": ("hs_before = previous(hs, h_0, block.mask, block.reset)",
                                 "hs_before = previous(hs, h_0, block.mask, None)"),
    "h_t for h_{t-1}": ("outer_sum(dzs, hs_before, dtype)",
                        "outer_sum(dzs, hs, dtype)"),
    "h_0 left out of dW_h": ("hs_before = previous(hs, h_0, block.mask, block.reset)",
                             "hs_before = previous(hs, 0 * h_0, block.mask, block.reset)"),
    "dW_h skips the first step": ("outer_sum(dzs, hs_before, dtype)",
                                  "outer_sum(dzs[1:], hs_before[1:], dtype)"),
    "db_h skips the last step": ("bias_sum(dzs, dtype)", "bias_sum(dzs[:-1], dtype)"),
    "db_y skips the first step": ("bias_sum(dys, dtype)", "bias_sum(dys[1:], dtype)"),
    "db_h times 0.99": ("bias_sum(dzs, dtype)", "bias_sum(dzs, dtype) * 0.99"),
    "dW_h times 1.01": ("outer_sum(dzs, hs_before, dtype)",
                        "1.01 * outer_sum(dzs, hs_before, dtype)"),
    "one element of dW_y zero": ("hs), dtype), bias_sum(dys, dtype)",
                                 "hs), dtype).at[0, 0].set(0), bias_sum(dys, dtype)"),
    "weights ignored": ("weights[..., None] * loss.error(ys, targets)", "loss.error(ys, targets)"),
    "divided by all steps": ("count = step_weights(batch, dtype).sum()",
                             "count = jnp.asarray(batch.mask.size, dtype)"),
    "blocks with few steps that count skipped": ("!= 0).any()", "!= 0).all()"),
    "sign of the error": ("loss.error(ys, targets)", "-loss.error(ys, targets)"),
    "blocks not joined": ("return (dh_next, jax.tree", "return (0 * dh_next, jax.tree"),
    "gradient of one block alone": ("jax.tree.map(jnp.add, means, divide_by_count(sums, count))",
                                  "divide_by_count(sums, count)"),
    "steps of two blocks counted twice": ("weights=own_steps(weights, last)", "weights=weights"),
    "first block left out": ("carry, (np.arange(n),", "carry, (np.arange(n).clip(1),"),
    "first block a step short": ("jnp.where(k == 0, T % K, K)", "jnp.where(k == 0, T % K - 1, K)"),
    "dh_next a step early": ("update_index_in_dim(dhs, dh, last,",
                             "update_index_in_dim(dhs, dh, last - 1,"),
    "dh_next twice": ("last, 0), zeros", "last, 0), dh_next"),
    "dh_next lost at a masked last step": (
        "hold(valid, unless_reset(reset_t, dh_before), dh)",
        "hold(valid, unless_reset(reset_t, dh_before), dh_next)",
    ),
    "state of a step of the second block": ("at_step(last, states[0]), (", "states[0][-1], ("),
    "h_t before a block": ("stored_at(start - 1, own, shared)", "stored_at(start, own, shared)"),
    "states before shared steps": ("steps_from(stored_at(start, own, shared)", "steps_from(start"),
    "state before shared steps": ("stored_at(start - 1, own, shared)", "(start - 1)"),
    "state after shared steps": ("jnp.where(t < own, t,", "jnp.where(t < own - 1, t,"),
    "every block from the first state": (
        "h, states = saved\n", "h, states = saved\n        h = h_0\n"
    ),
    "b_h forgotten": ("z_x + per_unit(b_h, h)", "z_x"),
    "b_h added twice": ("block.mask, bias=False)", "block.mask)"),
    "recomputed from a zero state": (
        "is None:\n            states = block_states(params, block, h,",
        "is None:\n            states = block_states(params, block, h_0,",
    ),
}  # fmt: skip

FORWARD = {
    "W_h transposed": ("h_before @ W_h.T  #", "h_before @ W_h  #"),
    "no recurrence": ("z_x + h_before @ W_h.T  #", "z_x  #"),
    "f forgotten": ("f_z = activation.f(z)", "f_z = z"),
    "mask ignored": ("h = hold(valid, leaky(leak, h_before, f_z), h)",
                     "h = leaky(leak, h_before, f_z)"),
    "reset ignored": ("h_before = unless_reset(reset_t, h)\n", "h_before = h\n"),
    "reset after the step": (
        "return h, (h, None",
        "return unless_reset(reset_t, h), (h, None",
    ),
    "b_h forgotten": ("add_bias(zs_x, params.b_h)", "zs_x"),
    "b_y forgotten": ("params.W_y).T, params.b_y)", "params.W_y).T, 0 * params.b_y)"),
}  # fmt: skip

TANGENT = {
    "f' forgotten": ("f_prime * (z_dot", "(z_dot"),
    "f' of the step before": ("derivatives(activation, leak, hs, fs, zs)",
                              "derivatives(activation, leak, hs_before, fs, zs)"),
    "W_h transposed": ("h_dot_before @ W_h.T", "h_dot_before @ W_h"),
    "no recurrence": ("(z_dot + h_dot_before @ W_h.T)", "z_dot"),
    "reset ignored": ("h_dot_before = unless_reset(reset_t, h_dot)", "h_dot_before = h_dot"),
    "mask ignored": ("h_dot = hold(valid, h_dot_new, h_dot)", "h_dot = h_dot_new"),
    "h_t for h_{t-1}": ("zs_x_dot + hs_before @ W_h_dot.T", "zs_x_dot + hs @ W_h_dot.T"),
    "reset ignored in h_{t-1}": ("hs_before = previous(hs, h_0, mask, reset)",
                                 "hs_before = previous(hs, h_0, mask, None)"),
    "h_0 left out of W_h_dot h_{t-1}": ("hs_before = previous(hs, h_0, mask, reset)",
                                        "hs_before = previous(hs, 0 * h_0, mask, reset)"),
    "h_0_dot forgotten": ("body, h_0_dot, inputs", "body, 0 * h_0_dot, inputs"),
}  # fmt: skip

LEAK = {
    "alpha forgotten in dz": (
        "if leak is None else per_unit(leak, f_primes) * f_primes", ""
    ),
    "1 - alpha forgotten in dh": ("carried(leak, dh, dz @ W_h)", "(dh + dz @ W_h)"),
    "dh not passed on": ("carried(leak, dh, dz @ W_h)", "dz @ W_h"),
    "dz passed on for dh": ("carried(leak, dh, dz @ W_h)", "carried(leak, dz, dz @ W_h)"),
    "dh passes a reset": (
        "hold(valid, unless_reset(reset_t, dh_before), dh)",
        "hold(valid, carried(leak, dh, unless_reset(reset_t, dz @ W_h)), dh)",
    ),
    "f' read off h": ("activation.df(hs if fs is None else fs)", "activation.df(hs)"),
    "drive left out": ("zs_x if drive is None else", "zs_x if True else"),
    "alpha and 1 - alpha exchanged": ("(1 - leak) * h + leak * f_z", "leak * h + (1 - leak) * f_z"),
    "leak from the state before a reset": ("leaky(leak, h_before,", "leaky(leak, h,"),
}  # fmt: skip

LEAK_TANGENT = {
    "1 - alpha forgotten": ("carried(leak, h_dot_before, f_prime", "(h_dot_before + f_prime"),
    "drive read where masked": ("where_exists(mask, drive.astype(zs_x.dtype))",
                                "drive.astype(zs_x.dtype)"),
    "no leak": ("carried(leak, h_dot_before, f_prime", "(f_prime"),
    "leak from the state before a reset": ("carried(leak, h_dot_before,", "carried(leak, h_dot,"),
    "alpha forgotten in f'": (
        "if leak is None else per_unit(leak, f_primes) * f_primes", ""
    ),
    "no derivative by alpha": ("h_dot_new + leak_dot", "h_dot_new"),
    "h_{t-1} forgotten in the derivative by alpha": ("(fs - hs_before)", "fs"),
    "z without the recurrence": ("return zs_x + hs_before @ W_h.T", "return zs_x"),
    "f' read off h": ("activation.df(hs if fs is None else fs)", "activation.df(hs)"),
}  # fmt: skip

KERNEL = {
    "reverse runs forward": ("t = T - 1 - k if reverse else k", "t = k"),
    "a step's inputs late": ("else jnp.minimum(t + 1, T - 1))", "else t)"),
    "a step's inputs late, in reverse": ("load(jnp.maximum(t - 1, 0) if", "load(t if"),
    "first inputs of the wrong end": ("load(T - 1 if reverse else 0)", "load(0)"),
    "every tile the first": ("SEQUENCES * pl.program_id(1)", "0 * pl.program_id(1)"),
    "every network the first": ("lambda ref: ref[n], network", "lambda ref: ref[0], network"),
    "W_h transposed": ("values.T if self.transposed", "values if self.transposed"),
    "W_h transposed in memory": ("jnp.swapaxes(W_h, 1, 2) if reverse else W_h", "W_h"),
    "flags inverted": ("x != 0 if", "x != 1 if"),
    "the last state is the first": ("store((n, rows), last, h)",
                                    "store((n, rows), last, carry[n, rows])"),
    "no initial state": ("carry[n, rows].astype(jnp.float32)", "0.0 * carry[n, rows]"),
    "pieces out of order": ("pieces, reverse=True)", "pieces)"),
    "pieces not joined": ("carry, end = run_piece(carry, at_end)\n            carry, outputs",
                          "_, end = run_piece(carry, at_end)\n            carry, outputs"),
    "rest of another piece": ("lambda x: x[-rest:]", "lambda x: x[:rest]"),
    "one leak for all units": ("jnp.broadcast_to(x.reshape(-1), (H,))",
                               "jnp.broadcast_to(x.reshape(-1)[0], (H,))"),
    "padding in front": ("(0, new - old)", "(new - old, 0)"),
}  # fmt: skip

UPDATE = {
    "gradient ascent": ("p - jnp.asarray", "p + jnp.asarray"),
    "a bad update is applied": ("_select, finite)", "_select, True)"),
    "h_T may be NaN": ("(value, norm, params, h))", "(value, norm, params))"),
    "the value may be NaN": ("(value, norm, params, h))", "(norm, params, h))"),
    "consecutive skips not counted": ("state.skipped + 1)", "1)"),
    "skips counted for ever": ("jnp.where(finite, 0, state.skipped + 1)",
                               "state.skipped + jnp.where(finite, 0, 1)"),
    "step not counted": ("TrainState(state.step + 1,", "TrainState(state.step,"),
    "h not carried": ("else lax.stop_gradient(h_T)", "else state.h"),
    "h not passed": ("batch, state.h, **keywords", "batch, 0 * state.h, **keywords"),
    "one key for all updates": ("jax.random.fold_in(state.key, state.step)", "state.key"),
    "norm of the parameters": ("d.astype(dtype), grads))", "d.astype(dtype), state.params))"),
    "all steps counted": ("step_weights(batch, dtype).sum(), skipped)",
                          "jnp.asarray(batch.mask.size, dtype), skipped)"),
}  # fmt: skip

VARIATIONS = {
    "f' forgotten in what flows back, as textbooks print it",
    "W_y transposed",
    "blocks forward in time",
    "no output error",
    "mask a step late",
    "reset a step late",
    "reset ignored in h_{t-1}",
    "dW_h skips the first step",
    "db_h skips the last step",
    "db_h times 0.99",
    "one element of dW_y zero",
    "gradient of one block alone",
    "first block a step short",
    "dh_next twice",
    "every block from the first state",
}
"""Faults in the backward pass that are much like another one."""

LEAK_VARIATIONS = {"dh not passed on", "no leak"}


def with_fault(modules, right: str, wrong: str) -> types.ModuleType:
    """The modules executed as one, with `right` replaced by `wrong`.

    Each module imports from those before it; these imports are left out.
    """
    source = "\n".join(map(inspect.getsource, modules))
    assert source.count(right) == 1, "the fault no longer applies: plant it again"
    for module in modules[:-1]:
        source = re.sub(rf"from {module.__name__} import (\([^)]*\)|.*)\n", "", source)
    faulty = types.ModuleType("faulty")
    exec(compile(source.replace(right, wrong), "faulty", "exec"), faulty.__dict__)
    return faulty
