"""Compile a plan's kernels for a GPU that is not here, and read from the machine code what it will be like.

Triton brings its own assembler and disassembler, so this needs neither a GPU nor CUDA. Not with the interpreter.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from groupnorm._engines.gpu.launch import KERNELS, array_types, compiler_options
from groupnorm._engines.gpu.plan import Launch, Plan

__all__ = ["Compiled", "compile_launch"]

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "uint8": "u8", "int32": "i32"}
_ALIGNED = [["tt.divisibility", 16]]
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "": 4, "64": 8, "128": 16}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the assembler made of a kernel: registers of a thread, bytes of stack and of shared memory, instructions
    that spill (to local memory and back), how many barriers of the program there are, and loads and stores of global
    memory of each width in bytes.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    barriers: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)


def compile_launch(plan: Plan, launch: Launch, capability: int) -> Compiled:
    """Compile one launch of a plan for compute capability `capability` (90 is 9.0), with every array that its problem
    has, 16 bytes aligned.
    """
    kernel = KERNELS[launch.kernel]
    types = array_types(plan)
    given = {**launch.numbers, **launch.constants}
    missing = _absent(plan)
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, name in enumerate(kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name in given:
            signature[name] = "i32"
        elif name in missing:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = f"*{_TYPES[types[name]]}"
            attributes[(place,)] = _ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)

    def compile_with(options: dict[str, Any]) -> Compiled:
        done = triton.compile(source, target=target, options=options)
        return _read(launch.kernel, capability, options["num_warps"], done)

    def registers_and_spills(options: dict[str, Any]) -> tuple[int, int]:
        found = compile_with(options)
        return found.registers, found.spills

    return compile_with(compiler_options(launch, registers_and_spills))  # which Triton has kept, if it did that before


def _absent(plan: Plan) -> set[str]:
    """The arrays that a call of this problem does not have."""
    p = plan.problem
    missing = {name.upper() for name in ("weight", "bias", "scale", "shift") if getattr(p, name) is None}
    missing |= {f"D{name}" for name in missing}
    if "residual" not in p.walks:
        missing |= {"RESIDUAL", "DRESIDUAL"}
    if not p.mask:
        missing.add("MASK")
    if not p.dx:
        missing |= {"DX", "DRESIDUAL"}
    missing |= {name.upper() for name in ("sums", "totals", "lost") if not getattr(plan, name)}
    if not plan.statistics_kept:
        missing.add("LOW")
    if p.task == "normalize":
        missing |= {"MEAN", "RSTD"}
    elif p.task != "moments":
        missing.add("MOMENTS")
    if p.task == "moments":
        missing |= {"Y", "MEAN", "RSTD"}
    return missing


def _read(kernel: str, capability: int, warps: int, done: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(done.asm["cubin"])
        usage = _tool("-res-usage", path)
        code = _tool("-sass", path)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Compiled(
        kernel, capability, warps, numbers["REG"], numbers["STACK"], done.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)), len(re.findall(r"\bBAR\.SYNC", code)), _widths("LDG", code),
        _widths("STG", code),
    )  # fmt: skip


def _widths(name: str, code: str) -> dict[int, int]:
    """How many instructions of this name move how many bytes a thread."""
    found: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{name}((?:\.[A-Z0-9]+)*)", code):
        parts = modifiers.split(".")
        width = next((_WIDTHS[part] for part in parts if part and part in _WIDTHS), 4)
        found[width] = found.get(width, 0) + 1
    return dict(sorted(found.items()))


def _tool(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([os.fspath(tool), option, os.fspath(path)], capture_output=True, text=True, check=True).stdout
