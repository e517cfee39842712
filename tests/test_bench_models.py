"""`groupnorm bench --models`: records, tables, verification, memory, and the command itself on tiny models."""

import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import groupnorm as gn
from groupnorm._core import machine
from groupnorm.bench import model_records, models, records
from groupnorm.bench.model_tables import MODEL_TABLES
from groupnorm.bench.model_work import ModelWork, model_works
from groupnorm.bench.report import report
from groupnorm.cli import app
from groupnorm.errors import FileError, OptionError

RECORD = model_records.ModelRecord(
    machine={"slug": "a-machine-2c", "cpu": "A machine", "cores": 2}, versions={"groupnorm": "1.0", "torch": "2.13"},
    date="2026-01-02", model="resnet50-gn", size="full", mode="inference", dtype="float32", memory_format="contiguous",
    compiled=False, threads=2, variant="stock", status="ok", reason=None, error=1e-6, stock_error=1e-6, median_s=0.4,
    q1_s=0.39, q3_s=0.41, repeats=5, peak_bytes=80_000_000, norm_share=0.25, swapped=0, fused=0,
)  # fmt: skip
CONVERTED = replace(
    RECORD, variant="converted", median_s=0.25, q1_s=0.24, q3_s=0.26, peak_bytes=50_000_000, norm_share=0.05, swapped=53
)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = gn.get_num_threads()
    yield
    gn.set_num_threads(before)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models_are_sane():
    assert len({case.name for case in models.MODELS}) == len(models.MODELS)
    for case in models.MODELS:
        assert set(case.sizes) <= set(models.MODES)
        assert set(case.sizes.values()) <= {"full", "half"}
        assert len(case.source) > 10


def test_select_by_name_and_beginning():
    assert models.select_models(None) == models.MODELS
    assert [case.name for case in models.select_models("vae-decode")] == ["vae-decode-256", "vae-decode-512"]
    with pytest.raises(OptionError, match="vgg"):
        models.select_models("vgg")


def test_what_is_missing_is_named():
    case = replace(models.MODELS[0], needs=("no_such_package",))
    assert models.missing(case) in {"torch", "no_such_package"}


def test_only_what_a_model_has_is_work():
    dtypes, formats = ("float32", "bfloat16"), ("contiguous", "channels_last")
    options = {"modes": models.MODES, "dtypes": dtypes, "memory_formats": formats, "compiled": True, "threads": 1}
    todo = list(model_works(models.select_models("dp-sgd,resnet50-gn"), **options))
    assert [(work.mode, work.dtype) for work in todo if work.case.name == "dp-sgd"] == [("dp-sgd", "float32")] * 2
    assert [work.compiled for work in todo] == [False] * 2 + [True] * 8
    assert {work.size for work in model_works(models.MODELS, **options, tiny=True)} == {"tiny"}


# ---- records ---------------------------------------------------------------------------------------------------------


def test_records_come_back(tmp_path):
    both = [RECORD, CONVERTED]
    (path,) = model_records.save_models(both, tmp_path)
    assert path == tmp_path / "a-machine-2c" / "models" / "resnet50-gn.json"
    assert sorted(model_records.load_models(tmp_path), key=lambda record: record.key) == sorted(
        both, key=lambda record: record.key
    )
    newer = replace(RECORD, median_s=0.3)
    model_records.save_models([replace(RECORD, compiled=True)], tmp_path)
    model_records.save_models([newer], tmp_path)  # of the run of both, which is not to be compared with it
    kept = model_records.load_models(tmp_path)
    assert len(kept) == 2
    assert newer in kept
    assert replace(RECORD, compiled=True) in kept


def test_records_of_models_and_of_cases_do_not_mix(tmp_path):
    assert model_records.load_models(tmp_path) == []
    model_records.save_models([RECORD], tmp_path)
    with pytest.raises(FileError, match="no benchmark records"):
        records.load(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"format": "groupnorm-models-1", "records": [{"model": "resnet50-gn"}]}'])
def test_broken_records_are_named(tmp_path, text):
    (path,) = model_records.save_models([RECORD], tmp_path)
    path.write_text(text)
    with pytest.raises(FileError, match=path.name):
        model_records.load_models(tmp_path)


# ---- tables ----------------------------------------------------------------------------------------------------------


def cells(table):
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_a_row_holds_stock_converted_and_both_compiled():
    compiled = [replace(RECORD, compiled=True, median_s=0.2, peak_bytes=None, norm_share=None)]
    compiled += [replace(compiled[0], variant="converted", median_s=None, status="failed", reason="a | b")]
    table = MODEL_TABLES["models"]([RECORD, CONVERTED, *compiled])
    assert "A machine, 2 cores, 2 threads; groupnorm 1.0, torch 2.13; 2026-01-02" in table
    assert cells(table) == [
        [
            "resnet50-gn",
            "inference, f32 NCHW",
            "400",
            "250",
            "1.60",
            "200",
            "**failed**",
            "-",
            "80",
            "50",
            "25 %",
            "5 %",
        ]
    ]
    assert table.count("|---|---|") == 1
    assert cells(MODEL_TABLES["models-failures"]([*compiled]))[0][-1] == "a \\| b"
    assert MODEL_TABLES["models-failures"]([RECORD]) == "No model failed."


