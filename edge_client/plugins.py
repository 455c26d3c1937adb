"""A user's own classes, named as `module:Class`: found, checked and made. No heavy imports: `--help` runs this."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from split_llama.errors import FlLlamaError, UsageError
from split_llama.settings import closest


def check_name(name: str) -> None:
    """Raise `ValueError` for what is no `module:Class`."""
    module, _, attribute = name.partition(":")
    words = [*module.split("."), *attribute.split(".")]
    if not all(word.isidentifier() for word in words):
        raise ValueError("expected MODULE:CLASS, such as my_package.my_module:MyClass")


def make_plugin(what: str, name: str, method: str, *arguments: Any) -> Any:
    """Import `module:Class`, call it with `arguments`, and see that the object has `method`.

    `what` says what it is for. The module is looked for where Python looks: installed, or in a folder of `PYTHONPATH`.
    The current folder is no such place unless it is named there. Raises `UsageError` for whatever is wrong with it.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(f"the {what} {name!r} is no plug-in: {error}") from None
    module_name, _, path = name.partition(":")
    found: Any = _import(what, name, module_name)
    for attribute in path.split("."):
        known = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
        if not hasattr(found, attribute):
            raise UsageError(f"the {what} {name!r}: {module_name} has no {path!r}{closest(attribute, known)}")
        found = getattr(found, attribute)
    if not callable(found):
        raise UsageError(f"the {what} {name!r} is no class or function, but a {type(found).__name__}")
    try:
        made = found(*arguments)
    except FlLlamaError:
        raise
    except Exception as error:
        given = f"{len(arguments)} argument{'' if len(arguments) == 1 else 's'}"
        raise UsageError(f"the {what} {name!r} cannot be made with {given}: {type(error).__name__}: {error}") from error
    if not callable(getattr(made, method, None)):
        raise UsageError(f"the {what} {name!r} makes a {type(made).__name__}, which has no method {method}()")
    return made


def _import(what: str, name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(
                f"the {what} {name!r}: there is no module {error.name!r}; install it, or name its folder in PYTHONPATH"
            ) from error
        raise UsageError(f"the {what} {name!r}: {module} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise UsageError(f"the {what} {name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
