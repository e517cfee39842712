"""The module: a torch.nn.GroupNorm with more options."""

from typing import Any

import torch

from groupnorm._core.problem import check_activation, check_eps, check_num_groups
from groupnorm.torch.autocast import cast
from groupnorm.torch.checks import check
from groupnorm.torch.composite import widest
from groupnorm.torch.functional import group_norm
from groupnorm.torch.moments import Moments, moments, normalize
from groupnorm.torch.per_sample import register_with_opacus
from groupnorm.torch.road import asks_for_gradient, is_transformed

__all__ = ["GroupNorm"]

Tensor = Any


class GroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` with the same parameters and state, and `group_norm` of this package inside.

    activation: what follows the norm, fused with it. inplace: y takes x's memory where no gradient is asked for, no
    compiler plans memory anyway, and the statistics are x's own.
    track_running_stats: in training, `running_mean` and `running_var`, (G,), follow the mean and the unbiased variance
    of each group, averaged over the batch, by the fraction `momentum` of the way (0.1 if None); in eval they take the
    place of x's own statistics. These are the rules of `torch.nn.InstanceNorm2d`. Raises GroupNormError (a ValueError)
    as `group_norm` does.
    """

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, device: Any = None,
        dtype: Any = None, *, bias: bool = True, activation: str | None = None, inplace: bool = False,
        momentum: float | None = None, track_running_stats: bool = False,
    ) -> None:  # fmt: skip
        check_num_groups(num_groups, num_channels, None)
        check_eps(eps)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = check_activation(activation)
        self.inplace = inplace
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        if track_running_stats:
            kind = {"device": device, "dtype": dtype}
            self.register_buffer("running_mean", torch.zeros(num_groups, **kind))
            self.register_buffer("running_var", torch.ones(num_groups, **kind))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        register_with_opacus(GroupNorm)

    def reset_parameters(self) -> None:
        """Weights 1, biases 0; running statistics as they were at the start."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is not None:
            torch.nn.init.ones_(weight)
        if bias is not None:
            torch.nn.init.zeros_(bias)
        if "running_mean" in self._buffers:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """`group_norm` of the input with this module's parameters and options."""
        if self.track_running_stats:
            return self._with_running_statistics(input)
        return self.normalized(input, self.activation)

    def normalized(
        self, input: Tensor, activation: str | None = None, scale: Tensor = None, shift: Tensor = None,
        residual: Tensor = None,
    ) -> Tensor:  # fmt: skip
        """`group_norm` of the input with this module's parameters, by its own statistics, and with these arguments."""
        out = None
        if self.inplace and isinstance(input, torch.Tensor) and not (torch.compiler.is_compiling() or is_transformed()):
            # Without gradients a checkpoint's input still says that it needs one: it will be read once more.
            keeps = input.requires_grad or asks_for_gradient(input, self.weight, self.bias, scale, shift, residual)
            out = input if not keeps and cast(input) is input else None  # else y will be of another type
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, activation=activation, scale=scale, shift=shift,
            residual=residual, out=out,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What `torch.nn.GroupNorm` shows, and the options that are not its own."""
        options = [super().extra_repr()]
        without_bias = self._parameters.get("weight") is not None and self._parameters.get("bias") is None
        if without_bias and "bias" not in options[0]:  # which newer PyTorch shows itself
            options.append("bias=False")
        if self.activation is not None:
            options.append(f"activation={self.activation!r}")
        if self.inplace:
            options.append("inplace=True")
        if self.track_running_stats:
            options.append(f"momentum={self.momentum}, track_running_stats=True")
        return ", ".join(options)

    def _with_running_statistics(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == 0:  # nothing to learn from
            return self.normalized(input, self.activation)
        if self.training:
            check(input, self.num_groups, self.weight, self.bias, self.eps, *[None] * 6)  # before anything is learned
            with torch.no_grad():
                found = moments(input, self.num_groups)
                unbiased = found.m2 / (found.count - 1).clamp(min=1)
                fraction = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(found.mean.mean(0).to(self.running_mean.dtype), fraction)
                self.running_var.lerp_(unbiased.mean(0).to(self.running_var.dtype), fraction)
                self.num_batches_tracked.add_(1)
            return self.normalized(input, self.activation)
        shape = (input.shape[0], self.num_groups)
        mean, var = (widest(t).expand(shape) for t in (self.running_mean, self.running_var))
        given = Moments(torch.ones_like(mean), mean, var)  # of one element, so that M2 is the variance
        return normalize(input, given, self.weight, self.bias, self.eps, activation=self.activation)
