"""A network inside somebody else's `lax.scan`: a recurrent policy in an environment loop.

An environment says after step t that an episode has ended; the network wants to know at step t
that a new one begins. So `done` is carried one step on, and is the `reset` of the step after it.
With the resets kept, `unroll` gives the same outputs again for the loss, all steps at once.
Run: python -m experiments.recipes.policy
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn


class Actor(NamedTuple):
    """What the loop carries, for B environments."""

    env_state: Any
    observation: jax.Array  # (B, I)
    done: jax.Array  # (B,) bool: the step before was the last of its episode
    h: jax.Array  # (B, H)


def rollout(key, params, actor, env_step, length):
    """env_step: (env_state, action) -> env_state, observation, reward, done, resetting itself.

    Returns the actor after the last step, and (observations, reset, actions, rewards), each
    (length, B, ...). The loss then takes `unroll(params, observations, h_0, reset=reset)`.
    """

    def body(actor, key):
        h = jnp.where(actor.done[:, None], jnp.zeros_like(actor.h), actor.h)
        h, logits = jaxrnn.step(params, h, actor.observation)
        action = jax.random.categorical(key, logits)
        env_state, observation, reward, done = env_step(actor.env_state, action)
        seen = actor.observation, actor.done, action, reward
        return Actor(env_state, observation, done, h), seen

    return lax.scan(body, actor, jax.random.split(key, length))


def recall(t, action):
    """An episode of 4 steps: say at the last which it is of the environment's two kinds."""
    B, last = t.shape[0], t % 4 == 3
    reward = (last & (action == jnp.arange(B) % 2)).astype(jnp.float32)
    t = t + 1
    cue = jnp.where(t % 4 == 0, jnp.arange(B) % 2 + 1, 0)
    return t, jax.nn.one_hot(cue, 3), reward, last


def main() -> None:
    B, H = 6, 8
    params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=H, output_size=2)
    actor = Actor(jnp.arange(B), jnp.zeros((B, 3)), jnp.ones(B, bool), jnp.zeros((B, H)))
    run = jax.jit(rollout, static_argnums=(3, 4))
    actor, (_, reset, _, rewards) = run(jax.random.key(1), params, actor, recall, 100)
    print("reward of an episode:", rewards.sum() / reset[1:].sum())


if __name__ == "__main__":
    main()
