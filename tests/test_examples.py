"""The examples, each in a process of its own: what it promises, what it writes, and that errors are one line."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]


def example(name, *arguments, path=()):
    """Run an example; `path` goes before everything else that is imported from."""
    places = [*map(str, path), str(ROOT / "src"), os.environ.get("PYTHONPATH")]
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)], capture_output=True, text=True,
        check=False, timeout=240, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
    )  # fmt: skip


def rows_of(table):
    """Name -> largest, mean and gradient's difference, and the jump at the seams; names take 20 characters."""
    rows = table.splitlines()[2:6]
    return {row[:20].strip(): [float(number) for number in row[20:].split()] for row in rows}


def size_of_png(path):
    """Width and height, after the check sum of every chunk."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.append(kind)
        end = at + 8 + length
        assert zlib.crc32(data[at + 4 : end]) == struct.unpack_from(">I", data, end)[0]
        at = end + 4
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    return struct.unpack_from(">II", data, 16)


@pytest.mark.slow
def test_tiles(tmp_path):
    output = tmp_path / "seams.png"
    run = example("tiles.py", "--output", output, "--strips", 5)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    rows = rows_of(run.stdout)
    own, merged, whole = rows["own statistics"], rows["merged statistics"], rows["whole"]
    assert all(a > 100 * b for a, b in zip(own[:3], merged[:3], strict=True)), run.stdout
    assert own[3] > 2 * whole[3]
    assert merged[3] == pytest.approx(whole[3], abs=1.1e-4)  # one unit of the last digit
    assert min(size_of_png(output)) > 500
    assert output.stat().st_size < 500_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strips", "1"], "--strips must be between 2 and"),
        (["--strips", "9999"], "got 9999"),
        (["--strips", "many"], "invalid int value"),
        (["--output", "no-such-folder/tiles.png"], "no-such-folder"),
        (["--output", "tiles.txt"], "tiles.txt"),
        (["--colour"], "--colour"),
    ],
)
def test_an_error_is_one_line(arguments, said):
    is_one_line(example("tiles.py", *arguments), said)


def test_matplotlib_is_missing(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    is_one_line(example("tiles.py", path=[tmp_path]), "pip install matplotlib")


def is_one_line(run, said):
    assert run.returncode == 2
    assert run.stdout == ""
    assert said in run.stderr
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
