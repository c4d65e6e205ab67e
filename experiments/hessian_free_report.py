"""The result and the figure of the experiment hessian_free, from the lines of its metrics."""

import statistics

import matplotlib.pyplot as plt

from experiments.long_lag_tasks import SOLVED, Task

LOWEST = 1e-4
"""The lowest error rate in the figure."""


def of_run(rows: list[dict], T: int, method: str, seed: int) -> list[dict]:
    """The rows of one network."""
    wanted = (T, method, seed)
    return [row for row in rows if (row["T"], row["method"], row["seed"]) == wanted]


def first_solved(rows: list[dict], T: int, method: str) -> list[dict | None]:
    """For each seed, the first row with at most 1 % errors, or None."""
    seeds = range(1 + max(row["seed"] for row in rows if row["T"] == T))
    return [
        next((row for row in of_run(rows, T, method, seed) if row["error"] <= SOLVED), None)
        for seed in seeds
    ]


def summarize(rows: list[dict]) -> tuple[str, dict]:
    """For each T and method, the seeds that solved the task and the medians over these; figures."""
    figures: dict[str, dict] = {}
    for T, method in dict.fromkeys((row["T"], row["method"]) for row in rows):
        every = first_solved(rows, T, method)
        solved = [row for row in every if row is not None]
        figure: dict = {"solved": len(solved), "of": len(every)}
        for name in ("seconds", "updates"):
            values = [row[name] for row in solved]
            figure[name] = round(statistics.median(values), 1) if solved else None
        figures[f"T {T}, {method}"] = figure
    parts = []
    for name, figure in figures.items():
        medians = f", median {figure['seconds']} s and {figure['updates']} updates"
        share = f"{name}: {figure['solved']} of {figure['of']}"
        parts.append(share + medians * (figure["solved"] > 0))
    return "; ".join(parts), figures


def draw(rows: list[dict], task: Task):
    """The error rate of each seed against its seconds, a panel for each T."""
    lengths = list(dict.fromkeys(row["T"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    fig, axes = plt.subplots(
        1, len(lengths), figsize=(1 + 4 * len(lengths), 4), layout="constrained", squeeze=False
    )
    for ax, T in zip(axes[0], lengths, strict=True):
        for color, method in enumerate(methods):
            for seed in range(1 + max(row["seed"] for row in rows)):
                of_seed = of_run(rows, T, method, seed)
                errors = [max(row["error"], LOWEST) for row in of_seed]
                label = method if seed == 0 else None
                seconds = [row["seconds"] for row in of_seed]
                ax.plot(seconds, errors, color=f"C{color}", alpha=0.7, label=label)
        ax.axhline(SOLVED, color="black", linestyle="--", linewidth=0.8)
        ax.set(title=f"{task.name}, T = {T}", xlabel="seconds", yscale="log")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("error rate on new sequences")
    axes[0, 0].legend()
    return fig
