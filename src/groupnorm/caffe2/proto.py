"""Caffe2's protobuf messages, made at run time: no generated files, and nothing that another copy could clash with.

The messages have the names, numbers and types of caffe2.proto (proto2, package caffe2), as far as operators and nets
need them. They live in a descriptor pool of their own, so a program may hold this and Caffe2's own caffe2_pb2 at once;
messages of either are taken wherever this package takes one. Fields that are not listed here survive reading and
writing as protobuf's unknown fields.
"""

import functools
import importlib
from typing import Any

from groupnorm.errors import DtypeError, GroupNormError

__all__ = ["MESSAGES", "as_message", "message_class", "protobuf"]

# message -> its fields: label, type, name, number, and "packed" or a default where caffe2.proto has one
_FIELDS = {
    "TensorProto": """
        repeated int64 dims 1
        optional DataType data_type 2 FLOAT
        repeated float float_data 3 packed
        repeated int32 int32_data 4 packed
        optional bytes byte_data 5
        repeated bytes string_data 6
        optional string name 7
        optional DeviceOption device_detail 8
        repeated double double_data 9 packed
        repeated int64 int64_data 10 packed
        optional Segment segment 11
        optional bytes raw_data 13
    """,
    "Argument": """
        optional string name 1
        optional float f 2
        optional int64 i 3
        optional bytes s 4
        repeated float floats 5
        repeated int64 ints 6
        repeated bytes strings 7
        optional NetDef n 8
        repeated NetDef nets 9
        optional TensorProto t 10
        repeated TensorProto tensors 11
    """,
    "DeviceOption": """
        optional int32 device_type 1
        optional int32 device_id 2
        optional uint32 random_seed 3
        optional string node_name 4
        optional int32 numa_node_id 5
        repeated string extra_info 6
    """,
    "OperatorDef": """
        repeated string input 1
        repeated string output 2
        optional string name 3
        optional string type 4
        repeated Argument arg 5
        optional DeviceOption device_option 6
        optional string engine 7
        repeated string control_input 8
        optional bool is_gradient_op 9 false
        optional string debug_info 10
        optional string domain 11
        optional string op_version 12
    """,
    "NetDef": """
        optional string name 1
        repeated OperatorDef op 2
        optional string type 3
        optional int32 num_workers 4
        optional DeviceOption device_option 5
        repeated Argument arg 6
        repeated string external_input 7
        repeated string external_output 8
    """,
}
_SEGMENT = """
        required int64 begin 1
        required int64 end 2
"""
_DATA_TYPES = {
    "UNDEFINED": 0, "FLOAT": 1, "INT32": 2, "BYTE": 3, "STRING": 4, "BOOL": 5, "UINT8": 6, "INT8": 7, "UINT16": 8,
    "INT16": 9, "INT64": 10, "FLOAT16": 12, "DOUBLE": 13,
}  # fmt: skip
_INSIDE_TENSOR = ("DataType", "Segment")  # types that are nested in TensorProto

MESSAGES = tuple(_FIELDS)


def message_class(name: str) -> Any:
    """The class of the message `name`, one of MESSAGES. Raises GroupNormError where protobuf is not installed."""
    return _classes()[name]


def as_message(name: str, value: Any) -> Any:
    """value, which must be a message caffe2.`name`, as one of the classes made here; DtypeError otherwise.

    A message of another copy of caffe2.proto is converted by its bytes.
    """
    wanted = message_class(name)
    if isinstance(value, wanted):
        return value
    if getattr(getattr(value, "DESCRIPTOR", None), "full_name", None) != f"caffe2.{name}":
        raise DtypeError(f"a caffe2.{name} message was expected: got {type(value).__name__}; make one with "
                         f"groupnorm.caffe2.{name}(), or read a file with load_net")  # fmt: skip
    return wanted.FromString(value.SerializeToString())


def protobuf(module: str) -> Any:
    """The module google.protobuf.`module`; GroupNormError where protobuf is not installed."""
    try:
        return importlib.import_module(f"google.protobuf.{module}")
    except ImportError as error:
        raise GroupNormError(
            "Caffe2's definitions need protobuf, which is not installed: pip install 'protobuf>=4.25'"
        ) from error


@functools.cache
def _classes() -> dict[str, Any]:
    pool = protobuf("descriptor_pool").DescriptorPool()
    pool.AddSerializedFile(_file().SerializeToString())
    make = protobuf("message_factory").GetMessageClass
    return {name: make(pool.FindMessageTypeByName(f"caffe2.{name}")) for name in MESSAGES}


def _file() -> Any:
    file = protobuf("descriptor_pb2").FileDescriptorProto(name="groupnorm/caffe2.proto", package="caffe2")
    file.syntax = "proto2"
    for name, fields in _FIELDS.items():
        _fill(file.message_type.add(name=name), fields)
    tensor = file.message_type[0]
    _fill(tensor.nested_type.add(name="Segment"), _SEGMENT)
    data_type = tensor.enum_type.add(name="DataType")
    for value, number in _DATA_TYPES.items():
        data_type.value.add(name=value, number=number)
    return file


def _fill(message: Any, fields: str) -> None:
    """Add the fields of a table above to a DescriptorProto."""
    for line in fields.split("\n"):
        if not line.strip():
            continue
        label, kind, name, number, *more = line.split()
        field = message.field.add(name=name, number=int(number))
        field.label = getattr(field, f"LABEL_{label.upper()}")
        if kind[0].islower():
            field.type = getattr(field, f"TYPE_{kind.upper()}")
        else:
            field.type = field.TYPE_ENUM if kind == "DataType" else field.TYPE_MESSAGE
            field.type_name = f".caffe2.{'TensorProto.' * (kind in _INSIDE_TENSOR)}{kind}"
        if more == ["packed"]:
            field.options.packed = True
        elif more:
            field.default_value = more[0]
