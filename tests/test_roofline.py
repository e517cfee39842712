"""The roofline: least bytes and operations as literals, bounds of known machines, figures, the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from typer.testing import CliRunner

import groupnorm as gn
from groupnorm._core.threads import usable_cpus
from groupnorm._core.traffic import least_traffic
from groupnorm.analysis import figures as figures_module
from groupnorm.analysis.devices import DEVICES, STORAGE
from groupnorm.analysis.figures import Level, MachineFigures, Speeds, figures_of, read_figures, write_figures
from groupnorm.analysis.operations import flops_per_element, operations_per_element
from groupnorm.analysis.prediction import move_s, predicted_seconds
from groupnorm.bench.predictions import compare_records, load_figures
from groupnorm.bench.records import load
from groupnorm.cli import app, main
from groupnorm.errors import DtypeError, FileError, OptionError, ShapeError

ROOT = Path(__file__).resolve().parents[1]
MEMORY = Level("memory", None, 10e9, 20e9, 20e9)
CACHE = Level("L3", 1000, 100e9, 80e9, 80e9)
SPEEDS = (Speeds(1, (MEMORY,), {"float32": 100e9}, 100e9), Speeds(4, (CACHE, MEMORY), {"float32": 400e9}, 400e9))
PLAIN = MachineFigures("plain", "cpu", "made up for tests", 8, 1e-6, SPEEDS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Figures of this machine are not measured: those of a plain one are found in their place."""
    monkeypatch.setenv("GROUPNORM_CACHE_DIR", str(tmp_path / "cache"))
    figures_module.cache_path().parent.mkdir()
    write_figures(PLAIN, figures_module.cache_path())


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_least_bytes_as_literals():
    x = 2 * 64 * 100 * 4  # N=2, C=64, S=100, float32
    assert least_traffic(2, 64, 100, 8, "float32", "forward") == (x + 2 * 64 * 4, x, x + 2 * 64 * 4 + 2 * 16 * 4)
    assert least_traffic(2, 64, 100, 8, "float32", "forward", affine=False).moved == 2 * x
    backward = least_traffic(2, 64, 100, 8, "float32", "backward")
    assert backward.read == 2 * x + 64 * 4 + 2 * 16 * 4  # bias changes no gradient
    assert backward.written == x + 2 * 64 * 4
    half = least_traffic(2, 64, 100, 8, "bfloat16", "forward", residual=True, scale_shift=True)
    assert half.read == x + 2 * 64 * 2 + 2 * 2 * 64 * 2  # x and residual at half the size, parameters
    assert half.saved == x // 2 + 2 * 64 * 2 + 2 * 2 * 64 * 2 + 2 * 16 * 4  # statistics stay float32; z is not needed
    plain = least_traffic(2, 64, 100, 8, "float32", "backward", affine=False, residual=True)
    assert (plain.read, plain.written) == (2 * x + 2 * 16 * 4, x)  # the residual's gradient is dy
    fused = least_traffic(2, 64, 100, 8, "float32", "backward", affine=False, residual=True, activation="silu")
    assert (fused.read, fused.written) == (3 * x + 2 * 16 * 4, 2 * x)


def test_backward_reads_the_parameters_that_gradients_depend_on():
    def read(**options):
        bytes_read = least_traffic(2, 64, 100, 8, "float32", "backward", **options).read
        return (bytes_read - 2 * 2 * 64 * 100 * 4 - 2 * 16 * 4) // 4

    assert read(affine=False) == 0
    assert read() == 64  # weight
    assert read(activation="relu") == 2 * 64  # and bias: z is computed again
    assert read(scale_shift=True) == 2 * 64 + 128  # dscale is a sum of dz*(xhat*weight + bias)
    assert read(scale_shift=True, activation="relu") == 2 * 64 + 2 * 128


