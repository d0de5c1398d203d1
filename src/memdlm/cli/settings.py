"""Plain data (YAML, `--set key=value`) into a tree of config dataclasses, checked key by key.

Knows dataclasses and annotations, not what any setting means: ranges are checked by the dataclasses
themselves. Every complaint names the file and the full dotted key.
"""

import difflib
import enum
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from memdlm.errors import ConfigError, UsageError

T = TypeVar("T")


class _Mismatch(Exception):
    """A value does not fit its annotation; the message says what would."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UsageError: The file is missing, unreadable, not YAML (with its line), repeats a key, or is
            no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {path} ({reason}): check the path") from error
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{line} is not valid YAML ({_one_line(error.problem)}): correct the line"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML ({_one_line(error)})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {_kind(data)}: a recipe is a mapping of keys to values")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def apply_overrides(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `data` with every `dotted.key=value` set; values are read as YAML.

    Raises:
        UsageError: An assignment has no `=`, no valid value, or goes through a value that is not a
            mapping.
    """
    result = _deep_copy(data)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise UsageError(f"--set {assignment}: write --set key=value, e.g. memory.rank=16")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {assignment}: the value is not valid YAML") from error
        place = result
        for depth, part in enumerate(parts[:-1], start=1):
            inner = place.get(part)
            if inner is None:
                inner = place[part] = {}
            if not isinstance(inner, dict):
                raise UsageError(
                    f"--set {assignment}: {'.'.join(parts[:depth])} is {inner!r}, not a section"
                )
            place = inner
        place[parts[-1]] = value
    return result


def build(config_class: type[T], data: Mapping[str, Any], source: str, path: str = "") -> T:
    """Build a config dataclass, nested ones included, from plain data.

    Args:
        config_class: A dataclass whose fields say their type.
        data: Differences from its defaults.
        source: What to name in messages, e.g. the recipe's file.
        path: Dotted key of this section; empty at the top.

    Raises:
        UsageError: An unknown key (with the nearest valid one) or a value of the wrong type.
        ConfigError: A value out of range.
    """
    checked = check_values(config_class, data, source, path)
    try:
        return config_class(**checked)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_values(
    config_class: type[Any], data: Any, source: str, path: str = "", hidden: Sequence[str] = ()
) -> dict[str, Any]:
    """Check keys and types of a section and return its values converted, without building it.

    `hidden` names fields that are set elsewhere and so are unknown here. Raises as `build`.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{source}: {path} is a {_kind(data)}; it must be a section of keys")
    hints = get_type_hints(config_class)
    known = [f.name for f in fields(config_class) if f.init and f.name not in hidden]
    values = {}
    for key, value in data.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            elsewhere = [place for place in _deeper_keys(config_class, path) if _last(place) == key]
            hint = nearest(str(key), known, path, elsewhere)
            raise UsageError(f"{source}: unknown key {full}{hint}")
        try:
            values[key] = _convert(value, hints[key], source, full)
        except _Mismatch as mismatch:
            raise UsageError(f"{source}: {full} is {value!r}; it must be {mismatch}") from None
    return values


def nearest(key: str, known: Sequence[str], path: str = "", elsewhere: Sequence[str] = ()) -> str:
    """Return "; did you mean ...?" for a misspelt or misplaced key, or the list of all keys.

    `elsewhere` are dotted keys of deeper sections that end in `key`.
    """
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    prefix = f"{path}." if path else ""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; valid keys: {', '.join(known)}" if len(known) <= 20 else "; see `memdlm recipe`"


def _convert(value: Any, annotation: Any, source: str, path: str) -> Any:
    """Return `value` as `annotation` wants it, or raise `_Mismatch`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, source, path)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return build(annotation, {} if value is None else value, source, path)
    if annotation in _SCALARS:
        return _SCALARS[annotation](value)
    if annotation is type(None) and value is None:
        return None
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices = [member.value for member in annotation]
        if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
            return "no"
        if value in choices:
            return value
        raise _Mismatch(f"one of {', '.join(map(str, choices))}")
    if origin is Literal and value in arguments:
        return value
    if origin in (list, tuple) or annotation in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _Mismatch("a list")
        items = [_convert(item, (arguments or (Any,))[0], source, path) for item in value]
        return tuple(items) if tuple in (origin, annotation) else items
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            raise _Mismatch("a mapping")
        item = (arguments or (Any, Any))[1]
        return {str(key): _convert(v, item, source, path) for key, v in value.items()}
    raise _Mismatch("left out: it cannot be written in a recipe")


def _convert_union(value: Any, arguments: tuple[Any, ...], source: str, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    wanted = []
    # transformers writes `SomeEnum | str` for a text that must be one of the enum's.
    if any(isinstance(a, type) and issubclass(a, enum.Enum) for a in arguments):
        arguments = tuple(a for a in arguments if a is not str)
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(value, argument, source, path)
        except _Mismatch as mismatch:
            wanted.append(str(mismatch))
    wanted += ["null"] if type(None) in arguments else []
    raise _Mismatch(" or ".join(dict.fromkeys(wanted)))


def _as_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Mismatch("a whole number")
    return value


def _as_float(value: Any) -> float:
    # YAML 1.1 reads 2e-5 as text (it wants 2.0e-5); everybody else reads a number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _Mismatch("a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Mismatch("a number")
    return float(value)


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Mismatch("true or false")
    return value


def _as_str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Mismatch("a text")
    return value


_SCALARS: dict[Any, Any] = {int: _as_int, float: _as_float, bool: _as_bool, str: _as_str}


def to_plain(value: Any) -> Any:
    """Return a config tree as dicts, lists and scalars, as YAML and JSON hold them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def to_yaml(value: Any) -> str:
    """Return a config tree as YAML that `read_yaml` and `build` turn into the same tree."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True)
class KeyHelp:
    """One line of documentation: a dotted key, its type, default and help."""

    key: str
    type: str
    default: str
    help: str


def describe(config_class: type[Any], path: str = "", depth: int = 8) -> Iterator[KeyHelp]:
    """Yield every key of a config tree with its help, in the order of the fields."""
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        if not field.init:
            continue
        key = f"{path}.{field.name}" if path else field.name
        nested = _nested(hints[field.name])
        text = str(field.metadata.get("help", ""))
        if nested is not None and depth > 0:
            yield KeyHelp(key, "section", "", text)
            yield from describe(nested, key, depth - 1)
        else:
            yield KeyHelp(key, _type_name(hints[field.name]), _default(field), text)


def _deeper_keys(config_class: type[Any], path: str) -> Iterator[str]:
    """Yield the dotted keys of all sections, those described by a `config` in metadata included."""
    yield from (entry.key for entry in describe(config_class, path))
    for field in fields(config_class):
        if "config" in field.metadata:
            section = f"{path}.{field.name}" if path else field.name
            yield from (entry.key for entry in describe(field.metadata["config"], section, depth=0))


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _nested(annotation: Any) -> type[Any] | None:
    """Return the dataclass an annotation is, or is beside null."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("NoneType", "null").replace("None", "null")


def _default(field: "Field[Any]") -> str:
    value = field.default
    if value is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return "(required)"
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, width=10_000)
    return text.strip().removesuffix("...").strip()


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _deep_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
