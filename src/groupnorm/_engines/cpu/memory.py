"""Vectors from and to memory: typed pointers for Numba, loads, stores, streamed stores and prefetch.

`Pointer(element)` is an address of float16, bfloat16, float32, float64 or bool elements; indices count elements. 16-bit
elements are computed in float32, so a load widens and a store rounds to nearest even. `pointer(address, code)` carries
an element code from a kernel's closure into Numba's types; from there on everything is chosen by type.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.simd import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    LANES,
    SCALAR,
    Vector,
    call_intrinsic,
    has_feature,
    lanes_below,
    maximum,
    splat,
    total,
    widen,
)  # fmt: skip

NONE, F16, BF16, FLOAT32, FLOAT64, BOOL = range(6)  # element codes, shared by kernels and their callers
CODES = {None: NONE, "float16": F16, "bfloat16": BF16, "float32": FLOAT32, "float64": FLOAT64, "bool": BOOL}
_ELEMENT = {F16: "f16", BF16: "bf16", FLOAT32: "f32", FLOAT64: "f64", BOOL: "bool"}
_HALF = ir.HalfType()
_STORED = {"f16": _HALF, "bf16": I16, "f32": F32, "f64": F64, "bool": I8}
_SUFFIX = {"f16": "f16", "bf16": "i16", "f32": "f32", "f64": "f64", "bool": "i8"}  # as LLVM spells the stored type
_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "bool": 1}
_LANE_OF = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64", "bool": "bool"}

THROUGH, PAST, FETCHED = 0, 1, 2  # ways to write: through the cache, past it, or through it with lines fetched ahead
_AHEAD = 1024  # bytes: how far ahead lines are fetched; 512 to 4096 were measured equal


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Pointer(types.Type):  # type: ignore[misc]
    """The address of an array's elements."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Pointer({element})")


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Pointer) -> None:
        super().__init__(manager, kind, I64)


# ---- memory ----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def pointer(typingctx: Any, address: Any, code: Any) -> Any:
    """The elements at `address`; `code` is a constant element code, and NONE gives None."""
    kind = types.none if code.literal_value == NONE else Pointer(_ELEMENT[code.literal_value])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value() if kind is types.none else args[0]

    return kind(types.int64, code), lower  # the literal type stays: Numba finds this implementation by it


@intrinsic
def zeros(typingctx: Any, p: Any) -> Any:
    """A vector of zeros of the lane type that p's elements are computed in."""
    result = Vector(_LANE_OF[p.element])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(result), None)

    return result(p), lower


@intrinsic
def one_lane(typingctx: Any, p: Any, number: Any) -> Any:
    """A float64 as a scalar of p's lane type."""
    kind = SCALAR[_LANE_OF[p.element]]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[1], sig.args[1], kind)

    return kind(p, types.float64), lower


@intrinsic
def scratch(typingctx: Any, p: Any) -> Any:
    """Room for LANES * (LANES + 1) numbers of p's lane type on the stack: one such place for each place in the
    program.
    """
    result = Pointer(_LANE_OF[p.element])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        room = ir.ArrayType(ir.VectorType(_STORED[result.element], LANES), LANES + 1)
        with builder.goto_entry_block():  # Numba's own way of doing this fills the room with zeros in each call
            return builder.ptrtoint(builder.alloca(room), I64)

    return result(p), lower


@jitted
def to_line(address):
    """The first address from this one on where a cache line begins."""
    return (address + 63) & -64


@intrinsic
def address_of(typingctx: Any, p: Any, index: Any) -> Any:
    """Where element index lies."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.add(args[0], builder.mul(args[1], I64(_BYTES[p.element])))

    return types.int64(p, types.int64), lower


@intrinsic
def shifted(typingctx: Any, p: Any, index: Any) -> Any:
    """The elements from index on; None of None."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if isinstance(p, types.NoneType):
            return context.get_dummy_value()
        return builder.add(args[0], builder.mul(args[1], I64(_BYTES[p.element])))

    return p(p, types.int64), lower


@intrinsic
def element_size(typingctx: Any, p: Any) -> Any:
    """Bytes of an element."""
    return types.int64(p), lambda context, builder, sig, args: I64(_BYTES[p.element])


def _address(builder: Any, p: Pointer, address: Any, index: Any, lanes: int = LANES) -> tuple[Any, int]:
    """A pointer to `lanes` elements at index, and the element size in bytes."""
    stored, size = _STORED[p.element], _BYTES[p.element]
    kind = ir.VectorType(stored, lanes) if lanes > 1 else stored
    return builder.inttoptr(builder.add(address, builder.mul(index, I64(size))), kind.as_pointer()), size


def _decode(builder: Any, element: str, raw: Any) -> Any:
    """Stored element(s) to lane type."""
    vector = isinstance(raw.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, LANES)) if vector else (lambda t: t)
    if element == "f16":
        return builder.fpext(raw, shape(F32))
    if element == "bf16":
        wide = builder.zext(raw, shape(I32))
        sixteen = ir.Constant(shape(I32), [16] * LANES if vector else 16)
        return builder.bitcast(builder.shl(wide, sixteen), shape(F32))
    if element == "bool":
        return builder.icmp_unsigned("!=", raw, ir.Constant(shape(I8), None))
    return raw


