"""`advise`: published numbers come back exactly, choices are ranked as stated, and degenerate layers are called so."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import groupnorm as gn
from groupnorm import reference
from groupnorm._core import group_counts
from groupnorm._core.group_counts import divisors, interpolate, noise_points, published_points, usual_groups
from groupnorm.analysis import advisor, circumstances, published, traps
from groupnorm.analysis.advisor import TASKS, advise
from groupnorm.errors import OptionError, ShapeError
from stand_in_machine import roofline_of

SOURCE = Path(__file__).resolve().parents[1] / "src"

GROUPS = {64: 24.6, 32: 24.1, 16: 24.6, 8: 24.4, 4: 24.6, 2: 24.7, 1: 25.3}
CHANNELS = {64: 24.4, 32: 24.5, 16: 24.2, 8: 24.3, 4: 24.8, 2: 25.6, 1: 28.4}
BATCHES = {"BN": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7}, "GN": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1}}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine on which every choice takes as long as its bytes; `slow[groups]` makes one slower."""
    slow = {}
    monkeypatch.setattr(advisor, "roofline", roofline_of(slow))
    return slow


def groups_of(advice):
    return [choice.num_groups for choice in advice]


# ---- the published numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "want"), [(published.ERROR_BY_GROUPS, GROUPS),
                                             (published.ERROR_BY_CHANNELS_PER_GROUP, CHANNELS),
                                             (published.ERROR_BY_BATCH["BN"], BATCHES["BN"]),
                                             (published.ERROR_BY_BATCH["GN"], BATCHES["GN"])])  # fmt: skip
def test_a_published_number_is_exact(table, want):
    assert {at: interpolate(table, at) for at in want} == want
    assert interpolate(table, min(want) / 2) is None
    assert interpolate(table, max(want) * 2) is None


def test_between_two_numbers_the_line_is_straight_in_log2():
    assert interpolate(GROUPS, 16 * math.sqrt(2)) == pytest.approx((24.6 + 24.1) / 2)
    assert interpolate({2: 34.7, 4: 27.3}, 3) == pytest.approx(34.7 - 7.4 * math.log2(1.5))


@pytest.mark.parametrize("groups", sorted(GROUPS)[1:])
def test_the_ablation_by_groups_enters_with_its_full_weight(groups):
    by_groups, by_channels = published_points(groups * 16, groups)
    assert by_groups == pytest.approx(GROUPS[groups] - 24.1)
    assert by_channels == 0


@pytest.mark.parametrize("per_group", sorted(CHANNELS)[1:])
def test_the_ablation_by_channels_enters_with_a_fifth(per_group):
    by_groups, by_channels = published_points(32 * per_group, 32)
    assert by_groups == 0
    assert by_channels == pytest.approx((CHANNELS[per_group] - 24.2) / 5)


def test_the_ends_are_norms_with_numbers_of_their_own():
    assert published_points(320, 1) == pytest.approx((25.3 - 24.1, 0))
    assert published_points(320, 320) == pytest.approx((0, 28.4 - 24.1))
    assert published_points(1, 1) == pytest.approx((1.2, 0))


def test_the_weight_gives_back_the_best_network_for_its_own_layers():
    """The bound in the comment at CHANNELS_PER_GROUP_WEIGHT."""
    assert [usual_groups(channels) for channels in (64, 128, 256, 512, 1024, 2048)] == [32] * 6
    assert group_counts.CHANNELS_PER_GROUP_WEIGHT < (24.4 - 24.1) / ((25.6 - 24.2) - (24.3 - 24.2))


@pytest.mark.parametrize("batch", [2, 4, 8, 16, 32])
def test_norms_at_published_batch_sizes(batch):
    found = {norm.norm: norm for norm in advise(256, 49, batch).norms}
    assert found["BN"].error_percent == BATCHES["BN"][batch]
    assert found["GN"].error_percent == BATCHES["GN"][batch]
    assert "interpolation" not in found["BN"].note
    assert "1803.08494, table 2" in found["BN"].note
    at_32 = {"LN": 25.3, "IN": 28.4}
    assert {name: found[name].error_percent for name in at_32} == (at_32 if batch == 32 else dict.fromkeys(at_32))


def test_norms_between_are_called_an_interpolation():
    found = {norm.norm: norm for norm in advise(256, 49, 3).norms}
    assert found["BN"].error_percent == pytest.approx(34.7 - 7.4 * math.log2(1.5))
    assert "interpolation" in found["BN"].note
    assert "published ImageNet numbers" in found["BN"].note


@pytest.mark.parametrize("batch", [1, 33, 4096])
def test_nothing_is_said_beyond_the_published_batch_sizes(batch):
    found = {norm.norm: norm for norm in advise(256, 49, batch).norms}
    assert all(norm.error_percent is None for norm in found.values())
    assert "only for 2 to 32" in found["BN"].note


