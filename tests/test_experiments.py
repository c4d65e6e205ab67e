"""The benchmark, run small: its files, and the check that every method has the same gradient."""

import json

import pytest

from experiments import benchmark


def test_benchmark_compares_and_leaves_its_files(tmp_path, capsys):
    """Where a peer is not installed it says so; all that are there must agree before it times."""
    rows = benchmark.main(benchmark.Config(sizes="small", repeats=3, devices=2, out=tmp_path))
    written = [json.loads(line) for line in (tmp_path / "benchmark.jsonl").read_text().splitlines()]
    assert len(written) == len(rows) >= 3 * 8
    assert all(row["min_ms"] <= row["median_ms"] for row in written)
    assert {"bptt", "bptt x 2", "plain scan", "floor"} <= {row["method"] for row in rows}
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    assert "floor x" in told.out
    for module, name in [("flax", "Flax"), ("haiku", "Haiku"), ("torch", "torch")]:
        there = any(name in row["method"] for row in rows)
        assert there != (f"{name} is not installed" in told.err), module


def test_benchmark_refuses_a_method_with_another_gradient(tmp_path, monkeypatch):
    def wrong(params, batch):
        return 1.001 * benchmark.hoisted_scan(params, batch)

    monkeypatch.setattr(benchmark, "plain_scan", wrong)
    config = benchmark.Config(sizes="small", out=tmp_path)
    size = benchmark.SIZES["small"][0]
    with pytest.raises(AssertionError, match="differs from the plain scan"):
        benchmark.methods(
            config,
            size,
            *benchmark.data(size, "float32"),
            dict.fromkeys(("flax", "haiku", "torch")),
        )
