"""The learning curve and the summary of a run of the character model."""

from pathlib import Path

import jax
import matplotlib

from jaxrnn import Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict], valid_bpc: float, path: Path) -> None:
    """Bits per character over updates; `valid_bpc` is the final validation value."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    ax.plot(steps, [row["train_bpc"] for row in rows], lw=0.8, alpha=0.6, label="training batch")
    points = {row["step"]: row["valid_bpc"] for row in rows if "valid_bpc" in row}
    points[steps[-1]] = valid_bpc
    ax.plot(list(points), list(points.values()), marker="o", ms=4, label="validation text")
    ax.set(xlabel="updates", ylabel="bits per character", title="Plain tanh RNN, characters")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def summarize(steps: int, run, params: Params, held_out: dict[str, float]) -> dict:
    """The settings and results of a run of that many steps."""
    recent = [row["train_bpc"] for row in run.rows[-100:] if "skipped" not in row]
    return {
        "train_bpc": sum(recent) / max(1, len(recent)),
        **held_out,
        "steps": steps,
        "skipped": sum("skipped" in row for row in run.rows),
        "seconds": run.seconds,
        "milliseconds_per_step": 1e3 * run.seconds_of_steps / steps,
        "parameters": sum(leaf.size for leaf in params),
        "vocabulary": params.W_y.shape[0],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
