"""The rules of the house: who may import whom, what an import costs, and that what is public is documented."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import groupnorm

SOURCE = Path(__file__).resolve().parents[1] / "src"
FILES = sorted((SOURCE / "groupnorm").rglob("*.py"))

# ---- the rules -------------------------------------------------------------------------------------------------------

# Layers from the top down, as modules inside groupnorm; a package stands for all that it holds, unless a longer name is
# listed as well. A module imports from its own package and from the lines below its own, never from its neighbours.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["bench"],
    ["analysis", "files"],
    ["caffe2", "cuda"],  # which stand on the front ends for NumPy and for PyTorch
    ["numpy", "torch", "jax", "onnx"],
    ["_dispatch"],
    ["_engines.cpu", "_engines.gpu", "_engines.reference"],
    ["_engines"],
    ["_core"],
    ["errors"],
]

# What the lines cannot say: these import exactly this of the package. "" is groupnorm/__init__.py.
MAY_IMPORT = {
    "": {"numpy", "errors", "reference", "_core", "analysis", "_version"},
    "reference": set(),
    "_version": set(),
}
# ... and these are imported by exactly these layers, or by all of them.
IMPORTED_BY = {
    "": {"cli", "__main__", "bench"},
    "reference": {"", "numpy", "cli", "__main__", "bench", "analysis", "_dispatch", "_engines.reference", "cuda"},
    "_version": {layer for line in LAYERS for layer in line} | {""},
}

# Other people's packages, each with the layers that may import it; one that is not listed may be imported by none.
ANYONE = {"", "reference"} | {layer for line in LAYERS for layer in line}
THIRD_PARTY = {
    "numpy": ANYONE,
    "ml_dtypes": ANYONE - {"reference", "errors"},
    "numba": {"_engines.cpu", "cli", "bench"},
    "llvmlite": {"_engines.cpu", "cli", "bench"},
    "torch": {"_engines.gpu", "torch", "cuda", "analysis", "cli", "bench"},
    "triton": {"_engines.gpu", "cli", "bench"},
    "jax": {"jax", "cli", "bench"},
    "onnx": {"onnx", "caffe2", "cli", "bench"},
    "google": {"caffe2"},  # protobuf
    "scipy": {"bench"},
    "onnxruntime": {"cli", "bench"},
    "openvino": {"cli", "bench"},
    "apex": {"bench"},
    "cupy": {"bench"},
    "flag_gems": {"bench"},
    "liger_kernel": {"bench"},
    "diffusers": {"bench"},
    "monai": {"bench"},
    "opacus": {"bench"},
    "safetensors": {"files", "cli"},
    "matplotlib": {"analysis", "bench", "cli"},
    "PIL": {"analysis"},  # matplotlib brings it
    "rich": {"bench", "cli"},
    "typer": {"cli", "__main__"},
}

MAX_LINES = 400
MAX_IMPORT_S = 0.15
LOADED_BY_IMPORT = {"groupnorm", "numpy"}  # everything else is loaded on first use


# ---- the imports of a source text ------------------------------------------------------------------------------------


def layer_of(module: str) -> str | None:
    """The layer of `module`, a dotted name inside groupnorm ("" is the package itself); None if no rule knows it."""
    known = [*MAY_IMPORT, *(layer for line in LAYERS for layer in line)]
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in known), None)


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import in `source`, wherever it stands; `package` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(name, str):
                yield node.lineno, f"{package}{name}" if name.startswith(".") else name


def refusal(importer: str, imported: str) -> str | None:
    """Why layer `importer` may not import the full name `imported`; None if it may."""
    top, _, inside = imported.partition(".")
    if top != "groupnorm":
        if top in sys.stdlib_module_names or importer in THIRD_PARTY.get(top, ()):
            return None
        return f"{top} is for {', '.join(sorted(THIRD_PARTY[top]))}" if top in THIRD_PARTY else f"{top} is not listed"
    layer = layer_of(inside) or ""  # a name that is no module is one of the package's own
    if layer == importer:
        return None
    if layer in IMPORTED_BY and importer not in IMPORTED_BY[layer]:
        return f"groupnorm.{layer} is not for it"
    if importer in MAY_IMPORT:
        return None if layer in MAY_IMPORT[importer] else "only listed modules are for it"
    if layer in IMPORTED_BY:
        return None
    height = {name: n for n, line in enumerate(LAYERS) for name in line}
    return None if height[layer] > height[importer] else "imports go down only"


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """One line for each import in `source`, the text of groupnorm.`module`, that the rules forbid."""
    layer = layer_of(module)
    if layer is None:
        return [f"groupnorm.{module}: in no layer; add it to the table in {Path(__file__).name}"]
    full = f"groupnorm.{module}".rstrip(".")
    package = full if is_package else full.rpartition(".")[0]
    found = ((line, name, refusal(layer, name)) for line, name in imported_names(source, package))
    return [f"{full}:{line} imports {name}: {reason}" for line, name, reason in found if reason]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE / "groupnorm").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "groupnorm")
def test_imports_go_down_only(path):
    source = path.read_text(encoding="utf-8")
    assert forbidden_imports(source, module_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_core.layout", "from groupnorm import _dispatch"),
        ("_core.layout", "def f():\n    import groupnorm._engines.cpu.plan"),
        ("_core.layout", "from groupnorm import group_norm"),
        ("_core.layout", "import numba"),
        ("_dispatch", "from .numpy import group_norm"),
        ("_dispatch", "import importlib\nimportlib.import_module('groupnorm.numpy')"),
        ("_engines.cpu.plan", "from ..gpu import launch"),
        ("_engines.cpu.plan", "from groupnorm.reference import group_norm"),
        ("_engines.cpu.plan", "import torch"),
        ("_engines.gpu.plan", "from numba import njit"),
        ("torch.functional", "from groupnorm.numpy import group_norm"),
        ("caffe2", "from . import files"),
        ("analysis.roofline", "if TYPE_CHECKING:\n    from groupnorm.bench import cases"),
        ("reference", "from groupnorm.errors import GroupNormError"),
        ("reference", "from scipy.special import erf"),
        ("errors", "from ._core import problem"),
        ("files", "import pandas"),
        ("utilities", "import os"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.run", "import groupnorm as gn\nfrom groupnorm.files import stream\nimport typer"),
        ("torch.module", "from .functional import group_norm\nfrom groupnorm import _dispatch\nimport torch"),
        ("_dispatch", "from ._engines import reference\nfrom groupnorm._engines.cpu import plan"),
        ("_engines.cpu.plan", "from . import simd\nfrom ..._core.problem import Problem\nfrom numba import njit"),
        ("_engines.reference", "from groupnorm import reference\nfrom groupnorm.reference import group_norm"),
        ("_core.problem", "import numpy as np\nfrom groupnorm.errors import GroupNormError"),
        ("onnx", "import onnx\nfrom ._version import __version__"),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert forbidden_imports(source, module) == []


# ---- what an import loads and costs ----------------------------------------------------------------------------------

_IMPORT = """
import sys, time
start = time.perf_counter()
import numpy
middle, before = time.perf_counter(), set(sys.modules)
import groupnorm
end = time.perf_counter()
import json
print(json.dumps({"numpy_s": middle - start, "groupnorm_s": end - middle, "loaded": sorted(set(sys.modules) - before)}))
"""


def import_in_fresh_interpreter():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, "-c", _IMPORT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_loads_only_numpy():
    loaded = {name.partition(".")[0] for name in import_in_fresh_interpreter()["loaded"]}
    assert "groupnorm" in loaded
    assert loaded - sys.stdlib_module_names - LOADED_BY_IMPORT == set()


def test_import_is_fast():
    runs = [import_in_fresh_interpreter() for _ in range(5)]
    ours_s = min(run["groupnorm_s"] for run in runs)
    print(f"import groupnorm: {ours_s:.3f} s after NumPy, {ours_s + min(run['numpy_s'] for run in runs):.3f} s with it")
    assert ours_s < MAX_IMPORT_S


# ---- what is public --------------------------------------------------------------------------------------------------


def test_public_names_are_listed_once():
    assert len(set(groupnorm.__all__)) == len(groupnorm.__all__)
    assert set(groupnorm.__all__) <= set(dir(groupnorm))


@pytest.mark.parametrize("name", [name for name in groupnorm.__all__ if not name.startswith("__")])
def test_public_name_is_documented(name):
    value = getattr(groupnorm, name)
    assert callable(value) or inspect.ismodule(value), f"{name} is neither a function, a class nor a module"
    text = value.__doc__ or ""
    assert len(text.strip()) > 20
    assert not text.startswith(f"{name}("), "only the signature that dataclass or NamedTuple wrote"


def test_version_is_written_once():
    text = (SOURCE / "groupnorm" / "_version.py").read_text(encoding="utf-8")
    assert f'__version__ = "{groupnorm.__version__}"' in text
    assert groupnorm.__doc__


def test_package_is_typed():
    assert (SOURCE / "groupnorm" / "py.typed").is_file()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "groupnorm")
def test_file_holds_one_idea(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines; split it"
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, "name the idea that the file holds"
