"""The benchmark: cases, verification, timing, records, and tables that are the same each time they are made."""

import json
import shutil
import time
from math import prod

import numpy as np
import pytest
from typer.testing import CliRunner

from groupnorm import reference
from groupnorm._core import machine
from groupnorm.bench import cases, records, rivals, runner, timing
from groupnorm.bench.chart import Bar, bar_chart
from groupnorm.bench.ready import Ready
from groupnorm.bench.report import CHARTS, report
from groupnorm.bench.tables import TABLES
from groupnorm.bench.work import Work, block_results, worst_error
from groupnorm.cli import app
from groupnorm.errors import FileError, OptionError

TINY = cases.Case("tiny-32", (2, 32, 4, 4), 8, "a test", "silu")


def work_of(direction="forward", layout="NCHW", dtype="float32", activation=None, case=TINY):
    return Work(case, dtype, layout, direction, activation, 1)


# ---- cases and machine -----------------------------------------------------------------------------------------------


def test_cases_are_sane():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    for case in cases.CASES:
        assert case.shape[1] % case.num_groups == 0
        assert 4 * prod(case.shape) <= 140e6
        assert len(case.source) > 10
    assert len(cases.select(None, quick=True)) < len(cases.select(None))


def test_select_by_name_and_beginning():
    assert [case.name for case in cases.select("tiny-32")] == ["tiny-32"]
    assert all(case.name.startswith("sd15") for case in cases.select("sd15"))
    with pytest.raises(OptionError, match="vgg"):
        cases.select("vgg")


def test_machine_is_described():
    found = machine.describe()
    assert found.cores >= 1
    assert found.slug == found.slug.lower()
    assert "/" not in found.slug
    assert machine.versions(["no-such-package"])["numpy"] == np.__version__


