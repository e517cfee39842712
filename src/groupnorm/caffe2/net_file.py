"""Nets in files: binary .pb, and protobuf's text in .pbtxt and .prototxt."""

import os
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm.caffe2.proto import as_message, message_class, protobuf
from groupnorm.errors import FileError

__all__ = ["load_net", "save_net"]

_TEXT = (".pbtxt", ".prototxt")


def load_net(path: str | os.PathLike[str]) -> Any:
    """The NetDef in a file: protobuf's text format if the name ends in .pbtxt or .prototxt, otherwise binary.

    Fields that this package does not know are kept in a binary file's message and written again by `save_net`.
    Raises FileError for a file that is not there, is not readable, or does not hold a NetDef; for text with its line.
    """
    name = _name(path)
    try:
        data = Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{name}: cannot be read ({reason}); check the name and the permissions") from error
    if not data:
        raise FileError(f"{name}: is empty, expected a NetDef; write it again with save_net, or with Caffe2")
    net = _parse_text(name, data) if _is_text(name) else _parse_binary(name, data)
    reason = _why_no_net(net)
    if reason is not None:
        raise FileError(f"{name}: is not a NetDef ({reason}); pass the file of a net, as Caffe2 writes predict_net.pb")
    return net


def save_net(net: Any, path: str | os.PathLike[str]) -> None:
    """Write a NetDef: as text if the name ends in .pbtxt or .prototxt, otherwise binary. The file appears whole or not
    at all.

    Raises FileError where it cannot be written, or would not be read again: an empty net, an operator without a type,
    and, as text, a net with fields that this package does not know, since text has no room for them.
    """
    net, name = as_message("NetDef", net), _name(path)
    reason = _why_no_net(net)
    if reason is not None:
        raise FileError(f"{name}: would not be a net ({reason}); complete the NetDef")
    if _is_text(name):
        known = type(net)()
        known.CopyFrom(net)
        known.DiscardUnknownFields()
        if known.ByteSize() != net.ByteSize():
            raise FileError(f"{name}: the net has fields that this package does not know, and text would lose them; "
                            "write a .pb file")  # fmt: skip
        data = protobuf("text_format").MessageToString(net).encode()
    else:
        data = net.SerializeToString()
    write_whole(name, data)


def _name(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as error:
        raise FileError(f"path must be the name of a file: got {type(path).__name__}") from error


def _is_text(name: str) -> bool:
    return name.lower().endswith(_TEXT)


def _parse_text(name: str, data: bytes) -> Any:
    text_format = protobuf("text_format")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(
            f"{name}: line {line} is not UTF-8 text; if the file is binary, let its name end in .pb"
        ) from error
    try:
        return text_format.Parse(text, message_class("NetDef")())
    except RecursionError as error:
        raise FileError(f"{name}: cannot be read as the text of a NetDef (messages within messages)") from error
    except text_format.ParseError as error:
        line = error.GetLine()
        place = "" if line is None else f"line {line}: "
        reason = " ".join(str(error).split()).removeprefix(f"{line}:{error.GetColumn()} : ")
        raise FileError(
            f"{name}: {place}cannot be read as the text of a NetDef ({reason}); if the field is one of another version "
            "of Caffe2, save the net as .pb, where unknown fields are passed over"
        ) from error


def _parse_binary(name: str, data: bytes) -> Any:
    try:
        return message_class("NetDef").FromString(data)
    except (protobuf("message").DecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{name}: cannot be read as a binary NetDef: it is cut short, or something else; if it is "
                        "text, let its name end in .pbtxt") from error  # fmt: skip


def _why_no_net(net: Any) -> str | None:
    """Why the message cannot be a net, though its bytes could be read as one; None if it can. Most messages of other
    types can be read so, with all they hold as unknown fields or in fields of another meaning.
    """
    if not net.ListFields():
        return "no field of a NetDef is in it"
    if not all(isinstance(name, str) for name in (net.name, net.type, *net.external_input, *net.external_output)):
        return "a name of the net is not UTF-8 text"
    for index, op in enumerate(net.op):
        if not op.type:
            return f"operator {index} has no type"
        names = (op.type, op.name, *op.input, *op.output, *(held.name for held in op.arg))
        if not all(isinstance(name, str) for name in names):  # protobuf gives bytes that are no UTF-8 as bytes
            return f"a name in operator {index} is not UTF-8 text"
    return None if net.op or net.name or net.external_input else "neither a name nor an operator is in it"
