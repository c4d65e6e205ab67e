"""What the networks of cognitive_tasks do on the test trials, as numbers and as a figure."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from experiments.cognitive_data import COHERENCES, DIRECTIONS


def perceptual_row(truth: np.ndarray, answers: np.ndarray) -> dict:
    """Accuracy of each seed, and the share of right choices by the signed coherence.

    The trials are ordered by coherence and direction; action 2 is the second direction, right.
    """
    kinds = len(COHERENCES) * len(DIRECTIONS)
    chose_right = (answers == 2).reshape(len(answers), len(COHERENCES), len(DIRECTIONS), -1)
    shares = chose_right.mean(axis=-1)  # (seeds, coherences, directions)
    coherences = np.array(COHERENCES)
    signed = np.concatenate([-coherences[:0:-1], coherences[:1], coherences[1:]])
    curve = [shares[:, :0:-1, 0], shares[:, :1].mean(axis=-1), shares[:, 1:, 1]]
    correct = (answers == truth).reshape(len(answers), kinds, -1).mean(axis=-1)
    with_evidence = correct[:, len(DIRECTIONS) :].mean(axis=-1)
    return {
        "accuracies": (answers == truth).mean(axis=-1).tolist(),
        "with_evidence": with_evidence.tolist(),
        "coherences": signed.tolist(),
        "chose_right": np.concatenate(curve, axis=1).tolist(),
    }


def task_row(tasks: Sequence[str], truth: np.ndarray, answers: np.ndarray) -> dict:
    """The accuracy of each seed in each task; the trials are ordered by task."""
    correct = (answers == truth).reshape(len(answers), len(tasks), -1).mean(axis=-1)
    return {"tasks": list(tasks), "accuracies": correct.tolist()}


def draw(rows: list[dict]):
    """Left: choices against the evidence, a line for each seed. Right: accuracy in each task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    last = {(row["set"], row["kind"]): row for row in rows}
    for n, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        row = last["perceptual", kind]
        curves = 100 * np.array(row["chose_right"])
        left.plot(row["coherences"], curves.T, color=f"C{n}", alpha=0.3, linewidth=1)
        left.plot(row["coherences"], curves.mean(axis=0), f"C{n}o-", label=kind)
        row = last["yang19", kind]
        accuracies = 100 * np.array(row["accuracies"])
        positions = np.arange(len(row["tasks"])) + 0.3 * (n - 0.5)
        right.bar(positions, accuracies.mean(axis=0), 0.28, color=f"C{n}", alpha=0.5, label=kind)
        right.plot(positions, accuracies.T, f"C{n}o", markersize=4)
    left.set(xlabel="evidence for right, % coherence", ylabel="chose right, %", ylim=(-2, 102))
    left.set_title("perceptual decision making: seeds and their mean")
    right.set_xticks(range(len(row["tasks"])), row["tasks"], rotation=30)
    right.set(ylabel="correct trials, %", ylim=(0, 102))
    right.set_title("one network for all tasks: seeds and their mean")
    for ax in (left, right):
        ax.grid(axis="y", alpha=0.3)
    left.legend(loc="upper left")
    return figure