# ---- work and verification -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks_together_are_the_specification(layout, direction, monkeypatch):
    monkeypatch.setattr("groupnorm.bench.work._BLOCK", 150)  # two groups at a time, so that blocks matter
    work = work_of(direction, layout, "float64", "silu")
    assert len(list(block_results(work, work.weight, work.bias))) == 8
    options = {"eps": TINY.eps, "layout": layout, "activation": "silu"}
    if direction == "forward":
        want = reference.group_norm(work.x, 8, work.weight, work.bias, **options)[:1]
    else:
        want = reference.group_norm_backward(work.dy, work.x, 8, work.weight, work.bias, **options)
    for got, expected in zip(work.expected, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["groupnorm", "groupnorm-out", "numpy", "torch"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rivals_compute_group_norm(name, layout, direction, dtype):
    rival = rivals.RIVALS[name]
    if rivals.installed(rival):
        pytest.skip(f"{rivals.installed(rival)} is not installed")
    entry = runner._verified(rival, work_of(direction, layout, dtype, "silu"))
    assert entry.status in {"ok", "unsupported"}, entry.reason
    assert (entry.status == "unsupported") == (
        (name, direction) == ("groupnorm-out", "backward") or (name, dtype) == ("numpy", "bfloat16")
    )


def test_no_rival_is_blamed_for_the_side_of_a_jump_it_rounds_to():
    case = cases.Case("many-values", (2, 32, 24, 24), 8, "a test", "relu")
    work = work_of("backward", "NHWC", "float32", "relu", case)
    (z,) = work_of("forward", "NHWC", "float32", None, case).expected
    rounded = np.where(np.abs(z) < 2e-3, -z, z)
    assert ((z > 0) != (rounded > 0)).any(), "no z is that near"
    np.testing.assert_array_equal(work.dy * (z > 0), work.dy * (rounded > 0))
    assert np.count_nonzero(work.dy) > 0.99 * work.dy.size


def test_worst_error_finds_nan_and_wrong_shapes():
    good = np.ones((3, 4))
    assert worst_error((good,), (good,)) == 0
    assert worst_error((good + 1e-3,), (good,)) == pytest.approx(1e-3)
    assert worst_error((np.full((3, 4), np.nan),), (good,)) == float("inf")
    assert worst_error((good.T,), (good,)) == float("inf")
    assert worst_error((), (good,)) == float("inf")


def test_a_wrong_or_raising_rival_is_recorded_not_dropped():
    wrong = rivals.Rival("wrong", "Wrong", lambda work: Ready(lambda: work.x, lambda y: (y,)))

    def broken(_):
        raise RuntimeError("no kernel\nand more")

    raising = rivals.Rival("raising", "Raising", broken)
    found = runner.measure_work(
        work_of(), (rivals.RIVALS["groupnorm"], wrong, raising), machine.describe(), budget_s=0.01
    )
    assert [record.status for record in found] == ["ok", "failed", "failed"]
    assert "wrong result" in found[1].reason
    assert found[2].reason == "RuntimeError: no kernel"
    assert found[1].median_s is None
    assert found[0].median_s > 0
    assert found[0].percent_of_copy == pytest.approx(
        100 * found[0].bytes / found[0].median_s / found[0].copy_bandwidth, rel=1e-3
    )


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_timing_measures_what_it_says():
    times = timing.measure({"slow": lambda: time.sleep(4e-3), "fast": lambda: None}, budget_s=0.02, min_repeats=3)
    assert 4e-3 <= times["slow"].median_s < 4e-2
    assert times["slow"].q1_s <= times["slow"].median_s <= times["slow"].q3_s
    assert times["fast"].median_s < 1e-4
    assert times["fast"].calls > 100
    assert times["slow"].repeats >= 3


def test_contestants_take_turns_in_both_orders():
    seen = []
    timing.measure(
        {name: lambda name=name: (seen.append(name), time.sleep(0.021)) for name in "ab"}, budget_s=0, min_repeats=4
    )
    assert "".join(seen[-8:]) == "abbaabba"


def test_cold_is_measured_apart():
    assert timing.measure_cold({"nothing": lambda: None}, 1 << 16, repeats=3)["nothing"] >= 0


# ---- the command -----------------------------------------------------------------------------------------------------


def measured(tmp_path, *options):
    arguments = ["bench", "--cases", "tiny-32", "--seconds", "0.01", "--save", str(tmp_path / "results"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_bench_records_one_tiny_case(tmp_path):
    pytest.importorskip("torch")
    result = measured(tmp_path, "--rivals", "numpy,torch", "--json", "--activations", "none", "--cold")
    found = json.loads(result.stdout)
    assert len(found) == 2 * 2 * 3  # layouts, directions, rivals with ours
    assert all(record["ok"] for record in found)
    assert all(record["cold_s"] > 0 for record in found)
    assert {record["rival"] for record in found} == {"groupnorm", "numpy", "torch"}
    kept = records.load(tmp_path / "results")
    assert len(kept) == len(found)
    assert kept[0].versions["numpy"] == np.__version__
    measured(tmp_path, "--rivals", "numpy", "--layouts", "NCHW", "--activations", "none")  # of the same work all go
    kept = [(record.layout, record.rival) for record in records.load(tmp_path / "results")]
    assert sorted(set(kept)) == [("NCHW", "groupnorm"), ("NCHW", "numpy"), ("NHWC", "groupnorm"), ("NHWC", "numpy"),
                                 ("NHWC", "torch")]  # fmt: skip
    assert len(kept) == 2 * 2 + 2 * 3


def test_no_save_leaves_nothing(tmp_path):
    text = measured(tmp_path, "--rivals", "numpy", "--directions", "forward", "--no-save").stdout
    assert "tiny-32" in text
    assert "NumPy" in text
    assert not (tmp_path / "results").exists()


def test_list_names_cases_and_rivals():
    found = json.loads(CliRunner().invoke(app, ["bench", "--list", "--json"]).stdout)
    assert {"torch", "jax", "onnxruntime", "openvino", "numpy"} <= set(found["rivals"])
    assert all(case["source"] for case in found["cases"])


# ---- report ----------------------------------------------------------------------------------------------------------


def marked(name):
    return f"before\n\n<!-- bench:{name} -->\n<!-- /bench -->\n\nafter\n"


@pytest.fixture(scope="module")
def some_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    measured(folder, "--rivals", "numpy", "--activations", "none,silu")
    return folder / "results"


@pytest.fixture
def tree(some_results, tmp_path):
    shutil.copytree(some_results, tmp_path / "results")
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_report_twice_changes_nothing(tree):
    (tree / "README.md").write_text("".join(marked(name) for name in (*TABLES, *CHARTS)))
    (tree / "docs" / "page.md").write_text(marked("chart-forward") + "```\n<!-- bench:example -->\n```\n")
    changed = report(tree)
    assert {tree / "README.md", tree / "docs" / "page.md"} <= set(changed)
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert report(tree) == []
    assert before == {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    text = (tree / "README.md").read_text()
    assert "tiny-32" in text
    assert text.count("before\n\n<!-- bench:") == len(TABLES) + len(CHARTS)
    picture = next((tree / "docs" / "img").glob("bench-chart-forward-*.svg"))
    assert f"](docs/img/{picture.name})" in text
    assert f"](img/{picture.name})" in (tree / "docs" / "page.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (marked("no-such-table"), "bench:no-such-table names no table"),
        ("<!-- bench:forward -->\n", "has no end"),
        ("<!-- /bench -->\n", "without a marker"),
        ("<!-- bench:forward -->\n<!-- bench:backward -->\n<!-- /bench -->\n", "inside bench:forward"),
    ],
)
def test_report_refuses_bad_markers_and_writes_nothing(tree, text, said):
    (tree / "README.md").write_text(marked("forward"))
    (tree / "docs" / "page.md").write_text(text)
    with pytest.raises(FileError, match=said):
        report(tree)
    assert (tree / "README.md").read_text() == marked("forward")


def test_report_needs_records(tmp_path):
    with pytest.raises(FileError, match="groupnorm bench"):
        report(tmp_path)


def test_broken_records_are_named(tree):
    path = next((tree / "results").rglob("*.json"))
    path.write_text("{")
    with pytest.raises(FileError, match=path.name):
        records.load(tree / "results")
    path.write_text('{"format": "of somebody else"}')
    with pytest.raises(FileError, match="no benchmark records"):
        records.load(tree / "results")


def test_a_chart_is_well_formed():
    from xml.etree import ElementTree

    svg = bar_chart(
        "a < b", "c & d", ("x", "y"), [Bar("one", (10.0, None)), Bar("two", (250.0, 3.0))], unit=" %", mark=100
    )
    root = ElementTree.fromstring(svg)
    assert len([e for e in root.iter() if e.tag.endswith("rect") and e.get("rx") == "2"]) == 3