def test_flops_and_operations_as_literals():
    assert flops_per_element("forward", None) == 7  # x - pivot, 1 + 2 for the sums; x - m, 2 for the multiply-add
    assert flops_per_element("forward", "relu") == 8
    assert flops_per_element("backward", None) == 12
    assert operations_per_element("forward", None, "float32") == {
        "load": 2, "store": 1, "arithmetic": 5, "activation": 0, "conversion": 0}  # fmt: skip
    assert operations_per_element("backward", "silu", "bfloat16")["conversion"] == 5
    for activation in gn.reference.ACTIVATIONS:
        for direction in ("forward", "backward"):
            wide, short = (operations_per_element(direction, activation, dtype) for dtype in ("float32", "float16"))
            assert wide["activation"] >= short["activation"]  # an exponential for 16-bit results is shorter
            assert (wide["activation"] > 0) == (activation is not None)
            assert flops_per_element(direction, activation) <= 2 * sum(wide.values())


def test_bytes_move_at_the_speed_of_where_they_lie():
    levels = PLAIN.speeds[1].levels
    assert move_s(1000, 1000, levels, "read") == pytest.approx([1e-8, 0.0])
    assert move_s(2000, 2000, levels, "read") == pytest.approx([1e-8, 1e-7])  # half fits
    assert move_s(500, 2000, levels, "best") == pytest.approx([250 / 100e9, 250 / 20e9])


# ---- roofline --------------------------------------------------------------------------------------------------------


def test_a_call_on_a_named_gpu():
    found = gn.roofline((1, 128, 512, 512), 32, dtype="bfloat16", activation="silu", machine="h200")
    elements = 128 * 512 * 512
    assert found.bytes_read == 2 * elements + 2 * 128 * 2
    assert found.bytes_written == 2 * elements
    assert found.flops == 11 * elements
    assert found.times_s["memory"] == pytest.approx(found.bytes / 4.8e12)
    assert found.times_s["arithmetic"] == pytest.approx(11 * elements / 67e12)
    assert found.bound == "memory"
    assert found.time_s == found.times_s["memory"]
    assert found.predicted_s is None
    assert found.instructions["load"] == 2 * elements // (32 * 8)  # 16 bytes for each of 32 lanes
    assert found.ridge == pytest.approx(67 / 4.8)
    assert found.calls_per_s == pytest.approx(1 / found.time_s)
    assert "memory bound" in str(found)
    assert "<- binds" in str(found)


def test_a_device_is_the_slowest_level():
    found = gn.roofline((64, 256, 56, 56), 32, storage="nvme4", machine="EPYC-9654")
    assert found.bound == "storage"
    assert found.predicted_s is None
    assert found.ridge == pytest.approx(96 * 2.4e9 * 32 / 7.88e9)
    assert found.launch_elements == pytest.approx(5e-6 * 7.88e9 / 8, rel=1e-3)
    assert "19 calls per second" in str(found)
    assert "1.92 calls per second" in str(gn.roofline((640, 256, 56, 56), 32, storage="nvme4", machine="EPYC-9654"))


def test_named_cpus_issue_two_vectors_in_a_clock():
    for name, cores, ghz in (("EPYC-9654", 96, 2.4), ("Xeon-8480+", 56, 2.0)):
        found = gn.roofline((8, 64, 56, 56), 32, machine=name)
        assert found.times_s["instructions"] == pytest.approx(sum(found.instructions.values()) / (cores * ghz * 2e9))


def test_a_prediction_for_fewer_threads_than_were_measured(monkeypatch):
    monkeypatch.setattr("groupnorm.analysis.roofline.get_num_threads", lambda: 4)
    four = gn.roofline((8, 64, 56, 56), 8).predicted_s
    monkeypatch.setattr("groupnorm.analysis.roofline.get_num_threads", lambda: 3)
    three = gn.roofline((8, 64, 56, 56), 8).predicted_s
    assert four < three < four * 4 / 3  # memory is shared as before, and a call costs what it costs


