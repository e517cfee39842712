"""The commands: what they print, that --json is one document, and that an error is one line with exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from groupnorm.analysis import features
from groupnorm.cli import app, main
from groupnorm.errors import FileError

SOURCE = Path(__file__).resolve().parents[1] / "src"
COMMANDS = ["demo", "check", "bench", "info", "run", "roofline", "advise", "style", "compare"]


def groupnorm(*arguments, cwd=None, **environment):
    """The command in a process of its own."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "groupnorm", *arguments], capture_output=True, text=True, check=False,
        timeout=120, cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def invoke(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# ---- help and errors -------------------------------------------------------------------------------------------------


def test_no_command_prints_help():
    run = groupnorm()
    assert run.returncode == 0
    assert all(name in run.stdout for name in COMMANDS)
    assert run.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name):
    text = invoke(name, "--help").stdout
    assert "--json" in text
    assert f"groupnorm {name}" in text.partition("Example")[2]


def test_version():
    assert invoke("--version").stdout.startswith("groupnorm 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["info", "--bogus"], "--bogus"),
        (["info", "--shape", "2xx"], "2x320x64x64"),
        (["info", "--shape", "2x30x4", "--groups", "7"], "try 6 or 10"),
        (["info", "--shape", "2x32x4", "--dtype", "int8"], "bfloat16"),
        (["info", "--shape", "2x32x4", "--impl", "tpu"], "tpu"),
        (["info", "--shape", "9999999999x9999999999"], "too large"),
        (["info", "--shape", "99999999999999999999x2"], "too large"),
        (["info", "--threads", "0"], "at least 1"),
        (["check", "--dtypes", "int8"], "int8"),
        (["bench", "--cases", "vgg"], "vgg"),
        (["bench", "--rivals", "tensorflow"], "tensorflow"),
        (["bench", "--seconds", "-1"], "-1"),
        (["bench", "--report", "--root", "/nowhere"], "/nowhere"),
        (["demo", "--output", "/nowhere/picture.png"], "/nowhere"),
        (["demo", "--side", "7"], "between 32 and 512"),
        (["demo", "--output", "picture.svg"], "must end in .png"),
        (["bench", "--compiled"], "give --models"),
        (["bench", "--models", "--cold"], "leave --cold"),
        (["roofline", "1x64x8x8", "--measure", "--storage", "hdd"], "leave --storage hdd away"),
        (["roofline", "4x1000000000x1000000000", "--groups", "1", "--measure"], "--measure makes arrays"),
        (["info", "--shape", "2x64x8x8", "--groups", "99999999999999999999", "--direction", "backward"], "num_groups"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("groupnorm: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_error_in_a_real_process_has_no_traceback():
    run = groupnorm("info", "--shape", "2x30x4", "--groups", "7")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr


def test_a_wrong_environment_is_a_clear_error():
    run = groupnorm("info", GROUPNORM_NUM_THREADS="many")
    assert run.returncode == 2
    assert "GROUPNORM_NUM_THREADS" in run.stderr
    assert run.stderr.count("\n") == 1


def test_interrupt_exits_with_130(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("groupnorm.cli.app", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 130


@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX shell")
def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m groupnorm bench --list --json | head -c 1"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False,
                         timeout=60, env={**os.environ, "PYTHONPATH": str(SOURCE)})  # fmt: skip
    assert (run.stdout, run.stderr, run.returncode) == ("{", "", 0)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom groupnorm.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numba', 'torch', 'matplotlib', 'jax', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
                         env={**os.environ, "PYTHONPATH": str(SOURCE)})  # fmt: skip
    assert run.stderr.strip() == "[]"


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_info_as_json():
    found = json.loads(invoke("info", "--json").stdout)
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["numpy"] == np.__version__
    assert found["engines"]["reference"] == "available"
    assert "not available" in found["engines"]["gpu"] or "GPU" in found["engines"]["gpu"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("layout", "shape"), [("NCHW", "2x64x16x16"), ("NHWC", "2x16x16x64")])
def test_info_prints_a_plan(direction, layout, shape):
    options = ["--shape", shape, "--groups", "32", "--layout", layout, "--direction", direction]
    text = invoke("info", *options, "--activation", "silu", "--dtype", "bfloat16").stdout
    assert direction in text
    assert "plan" in text
    found = json.loads(invoke("info", *options, "--json").stdout)
    assert found["plan"]["engine"] in {"cpu", "reference"}
    assert "C=64" in found["plan"]["text"]


def test_a_plan_takes_no_memory():
    text = invoke("info", "--shape", "64x512x512x512", "--groups", "32", "--json").stdout  # 34 GB if it were touched
    assert "N=64" in json.loads(text)["plan"]["text"]


def test_check_keeps_the_promises():
    result = invoke("check", "--dtypes", "float32", "--layouts", "NHWC", "--activations", "none,silu", "--json")
    found = json.loads(result.stdout)
    assert found["kept"], [f["broken"] for f in found["findings"]]
    assert result.exit_code == 0
    assert {f["promise"] for f in found["findings"]} == {"forward", "gradients", "bits", "constant", "contained"}
    assert all(f["tried"] > 0 for f in found["findings"])


def test_check_tells_what_is_broken(monkeypatch):
    import groupnorm as gn

    exact = gn.group_norm
    monkeypatch.setattr(gn, "group_norm", lambda *a, **k: exact(*a, **k) * np.float32(1 + 1e-5))
    result = invoke("check", "--dtypes", "float32", "--layouts", "NCHW", "--activations", "none")
    assert result.exit_code == 1
    assert "broken" in result.stdout


def test_demo_in_a_process(tmp_path):
    pytest.importorskip("matplotlib")
    run = groupnorm("demo", "--side", "32", "--seconds", "0.01", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["correct"]
    assert len(found["results"]) == 4
    assert (tmp_path / found["picture"]).read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    def missing():
        raise FileError("the photograph comes with matplotlib, which is not installed: pip install matplotlib")

    monkeypatch.setattr(features, "photograph", missing)
    monkeypatch.chdir(tmp_path)
    result = invoke("demo", "--side", "32", "--seconds", "0.01")
    assert result.exit_code == 0
    assert "pip install matplotlib" in result.stderr
    assert "of budget" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_feature_maps_are_those_of_their_filters():
    picture = np.full((64, 48, 3), 0.5, np.float32)
    maps = features.feature_maps(picture, 32)
    assert maps.shape == (4, features.CHANNELS, 32, 32)
    assert len(features.channel_names()) == features.CHANNELS
    blurred = ["luminance, blur" in name for name in features.channel_names()]
    np.testing.assert_allclose(maps[:, blurred], 0.5, atol=1e-6)  # a flat picture: its blur is itself
    np.testing.assert_allclose(maps[:, ~np.array(blurred)], 0, atol=1e-6)  # and no filter sees anything else


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_documents_have_null_for_what_json_has_not(capsys):
    from groupnorm.cli.documents import print_json

    print_json({"a": float("nan"), "b": [1.5, (float("inf"), "x")], "c": {"d": np.float64("-inf"), "e": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, [None, "x"]], "c": {"d": None, "e": None}}


def test_nan_is_never_correct():
    from groupnorm.cli.demo import _worst

    assert np.isnan(_worst([1e-7, float("nan"), 2.0]))
    assert not _worst([1e-7, float("nan")]) <= 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_with_few_characters(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "groupnorm", "roofline", "2x64x8x8", "--machine", "H200"], capture_output=True,
        check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("\u2588" if encoding == "utf-8" else "#") in done.stdout.decode(encoding)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_names_of_files_that_are_no_text(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 4, 3), np.float32))
    done = groupnorm("run", "x.npy", "--groups", "2", "--output", "y\udcff.npy", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "udcff.npy" in done.stdout
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "groupnorm", "info", "--json"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr
