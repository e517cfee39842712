"""Sixteen lanes in Python: the vector and pointer types for Numba that every CPU kernel is written in.

A kernel reads like NumPy over sixteen numbers: `store(y, i, fma(load(x, i) - mean, a, b))`. Nothing is left to the
auto-vectoriser: each name becomes the few instructions it says, on any target (LLVM splits a vector for AVX2 or NEON).

- `Pointer(element)`: an address of float16, bfloat16, float32, float64 or bool elements; indices count elements.
- `Vector(lane)`: LANES lanes of float32, float64, int32, int64 or bool. 16-bit elements are computed in float32.

`pointer(address, code)` carries an element code from a kernel's closure into Numba's types; from there on everything is
chosen by type. No fast-math flag is set anywhere, so a result depends on the operations written and on nothing else.
"""

import operator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

LANES = 16

NONE, F16, BF16, F32, F64, BOOL = range(6)  # element codes, shared by kernels and their callers
_ELEMENT = {F16: "f16", BF16: "bf16", F32: "f32", F64: "f64", BOOL: "bool"}

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_STORED = {"f16": _F16, "bf16": _I16, "f32": _F32, "f64": _F64, "bool": _I8}
_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "bool": 1}
_LANE = {"f32": _F32, "f64": _F64, "i32": _I32, "i64": _I64, "bool": _I1}
_LANE_OF = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64", "bool": "bool"}
_SCALAR = {"f32": types.float32, "f64": types.float64, "i32": types.int32, "i64": types.int64, "bool": types.boolean}
_SUFFIX = {"f16": "f16", "bf16": "i16", "f32": "f32", "f64": "f64", "bool": "i8", "i32": "i32", "i64": "i64"}
_INTEGER_OF = {"f32": "i32", "f64": "i64"}
_FLOAT_OF = {"i32": "f32", "i64": "f64"}


# ---- types -----------------------------------------------------------------------------------------------------------


class Vector(types.Type):  # type: ignore[misc]
    """LANES numbers in registers."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        super().__init__(name=f"Vector({lane})")


class Pointer(types.Type):  # type: ignore[misc]
    """The address of an array's elements."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Pointer({element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _vector_ir(vector.lane))


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, pointer_type: Pointer) -> None:
        super().__init__(manager, pointer_type, _I64)


def _vector_ir(lane: str) -> ir.VectorType:
    return ir.VectorType(_LANE[lane], LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    one = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(one, scalar, _I32(0)), one, zeros)


def _as_lanes(context: Any, builder: Any, value: Any, kind: types.Type, lane: str) -> Any:
    """`value` as a vector of `lane`; a scalar is repeated in every lane."""
    if isinstance(kind, Vector):
        return value
    return _splat(builder, context.cast(builder, value, kind, _SCALAR[lane]))


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


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
        values = [_as_lanes(context, builder, v, t, lane) for v, t in zip(args, sig.args, strict=True)]
        floating = lane in _INTEGER_OF
        if compares:
            compare = builder.fcmp_ordered if floating else builder.icmp_signed
            return compare(_COMPARE[function], *values)
        return getattr(builder, (_FLOAT if floating else _INTEGER)[function])(*values)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(spelling, *kinds)(lower)


for _operator in {*_FLOAT, *_INTEGER, *_COMPARE}:
    _define_operator(_operator, _operator)
for _operator, _inplace in {operator.add: operator.iadd, operator.mul: operator.imul, operator.sub: operator.isub}.items():
    _define_operator(_operator, _inplace)


# ---- memory ----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def pointer(typingctx: Any, address: Any, code: Any) -> Any:
    """The elements at `address`; `code` is a constant element code, and NONE gives None."""
    kind = types.none if code.literal_value == NONE else Pointer(_ELEMENT[code.literal_value])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value() if kind is types.none else args[0]

    return kind(types.int64, types.int64), lower


