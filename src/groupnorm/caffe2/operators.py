"""The operators GroupNorm and GroupNormGradient, as objects that hold the arguments and are called with the inputs."""

from dataclasses import dataclass
from typing import Any

from groupnorm.caffe2.checks import FLOAT32, check_epsilon, check_group, check_order
from groupnorm.caffe2.functional import backward, forward
from groupnorm.errors import OptionError

__all__ = ["GroupNormGradientOp", "GroupNormOp"]

Array = Any


@dataclass(frozen=True, slots=True)
class GroupNormOp:
    """Caffe2's GroupNorm: called with X, gamma and beta it gives the list of its outputs, [Y] or [Y, mean, inv_std].

    group: number of groups, must divide the channels. epsilon: added to the variance inside the root; held as float32,
    as Caffe2 holds it. order: "NCHW" for channels on axis 1, "NHWC" for channels last, at any rank from 2 up. is_test,
    num_outputs: one output is for inference; with is_test=False all three are required.

    X: float32. gamma, beta: float32, C elements, any rank. Y has X's shape; mean and inv_std are (N, group), and
    inv_std is 1/sqrt(var + epsilon), although Caffe2's schema calls this output "std". An empty batch gives an empty Y
    and, where three outputs are asked for, an empty mean and inv_std of shape (0, group), which Caffe2 never allocated;
    samples without positions give an empty Y, mean 0 and inv_std 1/sqrt(epsilon).

    Raises OptionError for an argument, DtypeError for another type than float32, ShapeError for shapes that do not fit.
    Cost: X is read once and Y written once where a group fits in cache.
    """

    group: int = 32
    epsilon: float = 1e-5
    order: str = "NCHW"
    is_test: bool = True
    num_outputs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", check_group(self.group))
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        object.__setattr__(self, "order", check_order(self.order))
        object.__setattr__(self, "is_test", bool(self.is_test))
        outputs: Any = self.num_outputs
        if not isinstance(outputs, int) or outputs not in (1, 3):
            raise OptionError(f"GroupNorm has 1 output (Y) or 3 (Y, mean, inv_std): got {self.num_outputs}")
        if self.num_outputs == 1 and not self.is_test:
            raise OptionError("GroupNorm with is_test=0 must have 3 outputs: got 1; the gradient needs mean and "
                              "inv_std; add them, or set is_test=1 for inference")  # fmt: skip

    def __call__(self, X: Array, gamma: Array, beta: Array) -> list[Array]:
        """[Y], or [Y, mean, inv_std]."""
        return list(forward(X, gamma, beta, self.group, self.epsilon, self.order, FLOAT32)[: self.num_outputs])


@dataclass(frozen=True, slots=True)
class GroupNormGradientOp:
    """Caffe2's GroupNormGradient: called with dY, X, gamma, beta, mu and rsig it gives [dX, dgamma, dbeta].

    group, order: as of the GroupNorm whose outputs mean and inv_std are mu and rsig, (N, group). All arrays are
    float32. dX has X's shape, dgamma and dbeta those of gamma and beta. An empty batch, or no positions, gives an empty
    dX, and zeros in dgamma and dbeta.

    Raises as `GroupNormOp` does. Cost: X and dY are read once and dX written once where a group fits in cache.
    """

    group: int = 32
    order: str = "NCHW"

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", check_group(self.group))
        object.__setattr__(self, "order", check_order(self.order))

    def __call__(self, dY: Array, X: Array, gamma: Array, beta: Array, mu: Array, rsig: Array) -> list[Array]:
        """[dX, dgamma, dbeta]."""
        return list(backward(dY, X, gamma, beta, mu, rsig, self.group, self.order, FLOAT32))
