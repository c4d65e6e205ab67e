"""The voltage convention, in which the leak is outside the recurrence, as a rate network.

    v_t = (1 - alpha) v_{t-1} + alpha (W_h f(v_{t-1}) + W_x u_t + b_h)        v_0 = 0

It is a rate network whose inputs went through the same leak (Miller and Fumarola 2012):

    i_{t+1} = (1 - alpha) i_t + alpha (W_x u_t + b_h)                         i_1 = 0
    r_t = (1 - alpha) r_{t-1} + alpha f(W_h r_{t-1} + i_t)                    r_0 = 0
    v_t = W_h r_t + i_{t+1}

since W_h r_t + i_{t+1} = (1 - alpha)(W_h r_{t-1} + i_t) + alpha (W_h f(v_{t-1}) + W_x u_t + b_h).
So the functions of jaxrnn apply, such as `fixed_points` to the rates; alpha is a scalar. To train,
take the scan below: it has fewer products, and its gradient takes 6.3 ms against 11.3 at H 128,
T 100, B 32 on 2 CPU cores (minimum of 11).
Run: python -m experiments.recipes.voltage
"""

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn


def leaky_filter(us, alpha):
    """i_1 ... i_{T+1} of the inputs u_1 ... u_T."""

    def body(i, u):
        return (1 - alpha) * i + alpha * u, i

    last, before = lax.scan(body, jnp.zeros_like(us[0]), us)
    return jnp.concatenate([before, last[None]])


def voltages(params, us, alpha, activation=jaxrnn.tanh):
    """v_1 ... v_T. The bias is filtered as an input that is always 1."""
    ones = jnp.ones((*us.shape[:-1], 1), us.dtype)
    filtered = leaky_filter(jnp.concatenate([us, ones], axis=-1), alpha)
    W_x = jnp.concatenate([params.W_x, params.b_h[:, None]], axis=1)
    rates = params._replace(W_x=W_x, b_h=jnp.zeros_like(params.b_h))
    _, rs = jaxrnn.hidden_states(rates, filtered[:-1], activation=activation, leak=alpha)
    return rs @ params.W_h.T + filtered[1:] @ W_x.T


def plain_voltages(params, us, alpha, activation=jaxrnn.tanh):
    """The equation as a scan."""

    def body(v, u):
        current = activation.f(v) @ params.W_h.T + u @ params.W_x.T + params.b_h
        v = (1 - alpha) * v + alpha * current
        return v, v

    start = jnp.zeros((*us.shape[1:-1], len(params.b_h)), us.dtype)
    return lax.scan(body, start, us)[1]


def main() -> None:
    key_init, key_data = jax.random.split(jax.random.key(0))
    params = jaxrnn.init(key_init, input_size=3, hidden_size=32, output_size=2)
    us = jax.random.normal(key_data, (200, 3))
    difference = jnp.abs(voltages(params, us, 0.1) - plain_voltages(params, us, 0.1)).max()
    print(f"largest difference from the scan: {difference:.1e}")


if __name__ == "__main__":
    main()
