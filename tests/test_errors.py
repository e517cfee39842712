"""Every wrong argument is refused at the door, by an error of our tree that says what was got, what was expected, and
what to do; also when the same call without the mistake is already known.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import groupnorm as gn
from groupnorm._engines.cpu.threads import POOL

F = np.float32
X = np.random.default_rng(0).standard_normal((2, 8, 4, 4)).astype(F)
W = np.ones(8, F)
MASK = np.ones((2, 4, 4), bool)
STAT = np.ones((2, 4), F)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def test_options_may_be_arrays_of_one_number() -> None:
    """As files give them back; they cannot be keys of a dictionary."""
    want = gn.group_norm(X, 2, eps=1e-3)
    for _ in range(2):
        assert np.array_equal(gn.group_norm(X, np.array(2), eps=np.array(1e-3)), want)


# What is wrong: arguments of group_norm -> the error, and words that its message must have (got, expected, remedy).
WRONG: dict[str, tuple[dict[str, Any], type, list[str]]] = {
    # num_groups
    "groups do not divide": ({"num_groups": 5}, gn.ShapeError, ["5", "8", "try 4 or 8", "uneven=True"]),
    "no groups": ({"num_groups": 0}, gn.OptionError, ["at least 1", "0"]),
    "negative groups": ({"num_groups": -2}, gn.OptionError, ["at least 1", "-2"]),
    "more groups than channels": ({"num_groups": 16}, gn.ShapeError, ["16", "8", "at most"]),
    "more uneven groups than channels": ({"num_groups": 9, "uneven": True}, gn.ShapeError, ["9", "8"]),
    "groups are a float": ({"num_groups": 2.0}, gn.OptionError, ["whole number", "2.0", "float"]),
    "groups are a fraction": ({"num_groups": 2.5}, gn.OptionError, ["whole number", "2.5"]),
    "groups are a bool": ({"num_groups": True}, gn.OptionError, ["whole number", "True"]),
    "groups are a NumPy bool": ({"num_groups": np.True_}, gn.OptionError, ["whole number", "True"]),
    "groups are a NumPy float": ({"num_groups": np.float64(2)}, gn.OptionError, ["whole number"]),
    "groups are text": ({"num_groups": "2"}, gn.OptionError, ["whole number", "'2'"]),
    "groups are nothing": ({"num_groups": None}, gn.OptionError, ["whole number", "None"]),
    "groups are a list": ({"num_groups": [2]}, gn.OptionError, ["whole number", "list"]),
    "groups are an array": ({"num_groups": np.array([2, 4])}, gn.OptionError, ["whole number"]),
    # x
    "x is nothing": ({"x": None}, gn.DtypeError, ["x", "None"]),
    "x is whole numbers": ({"x": X.astype(np.int32)}, gn.DtypeError, ["x", "int32", "float32", "astype"]),
    "x is complex": ({"x": X.astype(np.complex64)}, gn.DtypeError, ["x", "complex64"]),
    "x is bool": ({"x": X > 0}, gn.DtypeError, ["x", "bool"]),
    "x is objects": ({"x": X.astype(object)}, gn.DtypeError, ["x", "object"]),
    "x is masked": ({"x": np.ma.masked_array(X)}, gn.DtypeError, ["x", "masked", "mask="]),
    "x is text": ({"x": "abc"}, gn.DtypeError, ["x"]),
    "x is a ragged list": ({"x": [[1.0], [1.0, 2.0]]}, gn.DtypeError, ["x", "list"]),
    "x is a mixed list": ({"x": [[1.0, "a"]]}, gn.DtypeError, ["x"]),
    "x is 8 bit": ({"x": X.astype(ml_dtypes.float8_e4m3fn)}, gn.DtypeError, ["x", "float8"]),
    "x is a scalar": ({"x": F(1)}, gn.ShapeError, ["0", "x[None]"]),
    "x is a vector": ({"x": W}, gn.ShapeError, ["1", "x[None]"]),
    "x has no channels": ({"x": np.empty((2, 0, 4), F)}, gn.ShapeError, ["channel", "0", "layout"]),
    # layout
    "layout is unknown": ({"layout": "HWCN"}, gn.OptionError, ["HWCN", "NCHW", "NHWC"]),
    "layout in small letters": ({"layout": "nchw"}, gn.OptionError, ["nchw", "NCHW"]),
    "layout is nothing": ({"layout": None}, gn.OptionError, ["None", "NCHW"]),
    "layout is a number": ({"layout": 1}, gn.OptionError, ["1", "NCHW"]),
    "layout is a list": ({"layout": ["NCHW"]}, gn.OptionError, ["NCHW"]),
    "layout of another rank": ({"layout": "NCDHW"}, gn.ShapeError, ["5", "4", "NCHW"]),
    "layout of another rank, last": ({"layout": "NLC"}, gn.ShapeError, ["3", "4", "NHWC"]),
    # weight, bias, scale, shift
    "weight is short": ({"weight": np.ones(7, F)}, gn.ShapeError, ["weight", "(8,)", "(7,)"]),
    "weight of groups": ({"weight": np.ones(2, F)}, gn.ShapeError, ["weight", "(8,)", "(2,)"]),
    "weight of rank 4": ({"weight": np.ones((1, 8, 1, 1), F)}, gn.ShapeError, ["weight", "(8,)", "(1, 8, 1, 1)"]),
    "weight is a number": ({"weight": 1.0}, gn.ShapeError, ["weight", "(8,)", "()"]),
    "weight is whole numbers": ({"weight": np.ones(8, int)}, gn.DtypeError, ["weight", "int64", "astype"]),
    "bias is long": ({"bias": np.ones(9, F)}, gn.ShapeError, ["bias", "(8,)", "(9,)"]),
    "bias is complex": ({"bias": np.ones(8, complex)}, gn.DtypeError, ["bias", "complex128"]),
    "bias is text": ({"bias": "none"}, gn.DtypeError, ["bias"]),
    "scale without samples": ({"scale": W}, gn.ShapeError, ["scale", "(2, 8)", "(8,)"]),
    "scale of other samples": ({"scale": np.ones((3, 8), F)}, gn.ShapeError, ["scale", "(2, 8)", "(3, 8)"]),
    "shift turned": ({"shift": np.ones((8, 2), F)}, gn.ShapeError, ["shift", "(2, 8)", "(8, 2)"]),
    "shift is whole numbers": ({"shift": np.ones((2, 8), np.int8)}, gn.DtypeError, ["shift", "int8"]),
    # residual, mask
    "residual of another shape": ({"residual": X[:1]}, gn.ShapeError, ["residual", "(2, 8, 4, 4)", "(1, 8, 4, 4)"]),
    "residual is a number": ({"residual": 0.0}, gn.ShapeError, ["residual", "()"]),
    "residual is whole numbers": ({"residual": X.astype(int)}, gn.DtypeError, ["residual", "int64"]),
    "mask with channels": ({"mask": X > 0}, gn.ShapeError, ["mask", "(2, 4, 4)", "(2, 8, 4, 4)"]),
    "mask without samples": ({"mask": MASK[0]}, gn.ShapeError, ["mask", "(2, 4, 4)", "(4, 4)"]),
    "mask of numbers": ({"mask": MASK.astype(F)}, gn.DtypeError, ["mask", "bool", "float32"]),
    "mask is text": ({"mask": "all"}, gn.DtypeError, ["mask", "bool"]),
    "mask is ragged": ({"mask": [[True], [True, False]]}, gn.DtypeError, ["mask"]),
    # out
    "out of another shape": ({"out": np.empty((2, 8, 4), F)}, gn.ShapeError, ["out", "(2, 8, 4, 4)", "(2, 8, 4)"]),
    "out of another type": ({"out": X.astype(np.float64)}, gn.DtypeError, ["out", "float64", "float32"]),
    "out of another byte order": ({"out": np.empty(X.shape, ">f4")}, gn.DtypeError, ["out"]),
    "out is read-only": ({"out": read_only(np.empty_like(X))}, gn.ShapeError, ["out", "writeable", "read-only"]),
    "out is a list": ({"out": X.tolist()}, gn.DtypeError, ["out", "list", "array"]),
    "out of one element for many": ({"out": np.broadcast_to(F(0), X.shape)}, gn.GroupNormError, ["out"]),
    # other options
    "eps is NaN": ({"eps": float("nan")}, gn.OptionError, ["eps", "nan", "1e-5"]),
    "eps is infinite": ({"eps": float("inf")}, gn.OptionError, ["eps", "inf"]),
    "eps is negative": ({"eps": -1e-9}, gn.OptionError, ["eps", "-1e-09", "at least 0"]),
    "eps is text": ({"eps": "small"}, gn.OptionError, ["eps", "small"]),
    "eps is nothing": ({"eps": None}, gn.OptionError, ["eps", "None"]),
    "eps is a list": ({"eps": [1e-5]}, gn.OptionError, ["eps", "[1e-05]"]),
    "eps is complex": ({"eps": 1j}, gn.OptionError, ["eps", "1j"]),
    "activation is unknown": ({"activation": "selu"}, gn.OptionError, ["selu", "silu", "relu"]),
    "activation is a function": ({"activation": np.tanh}, gn.OptionError, ["tanh", "silu"]),
    "activation is a list": ({"activation": ["relu"]}, gn.OptionError, ["relu", "silu"]),
    "impl is unknown": ({"impl": "tpu"}, gn.OptionError, ["tpu", "cpu", "reference"]),
    "impl is a number": ({"impl": 0}, gn.OptionError, ["0", "cpu"]),
    "impl takes no NumPy arrays": ({"impl": "gpu"}, gn.EngineError, ["gpu", "NumPy", "cpu"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: Any) -> None:
    """Which would take NumPy arrays for the GPU engine."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def call(**changes: Any) -> Any:
    arguments = {"x": X, "num_groups": 2} | changes
    return gn.group_norm(arguments.pop("x"), arguments.pop("num_groups"), **arguments)


