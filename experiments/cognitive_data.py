"""Trials of the cognitive tasks of neurogym, drawn up front into arrays.

A trial has periods, the last of which is the decision. Its input is a fixation signal, stimuli and,
with several tasks, the rule: a one-hot code of the task. The target of each step is an action: 0 is
to fixate, action a > 0 is to choose direction a.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxrnn
from experiments.cli import InputError
from jaxrnn import Batch


class Trials(NamedTuple):
    """Trials of unequal length, padded.

    Attributes:
      batch: Batch (T, N, ...), whose targets are the correct actions, with the weights of
        `step_weights`.
      onset: (N,) integers, the first step of the decision.
      truth: (N,) integers, the correct action in the decision.
    """

    batch: Batch
    onset: np.ndarray
    truth: np.ndarray


RESPONSE = 5
"""The weight of a step of the decision (Yang et al. 2019)."""


def import_neurogym() -> Any:
    try:
        import neurogym
    except ImportError:
        raise InputError("neurogym: not installed: pip install -e '.[cognitive]'") from None
    return neurogym


def step_weights(onset: int, T: int) -> Any:
    """The weight of each step in the loss, (T,).

    It is 1 before the decision, 0 at its first step, in which the network cannot have reacted yet,
    and RESPONSE after it.

    >>> step_weights(onset=2, T=5).tolist()
    [1.0, 1.0, 0.0, 5.0, 5.0]
    """
    t = np.arange(T)
    return np.select([t < onset, t == onset], [1, 0], RESPONSE).astype(np.float32)


def collect(env: Any, draw_trial: Callable, conditions: Iterable[Any]) -> Trials:
    """The trials of an environment after each call `draw_trial(condition)`."""
    sequences, onsets = [], []
    with warnings.catch_warnings():
        # neurogym reads attributes through wrappers of gymnasium, which then warn.
        warnings.filterwarnings("ignore", message=".*to get variables from other wrappers")
        for condition in conditions:
            draw_trial(condition)
            task = env.unwrapped
            onset, T = task.start_ind["decision"], len(task.gt)
            weights = step_weights(onset, T)
            sequences.append(Batch(task.ob, task.gt.astype(np.int32), weights=weights))
            onsets.append(onset)
    batch, onset = jaxrnn.pad(sequences), np.array(onsets)
    truth = np.asarray(batch.targets)[onset, np.arange(len(onset))]
    return Trials(batch, onset, truth)


COHERENCES = (0.0, 6.4, 12.8, 25.6, 51.2)
"""In %, those of the task."""

DIRECTIONS = (0, 1)


def perceptual_conditions(trials: int) -> list[dict]:
    """`trials` trials of each coherence and direction."""
    conditions = [{"coh": c, "ground_truth": d} for c in COHERENCES for d in DIRECTIONS]
    return [condition for condition in conditions for _ in range(trials)]


def perceptual_trials(dt: int, counts: Sequence[int], seed: int) -> list[Trials]:
    """Perceptual decision making: which of two noisy stimuli is stronger on average?

    Args:
      dt: milliseconds per step.
      counts: trials of each coherence and direction, for each set of trials.
      seed: of all sets.

    Returns:
      The sets, each in the order of `perceptual_conditions`.
    """
    env = import_neurogym().make("PerceptualDecisionMaking-v0", dt=dt).unwrapped
    env.seed(seed)
    return [
        collect(env, lambda condition: env.new_trial(**condition), perceptual_conditions(count))
        for count in counts
    ]


def yang_trials(tasks: Sequence[str], dt: int, counts: Sequence[int], seed: int) -> list[Trials]:
    """Tasks of the collection yang19 (Yang et al. 2019), with the rule as further inputs.

    Args:
      tasks: their names.
      dt: milliseconds per step.
      counts: trials of each task, for each set of trials.
      seed: of all sets.

    Returns:
      The sets, each ordered by task.
    """
    neurogym = import_neurogym()
    from neurogym.wrappers.block import MultiEnvs

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*to get variables from other wrappers")
        envs = [neurogym.make(f"yang19.{task}-v0", dt=dt) for task in tasks]
        for n, env in enumerate(envs):
            env.get_wrapper_attr("seed")(seed + n)
    every = MultiEnvs(envs, env_input=True)

    def draw_trial(task: int) -> None:
        every.set_i(task)
        every.new_trial()

    return [collect(every, draw_trial, np.repeat(np.arange(len(tasks)), count)) for count in counts]


def to_device(trials: Trials) -> Trials:
    return jax.tree.map(jax.numpy.asarray, trials)
