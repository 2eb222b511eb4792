"""What may stand in the archive of an exported program before torch loads it.

``torch.export.load`` unpickles weights that say so, evaluates strings as symbolic expressions and guards,
imports modules that a tree of inputs names, looks operators up by dotted names, and writes names into
Python code. Here each of these is compared with a list of what a program of ours needs; anything else is
refused. Operators are native code all the same, and trust their arguments: see docs/trust.md.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO

import torch

from torchrec_sid.artifact.sealed import parse_json
from torchrec_sid.errors import ArtifactError

_REMEDY = "Export the model again; do not load programs of others without a signed manifest."
_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"[^\"'\\\n\r{}()\[\];]*")
_SYMBOL = re.compile(r"[suz]+f?\d+", re.ASCII)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_LONGEST = 20_000
_MOST_BITS = 63
# Keys of the graph's JSON whose strings become names in Python code, and those that become dotted paths.
_NAMES = {"name", "as_name", "forward_arg_names", "verifiers", "graph_name"}
_PATHS = {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "as_string_path"}
_METADATA = {"stack_trace", "nn_module_stack", "torch_fn"}
_TREES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
_NAMESPACES = ("aten", "fbgemm", "prims", "torchrec_sid")
# Operators whose text is data, a message or an equation, and never a file.
_TEXT_ALLOWED = {
    "einsum",
    "_assert_async",
    "_assert_scalar",
    "gelu",
    "div",
    "div_",
    "searchsorted",
    "bucketize",
}
_OPERATOR = {
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "neg",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and_",
    "or_",
    "not_",
    "getitem",
}
_MATH = {"ceil", "floor", "trunc", "sqrt"}
_SYM = {"sym_int", "sym_float", "sym_not", "sym_max", "sym_min", "sym_ite", "sym_sum"}
_FUNCTIONS = {
    "Add",
    "Mul",
    "Integer",
    "Symbol",
    "Max",
    "Min",
    "Eq",
    "Ne",
    "Equality",
    "Unequality",
    "GreaterThan",
    "LessThan",
    "StrictGreaterThan",
    "StrictLessThan",
    "And",
    "Or",
    "Not",
    "FloorDiv",
    "CeilDiv",
    "CleanDiv",
    "Mod",
    "PythonMod",
    "ModularIndexing",
    "Where",
    "ToFloat",
    "TruncToInt",
    "IntTrueDiv",
    "Float",
    "Rational",
}
_EXPRESSION = (
    ast.Expression | ast.BinOp | ast.UnaryOp | ast.Compare | ast.BoolOp | ast.Constant | ast.Name | ast.Load
    | ast.Add | ast.Sub | ast.Mult | ast.FloorDiv | ast.Mod | ast.USub | ast.Not | ast.And | ast.Or
    | ast.Eq | ast.NotEq | ast.Lt | ast.LtE | ast.Gt | ast.GtE
)  # fmt: skip


def check_program(file: BinaryIO, where: str) -> None:
    """Inspect an archive that :func:`torch.export.load` is to read; it is not changed.

    Args:
        file: open for reading, seekable.
        where: its path, for errors.

    Raises:
        ArtifactError: it is not an archive of torch.export, or holds anything that runs other code than the
            operators of a model: pickles, native code, foreign operators, expressions or names.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _entries(archive, file, where)
            _check_format(archive, entries, where)
            for part in ("weights", "constants"):
                _check_payload(archive, entries, part, where)
            _check_graph(archive.read(entries["models/model.json"]), where)
    except ArtifactError:
        raise
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise ArtifactError(where, f"is not a program ({error!r})"[:400], _REMEDY) from error
    except (RecursionError, MemoryError, EOFError, OSError, RuntimeError) as error:
        raise ArtifactError(where, f"is not a program ({type(error).__name__})", _REMEDY) from error
    finally:
        file.seek(0)


def _refuse(where: str, what: str) -> ArtifactError:
    return ArtifactError(where, f"holds {what}", _REMEDY)


def _entries(archive: zipfile.ZipFile, file: BinaryIO, where: str) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's root -> entry; every reader of zip files sees the same ones."""
    end = file.seek(0, 2)
    file.seek(max(end - 22, 0))
    if file.read(4) != b"PK\5\6" or archive.comment:
        raise _refuse(where, "bytes behind its directory")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        if root != "program" or not _ENTRY.fullmatch(name) or info.filename != info.orig_filename:
            raise _refuse(where, f"the entry {info.filename[:80]!r}")
        if name in entries or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _refuse(where, f"the entry {info.filename[:80]!r} twice, compressed or encrypted")
        if info.file_size != info.compress_size or info.header_offset + info.file_size > end:
            raise _refuse(where, f"the entry {info.filename[:80]!r}, which is larger than the file")
        archive.open(info).close()  # compares the name in front of the data
        entries[name] = info
    return entries