def test_every_table_has_its_source():
    assert {task: str(published.CONFIGURATIONS[task].source) for task in TASKS}
    assert all(str(result.source) for result in published.DETECTION)
    assert "1803.08494" in str(published.SOURCES["groups"])
    assert [(c.memory_gb, c.iteration_s, c.inference_s) for c in published.DETECTRON_COSTS] == [
        (8.6, 0.897, 0.099), (10.5, 1.017, 0.146), (10.2, 0.993, 0.126), (12.4, 1.151, 0.180),
    ]  # fmt: skip


# ---- the ranking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [64, 96, 128, 192, 256, 320, 512, 640, 960, 1024, 1280, 1920, 2048])
@pytest.mark.parametrize("spatial", [(7, 7), (32, 32), 4096, (8, 45, 80)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_32_groups_come_first_for_usual_layers(channels, spatial, layout):
    advice = advise(channels, spatial, 2, layout=layout)
    assert advice.num_groups == advice[0].num_groups == 32
    assert [choice.score for choice in advice] == sorted(choice.score for choice in advice)


@pytest.mark.parametrize("channels", [*range(1, 130), 192, 320, 512, 640, 1024, 1280, 2048])
def test_a_conversion_of_batch_norm_takes_the_same_groups(channels):
    """torch/batch_norm.py and advise() share one rule; they agree wherever noise, layout and speed say nothing."""
    assert advise(channels, 64 * 64, 2).num_groups == usual_groups(channels)
    if channels > 1:
        assert advise(channels, 1, 2).num_groups == usual_groups(channels, 1)


def test_few_channels_get_few_groups():
    assert [usual_groups(channels) for channels in (2, 4, 8, 16, 24, 32, 48)] == [1, 2, 2, 8, 8, 8, 8]


def test_a_score_is_the_sum_of_its_points():
    for choice in advise(320, 4, 2, task="medical", layout="NHWC"):
        assert choice.score == pytest.approx(sum(choice.points.values()), abs=1e-6)
        assert choice.score >= 0


def test_a_slower_choice_goes_down_and_says_so(machine):
    machine[32] = 8
    advice = advise(512, 1024, 2)
    slowed = next(choice for choice in advice if choice.num_groups == 32)
    assert advice.num_groups == 8
    assert slowed.points["time"] == pytest.approx(0.6)  # three doublings, 0.2 each
    assert "8.00 times the fastest" in slowed.reasons[-1]


def test_a_few_percent_of_time_are_not_counted(machine):
    machine[32] = 1.04
    assert all("time" not in choice.points for choice in advise(512, 1024, 2))


def test_a_machine_that_is_no_cpu_has_bounds_only(machine):
    machine[1] = 2
    advice = advise(512, 1024, 2, machine="H200")
    assert advice.machine == "H200"
    assert all(choice.predicted_s is None for choice in advice)
    one = next(choice for choice in advice if choice.num_groups == 1)
    assert "at least" in one.reasons[-1]


def test_channels_last_wants_groups_of_16_bytes():
    def unaligned(dtype, **options):
        advice = advise(64, 64, 2, dtype=dtype, **options)
        return {choice.num_groups for choice in advice if "alignment" in choice.points}

    assert unaligned("float32", layout="NHWC") == {32}  # D = 2; groups of one channel do not share a vector
    assert unaligned("float16", layout="NDHWC") == {32, 16}
    assert unaligned("float32") == set()
    odd = next(choice for choice in advise(96, 64, 2, layout="NHWC") if choice.num_groups == 32)
    assert any("odd number of channels of 12 bytes" in warning for warning in odd.warnings)


def test_small_groups_are_warned_of_with_the_numbers():
    warned = {c.num_groups: " ".join(c.warnings) for c in advise(64, 4, 2)}
    assert "M = 16 " in warned[16]
    assert "25%" in warned[16]  # 1/sqrt(16)
    assert "18%" in warned[16]  # 1/sqrt(32)
    assert "M =" not in warned[4]  # 64 elements
    assert noise_points(64) == 0 < noise_points(63)
    assert noise_points(16) == pytest.approx(1.25)
    assert noise_points(1) == 100


def test_the_stated_noise_is_the_measured_one():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20000, 16))
    assert x.mean(1).std() == pytest.approx(1 / math.sqrt(16), rel=0.03)
    assert x.std(1).std() == pytest.approx(1 / math.sqrt(32), rel=0.05)


# ---- degenerate layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "spatial"), [(4, 1), (512, ()), (7, (1, 1))])
def test_one_value_per_group_is_never_recommended(channels, spatial):
    advice = advise(channels, spatial, 8)
    worst = advice[-1]
    assert worst.num_groups == channels != advice.num_groups
    assert "every output equals bias" in worst.warnings[0]
    x = np.random.default_rng(0).standard_normal((8, channels))
    assert np.all(reference.group_norm(x, channels, bias=np.full(channels, 3.0))[0] == 3)
    assert any("LayerNorm" in text for text in advice.instead)


