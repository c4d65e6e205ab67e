"""The network inside another `lax.scan`: a recurrent policy in the loop of an environment.

An environment reports after step t that an episode ended; the network needs to know before step
t+1 that another begins. So `done` is carried to the next step, where it is the `reset`. With these
resets `unroll` computes the same outputs again, all steps at once, as a loss needs them.
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
    done: jax.Array  # (B,) bool: the previous step ended an episode
    h: jax.Array  # (B, H)


def rollout(key, params, actor, env_step, length):
    """env_step: (env_state, action) -> (env_state, observation, reward, done); it resets itself.

    Returns the actor after the last step, and (observations, reset, actions, rewards), each
    (length, B, ...). With returns >= 0 of the rewards, the gradient of `make_update` for
    `Batch(observations, actions, reset=reset, weights=returns)`, from the first actor's h, is
    minus the policy gradient (REINFORCE, Williams 1992) divided by the sum of the returns.
    """

    def body(actor, key):
        h = jnp.where(actor.done[:, None], jnp.zeros_like(actor.h), actor.h)
        h, logits = jaxrnn.step(params, h, actor.observation)
        action = jax.random.categorical(key, logits)
        env_state, observation, reward, done = env_step(actor.env_state, action)
        transition = actor.observation, actor.done, action, reward
        return Actor(env_state, observation, done, h), transition

    return lax.scan(body, actor, jax.random.split(key, length))


def recall(t, action):
    """Episodes of 4 steps: the last action should name the cue seen at the first step."""
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
    episodes = reset[1:].sum() + actor.done.sum()
    print("mean reward of an episode:", rewards.sum() / episodes)


if __name__ == "__main__":
    main()
