"""The result and the figure of the experiment hessian_free, from the lines of its metrics."""

import itertools
import statistics

import matplotlib.pyplot as plt

from experiments.long_lag_tasks import SOLVED

LOWEST = 1e-4
"""The lowest error rate in the figure."""

COLUMNS = 4
LABELS = {"+ clipping": "Adam, clipped", "subspace": "SOFO"}
"""The most panels in a row of the figure."""


def of_run(rows: list[dict], task: str, T: int, method: str, seed: int) -> list[dict]:
    """The rows of one network."""
    wanted = {"task": task, "T": T, "method": method, "seed": seed}
    return [row for row in rows if row.items() >= wanted.items()]


def seeds_of(rows: list[dict], task: str, T: int) -> range:
    """The seeds that were trained for a task and T."""
    return range(1 + max(row["seed"] for row in rows if (row["task"], row["T"]) == (task, T)))


def runs_of(rows: list[dict]) -> list[tuple[str, int, str]]:
    """Each task, T and method, in the order of the rows."""
    return list(dict.fromkeys((row["task"], row["T"], row["method"]) for row in rows))


def first_solved(rows: list[dict], task: str, T: int, method: str) -> list[dict | None]:
    """For each seed, the first row with at most 1 % errors, or None."""
    every = [of_run(rows, task, T, method, seed) for seed in seeds_of(rows, task, T)]
    return [next((row for row in rows if row["error"] <= SOLVED), None) for rows in every]


def summarize(rows: list[dict]) -> tuple[str, dict]:
    """For each task, T and method, the seeds that solved it and the medians over these; figures."""
    figures: dict[str, dict] = {}
    for task, T, method in runs_of(rows):
        every = first_solved(rows, task, T, method)
        solved = [row for row in every if row is not None]
        figure: dict = {"solved": len(solved), "of": len(every)}
        for name in ("seconds", "updates"):
            values = [row[name] for row in solved]
            figure[name] = round(statistics.median(values), 1) if solved else None
        figures[f"{task}, T {T}, {method}"] = figure
    parts = []
    for name, figure in figures.items():
        medians = f", median {figure['seconds']} s and {figure['updates']} updates"
        share = f"{name}: {figure['solved']} of {figure['of']}"
        parts.append(share + medians * (figure["solved"] > 0))
    return "; ".join(parts), figures


def draw(rows: list[dict]):
    """The error rate of each seed against its seconds, a panel for each task and T."""
    panels = list(dict.fromkeys((task, T) for task, T, _ in runs_of(rows)))
    methods = list(dict.fromkeys(method for _, _, method in runs_of(rows)))
    xlabel = "seconds" + ", all networks (Hessian-free: one)" * (len(methods) > 1)
    columns = min(len(panels), COLUMNS)
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(1 + 4 * columns, 4 * lines), layout="constrained", squeeze=False
    )
    for ax, (task, T) in zip(axes.flat, panels, strict=False):
        for method, seed in itertools.product(methods, seeds_of(rows, task, T)):
            of_seed = of_run(rows, task, T, method, seed)
            seconds = [row["seconds"] for row in of_seed]
            errors = [max(row["error"], LOWEST) for row in of_seed]
            color = f"C{methods.index(method)}"
            label = LABELS.get(method, method) if seed == 0 else None
            ax.plot(seconds, errors, ".-", color=color, alpha=0.7, label=label)
        ax.axhline(SOLVED, color="black", linestyle="--", linewidth=0.8)
        ax.set(title=f"{task}, T = {T}", xlabel=xlabel, yscale="log")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"error rate on new sequences, at least {LOWEST:g}")
    axes[0, 0].legend()
    return fig
