"""Settings of one component: flag over environment over configuration file over default, each with its origin.

A component declares one frozen dataclass whose fields are made by `setting(...)`. `add_flags` turns the fields into
argparse flags, `load_settings` merges the four layers. For the section `edge` and the field `max_new_tokens`:

    flag            --max-new-tokens 64
    environment     FL_LLAMA_EDGE_MAX_NEW_TOKENS=64
    file            [edge]
                    max_new_tokens = 64

The file is `config.toml` in `$XDG_CONFIG_HOME/fl-llama` or `~/.config/fl-llama` (the same on every system), or the one
that `FL_LLAMA_CONFIG` names. Unknown variables, sections and keys are errors that name the nearest known one.
Field types: `str`, `int`, `float`, `bool`, `Path`, each also `| None`, and `tuple[str, ...]`. In the environment a
tuple is a comma-separated text or a JSON list. This module stays light: `--help` runs through it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from split_llama.errors import UsageError

SECTIONS = ("edge", "gateway", "server", "train", "loadtest")
PREFIX = "FL_LLAMA_"
CONFIG_VARIABLE = "FL_LLAMA_CONFIG"
# Where tests and benchmarks find their data: no setting of any component.
DATA_VARIABLE = "FL_LLAMA_DATA"
TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")

T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    check: Callable[[Any], object] | None = None,
    secret: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare one field of a settings dataclass.

    `check` is called with the converted value and raises `ValueError` or a `UsageError` if it will not do. A `secret`
    value is never shown.
    """
    metadata = {"help": help, "choices": tuple(choices), "check": check, "secret": secret, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The merged settings, and for each field where its value came from ("default", "--noise", a variable, a file)."""

    settings: T
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """List (name, value as text, origin) per field; secrets are masked."""
        rows = []
        for field in dataclasses.fields(typing.cast(Any, self.settings)):
            value = getattr(self.settings, field.name)
            masked = field.metadata.get("secret") and value is not None
            rows.append((field.name, "********" if masked else _show(value), self.origins[field.name]))
        return rows


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Give the configuration file's path; it need not exist unless `FL_LLAMA_CONFIG` names it."""
    env = os.environ if environ is None else environ
    if env.get(CONFIG_VARIABLE):
        return Path(env[CONFIG_VARIABLE]).expanduser()
    base = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else Path.home() / ".config"
    return base / "fl-llama" / "config.toml"


def flag_name(field: str) -> str:
    """Spell a field as its flag: `top_p` -> `--top-p`."""
    return "--" + field.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, cls: type[Any], names: Iterable[str] | None = None) -> None:
    """Add one flag per field (or per field named); a flag that is not given leaves `None`.

    A `bool` becomes a pair `--x` and `--no-x`; a tuple may be given several times. Values stay text: `load_settings`
    converts every layer in the same way.
    """
    hints = typing.get_type_hints(cls)
    wanted = None if names is None else set(names)
    for field in dataclasses.fields(cls):
        if wanted is not None and field.name not in wanted:
            continue
        kind = _base_type(hints[field.name])[0]
        options: dict[str, Any] = {"dest": field.name, "default": None, "help": _help(field)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = field.metadata.get("choices")
            options["metavar"] = field.metadata.get("metavar") or ("|".join(choices) if choices else field.name.upper())
            if kind is tuple:
                options["action"] = "append"
        parser.add_argument(flag_name(field.name), **options)


def load_settings(
    cls: type[T],
    section: str,
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Loaded[T]:
    """Merge flags (entries of `None` count as absent), environment, file and defaults into one frozen `cls`.

    Raises `UsageError` naming the source for an unknown key, a value that does not convert, or an unreadable file.
    """
    env = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    layers = [_from_file(section, fields, env, config_file), _from_environment(section, fields, env)]
    layers.append(_from_flags(fields, flags or {}))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(fields, "default")
    for layer in layers:
        for name, (raw, origin) in layer.items():
            values[name] = _convert(hints[name], fields[name], raw, origin)
            origins[name] = origin
    return Loaded(cls(**values), types.MappingProxyType(origins))


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known key closest to a mistyped one, as the end of a sentence, or all; empty without any known key."""
    known = sorted(known)
    return closest(name, known) or (f"; known are {', '.join(known)}" if known else "")


def closest(name: str, known: Iterable[str]) -> str:
    """Name the word closest to a mistyped one, as the end of a sentence; empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _from_flags(fields: Iterable[str], flags: Mapping[str, object]) -> dict[str, tuple[object, str]]:
    unknown = sorted(set(flags) - set(fields))
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}{nearest(unknown[0], fields)}")
    return {name: (value, flag_name(name)) for name, value in flags.items() if value is not None}


def _from_environment(section: str, fields: Iterable[str], environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    prefix = f"{PREFIX}{section.upper()}_"
    variables = {prefix + name.upper(): name for name in fields}
    foreign = tuple(f"{PREFIX}{other.upper()}_" for other in SECTIONS if other != section)
    layer: dict[str, tuple[object, str]] = {}
    for variable, value in environ.items():
        named_elsewhere = variable in (CONFIG_VARIABLE, DATA_VARIABLE) or variable.startswith(foreign)
        if named_elsewhere or not variable.startswith(PREFIX):
            continue
        if variable not in variables:
            raise UsageError(
                f"unknown environment variable {variable}{nearest(variable, [*variables, CONFIG_VARIABLE])}"
            )
        layer[variables[variable]] = (value, variable)
    return layer


def _from_file(
    section: str, fields: Iterable[str], environ: Mapping[str, str], config_file: Path | None
) -> dict[str, tuple[object, str]]:
    path = config_file or config_path(environ)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if config_file is not None or environ.get(CONFIG_VARIABLE):
            raise UsageError(f"there is no configuration file {path}") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    for name, value in document.items():
        if name not in SECTIONS:
            raise UsageError(f"{path}: unknown section or key {name!r}{nearest(name, SECTIONS)}")
        if not isinstance(value, dict):
            raise UsageError(f"{path}: expected a section [{name}], got {value!r}")
    layer: dict[str, tuple[object, str]] = {}
    for key, value in document.get(section, {}).items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UsageError(f"{path}: unknown key {key!r} in [{section}]{nearest(name, fields)}")
        layer[name] = (value, f"{path} [{section}]")
    return layer


def _base_type(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); generic tuples become plain `tuple`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _base_type(kinds[0])[0], type(None) in arguments
    return typing.get_origin(hint) or hint, False


def _convert(hint: Any, field: dataclasses.Field[Any], raw: object, origin: str) -> Any:
    kind, _ = _base_type(hint)
    try:
        value = _parse(kind, raw)
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}{closest(str(value), choices)}")
        check = field.metadata.get("check")
        if check is not None:
            check(value)
    except (ValueError, UsageError) as error:
        shown = "a secret value" if field.metadata.get("secret") else repr(raw)
        raise UsageError(f"{origin}: cannot use {shown} for {field.name}: {error}") from error
    return value


def _parse(kind: Any, raw: object) -> Any:
    if kind is tuple:
        return _parse_tuple(raw)
    if kind is bool:
        return _parse_bool(raw)
    if isinstance(raw, bool):
        raise ValueError(f"expected {_kind_name(kind)}, got a boolean")
    if kind is float and isinstance(raw, (int, float, str)):
        return _number(float, raw)
    if kind is int and isinstance(raw, (int, str)):
        return _number(int, raw)
    if kind is Path and isinstance(raw, (str, Path)):
        return Path(raw).expanduser()
    if kind is str and isinstance(raw, (str, int, float)):
        return str(raw)
    raise ValueError(f"expected {_kind_name(kind)}, got {type(raw).__name__}")


def _number(kind: type[int] | type[float], raw: str | int | float) -> int | float:
    try:
        return kind(raw)
    except ValueError:
        raise ValueError(f"expected {_kind_name(kind)}") from None


def _kind_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", Path: "a path"}.get(kind, str(kind))


def _parse_bool(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError("expected true or false")


def _parse_tuple(raw: object) -> tuple[str, ...]:
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected a JSON list: {error}") from None
    elif isinstance(raw, str):
        raw = [part for part in raw.split(",") if part]
    if not isinstance(raw, (list, tuple)) or not all(isinstance(item, str) for item in raw):
        raise ValueError("expected a list of texts")
    return tuple(raw)


def _show(value: object) -> str:
    if value is None:
        return "-"
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value)


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    if field.default in (None, (), False):
        return text
    return f"{text} (default: {str(field.default).replace('%', '%%')})"