def _encode(context: Any, builder: Any, element: str, value: Any) -> Any:
    """Lane value(s) to the stored element: round to nearest even; a NaN stays a NaN.

    bfloat16 is rounded by one instruction where there is one (AVX-512 BF16, nine otherwise: forward in cache 1.2 to 1.4
    times as fast with it). It writes zero for what is below 2^-126, the smallest normal number.
    """
    vector = isinstance(value.type, ir.VectorType)
    shape = (lambda t: ir.VectorType(t, LANES)) if vector else (lambda t: t)
    if element == "f16":
        return builder.fptrunc(value, shape(_HALF))
    if element == "bf16" and has_feature(context, "avx512bf16"):
        return builder.bitcast(builder.fptrunc(value, shape(_BFloat())), shape(I16))
    if element == "bf16":

        def constant(number: int) -> Any:
            return ir.Constant(shape(I32), [number] * LANES if vector else number)

        bits = builder.bitcast(value, shape(I32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(bits, constant(0x400000))  # rounding could carry a NaN's payload into infinity
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), constant(16)), shape(I16))
    if element == "bool":
        return builder.zext(value, shape(I8))
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
        mask = lanes_below(builder, args[2])
        raw = call_intrinsic(builder, name, stored, where, I32(size), mask, ir.Constant(stored, None))
        return _decode(builder, p.element, raw)

    return result(p, types.int64, types.int64), lower


@intrinsic
def store(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write LANES elements."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        builder.store(_encode(context, builder, p.element, args[2]), where, align=size)

    return types.void(p, types.int64, value), lower


@intrinsic
def stream(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write LANES elements past the cache (non-temporal); the address is a multiple of their size. Needs a `fence`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        written = builder.store(_encode(context, builder, p.element, args[2]), where, align=size * LANES)
        written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))

    return types.void(p, types.int64, value), lower


@intrinsic
def store_first(typingctx: Any, p: Any, index: Any, value: Any, count: Any) -> Any:
    """Write the first `count` lanes; memory behind them is not touched."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1])
        raw = _encode(context, builder, p.element, args[2])
        name = f"llvm.masked.store.v{LANES}{_SUFFIX[p.element]}.p0"
        call_intrinsic(builder, name, ir.VoidType(), raw, where, I32(size), lanes_below(builder, args[3]))

    return types.void(p, types.int64, value, types.int64), lower


@intrinsic
def load_one(typingctx: Any, p: Any, index: Any) -> Any:
    """One element as a scalar of the lane type."""
    result = SCALAR[_LANE_OF[p.element]]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1], lanes=1)
        return _decode(builder, p.element, builder.load(where, align=size))

    return result(p, types.int64), lower


@intrinsic
def store_one(typingctx: Any, p: Any, index: Any, value: Any) -> Any:
    """Write one element."""
    kind = SCALAR[_LANE_OF[p.element]]

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where, size = _address(builder, p, args[0], args[1], lanes=1)
        builder.store(_encode(context, builder, p.element, args[2]), where, align=size)

    return types.void(p, types.int64, kind), lower


def _prefetch(writing: int, locality: int) -> Any:
    def typing(typingctx: Any, p: Any, index: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where, _ = _address(builder, p, args[0], args[1], lanes=1)
            where = builder.bitcast(where, I8.as_pointer())
            call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), where, I32(writing), I32(locality), I32(1))

        return types.void(p, types.int64), lower

    return typing


# Ask for the cache line that holds an element, to read it into the L2 cache, or to write it; any address is allowed.
prefetch = intrinsic(_prefetch(0, 2))
prefetch_to_write = intrinsic(_prefetch(1, 3))


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make every write so far, streamed ones too, visible before anything that follows."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")

    return types.void(), lower


@intrinsic
def totals(typingctx: Any, p: Any) -> Any:
    """The sums of LANES vectors that lie one after the other, a sum to a lane, each added up as `total` does: in pairs
    of vectors, so that the 15 additions of the first take as long as those of all.
    """
    result = Vector(_LANE_OF[p.element])

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wheres = [_address(builder, p, args[0], I64(i * LANES)) for i in range(LANES)]
        vectors = [builder.load(where, align=size) for where, size in wheres]
        while len(vectors) > 1:  # each holds LANES / width sums of which width lanes are left
            width = len(vectors)
            firsts = [i for i in range(2 * LANES) if i % width < width // 2]
            halves = [ir.Constant(ir.VectorType(I32, LANES), [i + at for i in firsts]) for at in (0, width // 2)]
            vectors = [builder.fadd(*(builder.shuffle_vector(a, b, half) for half in halves))
                       for a, b in zip(vectors[::2], vectors[1::2], strict=True)]  # fmt: skip
        return vectors[0]

    return result(p), lower


@inlined
def store_totals(p, index, room, count):
    """Write the sums of the first `count` vectors of a room to a float64 array."""
    if count <= 4:
        for i in range(count):
            store_one(p, index + i, total(load(room, i * LANES)))
    else:
        store_first(p, index, widen(totals(room)), count)


@jitted
def elements_to_line(p, index):
    """How many elements from index on lie before the next place where a vector can be streamed; a huge number if there
    is none because the elements are not aligned to their own size.
    """
    size = element_size(p)
    past = address_of(p, index) % (size * LANES)
    if past % size != 0:
        return 1 << 62
    return (LANES - past // size) % LANES


@inlined
def repeat(p, values, lanes, times):
    """Write each of the first `lanes` values `times` times (at most LANES), and numbers without meaning after them."""
    store(p, 0, values)
    if times == 1:
        return
    single = scratch(p)
    store(single, 0, values)
    for lane in range(lanes):
        store(p, lane * times, splat(values, load_one(single, lane)))


@inlined
def write(p, index, value, way, ahead):
    """Write LANES elements in one of the ways; `ahead` of `elements_ahead` is for FETCHED."""
    if way == PAST:
        stream(p, index, value)
    else:
        if way == FETCHED:
            prefetch_to_write(p, index + ahead)
        store(p, index, value)


@jitted
def elements_ahead(p, row, step):
    """How far ahead lines are fetched that will be written in rows of `row` elements, one every `step` elements."""
    return maximum(_AHEAD // (element_size(p) * row), 1) * step
