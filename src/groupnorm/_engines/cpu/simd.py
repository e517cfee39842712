"""Sixteen lanes in Python: the vector and pointer types for Numba that every CPU kernel is written in.

A kernel reads like NumPy over sixteen numbers: `store(y, i, fma(load(x, i) - mean, a, b))`. Nothing is left to the
auto-vectoriser: each name becomes the few instructions it says, on any target (LLVM splits a vector for AVX2 or NEON).

`Vector(lane)` holds LANES lanes of float32, float64, int32, int64 or bool. It knows + - * /, the comparisons and the
functions below, with vectors or with scalars, which are repeated in every lane. No fast-math flag is set anywhere, so a
result depends on the operations written and on nothing else. `memory.py` brings vectors from and to arrays.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

# A NumPy number and not an int, here and wherever kernels pass a constant on: Numba would compile the callee once more
# for each value of an int.
LANES: Any = np.int64(16)

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
_LANE = {"f32": F32, "f64": F64, "i32": I32, "i64": I64, "bool": I1}
SCALAR = {"f32": types.float32, "f64": types.float64, "i32": types.int32, "i64": types.int64, "bool": types.boolean}
_INTEGER_OF = {"f32": "i32", "f64": "i64"}
_FLOAT_OF = {"i32": "f32", "i64": "f64"}


# ---- types -----------------------------------------------------------------------------------------------------------


class Vector(types.Type):  # type: ignore[misc]
    """LANES numbers in registers."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        super().__init__(name=f"Vector({lane})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector_ir(vector.lane))


def vector_ir(lane: str) -> ir.VectorType:
    return ir.VectorType(_LANE[lane], LANES)


def splat_scalar(builder: Any, scalar: Any) -> Any:
    one = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(one, scalar, I32(0)), one, zeros)


def as_lanes(context: Any, builder: Any, value: Any, kind: types.Type, lane: str) -> Any:
    """`value` as a vector of `lane`; a scalar is repeated in every lane."""
    if isinstance(kind, Vector):
        return value
    return splat_scalar(builder, context.cast(builder, value, kind, SCALAR[lane]))


def call_intrinsic(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


def has_feature(context: Any, name: str) -> bool:
    """Whether the processor that is compiled for has this feature, in LLVM's spelling."""
    _, _, features = context.codegen().magic_tuple()
    return f"+{name}" in features.split(",")


# ---- operators -------------------------------------------------------------------------------------------------------

_FLOAT = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INTEGER = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
            operator.xor: "xor", operator.lshift: "shl", operator.rshift: "ashr"}  # fmt: skip
_COMPARE = {operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==",
            operator.ne: "!="}  # fmt: skip


def _common_lane(arguments: tuple[types.Type, ...]) -> str | None:
    """The one lane type among the vectors of `arguments`, the rest being numbers; None if they do not fit."""
    lanes = {a.lane for a in arguments if isinstance(a, Vector)}
    fits = all(isinstance(a, (Vector, types.Number, types.Boolean)) for a in arguments)
    return lanes.pop() if fits and len(lanes) == 1 else None


def _define_operator(function: Any, spelling: Any) -> None:
    """Let `spelling` (the operator itself or its in-place form) mean `function` on vectors."""
    compares = function in _COMPARE

    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            lane = _common_lane(args)
            if lane is None or kws:
                return None
            return signature(Vector("bool" if compares else lane), *map(types.unliteral, args))

    infer_global(spelling)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane = _common_lane(sig.args)
        assert lane is not None
        values = [as_lanes(context, builder, v, t, lane) for v, t in zip(args, sig.args, strict=True)]
        floating = lane in _INTEGER_OF
        if compares:
            compare = builder.fcmp_ordered if floating else builder.icmp_signed
            return compare(_COMPARE[function], *values)
        return getattr(builder, (_FLOAT if floating else _INTEGER)[function])(*values)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(spelling, *kinds)(lower)


for _operator in {*_FLOAT, *_INTEGER, *_COMPARE}:
    _define_operator(_operator, _operator)
