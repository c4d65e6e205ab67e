"""Online learning: over which lags does a network learn while its stream runs?

Bits x_t are coin flips, and the target adds those of two lags, t1 < t2 (Pitis 2016; Marschall, Cho
and Savin 2020):

    target_t = 0.5 + 0.5 x_{t-t1} - 0.25 x_{t-t2}

The loss is the binary cross-entropy. It is at least 0.662 nats for a network that knows neither
bit, 0.519 with the first one, and 0.454 with both. Every step of the streams is one update, by the
gradient of the loss of this step:

    window k    backpropagation through the last k steps (Williams and Peng 1990)
    RTRL        through all steps, forward in time (Williams and Zipser 1989)
    SnAp-1      its diagonal approximation (Menick et al. 2021)
    UORO        its random approximation of rank one (Tallec and Ollivier 2018)

Methods are compared after equal numbers of updates, against the lag, and after equal times, at one.

    python -m experiments.online_learning --out runs/online_learning
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from tqdm import tqdm

import jaxrnn
from experiments import cli, online_report
from experiments.long_lag_tasks import last_step
from experiments.multi_seed import nan_if_skipped, train_seeds, use_all_cores
from experiments.reports import Report, finite
from jaxrnn import Batch, Params
from jaxrnn.streams import Influence, diagonal, full, rank_one, start_stream, stream_gradient

LOSS = jaxrnn.binary_cross_entropy
LEVELS = {"neither bit": 0.66156, "the first bit": 0.51917, "both bits": 0.45446}
"""The least loss of a network that knows this much of the past, in nats."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Loss against the lag for truncated backpropagation, RTRL, SnAp-1 and UORO."""

    lags: tuple[int, ...] = (2, 4, 6, 8, 10)
    """First lags, t1, compared after equal numbers of updates."""
    timed_lag: int = 6
    """The first lag that is also compared after equal times."""
    between: int = 4
    """Steps between the lags, t2 - t1."""
    windows: tuple[int, ...] = (2, 4, 8, 16)
    """Windows k of truncated backpropagation."""
    updates: int = 20_000
    """Updates of each network; the time that RTRL takes for them is that of all methods."""
    check_every: int = 1_000
    """Updates between checks; the loss of a check is the mean over these updates."""
    hidden_size: int = 16
    """Hidden units, H."""
    scale: float = 0.8
    """Initial spectral radius of W_h, in the mean for large H."""
    streams: int = 16
    """Streams, B; an update is the mean over them."""
    learning_rate: float = 2e-3
    """Learning rate of Adam."""
    seeds: int = 4
    """Number of networks for each method and lag."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/online_learning")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "lags", "windows")
        counts = ("lags", "between", "windows", "updates", "check_every", "hidden_size", "streams")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect(self, "timed_lag", "one of --lags", lambda lag: lag in self.lags)
        cli.expect_positive(self, "scale", "learning_rate")
        cli.expect_multiple(self, "updates", of="check_every")
        cli.expect_seed(self)


SMOKE = {
    "lags": (3,),
    "timed_lag": 3,
    "between": 2,
    "windows": (2,),
    "updates": 8,
    "check_every": 4,
    "hidden_size": 3,
    "streams": 2,
    "seeds": 2,
}


def coin_flips(key, first, T: int, B: int):
    """The bits of B streams at the steps first, ..., first + T - 1, (T, B)."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(T))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (B,)))(keys).astype(jnp.float32)


def addition(bits, lags, T: int):
    """The targets of the last T steps of bits, (T, B); lags is (t1, t2)."""
    x_1, x_2 = (lax.dynamic_slice_in_dim(bits, len(bits) - T - lag, T) for lag in lags)
    return 0.5 + 0.5 * x_1 - 0.25 * x_2


def truncated(params: Params, batch: Batch, h):
    """The gradient through a window, for `make_update`; h is the state before it.

    The next window starts one step later.
    """
    (value, _), grads = jaxrnn.bptt(params, batch, h, loss=LOSS)
    h, _ = jaxrnn.step(params, h, batch.xs[0])
    return (value, h), grads


class Method(NamedTuple):
    """A way to learn from a stream.

    Attributes:
      name: as in the figure.
      cost: the time of an update for each of the B streams; N = I + H + 1.
      gradient_fn: for `make_update`; what it carries is in `TrainState.h`.
      start: (params, h_0) -> what is carried before the first update.
      window: the steps in the Batch of an update.
      random: whether the gradient needs a key.
    """

    name: str
    cost: str
    gradient_fn: Callable
    start: Callable[[Params, Any], Any]
    window: int = 1
    random: bool = False


def forward(name: str, cost: str, influence: Influence) -> Method:
    """A method that carries the influence of the parameters on the state."""
    gradient_fn = partial(stream_gradient, influence=influence, loss=LOSS)
    start = partial(start_stream, influence=influence)
    return Method(name, cost, gradient_fn, start, random=influence.random)