def test_limits_on_a_plain_machine(monkeypatch):
    monkeypatch.setattr("groupnorm.analysis.roofline.get_num_threads", lambda: 4)
    found = gn.roofline((1, 8, 100), 2, direction="backward")
    assert found.threads == 4
    moved = found.bytes
    assert found.times_s["memory"] == pytest.approx(1000 / 100e9 + (moved - 1000) / 20e9)
    assert found.times_s["launch"] == 1e-6
    assert found.bound == "launch"
    instructions = {"load": 400, "store": 100, "arithmetic": 900, "activation": 0, "conversion": 0}
    assert found.instructions == instructions
    assert found.times_s["instructions"] == pytest.approx(1400 / (400e9 / 8))
    assert found.intensity == pytest.approx(12 * 800 / moved)
    assert found.predicted_s > found.time_s
    at = found.launch_elements * moved / 800
    assert 1000 / 100e9 + (at - 1000) / 20e9 == pytest.approx(1e-6, rel=0.01)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_launch_binds_up_to_the_elements_that_are_named(monkeypatch, activation, threads):
    monkeypatch.setattr("groupnorm.analysis.roofline.get_num_threads", lambda: threads)
    limit = gn.roofline((1, 8, 100), 2, affine=False, activation=activation).launch_elements
    below, above = (gn.roofline((1, 1, n), 1, affine=False, activation=activation) for n in (limit - 64, limit + 64))
    assert (below.bound == "launch") != (above.bound == "launch")


def test_threads_between_the_measured_ones_have_a_bound_they_keep():
    assert [speeds.threads for speeds in PLAIN.speeds] == [1, 4]
    assert [PLAIN.for_threads(n).threads for n in (1, 2, 3, 4, 5)] == [1, 4, 4, 4, 4]


def test_data_that_streams_is_bound_by_its_device():
    found = gn.roofline((4, 64, 256, 256), 32, storage="nvme4")
    assert found.bound == "storage"
    assert found.times_s["storage"] == pytest.approx(found.bytes / STORAGE["nvme4"][0])
    assert gn.roofline((4, 64, 256, 256), 32, storage=1e15).bound != "storage"


def test_layouts_name_the_axis_of_the_channels():
    first, last = gn.roofline((2, 64, 10, 12), 32), gn.roofline((2, 10, 12, 64), 32, layout="NHWC")
    assert first.bytes == last.bytes
    with pytest.raises(ShapeError, match="10 channels"):
        gn.roofline((2, 10, 12, 64), 32)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "said"),
    [
        (((2, 0, 3), 1), {}, ShapeError, "at least 1"),
        (((2, -4, 3), 1), {}, ShapeError, "at least 1"),
        (((2, 4.5), 1), {}, ShapeError, "whole numbers"),
        (("ab", 1), {}, ShapeError, "whole numbers"),
        (((4,), 1), {}, ShapeError, "channel axis"),
        (((2, 30, 5), 4), {}, ShapeError, "try 3 or 5"),
        (((2, 8), 2), {"dtype": "int8"}, DtypeError, "float32"),
        (((2, 8), 2), {"dtype": ["a"]}, DtypeError, "float32"),
        (((2, float("inf")), 2), {}, ShapeError, "whole numbers"),
        (((2, 8, 1 << 62), 2), {}, ShapeError, "2.62"),
        (((2, 8), 2), {"storage": [1]}, OptionError, "bytes per second"),
        (((2, 8), 2), {"storage": 10**400}, OptionError, "bytes per second"),
        (((2, 8), 2), {"machine": "a\0.json"}, FileError, "cannot read"),
        (((2, 8), 2), {"direction": "sideways"}, OptionError, "forward or backward"),
        (((2, 8), 2), {"activation": "swish"}, OptionError, "silu"),
        (((2, 8), 2), {"layout": "CHW"}, OptionError, "NHWC"),
        (((2, 8), 2), {"machine": "abacus"}, OptionError, "H200"),
        (((2, 8), 2), {"machine": "nowhere.json"}, FileError, "No such file"),
        (((2, 8), 2), {"storage": "tape"}, OptionError, "nvme4"),
        (((2, 8), 2), {"storage": -1}, OptionError, "bytes per second"),
    ],
)
def test_bad_arguments_are_named(arguments, options, kind, said):
    with pytest.raises(kind, match=said):
        gn.roofline(*arguments, **options)