@intrinsic
def advance(typingctx: Any, p: Any, elements: Any) -> Any:
    """`p` moved on by a number of elements."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.add(args[0], builder.mul(args[1], _I64(_BYTES[p.element])))

    return p(p, types.int64), lower


def _address(builder: Any, p: Pointer, address: Any, index: Any, lanes: int = LANES) -> tuple[Any, int]:
    """A pointer to `lanes` elements at index, and the element size in bytes."""
    stored, size = _STORED[p.element], _BYTES[p.element]
    kind = ir.VectorType(stored, lanes) if lanes > 1 else stored
    return builder.inttoptr(builder.add(address, builder.mul(index, _I64(size))), kind.as_pointer()), size


def _decode(builder: Any, element: str, raw: Any) -> Any:
    """Stored element(s) to lane type."""
    vector = isinstance(raw.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, LANES)) if vector else (lambda t: t)
    if element == "f16":
        return builder.fpext(raw, shape(_F32))
    if element == "bf16":
        wide = builder.zext(raw, shape(_I32))
        sixteen = ir.Constant(shape(_I32), [16] * LANES if vector else 16)
        return builder.bitcast(builder.shl(wide, sixteen), shape(_F32))
    if element == "bool":
        return builder.icmp_unsigned("!=", raw, ir.Constant(shape(_I8), None))
    return raw


def _encode(builder: Any, element: str, value: Any) -> Any:
    """Lane value(s) to the stored element: round to nearest even; a NaN stays a NaN."""
    vector = isinstance(value.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, LANES)) if vector else (lambda t: t)
    if element == "f16":
        return builder.fptrunc(value, shape(_F16))
    if element == "bf16":

        def constant(number: int) -> Any:
            return ir.Constant(shape(_I32), [number] * LANES if vector else number)

        bits = builder.bitcast(value, shape(_I32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(bits, constant(0x400000))  # rounding could carry a NaN's payload into infinity
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), constant(16)), shape(_I16))
    if element == "bool":
        return builder.zext(value, shape(_I8))
    return value


@intrinsic
def load(typingctx: Any, p: Any, index: Any) -> Any:
    """LANES elements from index on."""
    result = Vector(_LANE_OF[p.element])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, *args)
        return _decode(builder, p.element, builder.load(where, align=size))

    return result(p, types.int64), lower


@intrinsic
def load_first(typingctx: Any, p: Any, index: Any, count: Any) -> Any:
    """The first `count` elements from index on, zero in the other lanes; memory behind them is not touched."""
    result = Vector(_LANE_OF[p.element])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        stored = ir.VectorType(_STORED[p.element], LANES)
        name = f"llvm.masked.load.v{LANES}{_SUFFIX[p.element]}.p0"
        mask = _first_lanes(builder, args[2])
        raw = _call(builder, name, stored, where, _I32(size), mask, ir.Constant(stored, None))
        return _decode(builder, p.element, raw)

    return result(p, types.int64, types.int64), lower


@intrinsic
def store(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write LANES elements."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        builder.store(_encode(builder, p.element, args[2]), where, align=size)

    return types.void(p, types.int64, value), lower


@intrinsic
def stream(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write LANES elements past the cache (non-temporal); the address is a multiple of their size. Needs a `fence`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        written = builder.store(_encode(builder, p.element, args[2]), where, align=size * LANES)
        written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))

    return types.void(p, types.int64, value), lower


@intrinsic
def store_first(typingctx: Any, p: Any, index: Any, value: Any, count: Any) -> Any:
    """Write the first `count` lanes; memory behind them is not touched."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        raw = _encode(builder, p.element, args[2])
        name = f"llvm.masked.store.v{LANES}{_SUFFIX[p.element]}.p0"
        _call(builder, name, ir.VoidType(), raw, where, _I32(size), _first_lanes(builder, args[3]))

    return types.void(p, types.int64, value, types.int64), lower


@intrinsic
def load_one(typingctx: Any, p: Any, index: Any) -> Any:
    """One element as a scalar of the lane type."""
    result = _SCALAR[_LANE_OF[p.element]]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, *args, lanes=1)
        value = _decode(builder, p.element, builder.load(where, align=size))
        return builder.zext(value, _I8) if p.element == "bool" and result is types.uint8 else value

    return result(p, types.int64), lower