def backward(**changes: Any) -> Any:
    arguments = {"dy": X, "x": X, "num_groups": 4} | changes
    return gn.group_norm_vjp(arguments.pop("dy"), arguments.pop("x"), arguments.pop("num_groups"), **arguments)


def refused(function: Callable[[], Any], error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert isinstance(caught.value, gn.GroupNormError)
    assert len(message) > 20
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert re.search(r"got|lacks", message), f"what was got is not in {message!r}"


@pytest.mark.parametrize("what", WRONG)
def test_group_norm(what: str) -> None:
    changes, error, words = WRONG[what]
    refused(lambda: call(**changes), error, words)


@pytest.mark.parametrize("what", WRONG)
def test_group_norm_after_the_right_call(what: str) -> None:
    """A known call is found by how it looks; what is only equal, like 2.0 to 2, must not be taken for it."""
    changes, error, words = WRONG[what]
    call()
    call(num_groups=1)
    call(uneven=True)
    call(mask=MASK, weight=W, bias=W, eps=0, residual=X, out=np.empty_like(X))
    for _ in range(2):
        refused(lambda: call(**changes), error, words)


@pytest.mark.parametrize("what", [w for w, (changes, _, _) in WRONG.items() if "out" not in changes])
def test_backward(what: str) -> None:
    changes, error, words = WRONG[what]
    if "impl" not in changes and "layout" not in changes:
        backward()
    if "x" in changes and changes["x"] is not None:
        words = []  # dy may be what is named
        error = gn.GroupNormError
    refused(lambda: backward(**changes), error, words)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dy": X[:1]}, gn.ShapeError, ["dy", "(2, 8, 4, 4)", "(1, 8, 4, 4)"]),
        ({"dy": X.astype(int)}, gn.DtypeError, ["dy", "int64"]),
        ({"mean": STAT}, gn.ShapeError, ["mean and rstd", "both"]),
        ({"rstd": STAT}, gn.ShapeError, ["mean and rstd", "both"]),
        ({"mean": STAT[:1], "rstd": STAT}, gn.ShapeError, ["mean", "(2, 4)", "(1, 4)"]),
        ({"mean": STAT, "rstd": STAT.T}, gn.ShapeError, ["rstd", "(2, 4)", "(4, 2)"]),
        ({"mean": STAT, "rstd": STAT.astype(int)}, gn.DtypeError, ["rstd", "int64"]),
        ({"mean": 0.0, "rstd": 1.0}, gn.ShapeError, ["mean", "(2, 4)", "()"]),
    ],
    ids=str,
)
def test_backward_alone(changes: dict[str, Any], error: type, words: list[str]) -> None:
    backward()
    backward(mean=STAT, rstd=STAT)
    refused(lambda: backward(**changes), error, words)