def test_tables_show_what_they_are_for():
    half = replace(RECORD, model="unet-sd15", size="half", mode="training")
    sixteen = replace(RECORD, dtype="bfloat16")
    others = [half, sixteen, replace(sixteen, memory_format="channels_last"), replace(RECORD, size="tiny")]
    short, whole = (MODEL_TABLES[name]([RECORD, *others]) for name in ("models", "models-all"))
    assert [row[:2] for row in cells(short)] == [
        ["unet-sd15, half the channels", "training, f32 NCHW"], ["resnet50-gn", "inference, f32 NCHW"],
        ["resnet50-gn", "inference, bf16 NHWC"],
    ]  # fmt: skip
    kinds = ["inference, f32 NCHW", "inference, bf16 NHWC", "inference, bf16 NCHW"]
    assert [row[1] for row in cells(whole)][1:] == kinds
    assert len(cells(MODEL_TABLES["models-cases"]([]))) == len(models.MODELS)


def test_threads_and_machines_stand_apart():
    other = replace(RECORD, machine={**RECORD.machine, "slug": "another-4c", "cpu": "Another"})
    table = MODEL_TABLES["models"]([RECORD, replace(RECORD, threads=1), other])
    assert [line.split(";")[0] for line in table.splitlines() if "Medians" in line] == [
        "A machine, 2 cores, 1 thread", "A machine, 2 cores, 2 threads", "Another, 2 cores, 2 threads",
    ]  # fmt: skip


def test_ratios_within_the_noise_are_marked():
    near = replace(CONVERTED, median_s=0.38, q1_s=0.36, q3_s=0.395)
    table = MODEL_TABLES["models-all"]
    assert "| 400 | 380 | ~ 1.05 |" in table([RECORD, near])
    assert "| 400 | 380 | 1.05 |" in table([RECORD, replace(near, q3_s=0.385)])


def test_report_fills_the_tables_of_models(tmp_path):
    bench = ["bench", "--cases", "tiny-32", "--quick", "--rivals", "numpy", "--save", str(tmp_path / "results")]
    assert CliRunner().invoke(app, bench).exit_code == 0
    (tmp_path / "README.md").write_text("".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in MODEL_TABLES))
    report(tmp_path)
    assert (tmp_path / "README.md").read_text().count("Nothing of this kind was measured yet.") == 3  # models-cases has
    model_records.save_models([RECORD, CONVERTED], tmp_path / "results")
    assert report(tmp_path) == [tmp_path / "README.md"]
    assert "| 400 | 250 | 1.60 |" in (tmp_path / "README.md").read_text()
    assert report(tmp_path) == []


# ---- measuring -------------------------------------------------------------------------------------------------------


def tiny(name, mode):
    torch = pytest.importorskip("torch")
    return ModelWork(
        models.select_models(name)[0], mode, "tiny", "float32", "contiguous", False, torch.get_num_threads()
    )


@pytest.mark.parametrize("break_it", ["wrong", "raising"])
def test_a_wrong_or_raising_model_is_recorded_not_timed(break_it, monkeypatch):
    work = tiny("resnet50-gn", "inference")
    from groupnorm.bench import model_runner
    from groupnorm.torch import GroupNorm

    def normalized(self, x, *_, **__):
        if break_it == "raising":
            raise RuntimeError("no kernel\nand more")
        return x.clone()

    monkeypatch.setattr(GroupNorm, "normalized", normalized)
    stock, converted = model_runner.measure_model(work, machine.describe(), budget_s=0.01, memory=False)
    assert (stock.status, converted.status) == ("ok", "failed")
    assert converted.median_s is None
    assert stock.median_s > 0
    assert ("wrong result" if break_it == "wrong" else "RuntimeError: no kernel") in converted.reason


def test_a_stock_that_gives_nan_excuses_nobody(monkeypatch):
    work = tiny("resnet50-gn", "inference")
    torch = pytest.importorskip("torch")
    from groupnorm.bench import model_runner
    from groupnorm.torch import GroupNorm

    exact = model_runner._exact(work.case, work.size, work.mode, work.dtype, work.threads)
    monkeypatch.setattr(model_runner, "_exact", lambda *_: exact)
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x * float("nan"))
    monkeypatch.setattr(GroupNorm, "normalized", lambda self, x, *_, **__: x * float("nan"))
    found = model_runner.measure_model(work, machine.describe(), budget_s=0.01, memory=False)
    assert [record.status for record in found] == ["failed", "failed"]
    assert all(record.error is None and record.median_s is None for record in found)


