"""Character models: how do window, carried state and hidden size trade training time for loss?

Every network reads the same number of characters, so a window of 16 steps means 16 times as many
updates as one of 256. The state is always carried through held-out text. A torch `nn.RNN` with the
same initial weights, batches and optimiser is trained in a separate process, if torch is installed.

    python -m experiments.char_sweep --text tinyshakespeare.txt --out runs/char_sweep
"""

import dataclasses
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.char_data import endless_windows, read_text, split, streams
from experiments.multi_seed import nan_if_skipped
from experiments.reports import Report, finite, mean_and_spread
from jaxrnn import Batch, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Bits per character against seconds, for windows, carried state, hidden sizes and torch."""

    text: Path | None = None
    """A UTF-8 text file; by default CPython's documentation, `pydoc_data.topics`."""
    characters: int = 1_000_000
    """Training characters for each network."""
    windows: tuple[int, ...] = (16, 64, 256)
    """Steps of backpropagation through time, T; hidden sizes are compared at the middle entry."""
    hidden_sizes: tuple[int, ...] = (128, 256, 512)
    """Hidden units, H; windows are compared at the middle entry."""
    batch_size: int = 32
    """Parallel streams of text, B."""
    learning_rate: float = 2e-3
    """Learning rate of Adam; the norm of the gradient is clipped at 1."""
    checks: int = 5
    """Number of evenly spaced evaluations on held-out text."""
    seeds: int = 3
    """Number of networks, trained one after another because their time is measured."""
    seed: int = 0
    """The first seed."""
    out: Path = Path("runs/char_sweep")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "windows", "hidden_sizes")
        counts = ("characters", "windows", "hidden_sizes", "batch_size", "checks", "seeds")
        cli.expect_at_least(1, self, *counts)
        least = self.batch_size * max(self.windows) * self.checks  # an update for each check
        cli.expect_at_least(least, self, "characters")
        cli.expect_positive(self, "learning_rate")
        cli.expect_seed(self)


SMOKE = {
    "characters": 3_000,
    "windows": (8,),
    "hidden_sizes": (4,),
    "batch_size": 4,
    "checks": 1,
    "seeds": 1,
}


class Setting(NamedTuple):
    """The settings of one network.

    Attributes:
      hidden_size: H.
      window: T.
      carry: the state is carried from window to window.
      seed: of the initial parameters.
    """

    hidden_size: int
    window: int
    carry: bool
    seed: int


Checks = Iterator[tuple[float, float]]
"""At each check, the seconds of training and the bits per character on held-out text."""


