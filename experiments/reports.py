"""The files of an experiment: JSON lines, a figure drawn from them, and a summary."""

import dataclasses
import datetime
import json
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from experiments import run_state
from experiments.locks import open_alone

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Report:
    """The folder of an experiment: metrics.jsonl grows, figure.png and summary.json end it.

    Args:
      config: the experiment's settings, with `out`, its folder, and `overwrite`.

    Attributes:
      rows: the lines of metrics.jsonl, a dict each.

    Raises:
      InputError: the folder cannot be created, it holds a run and `overwrite` is not set, or
        another process writes to it.
    """

    def __init__(self, config):
        self.config, self.folder = config, config.out
        self.rows: list[dict] = []
        self._start = time.monotonic()
        run_state.make_folder(self.folder)
        self._check_no_run()
        self._metrics = open_alone(self.folder / "metrics.jsonl")
        weakref.finalize(self, self._metrics.close)  # also after an error
        self._check_no_run()  # another process may have ended one since
        run_state.discard_run(self.folder)

    def _check_no_run(self) -> None:
        if not self.config.overwrite:
            run_state.check_no_run(
                self.folder, ": --overwrite discards it, another --out leaves it as it is"
            )

    def log(self, **row) -> None:
        """Appends a line to metrics.jsonl."""
        self._metrics.write(json.dumps(row).encode() + b"\n")
        self._metrics.flush()
        self.rows.append(row)

    def finish(self, ours: str, draw: Callable, **figures) -> dict:
        """Draws the figure from the lines, writes the summary and prints the result.

        Args:
          ours: the result in words, as in the table of experiments/README.md.
          draw: (rows) -> a matplotlib figure.
          figures: further numbers for the summary.

        Returns:
          The summary.
        """
        seconds = time.monotonic() - self._start
        return write_results(self.config, seconds, ours, draw, **figures)


def write_results(config, seconds: float, ours: str, draw: Callable, **figures) -> dict:
    """`Report.finish` for the metrics.jsonl in `config.out`, whoever has written it."""
    lines = (config.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    figure = draw([json.loads(line) for line in lines])
    figure.savefig(config.out / "figure.png", dpi=120)
    plt.close(figure)
    settings = {
        key: value.name if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("out", "overwrite", "resume")
    }
    summary = {
        "ours": ours,
        "figures": figures,
        "settings": settings,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": run_state.versions(),
    }
    run_state.write_json(config.out / "summary.json", summary)
    print(f"{ours}\n{seconds:.0f} s; results are in {config.out}")
    return summary


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; one value has no deviation.

    >>> mean_and_spread([1.0, 2.0, 3.0], digits=1)
    '2.0 ± 1.0'
    """
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def finite(values) -> list[float | None]:
    """Replaces infinities and NaNs, which JSON cannot hold, by None.

    >>> finite([1.0, float("nan")])
    [1.0, None]
    """
    return [float(value) if np.isfinite(value) else None for value in values]
