"""The field at fault of a body, where the checks of its model do not say which it is.

vLLM's checks look into a body before its types are known. What they raise then is Python's own, a
TypeError or an AttributeError, which would be a status without a field, or 500. So each field is
tried alone, and the first that does not fit is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from serve.wire import UNREADABLE, without_tail

Errors = list[dict[str, Any]]


def name_fields(routes: Iterable[Any]) -> None:
    """Let FastAPI's own routes tell the field of every body that does not fit. Idempotent."""
    for route in routes:
        for field in getattr(getattr(route, "dependant", None), "body_params", ()):
            if "validate" not in vars(field):
                field.validate = partial(_validated, field.validate, field.field_info.annotation)


def _validated(
    stock: Any, model: Any, value: Any, values: Any = None, *, loc: tuple[int | str, ...] = ()
) -> tuple[Any, Errors]:
    """FastAPI's `ModelField.validate`: what was read, or errors as pydantic tells them."""
    body = value if isinstance(value, Mapping) else {}
    kind = _meant(model, body)
    if kind is None:
        told: tuple[Any, Errors] = stock(value, values or {}, loc=loc)
        return told
    read, fault = _tried(lambda: stock(value, values or {}, loc=loc))
    if fault is not None:
        if getattr(fault, "parameter", None):  # it names its field
            raise fault
        return None, _alone(kind, body, loc) or [_error(loc, _words(fault))]
    read, errors = read
    if errors and (get_args(model) or not any(_is_placed(error, body, kind) for error in errors)):
        errors = _alone(kind, body, loc) or errors
    return read, errors


def _is_placed(error: Mapping[str, Any], body: Mapping[str, Any], kind: type[BaseModel]) -> bool:
    """Whether it names a field of the body; a check's own model has fields of its own."""
    lacking = error["type"] == "missing" and error["loc"][-1] in kind.model_fields
    return lacking or not body.keys().isdisjoint(error["loc"])


def _meant(model: Any, body: Mapping[str, Any]) -> type[BaseModel] | None:
    """Of a union of models the one that the body has most of; None where there is no model."""
    given = get_args(model) or (model,)
    kinds = [kind for kind in given if isinstance(kind, type) and issubclass(kind, BaseModel)]

    def lacks(kind: type[BaseModel]) -> tuple[int, int]:
        needed = {name for name, field in kind.model_fields.items() if field.is_required()}
        return len(needed - body.keys()), len(body.keys() - kind.model_fields.keys())

    return min(kinds, key=lacks, default=None)


def _alone(kind: type[BaseModel], body: Mapping[str, Any], loc: tuple[int | str, ...]) -> Errors:
    """The errors of the first field that does not fit by itself; none where all do."""
    for name in kind.model_fields:
        if name not in body:
            continue
        check = partial(_adapter(kind, name).validate_python, body[name])
        if errors := _errors(check, (*loc, name)):
            return errors
    return []


def _errors(read: Callable[[], Any], loc: tuple[int | str, ...]) -> Errors:
    """What is wrong with a value, down to what pydantic looks at only when somebody takes it."""
    value, fault = _tried(read)
    if isinstance(fault, ValidationError):
        told = fault.errors(include_url=False)
        return [{**error, "loc": (*loc, *error["loc"])} for error in told]
    if fault is not None:
        return [_error(loc, _words(fault))]
    if isinstance(value, Iterator):
        return _errors(partial(list, value), loc)
    parts: Iterable[tuple[int | str, Any]] = ()
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
    found = (_errors(partial(_itself, part), (*loc, place)) for place, part in parts)
    return next(filter(None, found), [])


def _tried(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it gives, or what it stumbled over: a client sent that, whatever kind of fault it is."""
    try:
        return read(), None
    except Exception as fault:  # noqa: BLE001 # the net of a body's checks, which are vLLM's
        return None, fault


def _itself(value: Any) -> Any:
    return value


@lru_cache(maxsize=512)
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind)


def _words(fault: Exception) -> str:
    """vLLM's own words; of Python's nobody has any use."""
    ours = type(fault).__module__.startswith("vllm.")
    return without_tail(str(fault)) if ours else UNREADABLE


def _error(loc: tuple[int | str, ...], message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": loc, "msg": message}
