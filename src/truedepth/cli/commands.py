"""Commands made of functions; what their parameters do not say, the library says.

    @command("truedepth.speed.prediction.predict")
    def predict(model: Model, *, tp: Annotated[int, Like("ranks")], length: int) -> None: ...

A parameter takes the text, the bounds and the default that it lacks from the library's parameter of
the same name, or from the one that `Like` names. `Given[Healing]` stands for one option per field
of `Healing`. All values are checked before a command runs, and so before torch is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

from truedepth.cli.options import DType
from truedepth.options import (
    Bounds,
    OneOf,
    Option,
    Panel,
    TorchDtype,
    options_of,
    parameters_of,
)

Options = TypeVar("Options")
EMPTY = inspect.Parameter.empty

LAST = (
    *("allow_pickle", "trust_remote_code", "shard_size", "force", "json_path", "seed", "device"),
    *("compute_dtype", "dtype"),
)
"""What many commands have is last on every help page, in this order."""

EVERYWHERE = ("truedepth.sources.opening.open_source",)
"""Functions whose parameters every command may have."""


@dataclass(frozen=True)
class Like:
    """The library's name of a parameter."""

    name: str


@dataclass(frozen=True)
class Fields:
    """Which options a `Given` stands for: one per field."""

    base: Any
    """A dataclass that holds the default values."""

    without: Sequence[str] = ()
    """Fields that are not options."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names of options that differ from their fields'."""

    panel: str | None = None
    """The part of the help page for fields that name none and are not `LAST`."""


@dataclass(frozen=True)
class Given(Generic[Options]):
    """Options, and which of them the user gave."""

    base: Options
    """The defaults."""

    said: dict[str, Any]
    """What the user gave, by field; the fields of a nested dataclass are among them."""

    def over(self, base: Options | None = None) -> Options:
        """The options; what the user did not give is as in `base`.

        Raises:
            TruedepthError: The options do not go together.
        """
        values = {
            name: value.torch() if isinstance(value, DType) else value
            for name, value in self.said.items()
        }
        options: Options = _changed(self.base if base is None else base, values)
        return options


def _changed(base: Any, values: Mapping[str, Any]) -> Any:
    inside = {f.name: getattr(base, f.name) for f in fields(base)}
    parts = {name: _changed(part, values) for name, part in inside.items() if is_dataclass(part)}
    return replace(base, **parts, **{name: values[name] for name in inside if name in values})


@dataclass
class _Parameter:
    """One option or argument of a command."""

    name: str
    type: Any
    default: Any
    info: ParameterInfo
    option: Option
    """What the library says of it."""

    group: str | None = None
    """The `Given` that it belongs to."""

    @property
    def flag(self) -> str:
        """How the user writes it."""
        if isinstance(self.info, ArgumentInfo):
            return self.info.metavar or self.name.upper()
        written = [self.info.default, *(self.info.param_decls or ())]
        flags = [each for each in written if isinstance(each, str) and each.startswith("--")]
        return flags[0].partition("/")[0] if flags else f"--{self.name.replace('_', '-')}"