@pytest.mark.parametrize("task", TASKS)
def test_nor_is_it_for_any_task(task):
    assert advise(32, 1, 8, task=task).num_groups != 32


def test_two_values_per_group_are_signs():
    x = np.random.default_rng(0).standard_normal((8, 8))
    np.testing.assert_allclose(np.abs(reference.group_norm(x, 4, eps=0)[0]), 1)
    assert any("+1 and -1" in w for choice in advise(8, 1, 2) for w in choice.warnings if choice.num_groups == 4)


def test_one_channel_of_one_value_has_no_answer():
    advice = advise(1, 1, 1)
    assert (advice.num_groups, groups_of(advice)) == (None, [1])
    assert "no number of groups" in str(advice)
    assert "M = 1" in advice.instead[0]


def test_one_channel():
    advice = advise(1, 4096, 2)
    assert advice.num_groups == 1
    assert "InstanceNorm too" in advice[0].reasons[0]
    assert any("one channel" in text for text in advice.instead)


@pytest.mark.parametrize("channels", [2, 3, 7, 127, 8191, 4194301])
def test_prime_channels_have_two_choices(channels):
    advice = advise(channels, 64, 2)
    assert groups_of(advice) == [1, channels]
    assert any("prime" in text and "InstanceNorm" in text for text in advice.instead)
    assert not any("prime" in text for text in advise(4 * channels, 64, 2).instead)


def test_the_ends_are_named():
    reasons = {choice.num_groups: choice.reasons[0] for choice in advise(64, 64, 2)}
    assert "LayerNorm" in reasons[1]
    assert "InstanceNorm" in reasons[64]


def test_few_channels_are_told():
    assert any("are few" in text for text in advise(6, 64, 2).instead)
    assert not any("are few" in text for text in advise(64, 64, 2).instead)


@pytest.mark.parametrize(
    ("channels", "task", "published"), [(480, "medical", 8), (960, "medical", 8), (360, "dp-sgd", 8)]
)
def test_what_was_published_for_a_task_is_a_choice(channels, task, published):
    advice = advise(channels, 64, 2, task=task)
    assert published in groups_of(advice)
    assert len(advice) <= advisor.MAX_CHOICES


def test_many_divisors_are_capped():
    advice = advise(5040, 64, 2)
    assert len(advice) == advisor.MAX_CHOICES < len(divisors(5040))
    assert {1, 5040} <= set(groups_of(advice))


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 5040, 65536])
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


# ---- tasks, other norms, cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "groups", "named"), [
    ("classification", 32, "Wu and He"), ("detection", 32, "Detectron"), ("segmentation", 32, "Detectron"),
    ("diffusion", 32, "unet/config.json"), ("video", 32, "Wu and He"), ("medical", 8, "Myronenko 2018"),
    ("dp-sgd", 32, "Opacus"), ("style", 256, "1607.08022"),
])  # fmt: skip
def test_a_task_brings_its_published_configuration(task, groups, named):
    advice = advise(256, 1024, 2, task=task)
    assert advice.num_groups == groups
    assert any(named in reason for reason in advice[0].reasons)
    others = [choice for choice in advice if choice.num_groups != groups]
    assert all(choice.points["task"] == 0.5 for choice in others)


def test_a_configuration_that_does_not_divide_is_said():
    advice = advise(36, 1024, 2, task="diffusion")
    assert all("task" not in choice.points for choice in advice)
    assert "do not divide 36" in advice[0].reasons[-1]


def test_opacus_rule_at_32_channels_is_instance_norm():
    advice = advise(32, 1024, 2, task="dp-sgd")
    assert advice.num_groups == 8
    assert any("gcd(32, 32)" in w for choice in advice if choice.num_groups == 32 for w in choice.warnings)


@pytest.mark.parametrize(("task", "said"), [
    ("style", "InstanceNorm"), ("dp-sgd", "never BatchNorm"), ("video", "GN 74.5"), ("detection", "GN 40.3"),
    ("segmentation", "GN 35.7"),
])  # fmt: skip
def test_what_a_task_says_instead(task, said):
    assert any(said in text for text in advise(256, 1024, 2, task=task).instead)


@pytest.mark.parametrize(("batch", "task", "told"), [(16, None, True), (32, "classification", True), (15, None, False),
                                                     (32, "detection", False)])  # fmt: skip
def test_batch_norm_for_large_batches(batch, task, told):
    assert any("0.5 lower" in text for text in advise(256, 1024, batch, task=task).instead) == told


