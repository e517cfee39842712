"""What is computed on one box of a file: a whole unit in one pass, or the pieces of a unit in several.

Forward in pieces: the Moments of every piece, merged, then `normalize`. Backward in pieces: the Moments, then the two
sums over a group in equation (14) of `groupnorm.reference`, then dx by that equation. dz, which both need, is the
dresidual of a call whose residual is z: every engine knows the slopes of the activations, so they are not written here.
"""

from typing import Any

import numpy as np

from groupnorm._core.moments import Moments
from groupnorm.files.boxes import Box, Grid
from groupnorm.numpy import group_norm, group_norm_vjp, moments, normalize

__all__ = ["Work"]

Array = Any


class Work:
    """The computation of one file, box by box. Arrays that go in and out have the axes of x, in x's layout.

    `stats` holds mean and rstd, (N, G), if they are kept; `dweight` and `dbias` are float64 sums over the boxes so far.
    """

    def __init__(self, grid: Grid, weight: Array, bias: Array, eps: float, layout: str, activation: str | None,
                 uneven: bool, keep_stats: bool, dtype: Any):  # fmt: skip
        self._grid, self._weight, self._bias = grid, weight, bias
        self._eps, self._layout, self._activation, self._uneven = eps, layout, activation, uneven
        self._channel_axis = 1 if layout.startswith("NC") else -1
        self._dtype = dtype
        self._stats_dtype = np.float64 if dtype == np.float64 else np.float32
        N, C, G = grid.shape[grid.batch], grid.shape[grid.channel], len(grid.edges) - 1
        self.stats = tuple(np.zeros((N, G), self._stats_dtype) for _ in range(2)) if keep_stats else None
        self.dweight, self.dbias = np.zeros(C), np.zeros(C)
        # Backward computes in float64 what has one number for each channel, so that many boxes add up exactly.
        self._weight64 = np.ones(C) if weight is None else weight.astype(np.float64)
        self._bias64 = np.zeros(C) if bias is None else bias.astype(np.float64)

    def begin(self, box: Box) -> None:
        """A new unit, to be done in pieces."""
        (n0, n1), (g0, g1) = box[self._grid.batch], self._grid.groups(box)
        zeros = np.zeros((n1 - n0, g1 - g0))
        self._n0, self._g0 = n0, g0
        self._moments = Moments(zeros, zeros.copy(), zeros.copy())
        self._sums = np.zeros((2, *zeros.shape))  # of dxhat, and of dxhat*xhat

    def warm_up(self, box: Box, backward: bool) -> None:
        """Do the work on a few zeros of the box's kind, so that loading an engine does not count as computing."""
        shape = [min(stop - start, 4) for start, stop in box]
        shape[self._grid.channel] = groups = self._grid.groups(box)[1] - self._grid.groups(box)[0]
        shape[self._grid.batch] = 1
        x = np.zeros(shape, self._dtype).transpose(self._axes())
        if backward:
            group_norm_vjp(
                x, x, groups, np.ones(groups), np.zeros(groups), layout=self._layout, activation=self._activation
            )
        else:
            group_norm(x, groups, layout=self._layout, activation=self._activation)

    # ---- one pass ----------------------------------------------------------------------------------------------------

    def forward(self, box: Box, x: Array, y: Array) -> Array:
        """y of a whole unit."""
        groups, channels = self._groups(box), slice(*box[self._grid.channel])
        found = group_norm(
            x, groups, *self._affine(channels), out=y, return_stats=self.stats is not None, **self._options()
        )
        if self.stats is None:
            return found
        y, mean, rstd = found
        self._keep(box, mean, rstd)
        return y

    def backward(self, box: Box, x: Array, dy: Array) -> Array:
        """dx of a whole unit; dweight and dbias are added to."""
        groups, channels = self._groups(box), slice(*box[self._grid.channel])
        mean = rstd = None
        if self.stats is not None:
            m = moments(x, groups, layout=self._layout, uneven=self._uneven)
            mean, rstd = m.mean.astype(self._stats_dtype), m.rstd(self._eps).astype(self._stats_dtype)
            self._keep(box, mean, rstd)
        affine = self._weight64[channels], self._bias64[channels]
        found: Any = group_norm_vjp(dy, x, groups, *affine, mean=mean, rstd=rstd, **self._options())
        self.dweight[channels] += found.dweight
        self.dbias[channels] += found.dbias
        return found.dx

    # ---- several passes ----------------------------------------------------------------------------------------------

    def measure(self, box: Box, x: Array) -> None:
        """First pass: merge the Moments of a piece."""
        groups = self._groups(box)
        m = moments(x, groups, layout=self._layout, uneven=self._uneven)
        at = self._at(box)
        mine = (self._moments.count, self._moments.mean, self._moments.m2)
        merged = Moments(*(a[at] for a in mine)) + m
        for total, part in zip(mine, (merged.count, merged.mean, merged.m2), strict=True):
            total[at] = part

    def normalize(self, box: Box, x: Array, y: Array) -> Array:
        """Last pass, forward: y of a piece."""
        self._keep_piece(box)
        affine = self._affine(slice(*box[self._grid.channel]))
        return normalize(x, self._moments_at(box), *affine, out=y, **self._options())

    def add_up(self, box: Box, x: Array, dy: Array) -> None:
        """Second pass, backward: the sums of a piece, and its share of dweight and dbias."""
        channels = slice(*box[self._grid.channel])
        axes = tuple(i for i in range(x.ndim) if i != self._channel_axis % x.ndim)
        for n in range(len(x)):
            dz, xhat = self._piece(box, n, x, dy)
            shares = [np.sum(dz, axes, np.float64), np.sum(np.multiply(dz, xhat, out=xhat), axes, np.float64)]
            self.dbias[channels] += shares[0]
            self.dweight[channels] += shares[1]
            for total, share in zip(self._sums, shares, strict=True):
                total[self._at(box, n)] += np.add.reduceat(self._weight64[channels] * share, self._starts(box))

    def correct(self, box: Box, x: Array, dy: Array) -> Array:
        """Last pass, backward: dx of a piece, by equation (14)."""
        self._keep_piece(box)
        dx = np.empty_like(x)
        weight = self._weight64[slice(*box[self._grid.channel])]
        for n in range(len(x)):
            dz, xhat = self._piece(box, n, x, dy)
            at, m = self._at(box, n), self._moments_at(box, n)
            s1, s2 = (total[at][0] / m.count[0] for total in self._sums)
            dz = dz * self._along_channels(weight, dz)  # dxhat; a new array, for dz may be dy itself
            dz -= self._along_channels(self._per_channel(box, s1), dz)
            dz -= np.multiply(xhat, self._along_channels(self._per_channel(box, s2), dz), out=xhat)
            dz *= self._along_channels(self._per_channel(box, m.rstd(self._eps)[0]), dz)
            dx[n] = dz[0].astype(x.dtype)
        return dx

    def _piece(self, box: Box, n: int, x: Array, dy: Array) -> tuple[Array, Array]:
        """dz and xhat of sample n of a piece; of 16-bit values as float32, so that dx is rounded only once."""
        wide = np.float32 if x.dtype.itemsize == 2 else x.dtype
        x, dy = (a[n : n + 1].astype(wide, copy=False) for a in (x, dy))
        m, channels = self._moments_at(box, n), slice(*box[self._grid.channel])
        options: dict[str, Any] = {"layout": self._layout, "uneven": self._uneven}
        xhat = normalize(x, m, eps=self._eps, **options)
        if self._activation is None:
            return dy, xhat
        z = normalize(x, m, *self._affine(channels), eps=self._eps, **options)
        nothing = np.zeros(x.shape[self._channel_axis])  # the weight of a call whose z is its residual
        found: Any = group_norm_vjp(
            dy, x, self._groups(box), nothing, residual=z, activation=self._activation, **options
        )
        return found.dresidual, xhat

    # ---- where things are --------------------------------------------------------------------------------------------

    def _axes(self) -> tuple[int, ...]:
        """From the order of the file to the order of x."""
        rank = len(self._grid.shape)
        return tuple(range(rank)) if self._grid.batch == 0 else tuple(reversed(range(rank)))

    def _options(self) -> dict[str, Any]:
        return {"eps": self._eps, "layout": self._layout, "activation": self._activation, "uneven": self._uneven}

    def _affine(self, channels: slice) -> list[Array]:
        return [None if a is None else a[channels] for a in (self._weight, self._bias)]

    def _groups(self, box: Box) -> int:
        first, last = self._grid.groups(box)
        return last - first

    def _at(self, box: Box, n: int | None = None) -> tuple[slice, slice]:
        """Samples and groups of a piece inside its unit; of its sample n alone, if that is given."""
        start, stop = (i - self._n0 for i in box[self._grid.batch])
        first, last = (g - self._g0 for g in self._grid.groups(box))
        return (slice(start, stop) if n is None else slice(start + n, start + n + 1)), slice(first, last)

    def _moments_at(self, box: Box, n: int | None = None) -> Moments:
        m, at = self._moments, self._at(box, n)
        return Moments(m.count[at], m.mean[at], m.m2[at])

    def _starts(self, box: Box) -> Array:
        """The first channel of each group of a piece, counted inside it."""
        start, _ = box[self._grid.channel]
        first, last = self._grid.groups(box)
        return np.maximum(np.array(self._grid.edges[first:last]) - start, 0)

    def _per_channel(self, box: Box, values: Array) -> Array:
        """One value for each group of a piece as one for each channel."""
        start, stop = box[self._grid.channel]
        return np.repeat(values, np.diff([*self._starts(box), stop - start]))

    def _along_channels(self, values: Array, like: Array) -> Array:
        """One value for each channel, shaped and typed to go with `like`."""
        shape = [1] * like.ndim
        shape[self._channel_axis] = -1
        return values.astype(like.dtype).reshape(shape)

    def _keep(self, box: Box, mean: Array, rstd: Array) -> None:
        assert self.stats is not None
        at = slice(*box[self._grid.batch]), slice(*self._grid.groups(box))
        for kept, part in zip(self.stats, (mean, rstd), strict=True):
            kept[at] = part

    def _keep_piece(self, box: Box) -> None:
        if self.stats is not None:
            m = self._moments_at(box)
            self._keep(box, m.mean, m.rstd(self._eps))
