"""One clear line per problem: pydantic's findings in the words of the spec's author."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from replicate.spec.models import UserError

ModelT = TypeVar("ModelT", bound=BaseModel)

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
    "too_short": "an entry",
    "string_too_short": "a name",
}


def suggest(name: str, allowed: Iterable[str]) -> str:
    """`, did you mean "width"?` where something close is allowed, and what is allowed."""
    allowed = list(allowed)
    folded = {other.casefold(): other for other in reversed(allowed)}
    close = [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)]
    hint = f', did you mean "{close[0]}"?' if close else ""
    return f"{hint}; allowed {', '.join(allowed)}" if allowed else f"{hint}; none is allowed"


def show(value: Any) -> str:
    """A value as the author wrote it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that a dotted location ends in, to know which keys it allows."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        inner = field.annotation
        options = typing.get_args(inner) if isinstance(inner, types.UnionType) else (inner,)
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return None
        model = models[0]
    return model


def _describe(model: type[BaseModel], error: ErrorDetails) -> tuple[str, str]:
    """(dotted key, problem) of one finding of pydantic."""
    kind, loc, value = error["type"], error["loc"], error.get("input")
    key = ".".join(str(part) for part in loc)
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(model, loc[:-1])
        allowed = (
            [] if owner is None else [k for k in owner.model_fields if k not in ("name", "content_sha256")]
        )
        return key, f"unknown key{suggest(str(loc[-1]), allowed)}"
    if kind == "missing":
        return key, "missing; it has no default"
    if kind == "literal_error":
        allowed = [str(a) for a in typing.get_args(_annotation(model, loc))]
        return key, f"{show(value)} is not allowed{suggest(str(value), allowed)}"
    if kind == "value_error":
        text = str(context.get("error", error["msg"]))
        head, colon, tail = text.partition(": ")
        if colon and head.isidentifier():  # our validators put the key first
            return ".".join(filter(None, (key, head))), tail
        return key, text
    if kind in _EXPECTED:
        return key, f"expected {_EXPECTED[kind]}, got {show(value)}"
    message = error["msg"].removeprefix("Input should be ")
    return key, f"must be {message}, got {show(value)}"


def _annotation(model: type[BaseModel], loc: tuple[int | str, ...]) -> Any:
    owner = _model_at(model, loc[:-1])
    return None if owner is None else owner.model_fields[str(loc[-1])].annotation


def findings(model: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """All (dotted key, problem) pairs of a failed validation."""
    return [_describe(model, detail) for detail in error.errors(include_url=False)]


def explain(model: type[ModelT], data: Mapping[str, Any], where: Callable[[str], str]) -> ModelT:
    """`model(**data)`, or a UserError with one line `where(key): problem` per finding."""
    try:
        return model(**data)
    except ValidationError as error:
        raise UserError(*(f"{where(key)}: {problem}" for key, problem in findings(model, error))) from None
