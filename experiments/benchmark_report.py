"""The table, the ratios and the figure of the benchmark, from its rows.

A row is a method at a size: group, number, size, method, min_ms, median_ms, temp_mb, ...
"""

import matplotlib.pyplot as plt
import numpy as np

OURS = ("sequence_loss", "bptt")
"""The methods that are jaxrnn's, as their names begin."""


def table(rows: list[dict]) -> str:
    """Every method at one size; `speed` is relative to the plain scan, `floor x` to the floor."""
    times = {row["method"]: row["min_ms"] for row in rows}
    first = rows[0]
    lines = [
        f"{first['number']}: {first['size']} ({first['group']}, {first['calls']} calls)",
        f"  {'':24} {'min ms':>9} {'median':>9} {'speed':>7} {'floor x':>8} {'temp MB':>9}",
    ]
    for row in rows:
        speed = times["plain scan"] / row["min_ms"]
        floor = f"{row['min_ms'] / times['floor']:.2f}" if "floor" in times else "-"
        memory = "-" if row["temp_mb"] is None else f"{row['temp_mb']:.2f}"
        lines.append(
            f"  {row['method']:24} {row['min_ms']:9.3f} {row['median_ms']:9.3f} "
            f"{speed:7.2f} {floor:>8} {memory:>9}"
        )
    return "\n".join(lines)


def is_compared(method: str, other: str) -> bool:
    """A method of jaxrnn with another method of the same activation, or its own older version."""
    if not method.startswith(OURS) or method.endswith("baseline") or other == "floor":
        return False
    if other.endswith("baseline"):
        return other == f"{method}, baseline"
    return method != other and ("ReLU" in method) == ("ReLU" in other)


def geometric_mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def compare(rows: list[dict]) -> dict[str, dict]:
    """Each method of jaxrnn beside each other.

    The result is keyed by "method / other", then by group; "all" is the last group.

    `speed` is the geometric mean, `least` the smallest, of how many times as fast it is by the
    minima; `median_speed` the mean by the medians; `memory` that of how many times the memory.
    """
    at = {(row["number"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    found: dict[str, dict] = {}
    for method, other in [(a, b) for a in methods for b in methods if is_compared(a, b)]:
        pairs = [
            (row, at[number, other])
            for (number, name), row in at.items()
            if name == method and (number, other) in at
        ]
        by_group = {g: [pair for pair in pairs if pair[0]["group"] == g] for g in groups}
        if len(groups) > 1:
            by_group["all"] = pairs
        found[f"{method} / {other}"] = {g: ratios(some) for g, some in by_group.items() if some}
    return found


def ratios(pairs: list[tuple[dict, dict]]) -> dict[str, float | None]:
    speeds = [other["min_ms"] / mine["min_ms"] for mine, other in pairs]
    medians = [other["median_ms"] / mine["median_ms"] for mine, other in pairs]
    memory = [
        mine["temp_mb"] / other["temp_mb"]
        for mine, other in pairs
        if mine["temp_mb"] and other["temp_mb"]
    ]
    return {
        "speed": geometric_mean(speeds),
        "least": min(speeds),
        "median_speed": geometric_mean(medians),
        "memory": geometric_mean(memory) if memory else None,
    }


def comparison_table(comparison: dict[str, dict]) -> str:
    groups = list(dict.fromkeys(group for by_group in comparison.values() for group in by_group))
    lines = ["times as fast, geometric mean (least); times the memory"]
    lines.append(" " * 40 + "".join(f"{group:>24}" for group in groups))
    for pair, by_group in comparison.items():
        cells = [cell(by_group.get(group)) for group in groups]
        lines.append(f"{pair:40}" + "".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


def cell(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "-"
    memory = "-" if found["memory"] is None else f"{found['memory']:.2f}"
    return f"{found['speed']:.2f} ({found['least']:.2f}); {memory}"


MARKERS = {
    "bptt": "C0o",
    "bptt x 2": "C9D",
    "sequence_loss": "C2s",
    "Flax": "C1^",
    "torch": "C3v",
}
"""The methods in the figure; the table has all."""


def draw(rows: list[dict]):
    """Speed relative to the plain scan: a line for each size, a point for each method."""
    times = {(row["size"], row["method"]): row["min_ms"] for row in rows}
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, ax = plt.subplots(figsize=(8, 1.4 + 0.24 * len(sizes)), layout="constrained")
    for name, marker in MARKERS.items():
        there = [(i, size) for i, size in enumerate(sizes) if (size, name) in times]
        speeds = [times[size, "plain scan"] / times[size, name] for _, size in there]
        if there:
            ax.plot(speeds, [i for i, _ in there], marker, ms=6, alpha=0.85, label=name)
    ax.axvline(1, color="black", linewidth=1)
    ax.set(yticks=range(len(sizes)), yticklabels=sizes, ylabel="T, B, I, H, O", xscale="log")
    ax.set_xlabel("speed of value and gradient relative to jax.grad of a plain scan")
    ticks = {1 / 16: "1/16", 1 / 8: "1/8", 0.25: "1/4", 0.5: "1/2", 1: "1", 2: "2", 4: "4", 8: "8"}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, fontsize="small")
    return figure
