"""Real models, small and with random weights: converted, they compute what they did before."""

import functools
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import groupnorm.torch as gnt  # noqa: E402
from groupnorm.bench.model_runner import TOLERANCE, error  # noqa: E402
from groupnorm.bench.model_work import ModelWork, build, step  # noqa: E402
from groupnorm.bench.models import MODELS, missing  # noqa: E402

CASES = {case.name: case for case in MODELS if case.name != "vae-decode-512"}  # tiny, it is vae-decode-256
WORKS = [
    pytest.param(name, mode, memory_format, id=f"{name}-{mode}-{memory_format}")
    for name, case in CASES.items()
    for mode in case.sizes
    for memory_format in ("contiguous", "channels_last")
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only wait for their threads, the more so where tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work_of(name, mode, memory_format="contiguous", dtype="float32"):
    absent = missing(CASES[name])
    if absent:
        pytest.skip(f"{absent} is not installed")
    return ModelWork(CASES[name], mode, "tiny", dtype, memory_format, False, 1)


@functools.lru_cache(maxsize=4)
def exact(work):
    """What stock gives in float64."""
    built = build(work, dtype="float64")
    return step(work, built.model, built.inputs)()


def results(work, *, converted, compile_with=None):
    built = build(work, converted=converted)
    model = built.model if compile_with is None else torch.compile(built.model, backend=compile_with, dynamic=False)
    return step(work, model, built.inputs)()


def norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "mode", "memory_format"), WORKS)
def test_a_converted_model_computes_the_same(name, mode, memory_format, dtype):
    if dtype not in CASES[name].dtypes:
        pytest.skip(f"{name} is measured in {', '.join(CASES[name].dtypes)}")
    work = work_of(name, mode, memory_format, dtype)
    wanted = exact(replace(work, memory_format="contiguous"))
    stock, converted = (error(results(work, converted=which), wanted) for which in (False, True))
    assert converted <= max(TOLERANCE[dtype], 2 * stock), f"stock is {stock:.1e} from exact"


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        ("unet-sd15", "contiguous"),
        ("vae-decode-256", "channels_last"),
        ("segresnet", "channels_last"),
        ("resnet50-gn", "contiguous"),
    ],
)
def test_compilers_follow_a_converted_model(name, memory_format):
    torch._dynamo.reset()
    work = work_of(name, "training", memory_format)
    found = results(work, converted=True, compile_with="aot_eager")
    assert error(found, exact(replace(work, memory_format="contiguous"))) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", CASES)
def test_revert_gives_stock_back(name):
    """Not only nearly: the same operations in the same order."""
    mode = next(iter(CASES[name].sizes))
    work = work_of(name, mode)
    built = build(work, converted=True)
    gnt.revert(built.model)
    assert all(type(norm) is torch.nn.GroupNorm for norm in norms(built.model))
    found, wanted = step(work, built.model, built.inputs)(), results(work, converted=False)
    assert error(found, wanted) <= 1e-6  # convolutions of PyTorch differ by as much from one call to the next


# ---- what is converted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_norm_is_swapped(name):
    work = work_of(name, next(iter(CASES[name].sizes)))
    count = len(norms(build(work).model))
    built = build(work, converted=True)
    assert built.swapped == count > 0
    assert all(type(norm) is gnt.GroupNorm for norm in norms(built.model))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("vae-decode-256", 1),  # the attention's
        ("vae-encode-256", 1),
        ("segresnet", 0),
        ("monai-unet", 5),  # followed by a PReLU, which has weights
        ("resnet50-gn", 2),  # the shortcuts'
        ("dp-sgd", 0),
    ],
)
def test_the_activations_after_norms_are_fused(name, left):
    built = build(work_of(name, next(iter(CASES[name].sizes))), converted=True)
    assert built.swapped - built.fused == left


# ---- DP-SGD ----------------------------------------------------------------------------------------------------------


def test_gradients_of_every_sample_are_those_of_stock():
    work = work_of("dp-sgd", "dp-sgd")
    stock, converted = (results(work, converted=which) for which in (False, True))
    samples = len(build(work).inputs[0])
    for found, wanted in zip(converted, stock, strict=True):
        assert len(found) == samples
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


def test_opacus_takes_a_converted_model_for_valid():
    work = work_of("dp-sgd", "dp-sgd")
    from opacus.validators import ModuleValidator

    assert ModuleValidator.validate(build(work, converted=True).model, strict=False) == []
