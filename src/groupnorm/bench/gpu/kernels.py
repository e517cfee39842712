"""Every kernel that the cases need, compiled for GPUs that are not here: `python -m groupnorm.bench.gpu.kernels`.

Writes results/offline/<architecture>-triton-<version>.json, from which docs/gpu.md has its tables. What they say is
read from machine code: registers, spills, and how wide loads and stores are. Times are not: no GPU takes part.
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm._engines.gpu.device import Device, has_clusters
from groupnorm._engines.gpu.plan import Launch, Plan, make_plan
from groupnorm.bench.cases import Case
from groupnorm.bench.gpu.cases import DTYPES, GPU_CASES, LAYOUTS, problem_of

__all__ = ["ARCHITECTURES", "Variant", "broken_rules", "compile_all", "source_hash", "variants"]

# One GPU for each architecture, since plans are made for a GPU; sizes from NVIDIA's architecture whitepapers.
ARCHITECTURES = {
    80: Device(0, "NVIDIA A100", 80, 108, 40 << 20),
    90: Device(0, "NVIDIA H200", 90, 132, 50 << 20, clusters=has_clusters(90)),
    100: Device(0, "NVIDIA B200", 100, 148, 126 << 20, clusters=has_clusters(100)),
}
_NOT_COMPILED = ("__init__.py", "workspace.py", "offline.py")
_REGISTERS = 65536  # of one multiprocessor
_WRITE_LITTLE = ("moments_of_slabs", "sums_of_slabs", "parameter_gradients", "sample_gradients")


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as the first of the cases needs it that needs it so; `wide` says whether rows begin at 16 bytes."""

    case: str
    task: str
    layout: str
    dtype: str
    plan: Plan
    launch: Launch
    wide: bool


def variants(capability: int, cases: Iterable[Case], dtypes: Iterable[str] = DTYPES) -> Iterator[Variant]:
    """What has to be compiled for an architecture, each kernel once; with clusters, and without, as for earlier
    versions of Triton.
    """
    seen = set()
    device = ARCHITECTURES[capability]
    devices = dict.fromkeys((device, replace(device, clusters=False)))
    for case in cases:
        for dtype in dtypes:
            for layout in LAYOUTS:
                for task in ("forward", "backward"):
                    problem = problem_of(case, task, layout, dtype)
                    plans = [make_plan(problem, device) for device in devices]
                    for plan, launch in ((made, launch) for made in plans for launch in made.launches):
                        constants = json.dumps(launch.constants, sort_keys=True)
                        key = launch.kernel, dtype, launch.warps, launch.multiprocessors, constants
                        if key not in seen:
                            seen.add(key)
                            yield Variant(case.name, task, layout, dtype, plan, launch, _wide(plan, launch))


def _wide(plan: Plan, launch: Launch) -> bool:
    """Whether each row (channels last: each column) of a tile begins where 16 bytes can be loaded at once."""
    p, vector = plan.problem, 16 // plan.problem.itemsize
    if launch.constants["ROWS"] * launch.constants.get("COLS", 0) < vector * 32 * launch.warps * launch.multiprocessors:
        return False  # a thread has less than that
    layout = launch.constants.get("LAYOUT")
    run = {"first": p.S, "flat": p.D * p.S, "last": launch.constants.get("P", 1) * p.D}.get(layout or "", 0)
    return run > 0 and run % vector == 0 and (layout != "last" or p.C % vector == 0)


def broken_rules(variant: Variant, found: dict[str, Any]) -> list[str]:
    """What a compiled kernel does that it should not: spill, use the stack, never load or store 16 bytes at once though
    rows allow it, or need more registers than its plan counts on.
    """
    broken = []
    if found["spills"]:
        broken.append(f"{found['spills']} instructions spill")
    if found["stack_bytes"]:
        broken.append(f"{found['stack_bytes']} bytes of stack")
    if variant.wide:
        loads, stores = ({int(width): n for width, n in found[kind].items()} for kind in ("loads", "stores"))
        if 16 not in loads:
            broken.append(f"no load of 16 bytes: {loads}")
        if variant.launch.kernel not in _WRITE_LITTLE and 16 not in stores:
            broken.append(f"no store of 16 bytes: {stores}")
    most = variant.launch.most_registers or min(255, _REGISTERS // (32 * found["warps"]))
    if found["registers"] > most:
        broken.append(f"{found['registers']} registers, {most} are planned")
    return broken


def _compiled(work: tuple[Variant, int]) -> dict[str, Any]:
    from groupnorm._engines.gpu.offline import compile_launch

    variant, capability = work
    found = asdict(compile_launch(variant.plan, variant.launch, capability))
    constants = {name: value for name, value in variant.launch.constants.items() if value is not None}
    return {
        "case": variant.case, "task": variant.task, "layout": variant.layout, "dtype": variant.dtype,
        "regime": variant.plan.regime, "multiprocessors": variant.launch.multiprocessors, **found,
        "constants": constants, "broken": broken_rules(variant, found),
    }  # fmt: skip


def compile_all(capability: int, cases: Iterable[Case], dtypes: Iterable[str] = DTYPES, jobs: int = 2) -> Any:
    """The records of all variants, in their order."""
    work = [(variant, capability) for variant in variants(capability, cases, dtypes)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_compiled, work, chunksize=4)


def source_hash() -> str:
    """A hash of everything that decides what is compiled: the engine's files, but those about memory and addresses."""
    folder = Path(__file__).parents[2] / "_engines" / "gpu"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.name not in _NOT_COMPILED:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Compile, print, write."""
    import triton

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", help="names, with commas; all if left away")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", type=Path, help="the folder for the records: results/offline")
    options = parser.parse_args()
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    names = options.cases.split(",") if options.cases else None
    cases = [case for case in GPU_CASES if names is None or case.name in names]
    bad = 0
    for capability in map(int, options.architectures.split(",")):
        records = []
        for record in compile_all(capability, cases, options.dtypes.split(","), options.jobs):
            records.append(record)
            bad += bool(record["broken"])
            if record["broken"]:
                constants = record["constants"]
                shape = f"{constants.get('ROWS')}x{constants.get('COLS', '')} {constants.get('LAYOUT', '')}"
                print(f"sm_{capability} {record['case']} {record['task']} {record['layout']} {record['dtype']} "
                      f"{record['kernel']} {shape} {record['warps']} warps "
                      f"on each of {record['multiprocessors']} multiprocessors, {record['registers']} registers: "
                      f"{'; '.join(record['broken'])}", flush=True)  # fmt: skip
        print(f"sm_{capability}: {len(records)} kernels", flush=True)
        if options.save:
            head = {"architecture": f"sm_{capability}", "triton": triton.__version__, "source": source_hash()}
            text = json.dumps({**head, "kernels": records}, indent=1) + "\n"
            version = ".".join(triton.__version__.split(".")[:2])
            write_whole(options.save / f"sm_{capability}-triton-{version}.json", text.encode())
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