for _operator, _inplace in {
    operator.add: operator.iadd,
    operator.mul: operator.imul,
    operator.sub: operator.isub,
}.items():
    _define_operator(_operator, _inplace)


# ---- scalars --------------------------------------------------------------------------------------------------------


def _scalar_choice(keeps_first: str) -> Any:
    def typing(typingctx: Any, a: Any, b: Any) -> Any:
        whole = all(isinstance(types.unliteral(t), (types.Integer, types.Boolean)) for t in (a, b))
        kind = types.int64 if whole else types.float64

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second = (context.cast(builder, v, t, kind) for v, t in zip(args, sig.args, strict=True))
            compare = builder.icmp_signed if whole else builder.fcmp_unordered
            return builder.select(compare(keeps_first, first, second), first, second)

        return kind(types.unliteral(a), types.unliteral(b)), lower

    return typing


# The smaller and the larger of two numbers, the first if either is NaN. Python's own min and max would do, but Numba
# compiles them anew for each pair of types: 0.2 s of a kernel.
minimum = intrinsic(_scalar_choice("<="))
maximum = intrinsic(_scalar_choice(">="))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, v: Any, scalar: Any) -> Any:
    """A vector of v's lane type with the number in every lane."""
    lane = v.lane

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return as_lanes(context, builder, args[1], sig.args[1], lane)

    return v(v, types.unliteral(scalar)), lower


def opaque(builder: Any, value: Any) -> Any:
    """`value`, of which LLVM no longer knows that it is a constant."""
    same = builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=False)
    same.attributes.add("readnone")
    same.attributes.add("nounwind")
    return same


@intrinsic
def held(typingctx: Any, like: Any, number: Any) -> Any:
    """The number in every lane, in a register for the whole of a loop where there are 32 of them (AVX-512). Left alone,
    LLVM reads constants from memory in every turn, folded into the instructions that use them.
    """
    lane = like.lane

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = as_lanes(context, builder, args[1], sig.args[1], lane)
        return opaque(builder, value) if lane == "f32" and has_feature(context, "avx512f") else value

    return like(like, types.unliteral(number)), lower


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once where the machine can; scalars are repeated in every lane."""
    lane = _common_lane((a, b, c))
    assert lane is not None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [as_lanes(context, builder, v, t, lane) for v, t in zip(args, sig.args, strict=True)]
        return call_intrinsic(builder, f"llvm.fmuladd.v{LANES}{lane}", vector_ir(lane), *values)

    return Vector(lane)(*map(types.unliteral, (a, b, c))), lower


def _unary(name: str) -> Any:
    def typing(typingctx: Any, v: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return call_intrinsic(builder, f"llvm.{name}.v{LANES}{v.lane}", vector_ir(v.lane), *args)

        return v(v), lower

    return typing


def _estimate(builder: Any, d: Any) -> Any:
    everywhere = (ir.Constant(d.type, None), ir.Constant(ir.IntType(LANES), -1))
    return call_intrinsic(builder, "llvm.x86.avx512.rcp14.ps.512", d.type, d, *everywhere)


def _newton(context: Any, builder: Any, n: Any, d: Any) -> tuple[Any, Any, Any]:
    """n/d by the machine's estimate of 1/d; what remains of n; n/d after a step of Newton. Else three times n/d."""
    vector = d.type
    if vector.element != ir.FloatType() or not has_feature(context, "avx512f"):
        return (builder.fdiv(n, d),) * 3
    inverse = _estimate(builder, d)
    first, fused = builder.fmul(n, inverse), f"llvm.fmuladd.v{LANES}f32"
    remainder = call_intrinsic(builder, fused, vector, builder.fneg(first), d, n)
    return first, remainder, call_intrinsic(builder, fused, vector, remainder, inverse, first)