def methods(config: Config) -> list[Method]:
    windows = [
        Method(f"window {k}", "k H N", truncated, lambda params, h_0: h_0, k)
        for k in config.windows
    ]
    snap1, uoro = forward("SnAp-1", "H N", diagonal), forward("UORO", "H N", rank_one)
    return [*windows, snap1, uoro, forward("RTRL", "H^3 N", full)]


def init_network(config: Config, method: Method, optimizer, key):
    """The state of a network before its first update."""
    key_init, key_updates = jax.random.split(key)
    H = config.hidden_size
    W_h_init = jax.nn.initializers.normal(config.scale / H**0.5)
    params = jaxrnn.init(key_init, 1, H, 1, W_h_init=W_h_init)
    carried = method.start(params, jnp.zeros((config.streams, H)))
    key = key_updates if method.random else None
    return jaxrnn.init_state(params, optimizer, carried, key=key)


def make_training(config: Config, method: Method):
    """A function that starts a network with a key, and one that makes `check_every` updates."""
    optimizer = optax.adam(config.learning_rate)
    update = jaxrnn.make_update(method.gradient_fn, optimizer)
    k, B, T = method.window, config.streams, config.check_every
    past = max(*config.windows, *config.lags) + config.between  # steps of which x_t is needed

    def updates_and_check(state, key, lags, key_stream):
        del key  # the stream goes on from check to check
        bits = coin_flips(key_stream, state.step, past + T, B)
        targets = addition(bits, lags, T)

        def update_on_step(state, n):
            xs = lax.dynamic_slice_in_dim(bits, past + n + 1 - k, k)[..., None]
            target = jnp.broadcast_to(targets[n, :, None], xs.shape)
            return update(state, Batch(xs, target, weights=last_step(k, B)))

        state, metrics = lax.scan(update_on_step, state, jnp.arange(T))
        results = metrics.loss.mean(), state.params
        loss, params = nan_if_skipped(results, metrics.skipped)
        return state._replace(params=params), loss

    return partial(init_network, config, method, optimizer), updates_and_check


def train(config: Config, method: Method, lags: tuple[int, ...], updates: int):
    """Trains `seeds` networks for each lag, all at once; nothing if there is no lag.

    Yields at each check the updates and the losses (lags, seeds); NaN for those that diverged. At
    each lag, a seed has the same initial parameters and the same bits.
    """
    if not lags:
        return
    start, updates_and_check = make_training(config, method)
    key_init, key_streams = jax.random.split(jax.random.key(config.seed))
    keys_init, keys_streams = (
        jnp.tile(jax.random.split(key, config.seeds), len(lags)) for key in (key_init, key_streams)
    )
    pairs = jnp.array([(lag, lag + config.between) for lag in lags])
    settings = jnp.repeat(pairs, config.seeds, axis=0), keys_streams
    schedule = updates, config.check_every
    states = jax.vmap(start)(keys_init)
    for done, losses in train_seeds(updates_and_check, states, key_init, *schedule, *settings):
        yield done, losses.reshape(len(lags), config.seeds)


def microseconds(config: Config, method: Method) -> float:
    """The time of an update of one network: the minimum over calls of `check_every` updates."""
    start, updates_and_check = make_training(config, method)
    key, lag = jax.random.key(config.seed), config.timed_lag
    lags = jnp.array([lag, lag + config.between])
    run, seconds = jax.jit(updates_and_check), []
    state, _ = run(start(key), key, lags, key)  # compiles
    for _ in range(5):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, key, lags, key))
        seconds.append(time.perf_counter() - begin)
    return 1e6 * min(seconds) / config.check_every


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    costs = {method.name: microseconds(config, method) for method in methods(config)}
    for method in methods(config):
        report.log(method=method.name, cost=method.cost, microseconds=costs[method.name])
    seconds = 1e-6 * config.updates * costs["RTRL"]
    others = tuple(lag for lag in config.lags if lag != config.timed_lag)
    with tqdm(methods(config), unit="method", disable=None) as bar:
        for method in bar:
            checks = online_report.affordable(seconds, costs[method.name]) // config.check_every
            longest = max(config.updates, checks * config.check_every)
            for lags, updates in ((others, config.updates), ((config.timed_lag,), longest)):
                for done, losses in train(config, method, lags, updates):
                    bar.set_description(f"{method.name}: {done} of {updates} updates")
                    for lag, of_lag in zip(lags, losses, strict=True):
                        report.log(method=method.name, lag=lag, updates=done, losses=finite(of_lag))
    summary = online_report.summarize(report.rows, config.updates, config.timed_lag, seconds)
    draw = partial(
        online_report.draw, levels=LEVELS, updates=config.updates, timed_lag=config.timed_lag
    )
    losses = {name: online_report.by_lag(report.rows, name, config.updates) for name in costs}
    return report.finish(summary, draw, microseconds=costs, seconds_for_all=seconds, losses=losses)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