def test_dy_is_nothing() -> None:
    """In a process of its own: whoever hands this to a kernel reads from address 0."""
    code = """
import numpy, groupnorm
for impl in ("cpu", "reference"):
    try:
        groupnorm.group_norm_vjp(None, numpy.ones((2, 8, 4, 4), numpy.float32), 4, impl=impl)
    except groupnorm.DtypeError as error:
        assert "dy" in str(error) and "None" in str(error), error
    else:
        raise AssertionError(impl)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize(
    "what", [w for w, (c, _, _) in WRONG.items() if not {"num_groups", "mask", "impl", "x", "uneven"} & set(c)]
)
def test_normalize(what: str) -> None:
    changes, error, words = WRONG[what]
    moments = gn.moments(X, 2)
    gn.normalize(X, moments)
    refused(lambda: gn.normalize(X, moments, **changes), error, words)


@pytest.mark.parametrize(
    ("m", "words"),
    [
        (None, ["Moments", "NoneType"]),
        ((1, 2, 3), ["Moments", "tuple"]),
        (gn.Moments(1.0, 2.0, 3.0), ["(N, G)"]),
        (gn.moments(X[:1], 2), ["1", "2", "sample"]),
    ],
    ids=["nothing", "a tuple", "scalars", "of other samples"],
)
def test_normalize_moments(m: Any, words: list[str]) -> None:
    gn.normalize(X, gn.moments(X, 2))
    refused(lambda: gn.normalize(X, m), gn.GroupNormError, words)


def test_normalize_groups_that_do_not_fit() -> None:
    other = gn.moments(np.ones((2, 9, 4), F), 3)
    refused(lambda: gn.normalize(X, other), gn.ShapeError, ["3", "8"])


@pytest.mark.parametrize(
    "what", [w for w, (c, _, _) in WRONG.items() if set(c) <= {"x", "num_groups", "layout", "mask"}]
)
def test_moments(what: str) -> None:
    changes, error, words = WRONG[what]
    arguments = {"x": X, "num_groups": 2} | changes
    gn.moments(X, 2)
    gn.moments(X, 1)
    refused(lambda: gn.moments(arguments.pop("x"), arguments.pop("num_groups"), **arguments), error, words)


def test_merge_moments() -> None:
    one = gn.moments(X, 2)
    refused(lambda: gn.merge_moments([]), gn.GroupNormError, ["at least one", "empty"])
    refused(lambda: gn.merge_moments([one, gn.moments(X, 4)]), gn.ShapeError, ["(2, 2)", "(2, 4)"])
    refused(lambda: gn.merge_moments([one, 3]), gn.GroupNormError, ["Moments", "int"])
    refused(lambda: gn.Moments(np.ones((2, 2)), np.ones((2, 2)), np.ones(2)), gn.ShapeError, ["(2, 2)", "(2,)"])
    with pytest.raises(TypeError):
        one + 1
    with pytest.raises((gn.GroupNormError, TypeError)):
        gn.merge_moments(one)  # forgot the list


@pytest.mark.parametrize("number", [0, -1, 1.0, 2.5, "2", None, True, [1]], ids=repr)
def test_set_num_threads(number: Any) -> None:
    before = gn.get_num_threads()
    refused(lambda: gn.set_num_threads(number), gn.OptionError, ["num_threads", repr(number), "at least 1"])
    assert gn.get_num_threads() == before


def test_an_error_leaves_everything_as_it_was() -> None:
    out = np.full_like(X, 7)
    for changes, _, _ in WRONG.values():
        if "out" not in changes:
            with pytest.raises(gn.GroupNormError):
                call(**changes, out=out)
    assert (out == 7).all()
    assert np.isfinite(call()).all()
    assert POOL is not None


def test_the_tree() -> None:
    for error in (gn.ShapeError, gn.DtypeError, gn.OptionError, gn.EngineError, gn.FileError):
        assert issubclass(error, gn.GroupNormError)
    assert issubclass(gn.GroupNormError, ValueError)
    assert issubclass(gn.DtypeError, TypeError)
    assert all(issubclass(kind, RuntimeError) for kind in (gn.ShapeError, gn.DtypeError, gn.OptionError))


@pytest.mark.parametrize("arguments", [(), (X,), (X, 2, W, W, 1e-5)], ids=["none", "x alone", "eps by place"])
def test_wrong_number_of_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        gn.group_norm(*arguments)


def test_the_specification_refuses_what_it_does_not_define() -> None:
    for wrong in ({"num_groups": 3}, {"num_groups": 0}, {"num_groups": 16}, {"num_groups": 2, "layout": "CHWN"}):
        with pytest.raises(ValueError, match="must"):
            gn.reference.group_norm(X, **wrong)


def test_tensors_that_ask_for_gradients_are_for_groupnorm_torch():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 4, 3, requires_grad=True)
    with pytest.raises(gn.DtypeError, match=r"groupnorm\.torch"):
        gn.group_norm(x, 2)
    with pytest.raises(gn.DtypeError, match="weight must be an array"):
        gn.group_norm(np.ones((2, 4, 3), np.float32), 2, torch.nn.Parameter(torch.ones(4)), np.ones(4, np.float32))