@intrinsic
def reciprocal_estimate(typingctx: Any, d: Any) -> Any:
    """1/d off by 2^-14 of it, 0 for an infinite d. Only where there is AVX-512."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _estimate(builder, args[0])

    return d(d), lower


@intrinsic
def quotient(typingctx: Any, a: Any, b: Any) -> Any:
    """a/b, off by little more than half a unit in the last place, for b between 2^-100 and 2^100; a small number for
    larger finite b, 0 for an infinite one, and infinite where a is. 5 cycles for 16 float32 against a division's 10.
    """
    lane = _common_lane((a, b))
    assert lane is not None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        n, d = (as_lanes(context, builder, v, t, lane) for v, t in zip(args, sig.args, strict=True))
        first, remainder, better = _newton(context, builder, n, d)
        return builder.select(builder.fcmp_unordered("uno", remainder, remainder), first, better)

    return Vector(lane)(*map(types.unliteral, (a, b))), lower


@intrinsic
def reciprocal(typingctx: Any, d: Any) -> Any:
    """1/d as `quotient` gives it, for d between 2^-100 and 2^100 or NaN: two instructions less."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _newton(context, builder, ir.Constant(args[0].type, [1.0] * LANES), args[0])[2]

    return d(d), lower


nearest = intrinsic(_unary("rint"))  # the nearest whole number, ties to even
absolute = intrinsic(_unary("fabs"))
square_root = intrinsic(_unary("sqrt"))


@intrinsic
def to_float(typingctx: Any, v: Any) -> Any:
    """int lanes as floats of the same width."""
    result = Vector(_FLOAT_OF[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], vector_ir(result.lane))

    return result(v), lower


@intrinsic
def to_int(typingctx: Any, v: Any) -> Any:
    """float lanes as ints of the same width; the lanes must fit."""
    result = Vector(_INTEGER_OF[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], vector_ir(result.lane))

    return result(v), lower


def _resize(lane: str, operation: str) -> Any:
    result = Vector(lane)

    def typing(typingctx: Any, v: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return args[0] if v.lane == lane else getattr(builder, operation)(args[0], vector_ir(lane))

        return result(v), lower

    return typing


widen = intrinsic(_resize("f64", "fpext"))  # float lanes as float64


@intrinsic
def narrow(typingctx: Any, v: Any, like: Any) -> Any:
    """float64 lanes in the lane type of `like`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0] if like.lane == "f64" else builder.fptrunc(args[0], vector_ir(like.lane))

    return like(v, like), lower


@intrinsic
def bits(typingctx: Any, v: Any) -> Any:
    """The bit patterns of float lanes as ints, or of int lanes as floats."""
    result = Vector({**_INTEGER_OF, **_FLOAT_OF}[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], vector_ir(result.lane))

    return result(v), lower


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask holds, b elsewhere; the mask is a bool vector, or one bool for all lanes."""
    lane = _common_lane((a, b))
    assert lane is not None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [as_lanes(context, builder, v, t, lane) for v, t in zip(args[1:], sig.args[1:], strict=True)]
        return builder.select(args[0], *values)

    return Vector(lane)(mask, *map(types.unliteral, (a, b))), lower


def lanes_below(builder: Any, count: Any) -> Any:
    numbers = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", numbers, splat_scalar(builder, count))


@intrinsic
def first_lanes(typingctx: Any, count: Any) -> Any:
    """A bool vector that holds in the first `count` lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return lanes_below(builder, args[0])

    return Vector("bool")(types.int64), lower


@intrinsic
def any_of(typingctx: Any, mask: Any) -> Any:
    """Whether a bool vector holds in any lane."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        together = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", together, ir.Constant(together.type, 0))

    return types.boolean(mask), lower


def _halved(builder: Any, value: Any) -> Any:
    """The sum of the lanes: halves are added until one lane is left, so the order is fixed."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(at, at + lanes))) for at in (0, lanes)]
        low, high = (builder.shuffle_vector(value, undefined, half) for half in halves)
        value = builder.fadd(low, high)
    return builder.extract_element(value, I32(0))


@intrinsic
def total(typingctx: Any, v: Any) -> Any:
    """The sum of the lanes, as float64; bool lanes are counted."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        if v.lane == "bool":
            value = builder.uitofp(value, vector_ir("f64"))
        elif v.lane == "f32":
            value = builder.fpext(value, vector_ir("f64"))
        return _halved(builder, value)

    return types.float64(v), lower