def test_predictions_grow_with_the_work():
    def seconds(**changed):
        usual = {"N": 2, "C": 64, "S": 4096, "G": 8, "dtype": "float32", "channels_last": False,
                 "direction": "forward", "activation": None, "speeds": PLAIN.speeds[1], "launch_s": 1e-6}  # fmt: skip
        return predicted_seconds(**{**usual, **changed})

    assert 1e-6 < seconds() < seconds(S=8192) < seconds(S=8192, direction="backward")
    assert seconds() < seconds(activation="silu") < seconds(activation="gelu")
    assert seconds(S=0) == 1e-6
    assert seconds(speeds=PLAIN.speeds[0]) > seconds()


def test_records_of_this_repository_keep_the_promises():
    """No bound is above what was measured, and the prediction is within a quarter in the median."""
    compared = compare_records(load(ROOT / "results"), load_figures(ROOT / "results"))
    assert len(compared) > 100
    assert max(each.bound_ratio for each in compared) <= 1
    assert median(abs(each.predicted_ratio - 1) for each in compared) <= 0.25


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_survive_a_file(tmp_path):
    write_figures(PLAIN, tmp_path / "plain.json")
    assert read_figures(tmp_path / "plain.json") == PLAIN
    assert figures_of(tmp_path / "plain.json") == PLAIN
    assert figures_of(PLAIN) is PLAIN
    for target in (tmp_path, tmp_path / "none" / "plain.json"):
        with pytest.raises(FileError, match="folder"):
            write_figures(PLAIN, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "plain.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 200_000, "[]", "1", "null", '{"format": "something else"}', '{"format": "groupnorm-figures-1"}',
     json.dumps({"format": "groupnorm-figures-1", "name": "x", "kind": "cpu", "source": "", "lanes": 8, "launch_s": 1,
                 "speeds": []}),
     json.dumps({"format": "groupnorm-figures-1", "name": "x", "kind": "cpu", "source": "", "lanes": 8, "launch_s": 1,
                 "speeds": [{"threads": 1, "levels": [], "flops_per_s": {}, "operations_per_s": 1}]})],
)  # fmt: skip
def test_a_file_from_elsewhere_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(FileError, match="figures"):
        read_figures(path)


def test_figures_that_are_no_numbers_are_refused(tmp_path):
    path = tmp_path / "figures.json"
    for changed in ({"launch_s": 0.0}, {"launch_s": float("nan")}, {"launch_s": "1"}, {"launch_s": 10**400},
                    {"launch_s": 1e-320}, {"lanes": -1}, {"lanes": True}, {"kind": "toaster"}, {"kind": ["cpu"]},
                    {"name": "two\nlines"}, {"name": [1]}):  # fmt: skip
        write_figures(replace(PLAIN, **changed), path)
        with pytest.raises(FileError, match="machine figures"):
            read_figures(path)


def test_this_machine_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr("groupnorm.analysis.measure.measure_figures", lambda: calls.append(1) or PLAIN)
    figures_module.cache_path().unlink()
    assert figures_of(None) == figures_of(None) == PLAIN
    assert len(calls) == 1
    figures_of(None, measure_anew=True)
    assert len(calls) == 2
    figures_module.cache_path().write_text("broken")
    assert figures_of(None) == PLAIN
    assert len(calls) == 3