def command(*library: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command for typer.

    Args:
        library: Functions that the command calls, such as
            `truedepth.speed.prediction.predict`. If several have a parameter, the first one says
            what it is.
    """
    known: dict[str, Option] = {}
    for path in (*library, *EVERYWHERE):
        known = parameters_of(path) | known

    def made(function: Callable[..., None]) -> Callable[..., None]:
        parameters: list[_Parameter] = []
        bases = {}
        for given in inspect.signature(function, eval_str=True).parameters.values():
            type_, *metadata = _unpacked(given.annotation)
            if get_origin(type_) is Given:
                (chosen,) = metadata
                bases[given.name] = chosen.base
                parameters += _expanded(given.name, chosen)
            else:
                parameters.append(_plain(given, type_, metadata, known))
        parameters.sort(key=lambda each: LAST.index(each.name) if each.name in LAST else -1)
        flags = {each.option.name: each.flag for each in parameters}
        for each in parameters:
            if not each.info.help:
                _explain(each, flags)

        def run(context: typer.Context, **values: Any) -> None:
            said: dict[str, dict[str, Any]] = {name: {} for name in bases}
            for each in parameters:
                each.option.check(values[each.name], each.flag)
                source = context.get_parameter_source(each.name)
                if each.group and source is not None and source.name == "COMMANDLINE":
                    said[each.group][each.option.name] = _read(each.option, values[each.name])
            plain = {each.name: values[each.name] for each in parameters if not each.group}
            function(**plain, **{name: Given(bases[name], said[name]) for name in bases})

        _sign(run, parameters)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run

    return made


def _sign(run: Callable[..., None], parameters: Sequence[_Parameter]) -> None:
    """Give a function the signature that typer reads."""
    kind = inspect.Parameter.KEYWORD_ONLY
    signed = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for each in parameters:
        known: Any = Annotated[each.type, each.info]
        signed.append(inspect.Parameter(each.name, kind, default=each.default, annotation=known))
    run.__signature__ = inspect.Signature(signed)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in signed}


def _unpacked(annotation: Any) -> Sequence[Any]:
    """The type, and what `Annotated` adds to it."""
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)


def _plain(
    given: inspect.Parameter, type_: Any, metadata: Sequence[Any], known: Mapping[str, Option]
) -> _Parameter:
    """A parameter that the command's function has itself."""
    name = next((each.name for each in metadata if isinstance(each, Like)), given.name)
    option = known.get(name, Option(name, ""))
    if limits := tuple(each for each in metadata if isinstance(each, Bounds)):
        option = replace(option, metadata=limits)
    words = next((each.words for each in option.metadata if isinstance(each, OneOf)), ())
    info = next((copy(each) for each in metadata if isinstance(each, ParameterInfo)), None)
    default = given.default
    if default is EMPTY and not isinstance(info, ArgumentInfo):
        default = option.default
    if info is None:
        info = _switch(given.name) if default is False else typer.Option()
    if panel := next((each.title for each in metadata if isinstance(each, Panel)), None):
        info.rich_help_panel = panel
    if words and type_ is str:  # refused in a sentence, shown like the choices of typer
        info.metavar = f"<{'|'.join(words)}>"
    return _Parameter(given.name, type_, default, info, option)


def _expanded(group: str, chosen: Fields) -> list[_Parameter]:
    """One option per field; a nested dataclass gives one per field of its own."""
    found = []
    for option in options_of(chosen.base).values():
        value = getattr(chosen.base, option.name)
        if option.name in chosen.without:
            continue
        if is_dataclass(value):
            found += _expanded(group, replace(chosen, base=value))
            continue
        name = chosen.renamed.get(option.name, option.name)
        type_, default = _typer_type(option, value)
        info = _switch(name) if default is False else typer.Option()
        info.rich_help_panel = option.panel or (None if name in LAST else chosen.panel)
        if type_ == list[Path] | None:
            info.metavar = "PATH"
        limits = tuple(each for each in option.metadata if isinstance(each, Bounds))
        option = replace(option, metadata=limits)  # words are refused by typer
        found.append(_Parameter(name, type_, default, info, option, group=group))
    return found


def _switch(name: str) -> OptionInfo:
    """An option without a value, which is off by default."""
    info: OptionInfo = typer.Option(f"--{name.replace('_', '-')}")
    return info


def _parts(type_: Any) -> set[Any]:
    """The types of a union but None, or of the elements of a sequence."""
    return set(get_args(type_)) - {NoneType} or {type_}


def _typer_type(option: Option, default: Any) -> tuple[Any, Any]:
    """A field's type and default as typer knows them."""
    parts = _parts(option.type)
    words = next((each.words for each in option.metadata if isinstance(each, OneOf)), ())
    if TorchDtype in parts:
        return _choice("auto", *words) if words else DType, "auto"
    if words:
        return _choice(*words) | None, default
    if get_origin(option.type) is Sequence:
        (element,) = parts
        return (list[Path] if Path in _parts(element) else list[str]) | None, None
    return Path | None if Path in parts else option.type, default


def _choice(*words: str) -> Any:
    return StrEnum("Choice", {word: word for word in words})


def _read(option: Option, value: Any) -> Any:
    """A field's value from what the user wrote; dtypes stay names until torch is needed."""
    parts = _parts(option.type)
    if TorchDtype in parts:
        return DType(value)
    if isinstance(value, list):
        (element,) = parts
        return tuple(map(element.parse, value)) if hasattr(element, "parse") else tuple(value)
    return str(value) if isinstance(value, StrEnum) and type(value) not in parts else value


def _explain(parameter: _Parameter, flags: Mapping[str, str]) -> None:
    """Show the library's text as the command line says it."""
    text = " ".join(parameter.option.text.split("\n\n")[0].split())
    text = re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[1]), text).replace("`", "")
    if parameter.type is DType or parameter.default == "auto":
        text = re.sub(r"\b[Dd]efault:", "auto:", text)
    elif parameter.default is None:
        text, *default = re.split(r"[.;] [Dd]efault: ", text, maxsplit=1)
        if default:
            text += "."
            parameter.info.show_default = default[0].removesuffix(".").replace("[", "\\[")
    if any(get_origin(part) is list for part in get_args(parameter.type)):
        text += " Repeat for several."
    parameter.info.help = text.replace("[", "\\[")
