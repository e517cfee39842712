"""What the GPU engine is compiled for, checked and measured with: the cases of the benchmark, and larger ones."""

from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem
from groupnorm.bench.cases import CASES, Case

__all__ = ["DTYPES", "GPU_CASES", "LAYOUTS", "problem_of", "select_gpu_cases"]

LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("bfloat16", "float32")
_VAE = "AutoencoderKL of Stable Diffusion, vae/config.json: block_out_channels 128, 256, 512, 512"

GPU_CASES: tuple[Case, ...] = (
    *CASES,
    Case("vae-1024", (1, 128, 1024, 1024), 32, _VAE + "; one 1024x1024 image", "silu", eps=1e-6, headline=True),
    Case("vae-512-mid", (1, 256, 512, 512), 32, _VAE + "; one 512x512 image", "silu", eps=1e-6, headline=True),
    Case("video-20", (1, 128, 20, 256, 256), 32, "causal video VAE decoder, 20 frames of 256x256", "silu", eps=1e-6,
         headline=True),
)  # fmt: skip


def select_gpu_cases(*, headline: bool = False) -> tuple[Case, ...]:
    """All cases, or those of the short tables."""
    return tuple(case for case in GPU_CASES if case.headline or not headline)


def problem_of(case: Case, task: str, layout: str, dtype: str) -> Problem:
    """The problem that a case gives, with what the network applies after it and parameters of x's type."""
    n, c = case.shape[:2]
    s = case.elements // (n * c)
    walk = Walk(c * s, s, 1) if layout == "NCHW" else Walk(c * s, 1, c)
    names = {"backward": ("x", "dy", "dx"), "moments": ("x",)}.get(task, ("x", "y"))
    return Problem(
        task, dtype, n, c, s, case.num_groups, case.eps, case.activation, dtype, dtype, stats=task == "backward",
        walks=dict.fromkeys(names, walk),
    )  # fmt: skip
