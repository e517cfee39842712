"""Named machines: figures from their makers' data sheets. Peak numbers, which no program reaches.

Bytes per second of memory, float32 flops of the vector units (no tensor cores: normalisation has no matrix products),
and size of the last cache as printed; operations per second follow from the units and the clock that give the flops.
What a data sheet does not say, the speed of caches, is left out, so data is taken to lie in memory.
"""

from groupnorm.analysis.figures import Level, MachineFigures, Speeds

__all__ = ["DEVICES", "STORAGE"]

_GPU_LAUNCH_S = 2e-6  # an estimate: what a graph of one small kernel takes on these machines
_GPU_NOTE = "launch time is an estimate; no data sheet has it"


def _gpu(name: str, source: str, memory_gb_per_s: float, tflops: float, wide_tflops: float) -> MachineFigures:
    """A multiply-add is two flops, and its unit takes one operation in a clock: operations are half the flops.
    wide_tflops: of float64.
    """
    speed = memory_gb_per_s * 1e9
    flops = tflops * 1e12
    memory = Level("memory", None, speed, speed, speed)
    speeds = Speeds(1, (memory,), {"float32": flops, "float64": wide_tflops * 1e12}, flops / 2)
    return MachineFigures(name, "gpu", source, 32, _GPU_LAUNCH_S, (speeds,), _GPU_NOTE)


def _cpu(name: str, source: str, threads: int, memory_gb_per_s: float, ghz: float, flops_per_clock: int,
         lanes: int) -> MachineFigures:  # fmt: skip
    """Base clock times what a core's units do in one: `flops_per_clock` float32. Two vectors of `lanes` are issued in a
    clock.
    """
    speed = memory_gb_per_s * 1e9
    memory = Level("memory", None, speed, speed, speed)
    flops = threads * ghz * 1e9 * flops_per_clock
    speeds = Speeds(threads, (memory,), {"float32": flops, "float64": flops / 2}, threads * ghz * 1e9 * 2 * lanes)
    return MachineFigures(name, "cpu", source, lanes, 5e-6, (speeds,), "base clock; launch time is an estimate")


DEVICES = (
    _gpu("T4", "NVIDIA T4 data sheet: 320 GB/s, 8.1 TFLOPS float32; float64 1/32 (Turing architecture white paper)",
         320, 8.1, 8.1 / 32),
    _gpu("V100", "NVIDIA V100 data sheet, SXM2: 900 GB/s, 15.7 TFLOPS float32, 7.8 float64", 900, 15.7, 7.8),
    _gpu("A100", "NVIDIA A100 80 GB data sheet, SXM: 2039 GB/s, 19.5 TFLOPS float32, 9.7 float64", 2039, 19.5, 9.7),
    _gpu("L4", "NVIDIA L4 data sheet: 300 GB/s, 30.3 TFLOPS float32; float64 1/64 (Ada architecture white paper)",
         300, 30.3, 30.3 / 64),
    _gpu("RTX4090", "NVIDIA Ada architecture white paper: 1008 GB/s, 82.6 TFLOPS float32, float64 1/64", 1008, 82.6,
         82.6 / 64),
    _gpu("H100", "NVIDIA H100 data sheet, SXM: 3.35 TB/s, 67 TFLOPS float32, 34 float64", 3350, 67, 34),
    _gpu("H200", "NVIDIA H200 data sheet, SXM: 4.8 TB/s, 67 TFLOPS float32, 34 float64", 4800, 67, 34),
    _gpu("MI300X", "AMD Instinct MI300X data sheet: 5.3 TB/s, 163.4 TFLOPS float32, 81.7 float64", 5300, 163.4, 81.7),
    _cpu("EPYC-9654", "AMD EPYC 9654 product page: 96 cores at 2.4 GHz, 12 channels DDR5-4800 (460.8 GB/s)", 96, 460.8,
         2.4, 32, 16),
    _cpu("Xeon-8480+", "Intel Xeon Platinum 8480+ product page: 56 cores at 2.0 GHz, 8 channels DDR5-4800 (307.2 GB/s)",
         56, 307.2, 2.0, 64, 16),
)  # fmt: skip

STORAGE = {  # bytes per second: limits of the interface, or what a data sheet calls the sustained rate
    "hdd": (0.26e9, "sustained rate of 7200 rpm disks, by their data sheets"),
    "sata": (0.6e9, "SATA 6 Gbit/s after 8b/10b encoding"),
    "nvme3": (3.94e9, "PCI Express 3.0, 4 lanes"),
    "nvme4": (7.88e9, "PCI Express 4.0, 4 lanes"),
    "nvme5": (15.75e9, "PCI Express 5.0, 4 lanes"),
}