@intrinsic
def store_one(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write one element."""
    kind = _SCALAR[_LANE_OF[p.element]]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1], lanes=1)
        builder.store(_encode(builder, p.element, args[2]), where, align=size)

    return types.void(p, types.int64, kind), lower


@intrinsic
def prefetch(typingctx: Any, p: Any, index: Any) -> Any:
    """Ask for the cache line that holds element index; any address is allowed."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, _ = _address(builder, p, *args, lanes=1)
        where = builder.bitcast(where, _I8.as_pointer())
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), where, _I32(0), _I32(2), _I32(1))

    return types.void(p, types.int64), lower


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make every write so far, streamed ones too, visible before anything that follows."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")

    return types.void(), lower


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, p: Any, scalar: Any) -> Any:
    """A vector of p's lane type (p: Pointer or Vector) with the number in every lane."""
    lane = p.lane if isinstance(p, Vector) else _LANE_OF[p.element]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _as_lanes(context, builder, args[1], sig.args[1], lane)

    return Vector(lane)(p, types.unliteral(scalar)), lower


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once where the machine can; scalars are repeated in every lane."""
    lane = _common_lane((a, b, c))
    assert lane is not None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [_as_lanes(context, builder, v, t, lane) for v, t in zip(args, sig.args, strict=True)]
        return _call(builder, f"llvm.fmuladd.v{LANES}{lane}", _vector_ir(lane), *values)

    return Vector(lane)(*map(types.unliteral, (a, b, c))), lower


def _unary(name: str) -> Any:
    def typing(typingctx: Any, v: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _call(builder, f"llvm.{name}.v{LANES}{v.lane}", _vector_ir(v.lane), *args)

        return v(v), lower

    return typing


nearest = intrinsic(_unary("rint"))  # the nearest whole number, ties to even
absolute = intrinsic(_unary("fabs"))


@intrinsic
def to_float(typingctx: Any, v: Any) -> Any:
    """int lanes as floats of the same width."""
    result = Vector(_FLOAT_OF[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _vector_ir(result.lane))

    return result(v), lower


@intrinsic
def to_int(typingctx: Any, v: Any) -> Any:
    """float lanes as ints of the same width; the lanes must fit."""
    result = Vector(_INTEGER_OF[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], _vector_ir(result.lane))

    return result(v), lower


@intrinsic
def bits(typingctx: Any, v: Any) -> Any:
    """The bit patterns of float lanes as ints, or of int lanes as floats."""
    result = Vector({**_INTEGER_OF, **_FLOAT_OF}[v.lane])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _vector_ir(result.lane))

    return result(v), lower


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask holds, b elsewhere; the mask is a bool vector, or one bool for all lanes."""
    lane = _common_lane((a, b))
    assert lane is not None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        chosen = args[0] if isinstance(mask, Vector) else builder.icmp_unsigned("!=", args[0], args[0].type(0))
        values = [_as_lanes(context, builder, v, t, lane) for v, t in zip(args[1:], sig.args[1:], strict=True)]
        return builder.select(chosen, *values)

    return Vector(lane)(mask, *map(types.unliteral, (a, b))), lower


def _first_lanes(builder: Any, count: Any) -> Any:
    numbers = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", numbers, _splat(builder, count))


@intrinsic
def first_lanes(typingctx: Any, count: Any) -> Any:
    """A bool vector that holds in the first `count` lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _first_lanes(builder, args[0])

    return Vector("bool")(types.int64), lower


@intrinsic
def total(typingctx: Any, v: Any) -> Any:
    """The sum of the lanes, as float64; bool lanes are counted. Lanes are added pairwise, so the order is fixed."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(_F64, LANES)
        value = args[0]
        if v.lane == "bool":
            value = builder.uitofp(value, wide)
        elif v.lane == "f32":
            value = builder.fpext(value, wide)
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            halves = [ir.Constant(ir.VectorType(_I32, lanes), list(range(at, at + lanes))) for at in (0, lanes)]
            low, high = (builder.shuffle_vector(value, undefined, half) for half in halves)
            value = builder.fadd(low, high)
        return builder.extract_element(value, _I32(0))

    return types.float64(v), lower
