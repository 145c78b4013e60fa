"""Options, written once: Python checks values by them, and the command line is made of them.

An option is a field of a dataclass or a parameter of a function: that holds its name, type and
default. `Annotated` adds the values that it takes (`Bounds`, `OneOf`) and its panel on a help page
(`Panel`). Its text is the docstring below the field, or its entry under `Args:`. Both are read from
the source of the module, which need not be imported: most of them import torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from truedepth.errors import TruedepthError

Function = TypeVar("Function", bound=Callable[..., Any])


class Bounds:
    """The least and the greatest value of a number; `above` is a least value that is excluded."""

    def __init__(
        self, least: float | None = None, most: float | None = None, *, above: float | None = None
    ) -> None:
        self.least, self.most, self.above = least, most, above

    def admits(self, value: object) -> bool:
        """Whether a value is within the bounds; what is not a number always is."""
        if not isinstance(value, int | float):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        """The limit, as the end of "must be …"."""
        if self.above is not None:
            return f"above {self.above}" + ("" if self.most is None else f", at most {self.most}")
        return (
            f"at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        )


class OneOf:
    """The words that an option takes, or the dtypes of torch by their names."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def admits(self, value: object) -> bool:
        """Whether a value is one of the words."""
        return _name(value) in self.words

    def __str__(self) -> str:
        """The limit, as the end of "must be …"."""
        return " or ".join(self.words)


@dataclass(frozen=True)
class Panel:
    """The part of a help page that shows an option."""

    title: str


class TorchDtype:
    """Stands for `torch.dtype` in the types of options, for these are read without torch."""


@dataclass(frozen=True)
class Option:
    """What a field or a parameter says."""

    name: str
    text: str
    metadata: tuple[Any, ...] = ()
    """`Bounds`, `OneOf` and `Panel`."""

    type: Any = None
    """A field's type, with `TorchDtype` for `torch.dtype` and str for `torch.device`."""

    default: Any = inspect.Parameter.empty
    """A parameter's default, if it is a literal."""

    @property
    def panel(self) -> str | None:
        """Title of its panel."""
        return next((each.title for each in self.metadata if isinstance(each, Panel)), None)

    def check(self, value: object, name: str | None = None) -> None:
        """Refuse a value, or one of several, that is out of bounds; None stands for the default.

        Raises:
            TruedepthError: It is; the sentence names the option (or `name`), bounds and value.
        """
        for each in value if isinstance(value, list | tuple) else (value,):
            for limit in self.metadata:
                if each is None or isinstance(limit, Panel) or limit.admits(each):
                    continue
                said = f"{each:g}" if isinstance(each, float) else _name(each)
                raise TruedepthError(f"{name or self.name} must be {limit}, not {said}.")


def check_fields(options: Any) -> None:
    """Check a dataclass's values; for its `__post_init__`.

    Raises:
        TruedepthError: One is out of bounds.
    """
    for name, option in options_of(options).items():
        option.check(getattr(options, name))


def checked(function: Function) -> Function:
    """Let a function check its arguments by their `Bounds` whenever it is called."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        options = parameters_of(f"{function.__module__}.{function.__name__}")
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            options[name].check(value)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def options_of(options: object) -> dict[str, Option]:
    """The fields of a dataclass's instance, by name."""
    return _fields_of(type(options))  # type: ignore[arg-type]  # mypy: a type is not hashable


@functools.cache
def _fields_of(dataclass_: Any) -> dict[str, Option]:
    body = _definitions(dataclass_.__module__)[dataclass_.__name__].body
    texts = {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }
    torch = SimpleNamespace(dtype=TorchDtype, device=str)
    hints = get_type_hints(dataclass_, localns={"torch": torch}, include_extras=True)
    found = {}
    for field in fields(dataclass_):
        hint = hints[field.name]
        type_, *metadata = get_args(hint) if get_origin(hint) is Annotated else [hint]
        found[field.name] = Option(field.name, texts.get(field.name, ""), tuple(metadata), type_)
    return found


@functools.cache
def parameters_of(function: str) -> dict[str, Option]:
    """The parameters of a function, by name; the function as in `"package.module.function"`."""
    module, _, name = function.rpartition(".")
    node = _definitions(module)[name]
    assert isinstance(node, ast.FunctionDef)
    texts = dict(_entries(ast.get_docstring(node) or ""))
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    values = [None] * (len(positional) - len(given.defaults)) + given.defaults + given.kw_defaults
    return {
        each.arg: Option(
            each.arg, texts.get(each.arg, ""), _metadata(each.annotation), default=_literal(value)
        )
        for each, value in zip([*positional, *given.kwonlyargs], values, strict=True)
    }


@functools.cache
def _definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """The classes and functions of a module, which is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    nodes = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return {each.name: each for each in nodes if isinstance(each, ast.ClassDef | ast.FunctionDef)}


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and texts of what a docstring lists under `Args:`."""
    _, _, listed = docstring.partition("\nArgs:\n")
    listed = re.split(r"\n(?=\S)", listed)[0]
    for entry in re.split(r"\n(?=    \w)", "\n" + listed)[1:]:
        name, _, text = entry.strip().partition(":")
        yield name, inspect.cleandoc(text)


def _metadata(annotation: ast.expr | None) -> tuple[Any, ...]:
    """What `Annotated` adds to a parameter's type."""
    found = []
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Call):
            names = {"Bounds": Bounds, "OneOf": OneOf, "Panel": Panel}
            found.append(eval(ast.unparse(node), names))
    return tuple(found)


def _literal(value: ast.expr | None) -> Any:
    try:
        return inspect.Parameter.empty if value is None else ast.literal_eval(value)
    except ValueError:
        return inspect.Parameter.empty


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