def middle(values: Sequence[int]) -> int:
    return values[len(values) // 2]


def settings(config: Config) -> list[Setting]:
    """Windows with and without carried state, then hidden sizes with carried state."""
    H, T = middle(config.hidden_sizes), middle(config.windows)
    shapes = [(H, window, carry) for window in config.windows for carry in (True, False)]
    shapes += [(size, T, True) for size in config.hidden_sizes if size != H]
    seeds = range(config.seed, config.seed + config.seeds)
    return [Setting(*shape, seed) for shape, seed in itertools.product(shapes, seeds)]


def updates_of(config: Config, setting: Setting) -> int:
    return config.characters // (config.batch_size * setting.window)


def is_check(config: Config, setting: Setting, n: int) -> bool:
    """Whether a check follows this update: `config.checks` of them, evenly spaced."""
    updates = updates_of(config, setting)
    return n * config.checks // updates > (n - 1) * config.checks // updates


def train_jaxrnn(
    config: Config, setting: Setting, params: Params, stream: Batch, valid: Batch
) -> Checks:
    H, T, carry, _ = setting
    zeros = jnp.zeros((config.batch_size, H))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
    state = jaxrnn.init_state(params, optimizer, h=zeros if carry else None)
    updates = range(1, updates_of(config, setting) + 1)
    seconds, start, skipped = 0.0, time.perf_counter(), []
    for n, (new_pass, batch) in zip(updates, endless_windows(stream, T, seen=0), strict=False):
        if new_pass and carry:
            state = state._replace(h=jnp.zeros_like(zeros))
        state, metrics = update(state, batch)
        skipped.append(metrics.skipped)
        if is_check(config, setting, n):
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            state = state._replace(params=nan_if_skipped(state.params, np.array(skipped)))
            nats = jaxrnn.evaluate(state.params, jaxrnn.windows(valid, 1024), zeros)
            yield seconds, nats / math.log(2)
            skipped.clear()
            start = time.perf_counter()


def train_torch(config: Config, setting: Setting, weights, stream: Batch, valid: Batch) -> Checks:
    """The same in torch, from the weights that `jaxrnn.interop.to_torch` returns."""
    import torch

    H, T, carry, _ = setting
    V = len(weights[1]["bias"])
    rnn, linear = torch.nn.RNN(V, H), torch.nn.Linear(H, V)
    for module, arrays in zip((rnn, linear), weights, strict=True):
        module.load_state_dict({name: torch.tensor(leaf) for name, leaf in arrays.items()})
    rnn.bias_hh_l0.requires_grad_(False)  # a second bias, redundant
    parameters = [p for p in (*rnn.parameters(), *linear.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)

    def loss_and_state(batch, h):
        xs = torch.nn.functional.one_hot(torch.from_numpy(batch.xs).long(), V).float()
        hs, h_T = rnn(xs, h)
        targets = torch.from_numpy(batch.targets).long().flatten()
        return torch.nn.functional.cross_entropy(linear(hs).flatten(0, 1), targets), h_T

    def held_out():
        h, nats = None, 0.0
        with torch.no_grad():
            for batch in jaxrnn.windows(valid, 1024):
                value, h = loss_and_state(batch, h)
                nats += value.item() * batch.xs.size
        return nats / valid.xs.size

    updates = range(1, updates_of(config, setting) + 1)
    seconds, start, h = 0.0, time.perf_counter(), None
    for n, (new_pass, batch) in zip(updates, endless_windows(stream, T, seen=0), strict=False):
        optimizer.zero_grad()
        value, h = loss_and_state(batch, None if new_pass or not carry else h)
        value.backward()
        h = h.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if is_check(config, setting, n):
            seconds += time.perf_counter() - start
            yield seconds, held_out() / math.log(2)
            start = time.perf_counter()


def train_torch_in_process(*arguments) -> list[tuple[float, float]]:
    """All checks of `train_torch`, as a list, which another process can return."""
    return list(train_torch(*arguments))


def plot_curve(ax, rows: list[dict], style: str, label: str) -> None:
    """The mean over seeds, with their range."""
    if not rows:
        return
    checks = sorted({row["check"] for row in rows})
    by_check = [[row for row in rows if row["check"] == check] for check in checks]
    seconds = [np.mean([row["seconds"] for row in check]) for check in by_check]
    bits = np.array([[row["valid_bpc"] for row in check] for check in by_check], float)
    (line,) = ax.plot(seconds, bits.mean(axis=1), style, ms=4, label=label)
    ax.fill_between(seconds, bits.min(axis=1), bits.max(axis=1), alpha=0.2, color=line.get_color())


def draw(rows: list[dict], H: int, T: int):
    """Left: windows, with and without carried state; right: hidden sizes, with torch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)

    def select(**values):
        return [row for row in rows if values.items() <= row.items()]

    for n, window in enumerate(sorted({row["window"] for row in rows})):
        for carry, line in ((True, "-o"), (False, ":o")):
            selected = select(library="jaxrnn", hidden_size=H, window=window, carry=carry)
            label = f"T {window}, state {'' if carry else 'not '}carried"
            plot_curve(left, selected, f"C{n}{line}", label)
    for n, size in enumerate(sorted({row["hidden_size"] for row in rows})):
        for library, line in (("jaxrnn", "-o"), ("torch", "--s")):
            selected = select(library=library, hidden_size=size, window=T, carry=True)
            plot_curve(right, selected, f"C{n + 3}{line}", f"{library}, H {size}")
    left.set(ylabel="bits per character, held-out text", title=f"jaxrnn, H {H}")
    right.set(title=f"T {T}, state carried")
    for ax in (left, right):
        ax.set(xlabel="seconds of training, including compilation", xscale="log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    return figure


def summarize(rows: list[dict], config: Config) -> str:
    """Bits per character and seconds after training, for each setting: mean and spread."""
    parts = []
    last = [row for row in rows if row["check"] == config.checks]
    names = ("library", "hidden_size", "window", "carry")
    for values in dict.fromkeys(tuple(row[name] for name in names) for row in last):
        of_setting = [row for row in last if tuple(row[name] for name in names) == values]
        library, H, T, carry = values
        bits = np.array([row["valid_bpc"] for row in of_setting], float)
        seconds = np.mean([row["seconds"] for row in of_setting])
        carried = "" if carry else ", not carried"
        spread = mean_and_spread(bits.tolist(), digits=2)
        parts.append(f"{library} H {H}, T {T}{carried}: {spread} in {seconds:.0f} s")
    return "; ".join(parts)


def main(config: Config) -> dict:
    text, batch_size = read_text(config.text), config.batch_size
    vocabulary, parts = split(text, config.text, batch_size, max(config.windows))
    report = Report(config)
    train, valid, _ = (streams(part, batch_size) for part in parts)
    V = len(vocabulary)
    runs = [("jaxrnn", setting) for setting in settings(config)]
    if importlib.util.find_spec("torch"):
        runs += [("torch", setting) for setting in settings(config)]
    else:
        print("torch is not installed: skipped", file=sys.stderr)
    # The threads of JAX and torch slow each other down, so torch runs in a process, after JAX.
    with cli.own_process() as process:
        bar = tqdm(runs, unit="run", disable=None)
        for library, setting in bar:
            bar.set_description(f"{library} H {setting.hidden_size}, T {setting.window}")
            params = jaxrnn.init(jax.random.key(setting.seed), V, setting.hidden_size, V)
            if library == "torch":
                weights = jaxrnn.interop.to_torch(params)
                arguments = config, setting, weights, train, valid
                checks = process.submit(train_torch_in_process, *arguments).result()
            else:
                checks = list(train_jaxrnn(config, setting, params, train, valid))
            for check, (seconds, bits) in enumerate(checks, start=1):
                row = {"check": check, "seconds": seconds, "valid_bpc": finite([bits])[0]}
                report.log(library=library, **setting._asdict(), **row)
    H, T = middle(config.hidden_sizes), middle(config.windows)
    return report.finish(summarize(report.rows, config), partial(draw, H=H, T=T))


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
