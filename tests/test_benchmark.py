"""The benchmark at small sizes: its files, its agreement check, its comparison with a baseline."""

import json
import re
import shutil
from pathlib import Path

import jax
import pytest

from experiments import benchmark, benchmark_report, peers

ROOT = Path(__file__).parent.parent
SMALL = benchmark.GROUPS["smoke"][0]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.thorough
def test_every_method_is_measured_and_a_missing_peer_is_named(tmp_path, capsys):
    assert benchmark.run(["--smoke", "--devices", "2", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    methods = {row["method"] for row in rows}
    assert len(rows) == len(methods) * len(benchmark.GROUPS["smoke"])
    assert {"plain scan", "sequence_loss", "bptt", "bptt, K", "bptt x 2", "floor"} < methods
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in rows)
    assert all(row["temp_mb"] > 0 for row in rows if row["method"] != "torch")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"date", "versions", "settings"} < summary.keys()
    assert summary["figures"]["compared"]["bptt / plain scan"]["smoke"]["speed"] > 0
    assert summary["figures"]["processor"]
    printed = capsys.readouterr()
    assert summary["ours"] in printed.out
    for name, version in peers.versions().items():
        measured = any(name in method for method in methods)
        assert measured == (version is not None) != (f"{name} is not installed" in printed.err)


@pytest.mark.thorough
def test_a_baseline_is_measured_beside_the_present_version(tmp_path):
    shutil.copytree(ROOT / "jaxrnn", tmp_path / "old" / "jaxrnn")
    flags = ["--baseline", str(tmp_path / "old"), "--out", str(tmp_path / "out")]
    assert benchmark.run(["--smoke", "--rows", "20", *flags]) == 0
    memory = {row["method"]: row["temp_mb"] for row in rows_of(tmp_path / "out")}
    assert len(memory) == 7
    for name in ("sequence_loss", "bptt", "bptt, K"):
        assert memory[name] == memory[f"{name}, baseline"] > 0


@pytest.mark.thorough
def test_a_row_with_a_leak_is_measured_beside_the_plain_scan_with_one(tmp_path):
    number = next(n for n, (_, size) in enumerate(benchmark.ROWS) if size.leak and size.T == 256)
    assert benchmark.run(["--smoke", "--rows", str(number), "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [row["method"] for row in rows][:3] == ["plain scan", "sequence_loss", "bptt"]
    assert all(row["group"] == "leak" for row in rows)
    assert not any(name in row["method"] for row in rows for name in peers.PACKAGES)


def test_a_baseline_is_the_package_in_its_checkout(tmp_path):
    shutil.copytree(ROOT / "jaxrnn", tmp_path / "jaxrnn")
    init = tmp_path / "jaxrnn" / "__init__.py"
    init.write_text(init.read_text() + "\nMARK = 1\n")
    old = peers.load_baseline(tmp_path)
    assert old.MARK == 1
    assert old.bptt.__module__.startswith("jaxrnn_baseline.")


def test_a_method_with_another_gradient_is_refused(monkeypatch):
    def slightly_wrong(params, batch):
        return 1.001 * peers.plain_scan(params, batch)

    def methods(params, batch, devices, baseline, leak):
        fns = {"plain scan": peers.plain_scan, "wrong": slightly_wrong}
        return {name: (jax.value_and_grad(fn), (params, batch)) for name, fn in fns.items()}

    monkeypatch.setattr(peers, "methods", methods)
    with pytest.raises(AssertionError, match=r"wrong differs from the plain scan by 1\.0e-03"):
        benchmark.measure(benchmark.Config(), SMALL, None)


def row(number, group, method, milliseconds, memory):
    times = {"min_ms": milliseconds, "median_ms": 2 * milliseconds}
    return {"number": number, "group": group, "method": method, "temp_mb": memory, **times}


def test_comparison_is_the_geometric_mean_over_each_group_and_over_all():
    rows = [
        row(0, "wide", "plain scan", 4.0, 1.0),
        row(0, "wide", "bptt", 2.0, 2.0),
        row(0, "wide", "floor", 1.0, 0.0),
        row(1, "wide", "plain scan", 8.0, 1.0),
        row(1, "wide", "bptt", 1.0, 8.0),
        row(2, "tiny", "plain scan", 1.0, 0.0),
        row(2, "tiny", "bptt", 2.0, 3.0),
    ]
    compared = benchmark_report.compare(rows)
    assert compared.keys() == {"bptt / plain scan"}
    by_group = compared["bptt / plain scan"]
    assert by_group["wide"] == pytest.approx(
        {"speed": 4.0, "least": 2.0, "median_speed": 4.0, "memory": 4.0}
    )
    assert by_group["tiny"]["speed"] == pytest.approx(0.5)
    assert by_group["tiny"]["memory"] is None
    assert by_group["all"]["speed"] == pytest.approx(2.0)
    assert by_group["all"]["least"] == pytest.approx(0.5)


def test_only_methods_of_one_activation_and_version_are_compared():
    assert benchmark_report.is_compared("bptt, ReLU", "Haiku, ReLU")
    assert benchmark_report.is_compared("bptt", "bptt, baseline")
    assert not benchmark_report.is_compared("bptt, K", "bptt, baseline")
    assert not benchmark_report.is_compared("bptt", "Haiku, ReLU")
    assert not benchmark_report.is_compared("bptt, baseline", "plain scan")
    assert not benchmark_report.is_compared("Flax", "plain scan")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "34"], "--rows: expected typical, .*, leak or a number below 34, got 34"),
        (["--rows", "narrow"], "--rows: expected .* got narrow"),
        (["--baseline", "/no"], "--baseline: expected a folder that holds jaxrnn/, got /no"),
    ],
)
def test_a_bad_setting_is_named(flags, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert benchmark.run(["--smoke", *flags, "--out", str(out)]) == 2
    assert not out.exists()
    assert re.fullmatch(message + "\n", capsys.readouterr().err)
