"""How a perturbation of the state at step t reaches the last step: dh_T/dh_t, by forward mode.

    J_t = dh_t/dh_{t-1} = diag(f'(z_t)) W_h        dh_T/dh_t = J_T J_{T-1} ... J_{t+1}

Singular values of dh_T/dh_t are the factors by which perturbations grow or shrink (Pascanu,
Mikolov, Bengio 2013). The largest Lyapunov exponent is the mean growth per step, in nats, of the
direction that grows most (Benettin et al. 1980). `jaxrnn.gradient_flow` gives the gradient
of a loss by each state.
Run: python -m experiments.recipes.jacobians
"""

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn


def step_jacobians(params, xs, h_0, activation=jaxrnn.tanh):
    """J_1 ... J_T, (T, H, H), for one sequence xs (T, I); `vmap` for more."""
    _, hs = jaxrnn.hidden_states(params, xs, h_0, activation=activation)
    before = jnp.concatenate([h_0[None], hs])[: len(hs)]

    def next_state(h, x):
        return jaxrnn.step(params, h, x, activation=activation)[0]

    return jax.vmap(jax.jacfwd(next_state))(before, xs)


def jacobian_products(Js):
    """dh_T/dh_t for t = 0 ... T, (T + 1, H, H). The last is the identity."""
    identity = jnp.eye(Js.shape[1], dtype=Js.dtype)

    def body(product, J):
        return product @ J, product

    first, products = lax.scan(body, identity, Js, reverse=True)
    return jnp.concatenate([first[None], products])


def lyapunov_exponents(Js):
    """All H, largest first: the mean over t of log |diag R_t|, where J_t Q_{t-1} = Q_t R_t.

    A product of many Jacobians overflows or collapses to one direction; QR at each step avoids it.
    """

    def body(Q, J):
        Q, R = jnp.linalg.qr(J @ Q)
        return Q, jnp.log(jnp.abs(jnp.diagonal(R)))

    _, growth = lax.scan(body, jnp.eye(Js.shape[1], dtype=Js.dtype), Js)
    return jnp.sort(growth.mean(axis=0))[::-1]


def main() -> None:
    xs, h_0 = 0.1 * jax.random.normal(jax.random.key(1), (400, 3)), jnp.zeros(32)
    for gain in (0.9, 1.0, 1.5, 2.5):
        orthogonal = jax.nn.initializers.orthogonal(scale=gain)
        params = jaxrnn.init(jax.random.key(0), 3, 32, 2, W_h_init=orthogonal)
        Js = jax.jit(step_jacobians)(params, xs, h_0)
        singular = jnp.linalg.svd(jacobian_products(Js[-20:])[0], compute_uv=False)
        largest = lyapunov_exponents(Js)[0]
        print(f"gain {gain}: singular values of dh_T/dh_(T-20) from {singular[-1]:.2g} to "
              f"{singular[0]:.2g}, largest exponent {largest:+.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
