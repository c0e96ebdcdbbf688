"""tools/dev/bench.py: every benchmark once on tiny sizes, turns, ratios, and the page it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median

import pytest
import torch

from pipeline.config import load as configuration
from pipeline.errors import ConfigError
from tools.dev import bench
from tools.dev.benchmarks import device
from tools.dev.benchmarks import page as page_of
from tools.dev.benchmarks.harness import measure
from tools.dev.benchmarks.loader import drop_from_page_cache, resident_pages


def test_contenders_take_turns_and_ratios_are_those_of_a_round() -> None:
    calls: list[str] = []
    values = {"fast": iter([99.0, 40.0, 30.0, 100.0]), "slow": iter([1.0, 10.0, 10.0, 10.0])}

    def contender(name: str) -> float:
        calls.append(name)
        return next(values[name])

    result = measure({n: lambda n=n: contender(n) for n in values}, 3, {("fast", "slow"): 4.5}, warm_up=True)
    assert calls == ["fast", "slow"] * 4
    assert result["contenders"]["fast"] == {
        "median": 40.0,
        "min": 30.0,
        "max": 100.0,
        "values": [40.0, 30.0, 100.0],
    }
    (ratio,) = result["ratios"]
    assert ratio["values"] == [4.0, 3.0, 10.0] and ratio["median"] == 4.0 and not ratio["met"]


def test_residency_of_a_file_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    assert resident_pages(file).shape == (25,) and resident_pages(file).all()
    assert 0 <= drop_from_page_cache([file]) <= 1


@pytest.fixture(scope="module")
def written(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    """Report, page and runs_dir of all benchmarks on 60 images of noise."""
    folder = tmp_path_factory.mktemp("bench")
    source = configuration.load([], tiny_overrides).shard.source
    overrides = [o for o in tiny_overrides if not o.startswith(("runs_dir=", "shard.source="))]
    files = ["--json", str(folder / "bench.json"), "--markdown", str(folder / "docs/bench.md")]
    bench.main(
        [
            *files,
            "--source",
            source,
            "--fp32",
            "--repeats",
            "1",
            "--seconds",
            "0.1",
            *overrides,
            f"runs_dir={folder / 'runs'}",
        ]
    )
    return (
        json.loads((folder / "bench.json").read_text()),
        (folder / "docs/bench.md").read_text(),
        folder / "runs",
    )


@pytest.mark.slow
def test_every_benchmark_reports_sane_numbers(written: tuple[dict, str, Path]) -> None:
    report, _, _ = written
    assert list(report["benchmarks"]) == [
        "loader",
        "loader_cold",
        "encoded_128",
        "encoded_256",
        "streaming",
        "train",
        "train_pauses",
        "train_outage",
        "train_memory",
        "host",
        "operations",
        "order",
        "shard",
        "evaluation",
        "startup",
    ]
    units = ("images/s", "s", "ms", "MiB", "operations", "share of the store's rate")
    for result in report["benchmarks"].values():
        assert result["unit"] in units and result["protocol"]
        for figures in result["contenders"].values():
            assert len(figures["values"]) == result["repeats"] and figures["median"] == median(
                figures["values"]
            )
            assert 0 < figures["min"] <= figures["median"] <= figures["max"] < 1e9
        for ratio in result["ratios"]:
            one, other = (result["contenders"][ratio[key]]["values"] for key in ("contender", "reference"))
            assert ratio["values"] == [a / b for a, b in zip(one, other, strict=True)]
    ratios = {
        name: [r["target"] for r in result["ratios"]]
        for name, result in report["benchmarks"].items()
        if result["ratios"]
    }
    assert ratios == {
        "loader": [50, 25],
        "loader_cold": [50, 25],
        "encoded_128": [1.5, 1.5],
        "encoded_256": [1.5, 1.5],
        "train": [0.9],
        "train_outage": [0.99],
        "order": [0.8, 0.8, 0.8],
    }
    assert {
        "cpu",
        "cores",
        "memory_gib",
        "torch",
        "torchvision",
        "date",
        "commit",
        "load_average_at_start",
    } <= report["machine"].keys()
    assert all(
        50 < figures["median"] < 20_000
        for figures in report["benchmarks"]["train_memory"]["contenders"].values()
    )


@pytest.mark.slow
def test_page_is_made_from_the_json(written: tuple[dict, str, Path]) -> None:
    report, page, _ = written
    assert page == page_of.markdown(report)
    for result in report["benchmarks"].values():
        assert f"## {result['title']}" in page and result["protocol"] in page
        for name, figures in result["contenders"].items():
            assert f"| {name} | {page_of.number(figures['median'])} |" in page
    report["benchmarks"]["startup"]["contenders"]["launch.py --help"]["median"] = 123456.0
    assert "| launch.py --help | 123,456 |" in page_of.markdown(report)


@pytest.mark.slow
def test_nothing_is_left_behind(written: tuple[dict, str, Path]) -> None:
    _, _, runs = written
    assert not list(runs.iterdir())
    assert Path(os.environ["XDG_CACHE_HOME"]).name.startswith("cache")


@pytest.mark.slow
def test_a_page_gets_the_tables_of_its_suite_and_machine(
    written: tuple[dict, str, Path], tmp_path: Path
) -> None:
    report = written[0] | {"machine": written[0]["machine"] | {"gpu": None}}
    page = tmp_path / "performance.md"
    kept = "<!-- begin: peers, CPU -->\n<!-- end: peers, CPU -->\n"
    page.write_text(f"Text.\n<!-- begin: own, CPU -->\nstale tables\n<!-- end: own, CPU -->\nMore.\n{kept}")
    page_of.replace_section(page, report)
    page_of.replace_section(page, report)  # a second run replaces the first
    text = page.read_text()
    assert text.startswith("Text.\n") and text.endswith(f"More.\n{kept}") and "stale tables" not in text
    assert text.count("### Start-up (CPU)") == 1 and report["machine"]["commit"] in text
    with pytest.raises(ConfigError, match="begin: own, GPU"):
        page_of.replace_section(page, report | {"machine": {"gpu": "a GPU"}})


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_a_peer(_: object) -> dict:
        raise ModuleNotFoundError("No module named 'nflows'", name="nflows")

    with pytest.raises(ConfigError, match="nflows is not installed.*make bench-peers"):
        bench.run_one(needs_a_peer, None)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--only", "loader,trian"],
            "trian.*loader,encoded,streaming,train,host,device,shard,evaluation,startup",
        ),
        (["--peers", "--only", "flow"], "flow.*loading,sharding,training,flows,distances"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(words)


def test_the_work_of_a_step_is_counted_per_operation_and_the_slower_unit_sets_its_floor() -> None:
    left, right = torch.ones(8, 4), torch.ones(4, 16)
    with device.Work() as work:
        product = left @ right
        _ = product.view(-1)  # costs nothing
        _ = product.relu()
    (name, flops, moved), relu = work.operations
    assert "mm" in name and flops == 2 * 8 * 4 * 16 and moved == 4 * (8 * 4 + 4 * 16 + 8 * 16)
    assert relu[1] == 0 and relu[2] == 2 * 4 * 8 * 16
    assert work.floor(flops_per_s=1.0, bytes_per_s=1e9) == flops + relu[2] / 1e9
    assert work.floor(flops_per_s=1e9, bytes_per_s=1.0) == moved + relu[2]
