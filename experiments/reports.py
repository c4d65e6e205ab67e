"""What an experiment leaves in its folder: JSON lines, a figure drawn from them, a summary."""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from experiments import runs
from experiments.runs import InputError

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Report:
    """The folder `out` of a run: metrics.jsonl as it goes, figure.png and summary.json at its end.

    Attributes:
      rows: what metrics.jsonl holds, a dict a line.
    """

    def __init__(self, config):
        self.config, self.folder = config, config.out
        self.rows: list[dict] = []
        self._start = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror
            raise InputError(f"{self.folder}: expected a folder to write to: {why}") from None
        self._path = self.folder / "metrics.jsonl"
        self._path.write_bytes(b"")
        (self.folder / "summary.json").unlink(missing_ok=True)

    def log(self, **row) -> None:
        """One line of metrics.jsonl."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def finish(self, ours: str, draw: Callable, **figures) -> dict:
        """Draws the figure from the lines, writes the summary, prints what was found.

        Args:
          ours: the result in words, as the table in experiments/README.md has it.
          draw: (rows) -> a matplotlib figure.
          figures: what else the summary should hold.

        Returns:
          The summary.
        """
        seconds = time.monotonic() - self._start
        lines = self._path.read_text(encoding="utf-8").splitlines()
        figure = draw([json.loads(line) for line in lines])
        figure.savefig(self.folder / "figure.png", dpi=120)
        plt.close(figure)
        settings = {
            key: value.name if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self.config).items()
            if key != "out"
        }
        summary = {
            "ours": ours,
            "figures": figures,
            "settings": settings,
            "seconds": round(seconds, 1),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": runs.versions(),
        }
        runs.write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{ours}\n{seconds:.0f} s; all of it is in {self.folder}")
        return summary


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds.

    >>> mean_and_spread([1.0, 2.0, 3.0], digits=1)
    '2.0 ± 1.0'
    """
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"


def finite(values) -> list[float | None]:
    """None where a network has diverged, for which JSON has no number.

    >>> finite([1.0, float("nan")])
    [1.0, None]
    """
    return [float(value) if np.isfinite(value) else None for value in values]
