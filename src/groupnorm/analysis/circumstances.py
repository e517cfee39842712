"""What surrounds the choice of groups: other norms at this batch size, what to take instead, what GroupNorm costs."""

from dataclasses import dataclass

from groupnorm._core.group_counts import ENOUGH_ELEMENTS, divisors, interpolate
from groupnorm.analysis.published import (
    CONFIGURATIONS,
    DETECTION,
    DETECTRON_COSTS,
    DETECTRON_HEADS,
    ERROR_BY_BATCH,
    ERROR_BY_NORM,
    FROZEN_BN_SAME_HEAD,
    REPRODUCED_ERRORS,
    SOURCES,
    VIDEO,
)
from groupnorm.analysis.traps import TRAPS

__all__ = ["NormError", "TrainingCost", "general_warnings", "instead", "norm_errors", "training_cost"]

_FEW_CHANNELS = 8  # below that, no grouping has 4 channels in each of 2 groups or more


@dataclass(frozen=True, slots=True)
class NormError:
    """A norm's published validation error of ResNet-50 on ImageNet in percent; None where none was published."""

    norm: str
    error_percent: float | None
    note: str


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What a change of norm costs in one layer: bytes that backward needs kept, and bytes moved by a forward.

    `saved_bytes` of GN is N*C*S*itemsize + 8*N*G (x; mean and rstd in float32), of BN N*C*S*itemsize + 8*C, of a
    frozen BN 0, as y = A*x + B with constants needs no x. `least_forward_bytes`: x read once and y written once.
    """

    saved_bytes: int
    batch_norm_saved_bytes: int
    frozen_batch_norm_saved_bytes: int
    least_forward_bytes: int
    notes: tuple[str, ...]


def norm_errors(batch: int) -> tuple[NormError, ...]:
    """BN, LN, IN and GN with `batch` images per GPU. Never beyond the published range, 2 to 32 images."""
    source = SOURCES["batch"]
    found = []
    for norm in ("GN", "BN"):
        table = ERROR_BY_BATCH[norm]
        error = interpolate(table, batch)
        if error is None:
            note = f"nothing published for {batch} images per GPU, only for {min(table)} to {max(table)} [{source}]"
        elif batch in table:
            note = f"ImageNet, published [{source}]"
        else:
            note = f"an interpolation over log2(batch) of published ImageNet numbers [{source}]"
        found.append(NormError(norm, error, note))
    for norm in ("LN", "IN"):
        published = ERROR_BY_NORM[norm]
        note = (f"ImageNet, published [{SOURCES['norms']}]" if batch == 32 else
                f"published for 32 images per GPU only: {published}; its statistics are those of one sample, as GN's "
                f"are [{SOURCES['norms']}]")  # fmt: skip
        found.append(NormError(norm, published if batch == 32 else None, note))
    return tuple(found)


def instead(channels: int, positions: int, batch: int, task: str | None) -> tuple[str, ...]:
    """When not to use GroupNorm in such a layer, and what instead."""
    said = []
    if channels * positions == 1:
        said.append("M = 1 whatever the groups: every output equals bias. Use no norm here, or BatchNorm")
    elif positions == 1:
        said.append(
            f"S = 1: a group has M = D elements, so {channels} groups give y = bias, and one group is "
            "torch.nn.LayerNorm over the channels, the usual norm of vectors"
        )
    elif channels * positions < ENOUGH_ELEMENTS:
        said.append(
            f"a whole sample has {channels * positions} elements, fewer than {ENOUGH_ELEMENTS}: statistics are noisy "
            "with any number of groups. LayerNorm, or BatchNorm if the batch is large"
        )
    if channels == 1:
        said.append("one channel: each sample is normalized by itself, so how bright and strong it was is lost")
    elif len(divisors(channels)) == 2:
        said.append(
            f"{channels} channels are prime: only 1 group (LayerNorm) and {channels} (InstanceNorm) are of one size. "
            f"Take {4 if channels == 2 else channels + 1} or another number of channels with more divisors, or "
            "uneven=True"
        )
    elif channels < _FEW_CHANNELS:
        said.append(
            f"{channels} channels are few: groups of 4, below which the published error rises, would be "
            f"{max(1, channels // 4)}. Normalize where there are more channels"
        )
    if task == "style":
        said.append(f"style transfer: InstanceNorm, one channel per group [{CONFIGURATIONS['style'].source}]")
    elif task == "dp-sgd":
        said.append(
            "never BatchNorm: it mixes samples, so there is no gradient of one sample; GroupNorm, LayerNorm or "
            f"InstanceNorm [{CONFIGURATIONS['dp-sgd'].source}]"
        )
    elif task == "video":
        eight = {result.norm: result for result in VIDEO if (result.frames, result.batch) == (32, 8)}
        four = {result.norm: result for result in VIDEO if (result.frames, result.batch) == (64, 4)}
        said.append(
            f"I3D, top-1 in percent: 8 clips of 32 frames per GPU BN {eight['BN'].top1}, GN {eight['GN'].top1}; 4 "
            f"clips of 64 frames BN {four['BN'].top1}, GN {four['GN'].top1} [{SOURCES['video']}]"
        )
    elif task in {"detection", "segmentation"}:
        frozen, gn = (next(r for r in DETECTION if (r.backbone, r.norm, r.schedule) == ("R50-FPN", norm, "2x"))
                      for norm in ("frozen BN", "GN"))  # fmt: skip
        which = "box AP" if task == "detection" else "mask AP"
        numbers = (frozen.box_ap, gn.box_ap) if task == "detection" else (frozen.mask_ap, gn.mask_ap)
        same_head = FROZEN_BN_SAME_HEAD[task != "detection"]
        said.append(
            f"Mask R-CNN R50-FPN, {which}: frozen BN {numbers[0]}, {same_head} with GN's box head; GN {numbers[1]}. A "
            f"frozen BN stays where memory counts more [{gn.source}; {SOURCES['cost']}]"
        )
    if batch >= 16 and task in {None, "classification"} and positions > 1:
        prefix = "for plain classification, BatchNorm" if task is None else "BatchNorm"
        said.append(
            f"{prefix} with 16 images per GPU or more: its published error is 0.5 lower (23.6 and 24.1 at 32; runs of "
            f"one network lie within {max(REPRODUCED_ERRORS) - min(REPRODUCED_ERRORS):.1f}), and at inference it folds "
            f"into the convolution before it and costs nothing [{SOURCES['batch']}; {SOURCES['reproduced']}]"
        )
    return tuple(said)


def training_cost(batch: int, channels: int, positions: int, num_groups: int, itemsize: int) -> TrainingCost:
    """What GroupNorm with so many groups costs beside BatchNorm, in bytes by formula and as it was measured."""
    x = batch * channels * positions * itemsize
    stat = 16 if itemsize == 8 else 8  # mean and rstd: float32, float64 for float64 x
    frozen, gn = DETECTRON_COSTS[:2]
    notes = (
        "backward of GN needs x (N*C*S numbers), mean and rstd (2*N*G); of BN x and 2*C: nearly the same",
        "a frozen BN, as fine-tuned detectors have it, is y = A*x + B and needs no x: changing it to GN keeps x of "
        "every layer",
        f"{gn.network}, frozen BN to GN: memory {frozen.memory_gb} to {gn.memory_gb} GB, iteration "
        f"{frozen.iteration_s} to {gn.iteration_s} s, inference {frozen.inference_s} to {gn.inference_s} s per "
        f"image; {DETECTRON_HEADS} [{SOURCES['cost']}]",
        "BN at inference folds into a convolution and moves no bytes of its own; GN has to read x and write y, unless "
        "something is fused with it",
        "in training BN must see the whole batch before it writes, so it reads x twice where x exceeds the cache; GN "
        "reads x once where a group fits",
    )
    return TrainingCost(x + stat * batch * num_groups, x + stat * channels, 0, 2 * x, notes)


def general_warnings() -> tuple[str, ...]:
    """The traps that everybody meets, as text."""
    return tuple(map(str, TRAPS))
