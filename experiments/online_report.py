"""The results of online_learning: what its figure shows, and its summary."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.reports import finite, mean_and_spread


def checks(rows: list[dict], method: str, lag: int):
    """The updates (checks,) and losses (checks, seeds) of a method at a lag; NaN if diverged."""
    found = [row for row in rows if (row["method"], row.get("lag")) == (method, lag)]
    updates = np.array([row["updates"] for row in found])
    return updates, np.array([row["losses"] for row in found], float)


def losses_after(rows: list[dict], method: str, lag: int, updates: float) -> list[float]:
    """The loss of each seed at the last check after at most so many updates, or at the first."""
    done, losses = checks(rows, method, lag)
    return losses[done <= max(updates, done[0])][-1].tolist()


def by_lag(rows: list[dict], method: str, updates: int) -> dict[int, list[float | None]]:
    """The losses of all seeds after so many updates, by first lag."""
    return {lag: finite(losses_after(rows, method, lag, updates)) for lag in lags(rows)}


def costs(rows: list[dict]) -> dict[str, float]:
    """The microseconds of an update, by method."""
    return {row["method"]: row["microseconds"] for row in rows if "microseconds" in row}


def affordable(seconds: float, microseconds: float) -> int:
    """The number of updates in a time; rounding does not lose one.

    >>> affordable(0.3, 100.0)
    3000
    """
    return int(1e6 * seconds / microseconds * (1 + 1e-9))


def lags(rows: list[dict]) -> list[int]:
    return sorted({row["lag"] for row in rows if "lag" in row})


def colors(names: list[str]) -> dict:
    """Blue to green for the windows, by length, and a colour of its own for every other method."""
    windows = [name for name in names if name.startswith("window")]
    shades = plt.cm.viridis(np.linspace(0.85, 0.15, len(windows)))
    others = {"SnAp-1": "C1", "UORO": "C4", "RTRL": "C3"}
    return dict(zip(windows, shades, strict=True)) | {n: others[n] for n in names if n in others}


def draw_levels(axes, levels: dict[str, float]):
    """A line for what a network can know, with its name at the right of the last panel."""
    for name, level in levels.items():
        for ax in axes:
            ax.axhline(level, color="black", linestyle="--", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "va": "center"}
        axes[-1].annotate(f"knows\n{name}", (1.01, level), **at)


def draw(rows: list[dict], levels: dict[str, float], updates: int, timed_lag: int):
    """The loss against the lag, against updates, and against seconds."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained", sharey=True)
    against_lag, against_updates, against_seconds = axes
    names = costs(rows)
    for name, color in colors(list(names)).items():
        style = {"color": color, "label": name, "linewidth": 1.5}
        seeds = np.array([losses_after(rows, name, lag, updates) for lag in lags(rows)])
        against_lag.plot(lags(rows), seeds.mean(axis=1), marker="o", **style)
        against_lag.plot(lags(rows), seeds, ".", color=color, alpha=0.5)
        done, losses = checks(rows, name, timed_lag)
        kept = done <= updates
        against_updates.plot(done[kept], losses[kept].mean(axis=1), **style)
        against_seconds.plot(1e-6 * names[name] * done, losses.mean(axis=1), **style)
    against_lag.set(xlabel="first lag, t1", xticks=lags(rows), ylabel="cross-entropy, nats")
    against_lag.set_title(f"after {updates:,} updates")
    against_updates.set(xlabel="updates", title=f"t1 = {timed_lag}, at equal numbers of updates")
    against_updates.locator_params("x", nbins=4)
    against_seconds.set(xlabel="seconds of one network", xscale="log")
    against_seconds.set_title(f"t1 = {timed_lag}, at equal times")
    draw_levels(axes, levels)
    for ax in axes:
        ax.grid(alpha=0.3)
    handles, labels = against_lag.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def summarize(rows: list[dict], updates: int, timed_lag: int, seconds: float) -> str:
    """For each method: the time of an update, the loss at each lag, and the loss at equal times."""
    parts = []
    orders = {row["method"]: row["cost"] for row in rows if "cost" in row}
    for name, microseconds in costs(rows).items():
        equal = [
            f"{mean_and_spread(losses_after(rows, name, lag, updates))} at t1 = {lag}"
            for lag in lags(rows)
        ]
        in_seconds = losses_after(rows, name, timed_lag, affordable(seconds, microseconds))
        parts.append(
            f"{name}, O(B {orders[name]}): {microseconds:.0f} µs per update, {', '.join(equal)}, "
            f"and in the time of RTRL {mean_and_spread(in_seconds)} at t1 = {timed_lag}"
        )
    return f"cross-entropy after {updates} updates: {'; '.join(parts)}"