@pytest.mark.parametrize(("dtype", "itemsize", "stat"), [("float16", 2, 8), ("float32", 4, 8), ("float64", 8, 16)])
def test_bytes_kept_for_backward(dtype, itemsize, stat):
    cost = advise(64, (8, 8), 2, dtype=dtype).cost
    x = 2 * 64 * 64 * itemsize
    assert cost.saved_bytes == x + stat * 2 * 32
    assert cost.batch_norm_saved_bytes == x + stat * 64
    assert cost.frozen_batch_norm_saved_bytes == 0
    assert cost.least_forward_bytes == 2 * x
    assert any("8.6 to 10.5 GB" in note and "Detectron" in note for note in cost.notes)


def test_traps_are_all_named_with_a_source():
    text = "\n".join(advise(64, 64, 2).warnings)
    for word in (
        "eps",
        "Keras",
        "Flax",
        "one value per group",
        "weight decay",
        "zero-init",
        "MLX",
        "opset 18",
        "Caffe2",
    ):
        assert word in text
    assert len(circumstances.general_warnings()) == text.count("[") == text.count("\n") + 1


def test_the_effect_of_eps_is_computed():
    x = np.random.default_rng(0).standard_normal((1, 4, 1000))
    x = (x - x.mean()) / x.std() * 0.1  # variance 0.01
    ratio = reference.group_norm(x, 1, eps=1e-3)[0] / reference.group_norm(x, 1, eps=1e-5)[0]
    np.testing.assert_allclose(1 - ratio, traps.eps_change(0.01, 1e-3), rtol=1e-9)
    assert "4.6% smaller" in traps.TRAPS[0].text


# ---- the answer as a value -------------------------------------------------------------------------------------------


def test_an_advice_is_a_sequence_and_frozen():
    advice = advise(64, 64, 2)
    assert len(advice) == len(list(advice)) == len(advice[:])
    assert advice[0] is next(iter(advice))
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice.task = "video"
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice[0].score = 0


def test_the_text_says_everything():
    advice = advise(320, (64, 64), 2, task="diffusion")
    text = str(advice)
    assert text.startswith("2x320x64x64 float32 for diffusion: 32 groups of 10 channels")
    for part in (*advice[0].reasons, *advice.warnings, *advice.cost.notes, "BN: 34.7 %", "a computer"):
        assert part in text
    assert "1 group of 7 channels" in str(advise(7, (), 2))


@pytest.mark.parametrize("spatial", [4096, (64, 64), [16, 16, 16], np.int64(4096)])
def test_only_the_number_of_positions_counts(spatial):
    assert [c.score for c in advise(64, spatial, 2)] == [c.score for c in advise(64, 4096, 2)]


@pytest.mark.parametrize("spatial", [(), 1, (1, 1)])
def test_vectors(spatial):
    assert advise(64, spatial, 2).num_groups == 2


@pytest.mark.parametrize(("arguments", "options", "error", "said"), [
    ((0, 64, 2), {}, ShapeError, "channels must be at least 1: got 0"),
    ((-3, 64, 2), {}, ShapeError, "got -3"),
    ((64, -1, 2), {}, ShapeError, "spatial must be at least 1"),
    ((64, (8, 0), 2), {}, ShapeError, "spatial must be at least 1"),
    ((64, 64, 0), {}, ShapeError, "batch must be at least 1"),
    ((1 << 25, 64, 2), {}, ShapeError, "channels must be at most 16777216"),
    ((64, (1 << 40, 1 << 40), 2), {}, ShapeError, "at most 2^62"),
    ((64.0, 64, 2), {}, OptionError, "whole number: got 64.0 (float)"),
    ((True, 64, 2), {}, OptionError, "bool"),
    ((64, "8x8", 2), {}, OptionError, "spatial"),
    ((64, 64, None), {}, OptionError, "batch"),
    ((64, 64, 2), {"task": "speech"}, OptionError, ", ".join(TASKS)),
    ((64, 64, 2), {"dtype": "int8"}, OptionError, "bfloat16"),
    ((64, 64, 2), {"layout": "CHWN"}, OptionError, "NHWC"),
    ((64, 64, 2), {"machine": "abacus"}, OptionError, "abacus"),
])  # fmt: skip
def test_bad_arguments(arguments, options, error, said):
    with pytest.raises(error, match=re.escape(said)):
        advise(*arguments, **options)
    assert issubclass(error, gn.GroupNormError)


def test_nothing_heavy_is_loaded():
    code = (
        "import sys, groupnorm.analysis.published, groupnorm.analysis.traps, groupnorm.analysis.circumstances\n"
        "import groupnorm.analysis.advice_text, groupnorm.analysis.model_layers\n"
        "print(sorted({'numba', 'torch', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
                         env={"PYTHONPATH": str(SOURCE)})  # fmt: skip
    assert run.stdout.strip() == "[]"
