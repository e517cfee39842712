"""docs/caffe2.md: its code runs, and every place in its table of symbols exists."""

import importlib
import re
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")
pytest.importorskip("onnx")

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "caffe2.md").read_text(encoding="utf-8")
SYMBOLS = {
    "GN", "mu", "rsig", "SIGMA", "dL", "dmu", "drsig", "ds", "db", "dsi", "dbi", "dgamma", "dbeta", "GammaGrad",
    "BetaGrad", "GammaBetaBackward", "forwardNCHW", "forwardNHWC", "ComputeFusedParams", "ComputeInternalGradients",
    "GetGroupNormGradient",
}  # fmt: skip


def rows():
    table = PAGE[PAGE.index("| symbol |") :].splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table if line.startswith("|")]


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```") // 2 == 4
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/caffe2.md, block {number}", "exec"), names)


def test_every_symbol_is_in_the_table():
    assert {row[0] for row in rows()} >= SYMBOLS
    assert all(row[1] and "::" in row[2] for row in rows())


@pytest.mark.parametrize("place", sorted({p for row in rows() for p in re.findall(r"`([^`]+)`", row[2])}))
def test_every_place_exists(place):
    module, name = place.split("::")
    assert callable(getattr(importlib.import_module(f"groupnorm.{module}"), name))
