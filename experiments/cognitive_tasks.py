"""Cognitive tasks: what do rate networks learn, and does Dale's law cost them anything?

The tasks are those of neurogym. One set of networks learns perceptual decision making, with several
strengths of evidence. Another learns eight tasks of Yang et al. (2019) at once: the input names the
task. The units leak, with alpha = dt / tau, and have private noise:

    h_t = (1 - alpha) h_{t-1} + alpha softplus(W_x x_t + W_h h_{t-1} + b_h + drive_t)
    drive_t normal with standard deviation sigma sqrt(2 / alpha)

Two kinds of networks:

    unconstrained    any W_h
    Dale's law       each column of W_h has one sign: 80 % of the units excite, 20 % inhibit

A trial is correct if the network fixates up to the decision and its first action in it, the largest
output, is the correct one. Accuracies are those on new trials, with noise, after the last epoch.
At 0 % coherence the correct direction is a coin flip, so perceptual decisions have a ceiling: an
ideal observer, which compares the sums of the two stimuli, is right in 89.6 % of the trials.

    pip install -e '.[experiments,cognitive]'
    python -m experiments.cognitive_tasks --out runs/cognitive_tasks
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.cognitive_data import (
    Trials,
    perceptual_trials,
    to_device,
    yang_trials,
)
from experiments.cognitive_report import draw, perceptual_row, task_row
from experiments.multi_seed import nan_if_skipped, shard_seeds, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Batch, Params
from jaxrnn.epochs import shuffled_epoch


@dataclasses.dataclass(frozen=True)
class Config:
    """Accuracy in perceptual decisions and in tasks of Yang et al., with and without Dale's law."""

    tasks: tuple[str, ...] = ("go", "rtgo", "dlygo", "anti", "rtanti", "dlyanti", "dms", "dnms")
    """Tasks of yang19 that one network learns."""
    hidden_size: int = 96
    """Hidden units, H."""
    tau: int = 100
    """Time constant of a unit, in ms."""
    dt: int = 50
    """Duration of a step, in ms."""
    noise: float = 0.05
    """Standard deviation sigma of a unit's noise."""
    trials: int = 1_000
    """Training trials of each task of yang19."""
    epochs: int = 60
    """Passes over the training trials of yang19."""
    perceptual_trials: int = 200
    """Training trials of perceptual decision making, of each coherence and direction."""
    perceptual_epochs: int = 20
    """Passes over the training trials of perceptual decision making."""
    test_trials: int = 200
    """Test trials of each task, or of each coherence and direction."""
    batch_size: int = 64
    """Trials per update, B."""
    learning_rate: float = 2e-3
    """Initial learning rate of Adam; cosine decay to zero."""
    clip: float = 1.0
    """Clipping threshold for the norm of the gradient."""
    seeds: int = 6
    """Number of networks of perceptual decision making, trained in parallel."""
    yang_seeds: int = 2
    """Number of networks of yang19, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/cognitive_tasks")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "tasks")
        sizes = ("hidden_size", "dt", "trials", "epochs", "perceptual_trials", "perceptual_epochs")
        cli.expect_at_least(1, self, *sizes, "test_trials", "batch_size", "seeds", "yang_seeds")
        cli.expect_at_least(self.dt, self, "tau")
        cli.expect_at_least(0, self, "noise")
        cli.expect_positive(self, "learning_rate", "clip")
        cli.expect_seed(self)


SMOKE = {
    "tasks": ("rtgo", "dm1"),
    "hidden_size": 10,
    "dt": 100,
    "trials": 8,
    "epochs": 2,
    "perceptual_trials": 2,
    "perceptual_epochs": 2,
    "test_trials": 2,
    "batch_size": 8,
    "seeds": 2,
    "yang_seeds": 1,
}

EXCITATORY = 0.8
"""Share of the units that excite."""


def signs(H: int):
    """The sign of each column of W_h, the weights from one unit to all others."""
    return jnp.where(jnp.arange(H) < EXCITATORY * H, 1.0, -1.0)


def dale(theta: Params) -> Params:
    """W_h = |theta_h| diag(signs)."""
    return theta._replace(W_h=jnp.abs(theta.W_h) * signs(len(theta.W_h)))


def balanced(key, shape, dtype=jnp.float32):
    """theta_h for which excitation and inhibition of a unit cancel in the mean; radius about 1."""
    sizes = jnp.where(signs(shape[1]) > 0, 1 - EXCITATORY, EXCITATORY)
    variance = (1 - 2 / jnp.pi) * (sizes**2).sum()  # of a sum over a row of |normal|
    return jax.random.normal(key, shape, dtype) * sizes / jnp.sqrt(variance)


class Kind(NamedTuple):
    """A kind of networks.

    Attributes:
      name: as in the figure.
      to_params: theta, which is trained, -> params.
      init: (key, I, H, O) -> the initial theta.
    """

    name: str
    to_params: Callable[[Params], Params]
    init: Callable[..., Params]


KINDS = [
    Kind("unconstrained", lambda theta: theta, jaxrnn.init),
    Kind("Dale's law", dale, partial(jaxrnn.init, W_h_init=balanced)),
]


def noise(config: Config, key, xs):
    """The drive (T, B, H) of the units."""
    scale = config.noise * math.sqrt(2 * config.tau / config.dt)
    return scale * jax.random.normal(key, (*xs.shape[:2], config.hidden_size))


def make_gradient_fn(config: Config, kind: Kind):
    """The gradient of the mean cross-entropy with respect to theta; noisy if there is a key."""
    options: dict = {"activation": jaxrnn.softplus, "leak": config.dt / config.tau}

    def gradient_fn(params, batch, h=None, *, key=None):
        if key is not None:
            batch = batch._replace(drive=noise(config, key, batch.xs))
        return jaxrnn.bptt(params, batch, h, **options)

    return jaxrnn.reparametrized(gradient_fn, kind.to_params)


def make_optimizer(config: Config, updates: int):
    rate = optax.cosine_decay_schedule(config.learning_rate, updates)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))


def responses(config: Config, params: Params, trials: Trials, key):
    """The first action of each trial's decision that is no fixation, 0 if there is none; (N,).

    It is -1 if the network did not fixate up to the decision, or if an output is not finite.
    """
    xs, mask = trials.batch.xs, jnp.asarray(trials.batch.mask)
    options: dict = {"activation": jaxrnn.softplus, "leak": config.dt / config.tau}
    _, ys = jaxrnn.unroll(params, xs, drive=noise(config, key, xs), mask=mask, **options)
    actions = ys.argmax(axis=-1)
    decision = jnp.arange(len(xs))[:, None] >= trials.onset
    acts = mask & (actions != 0)
    first = (acts & decision).argmax(axis=0)  # 0 if there is none
    response = jnp.where((acts & decision).any(axis=0), actions[first, jnp.arange(len(first))], 0)
    valid = ~(acts & ~decision).any(axis=0) & jnp.isfinite(ys).all()
    return jnp.where(valid, response, -1)


def init_networks(config: Config, kind: Kind, batch: Batch, seeds: int, key) -> Params:
    """The initial theta of all seeds, stacked."""
    O = int(batch.targets.max()) + 1
    init = partial(
        kind.init, input_size=batch.xs.shape[-1], hidden_size=config.hidden_size, output_size=O
    )
    return jax.vmap(init)(jax.random.split(key, seeds))


def train(config: Config, kind: Kind, sets: list[Trials], epochs: int, seeds: int, key):
    """Trains all seeds at once. Yields after each epoch the test responses (seeds, N)."""
    training, test = map(to_device, sets)
    updates = epochs * math.ceil(training.truth.size / config.batch_size)
    optimizer = make_optimizer(config, updates)
    update = jaxrnn.make_update(make_gradient_fn(config, kind), optimizer)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None, None))
    def epoch(state, key, training, test):
        key_shuffle, key_test = jax.random.split(key)
        state, metrics = shuffled_epoch(update, state, training, key_shuffle, config.batch_size)
        theta = nan_if_skipped(state.params, metrics.skipped)
        answers = responses(config, kind.to_params(theta), test, key_test)
        return state._replace(params=theta), answers

    key_init, key_noise, key_epochs = jax.random.split(key, 3)
    networks = init_networks(config, kind, training.batch, seeds, key_init)
    init_state = jax.vmap(lambda theta, key: jaxrnn.init_state(theta, optimizer, key=key))
    state = shard_seeds(init_state(networks, jax.random.split(key_noise, seeds)))
    for key_epoch in jax.random.split(key_epochs, epochs):
        keys = shard_seeds(jax.random.split(key_epoch, seeds))
        state, answers = epoch(state, keys, training.batch, test)
        yield np.asarray(answers)


def main(config: Config) -> dict:
    use_all_cores()
    counts = config.perceptual_trials, config.test_trials
    perceptual = perceptual_trials(config.dt, counts, config.seed)
    yang = yang_trials(config.tasks, config.dt, (config.trials, config.test_trials), config.seed)
    report = Report(config)
    runs = [
        ("perceptual", perceptual, config.perceptual_epochs, config.seeds, perceptual_row),
        ("yang19", yang, config.epochs, config.yang_seeds, partial(task_row, config.tasks)),
    ]
    parts: list[str] = []
    with tqdm(total=len(KINDS) * sum(run[2] for run in runs), unit="epoch", disable=None) as bar:
        for kind, (name, sets, epochs, seeds, measure) in itertools.product(KINDS, runs):
            key = jax.random.fold_in(jax.random.key(config.seed), len(parts))
            answers_by_epoch = train(config, kind, sets, epochs, seeds, key)
            for epoch, answers in enumerate(answers_by_epoch, start=1):
                row = measure(sets[1].truth, answers)
                report.log(set=name, kind=kind.name, epoch=epoch, **row)
                bar.set_description(f"{name}, {kind.name}: {np.mean(row['accuracies']):.3f}")
                bar.update()
            values = (100 * np.array(row["accuracies"])).ravel().tolist()
            parts.append(f"{name}, {kind.name}: {mean_and_spread(values, 1)} % correct")
    last = {"perceptual": config.perceptual_epochs, "yang19": config.epochs}
    final = [row for row in report.rows if row["epoch"] == last[row["set"]]]
    return report.finish("; ".join(parts), draw, final=final)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