def _check_format(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], where: str) -> None:
    for name, wanted in (("archive_format", b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
        if archive.read(entries[name]) != wanted:
            raise _refuse(where, f"another {name} than {wanted.decode()!r}")
    if entries["data/sample_inputs/model.pt"].file_size:
        raise _refuse(where, "pickled inputs")


def _check_payload(
    archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], part: str, where: str
) -> None:
    config = parse_json(archive.read(entries[f"data/{part}/model_{part}_config.json"]), where, _REMEDY)
    if set(config) != {"config"}:
        raise _refuse(where, f"an odd list of {part}")
    for name, entry in config["config"].items():
        _require(_PATH, name, where)
        if entry["use_pickle"] is not False:
            raise _refuse(where, f"the pickle {name[:80]!r}")
        path = entry["path_name"]
        if not _PAYLOAD.fullmatch(path):
            raise _refuse(where, f"the object {path[:80]!r}")
        record = entries[f"data/{part}/{path}"]
        sizes = [int(size["as_int"]) for size in entry["tensor_meta"]["sizes"]]
        if min(sizes, default=0) < 0 or (not record.file_size and 0 not in sizes):
            raise _refuse(where, f"no bytes for {name[:80]!r} of shape {sizes[:8]}")


def _check_graph(data: bytes, where: str) -> None:
    model = parse_json(data, where, _REMEDY)
    module = model["graph_module"]
    if module.get("treespec_namedtuple_fields") or module.get("metadata"):
        raise _refuse(where, "classes of its own")
    for guard in model.get("guards_code") or []:
        _check_expression(guard, where, _guard_node)
    for symbol in model["range_constraints"]:
        _require(_SYMBOL, symbol, where)
    for key, value in _walk(model):
        _check_value(key, value, where)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with every value below it that is no list; not recursive, since nesting is the file's."""
    left = [("", value)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            yield key, value
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((key, item) for item in value)
        else:
            yield key, value


def _check_value(key: str, value: Any, where: str) -> None:
    if key in ("as_custom_obj", "custom_obj", "as_graph", "as_operator") and value is not None:
        raise _refuse(where, f"a {key}")
    if key == "custom_obj_values" and value:
        raise _refuse(where, "objects of classes")
    if key == "metadata" and isinstance(value, dict) and not set(value) <= _METADATA:
        raise _refuse(where, f"metadata {sorted(set(value) - _METADATA)[:4]}")
    if key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
        for name in value:
            _require(_NAME, name, where)
    if not isinstance(value, str):
        return
    if key in _NAMES and value:
        _require(_NAME, value, where)
    elif key in _PATHS:
        _require(_PATH, value, where)
    elif key == "expr_str":
        _check_expression(value, where, _symbolic_node)
    elif key == "target":
        _check_operator(value, where)
    elif key in ("in_spec", "out_spec"):
        _check_tree(value, where)
    elif key == "type":
        _require(_NAME, value, where)


def _require(pattern: re.Pattern[str], value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > _LONGEST or not pattern.fullmatch(value):
        raise _refuse(where, f"the name {str(value)[:80]!r}")


def _check_operator(target: str, where: str) -> None:
    parts = target.split(".")
    plain = {"_operator": _OPERATOR, "math": _MATH, "torch": _SYM}.get(parts[0])
    if len(parts) == 2 and plain is not None and parts[1] in plain:
        return
    if len(parts) == 5 and parts[:2] == ["torch", "ops"] and parts[2] in _NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
        overload = getattr(packet, parts[4], None)
        if isinstance(overload, torch._ops.OpOverload) and (
            parts[2] == "torchrec_sid"  # whose text names a backend
            or parts[3] in _TEXT_ALLOWED
            or not _takes_text(overload)
        ):
            return
    raise _refuse(where, f"the operator {target[:80]!r}")


def _takes_text(overload: Any) -> bool:
    # A file name is text: aten.from_file maps any file.
    return any("str" in str(argument.type) for argument in overload._schema.arguments)


def _check_tree(text: str, where: str) -> None:
    version, tree = json.loads(text)
    if version != 1:
        raise _refuse(where, f"a tree of version {version!r}")
    left = [tree]
    while left:
        node = left.pop()
        if node["type"] not in _TREES:
            raise _refuse(where, f"an input of type {str(node['type'])[:80]!r}")
        keys = json.loads(node["context"]) if node["context"] is not None else None
        for key in keys or []:
            _require(_PATH, key, where)
        left.extend(node["children_spec"])


def _check_expression(text: Any, where: str, allowed: Callable[[ast.AST], bool]) -> None:
    if not isinstance(text, str) or len(text) > _LONGEST or not _is_expression(text, allowed):
        raise _refuse(where, f"the expression {str(text)[:80]!r}")


@lru_cache(4096)  # a graph says the same ones again and again
def _is_expression(text: str, allowed: Callable[[ast.AST], bool]) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and not _small(node.value):
            return False
        if not (isinstance(node, _EXPRESSION) or allowed(node)):
            return False
        if isinstance(node, ast.Name) and not (node.id in (*_FUNCTIONS, "L") or _SYMBOL.fullmatch(node.id)):
            return False
    return True


def _small(value: Any) -> bool:
    if type(value) is int:
        return value.bit_length() <= _MOST_BITS
    return isinstance(value, bool | float | str) or value is None


def _symbolic_node(node: ast.AST) -> bool:
    """Calls of sympy's and torch's functions of integers, by name."""
    if isinstance(node, ast.keyword):
        return node.arg in ("positive", "integer", "nonnegative", "real", "evaluate")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    fits = all(_SYMBOL.fullmatch(text) for text in texts) and (not texts or node.func.id == "Symbol")
    return node.func.id in _FUNCTIONS and fits


def _guard_node(node: ast.AST) -> bool:
    """Sizes of inputs: L['features']['item'][1].size()[0]."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
    if isinstance(node, ast.Attribute):
        return node.attr in ("size", "stride", "storage_offset")
    return isinstance(node, ast.Subscript)