def test_gradients_of_zero_are_wrong_even_where_the_worst_tensor_of_stock_is_all_rounding(monkeypatch):
    torch = pytest.importorskip("torch")
    from groupnorm.bench import model_runner

    work, exact = tiny("resnet50-gn", "training"), (torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.1]))
    stock = model_runner._Entry("stock", False, 0, 0, lambda: (exact[0] + 0.01, -exact[1]))
    converted = model_runner._Entry("converted", False, 0, 0, lambda: (0 * exact[0], 0 * exact[1]))
    for entry in (stock, converted):
        model_runner._verify(entry, work, exact, stock)
    assert (stock.error, stock.reason) == (pytest.approx(2), None)
    assert converted.error == pytest.approx(1)
    assert converted.distance == pytest.approx(1)
    assert "wrong result: distance 1.0e+00, allowed 1.1e-01" in converted.reason
    assert converted.run is None


def test_long_calls_are_taken_in_turns():
    from groupnorm.bench.timing import measure_long

    calls = []
    found = measure_long({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert "".join(calls) == "abbaab"
    assert [timing.repeats for timing in found.values()] == [3, 3]


def test_error_finds_nan_and_wrong_shapes():
    torch = pytest.importorskip("torch")
    from groupnorm.bench.model_runner import error

    large, none = torch.full((4,), 2.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert error((large, none), (large, none)) == 0
    assert error((1.01 * large, none), (large, none)) == pytest.approx(0.01)
    assert error((large, none + 0.02), (large, none)) == pytest.approx(0.01)  # a gradient that should be 0
    assert error((large * float("nan"), none), (large, none)) == float("inf")
    assert error((large, none * float("nan")), (large, none)) == float("inf")
    assert error((none, none), (large, none)) == float("inf")
    assert error((large,), (large, none)) == float("inf")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_norms_and_activations_are_a_part_of_the_time(mode):
    work = tiny("resnet50-gn", mode)
    from groupnorm.bench.model_profile import norm_share
    from groupnorm.bench.model_work import build, step

    for converted in (False, True):
        built = build(work, converted=converted)
        run = step(work, built.model, built.inputs)
        run()
        assert 0 < norm_share(run) < 1


def test_what_is_no_norm_has_no_part():
    torch = pytest.importorskip("torch")
    from groupnorm.bench.model_profile import norm_share

    x = torch.ones(64, 64)
    assert norm_share(lambda: x @ x) == 0
    assert norm_share(lambda: torch.relu_(torch.nn.functional.group_norm(x, 8))) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    from groupnorm.bench.model_memory import peak_bytes

    work = tiny("resnet50-gn", "training")
    assert 10_000 < peak_bytes(work, converted=True) < 100_000_000


# ---- the command -----------------------------------------------------------------------------------------------------


def measured(*options):
    return CliRunner().invoke(app, ["bench", "--models", "--quick", "--layouts", "NCHW", "--threads", "1", *options])


def test_quick_measures_a_tiny_model(tmp_path):
    pytest.importorskip("torch")
    result = measured("--cases", "resnet50-gn", "--json", "--save", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert [(record["mode"], record["variant"]) for record in found] == [
        ("inference", "stock"), ("inference", "converted"), ("training", "stock"), ("training", "converted"),
    ]  # fmt: skip
    for record in found:
        assert record["status"] == "ok"
        assert record["median_s"] > 0
        assert 0 < record["norm_share"] < 1
        assert record["size"] == "tiny"
        assert (record["swapped"] > 0) == (record["variant"] == "converted")


def test_quick_prints_a_table():
    pytest.importorskip("torch")
    result = measured("--cases", "resnet50-gn", "--directions", "forward", "--no-save")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "resnet50-gn (tiny)" in result.stdout
    assert "converted" in result.stdout


@pytest.mark.slow
def test_quick_measures_every_model():
    pytest.importorskip("torch")
    result = measured("--no-save", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    installed = {case.name for case in models.MODELS if models.missing(case) is None}
    assert {record["model"] for record in found} == installed
    assert all(record["status"] == "ok" for record in found)


def test_an_unknown_model_is_an_error():
    assert isinstance(measured("--cases", "vgg").exception, OptionError)


def test_a_model_that_cannot_be_built_is_left_out(monkeypatch):
    absent = {"dp-sgd": "opacus", "segresnet": "monai"}
    monkeypatch.setattr("groupnorm.bench.models.missing", lambda case: absent.get(case.name))
    result = measured("--cases", "dp-sgd,segresnet")
    assert isinstance(result.exception, OptionError)
    assert "dp-sgd needs opacus" in result.stderr
    assert "segresnet needs monai" in result.stderr
