"""Prints the API of a module as JSON: classes, members and signatures; run in an environment of its own by test_api_contract.

A node is {"kind": class | enum | callable | value, "members": {name: node}, "overloads": [{"params", "required", "returns"}]};
`overloads` is null where the library does not tell.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from typing import Any

Node = dict[str, Any]
# "3. name(self: X, flags: int = 0) -> Y", as pybind11 writes it, and "cuName(hStream, unsigned long long flags)", as Cython does.
SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*?)\)(?: -> (.+))?$", re.MULTILINE)


def last(path: str) -> str:
    """The name at the end of a path of Python or of C++."""
    return re.split(r"[.:]", path)[-1]


def split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, current = [], 0, ""
    for sign in text:
        depth += (sign in "([{<") - (sign in ")]}>" and not current.endswith("-"))
        if sign == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += sign
    return [part.strip() for part in [*parts, current] if part.strip()]


def overloads(name: str, doc: str | None) -> list[Node] | None:
    found = []
    for match in SIGNATURE.finditer(doc or ""):
        if match[1] != name or match[2] == "*args, **kwargs":
            continue
        params, required = [], 0
        for part in split(match[2]):
            declared, _, default = part.partition("=")
            param = declared.partition(":")[0].split()[-1]
            if param != "self":
                params.append(param)
                required += not default
        found.append({"params": params, "required": required, "returns": last(match[3] or "")})
    return found or None


def from_python(function: Any) -> list[Node] | None:
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    required = sum(p.default is p.empty for p in parameters)
    return [{"params": [p.name for p in parameters], "required": required, "returns": ""}]


def describe(name: str, value: Any, depth: int = 0) -> Node:
    if inspect.isclass(value):
        members = getattr(value, "__members__", None)
        node: Node = {"kind": "class" if members is None else "enum"}
        offered = {n for n in dir(value) if not n.startswith("_") or n == "__init__"} | {"__call__", "__int__"}
        names = set(members or ()) if members is not None else offered
        if depth == 2 or issubclass(value, BaseException):
            names = set()
        own = {n for n in names if any(n in vars(base) for base in value.__mro__)}
        node["members"] = {n: describe(n, inspect.getattr_static(value, n), depth + 1) for n in own}
        return node
    if isinstance(value, staticmethod):
        value = value.__func__
    if isinstance(value, property):
        text = re.search(r"-> (.+)$", (value.fget.__doc__ or "").strip(), re.MULTILINE)
        return {"kind": "value", "returns": last(text[1]) if text else ""}
    if callable(value):
        return {"kind": "callable", "overloads": overloads(name, value.__doc__) or from_python(value)}
    return {"kind": "value", "returns": ""}


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    public = [name for name in dir(module) if not name.startswith("_") or name == "__version__"]
    values = {name: getattr(module, name) for name in public}
    foreign = {name for name, value in values.items() if getattr(value, "__module__", "") in ("typing", "collections.abc")}
    own = {name: value for name, value in values.items() if name not in {*foreign, "annotations"} and not inspect.ismodule(value)}
    found = {name: describe(name, value) for name, value in own.items()}
    json.dump({"kind": "module", "members": found, "version": getattr(module, "__version__", "")}, sys.stdout)
