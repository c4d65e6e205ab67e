"""How a perturbation of the state at step t reaches the last step: dh_T/dh_t.

    J_t = dh_t/dh_{t-1} = diag(f'(z_t)) W_h        dh_T/dh_t = J_T J_{T-1} ... J_{t+1}

Singular values of dh_T/dh_t are the factors by which perturbations grow or shrink. The largest
Lyapunov exponent is the mean growth per step, in nats, of the direction that grows most. With gain
2.5 it is above 0: the network is chaotic. `jaxrnn.gradient_flow` gives the gradient of a loss with
respect to each state.
Run: python -m experiments.recipes.jacobians
"""

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import jacobian, jacobian_products, lyapunov_exponents


@jax.jit
def growth(params, xs, h_0):
    """The singular values of dh_T/dh_(T-20), and the Lyapunov exponents, of a sequence (T, I)."""
    _, hs = jaxrnn.hidden_states(params, xs, h_0)
    before = jnp.concatenate([h_0[None], hs[:-1]])
    Js = jacobian(params, before[-20:], xs[-20:])
    singular = jnp.linalg.svd(jacobian_products(Js)[0], compute_uv=False)
    return singular, lyapunov_exponents(params, xs, h_0)


def main() -> None:
    xs, h_0 = 0.1 * jax.random.normal(jax.random.key(1), (400, 3)), jnp.zeros(32)
    for gain in (0.9, 1.0, 1.5, 2.5):
        orthogonal = jax.nn.initializers.orthogonal(scale=gain)
        params = jaxrnn.init(jax.random.key(0), 3, 32, 2, W_h_init=orthogonal)
        singular, exponents = growth(params, xs, h_0)
        print(f"gain {gain}: singular values of dh_T/dh_(T-20) from {singular[-1]:.2g} to "
              f"{singular[0]:.2g}, largest exponent {exponents[0]:+.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