def test_a_figure_that_is_missing_is_seen(tmp_path):
    write_figures(PLAIN, tmp_path / "f.json")
    text = json.loads((tmp_path / "f.json").read_text())
    for name in ("read_bytes_per_s", "copy_bytes_per_s", "triad_bytes_per_s"):
        level = text["speeds"][0]["levels"][0]
        (tmp_path / "g.json").write_text(
            json.dumps(text | {"speeds": [{**text["speeds"][0], "levels": [{**level, name: None}]}]})
        )
        with pytest.raises(gn.FileError, match="figure is missing"):
            read_figures(tmp_path / "g.json")


def test_figures_that_nobody_can_keep_are_still_given(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROUPNORM_CACHE_DIR", str(tmp_path / "file"))  # a folder cannot be made here
    monkeypatch.setattr("groupnorm.analysis.measure.measure_figures", lambda: PLAIN)
    with pytest.warns(UserWarning, match="GROUPNORM_CACHE_DIR"):
        assert figures_of(None) == PLAIN


def test_measured_figures_make_sense():
    from groupnorm.analysis.measure import measure_figures

    before = gn.get_num_threads()
    try:
        gn.set_num_threads(1)  # figures are kept for other processes, which may use more
        found = measure_figures()
    finally:
        gn.set_num_threads(before)
    assert found.kind == "cpu"
    assert found.speeds[-1].threads == usable_cpus()
    assert 1e-7 < found.launch_s < 1e-3
    assert [speeds.threads for speeds in found.speeds][:1] == [1]
    for speeds in found.speeds:
        assert [level.name for level in speeds.levels] == ["L1", "L2", "L3", "memory"]
        assert speeds.levels[0].best_bytes_per_s > speeds.levels[-1].best_bytes_per_s > 1e8
        assert speeds.flops_per_s["float32"] > speeds.flops_per_s["float64"] > 1e8
        assert speeds.operations_per_s > 1e8


@pytest.mark.parametrize("most", [6, 12, 48, 96, 128])
def test_no_thread_measures_beyond_the_arrays(most):
    from groupnorm._engines.cpu.peaks import STEP
    from groupnorm.analysis import measure

    floats = measure._memory_bytes() // 4 // (STEP * most) * STEP * most
    arrays = (np.empty(floats, np.float32),) * 3  # never touched
    for threads in (1, 2, 4, most // 2, most):
        for work in measure._works(arrays, threads).values():
            _, x, y, other, elements = work.run.args
            assert elements % STEP == 0
            assert threads * elements * x.itemsize <= min(x.nbytes, y.nbytes, other.nbytes)


def test_l3_caches_of_machines_that_have_several(monkeypatch, tmp_path):
    from groupnorm._core import machine

    one = machine.Caches(1, 2, 32, cpus=96, l3s=12)
    assert [one.l3_of(threads) for threads in (1, 8, 9, 96, 200)] == [32, 32, 64, 384, 384]
    assert [one.l3_spread(threads) for threads in (1, 8, 12, 200)] == [32, 256, 384, 384]
    cache = tmp_path / "cpu8/cache/index3"
    cache.mkdir(parents=True)
    (cache / "shared_cpu_list").write_text("8-15,104\n")
    monkeypatch.setattr(machine, "_CPU", tmp_path)
    assert machine._cpus_of_l3(8) == {*range(8, 16), 104}
    assert machine._cpus_of_l3(9) == set()
    (tmp_path / "cpu0/cache/index3").mkdir(parents=True)
    (tmp_path / "cpu0/cache/index3/shared_cpu_list").write_text("0-7\n")
    monkeypatch.setattr(machine, "_cpus", lambda: {0, *range(8, 16)})
    assert machine._known_caches()[3:] == (9, 2)


def test_memory_of_a_container_is_all_there_is(monkeypatch, tmp_path):
    from groupnorm._core import machine
    from groupnorm.analysis import measure

    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.memory_limit()
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit() == whole
    (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
    assert machine.memory_limit() == 1 << 28
    assert measure._memory_bytes() <= 1 << 25


def test_figures_do_not_depend_on_the_number_of_threads_of_pytorch():
    torch = pytest.importorskip("torch")
    from groupnorm._engines.cpu.threads import _PARALLEL, POOL

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        gn.group_norm(np.ones((2, 8, 64, 64), np.float32), 2)
        team = POOL._header[_PARALLEL]
        with POOL.own_threads():
            assert POOL._header[_PARALLEL] == 0
            gn.group_norm(np.ones((2, 8, 64, 64), np.float32), 2)
            assert POOL._header[_PARALLEL] == 0
        assert POOL._header[_PARALLEL] == team
    finally:
        torch.set_num_threads(before)


def test_a_disturbance_costs_no_limit(monkeypatch):
    from groupnorm.analysis import measure

    samples = []  # of "slow" and "fast", in turns; something else runs during the first twelve of them

    def seconds(run, passes):
        samples.append(run)
        return (2.0 if run == "slow" else 1.0) * (4.0 if len(samples) <= 12 else 1.0)

    monkeypatch.setattr(measure, "_passes", lambda run: 1)
    monkeypatch.setattr(measure, "_seconds", seconds)
    found = measure._rates({"a": measure.Work("slow", 8.0), "b": measure.Work("fast", 8.0)})
    assert found == {"a": 4.0, "b": 8.0}
    assert len(samples) == 2 * 13  # the seventh round was the first undisturbed one: six more in which nothing rose


def test_every_named_machine_has_a_source():
    names = [device.name.lower() for device in DEVICES]
    assert len(set(names)) == len(names)
    for device in DEVICES:
        assert any(word in device.source for word in ("data sheet", "product page", "white paper"))
        found = gn.roofline((8, 64, 32, 32), 32, machine=device.name)
        assert found.time_s > 0
        assert (found.predicted_s is None) == (device.kind == "gpu")


# ---- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, ["roofline", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_the_command_prints_limits_and_measures():
    text = invoke("2x64x16x16", "--measure")
    assert all(word in text for word in ("memory bound", "launch bound", "predicted", "measured here"))
    assert "█" in text
    assert "% of the bound's speed" in invoke("2x16x16x64", "--layout", "NHWC", "--direction", "backward", "--measure",
                                              "--dtype", "bfloat16")  # fmt: skip


def test_the_command_gives_json():
    found = json.loads(invoke("1,128,64,64", "--machine", "H100", "--storage", "hdd", "--json"))
    assert found["bound"] == "storage"
    assert found["machine"]["name"] == "H100"
    assert found["measured_s"] is None


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_command_draws(tmp_path, ending):
    invoke("2x64x16x16", "--measure", "--picture", tmp_path / f"roof.{ending}")
    written = (tmp_path / f"roof.{ending}").read_bytes()
    assert written.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f"roof.{ending}"]


def test_the_command_saves_the_machine(tmp_path):
    invoke("2x64x16", "--machine", "A100", "--save-machine", tmp_path / "a100.json")
    assert figures_of(tmp_path / "a100.json") == figures_of("A100")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0x3"], "at least 1"),
        (["ax3"], "SHAPE must be"),
        (["4x30x5"], "num_groups"),
        (["4x32", "--machine", "abacus"], "abacus"),
        (["4x32", "--machine", "H200", "--measure"], "leave --machine"),
        (["4x32", "--picture", "roof.gif"], "roof.gif"),
        (["4x32", "--picture", "no/such/folder/roof.png"], "folder"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        main(["roofline", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_answers_within_half_a_second_without_measuring():
    code = ("import time; start = time.perf_counter(); import groupnorm as gn; "
            "gn.roofline((1, 128, 512, 512), 32); print(time.perf_counter() - start)")  # fmt: skip
    taken = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
                for _ in range(3))  # fmt: skip
    assert taken < 0.5
