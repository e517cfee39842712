"""The classic traps of Group Normalization between frameworks and in training, each with its number and source."""

import math
from dataclasses import dataclass

from groupnorm.analysis.published import SOURCES, Source

__all__ = ["EPS_DEFAULTS", "TRAPS", "Trap", "eps_change"]


@dataclass(frozen=True, slots=True)
class Trap:
    """A name to refer to it by, what happens, and where that was read."""

    name: str
    text: str
    source: Source

    def __str__(self) -> str:
        return f"{self.name}: {self.text} [{self.source}]"


EPS_DEFAULTS = {
    1e-5: ("PyTorch", "Caffe2", "ONNX", "ONNX Runtime", "Haiku", "Equinox", "MLX", "Apex"),
    1e-3: ("Keras",),
    1e-6: ("Flax", "Liger"),
}


def eps_change(variance: float, eps: float, usual: float = 1e-5) -> float:
    """By what part y shrinks in a group of this variance when eps is used in place of the usual one."""
    return 1 - math.sqrt((variance + usual) / (variance + eps))


_EPS_TEXT = "; ".join(f"{eps:g} in {', '.join(names)}" for eps, names in EPS_DEFAULTS.items())

TRAPS = (
    Trap(
        "eps",
        f"defaults differ: {_EPS_TEXT}. Where a group's variance is 0.01, y with 1e-3 is {eps_change(0.01, 1e-3):.1%} "
        f"smaller than with 1e-5; where it is 1, {eps_change(1, 1e-3):.2%}. Carry eps over with the weights",
        Source("the sources of these frameworks"),
    ),
    Trap(
        "one value per group",
        "M = 1 gives y = bias whatever x is. PyTorch refuses it only for a batch of 1; with more samples it passes "
        "silently, because the check multiplies the batch in",
        Source("torch.nn.functional._verify_batch_size; Opacus issue 567"),
    ),
    Trap(
        "weight decay",
        "fine-tuning used weight decay 0 on weight and bias of the norms; most optimizers decay every parameter unless "
        "told otherwise",
        SOURCES["frozen"],
    ),
    Trap(
        "zero-init",
        "the published results start the weight of the last norm of each residual block at 0, all others at 1",
        SOURCES["recipe"],
    ),
    Trap(
        "MLX",
        "channel c belongs to group c mod G unless pytorch_compatible=True; everyone else takes C/G neighbours, c // D",
        Source("MLX, nn.GroupNorm"),
    ),
    Trap(
        "ONNX opset 18",
        "GroupNormalization of opset 18 has one scale and bias per group, (G,); that of opset 21 one per channel, (C,)",
        Source("ONNX, GroupNormalization-18 and -21"),
    ),
    Trap(
        "Caffe2",
        "the operator reads the argument `group`, though its documentation says `num_groups`; a wrong name is ignored "
        "and 32 is used. Its third output is the inverse of the standard deviation",
        Source("caffe2/operators/group_norm_op.h"),
    ),
)
