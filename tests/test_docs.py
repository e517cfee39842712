"""README.md and docs/frontends.md: their code runs, and the signatures they print are those of the functions."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import groupnorm as gn

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/frontends.md")}
BLOCKS = [(page, number, block) for page, text in PAGES.items()
          for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))]  # fmt: skip


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}, {n}" for page, n, _ in BLOCKS])
def test_the_code_runs(page: str, number: int, block: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in re.findall(r"^(?:import|from) (torch|diffusers)", block, re.MULTILINE):
        pytest.importorskip(package)
    if "groupnorm.torch" in block:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    threads = gn.get_num_threads()
    try:
        exec(compile(block, f"{page}, block {number}", "exec"), {"__name__": "block"})
    finally:
        gn.set_num_threads(threads)


def test_signatures_are_those_of_the_functions() -> None:
    found = re.search(r"```text\n(.*?)```", PAGES["docs/frontends.md"], re.DOTALL)
    assert found
    printed = dict.fromkeys(
        ("group_norm", "group_norm_vjp", "group_norm_backward", "moments", "merge_moments", "normalize")
    )
    for heads, parameters in re.findall(r"^([\w, ]+)\((.*?)\)$", found[1], re.MULTILINE | re.DOTALL):
        for name in heads.split(", "):
            printed[name] = parameters
    for name, parameters in printed.items():
        signature = inspect.signature(getattr(gn, name))
        bare = [str(p.replace(annotation=p.empty)) for p in signature.parameters.values()]
        first = next((i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY), None)
        if first is not None:
            bare.insert(first, "*")
        said = " ".join(str(parameters).split()).replace('"', "'").replace("1e-5", "1e-05")
        assert said.replace("= ", "=") == ", ".join(bare).replace(" = ", "="), name
