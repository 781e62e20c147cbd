"""Type errors in the words of the caller: those of the extension name functions and parameters of its own."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


def clear_type_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let a TypeError of the call name the argument that is of another type than its annotation.

    Nothing is looked at before the call has failed. numpy's booleans, which the extension does not take, are accepted.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            return recover(function, args, kwargs)

    return wrapper


def recover(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """The same for a call that has failed; to be called where its TypeError is handled."""
    if any(map(_is_numpy_bool, [*args, *kwargs.values()])):
        plain = [bool(x) if _is_numpy_bool(x) else x for x in args]
        named = {name: bool(x) if _is_numpy_bool(x) else x for name, x in kwargs.items()}
        return clear_type_errors(function)(*plain, **named)
    message = _mismatch(function, args, kwargs)
    if message is None:
        raise
    raise TypeError(f"[{function.__name__}] {message}") from None


def _is_numpy_bool(value: object) -> bool:
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")


def _mismatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Which argument is not of its type; None if none or if the arguments are not those of the function at all."""
    from .attention import flash_attention  # the options that other entry points pass on

    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    hints = get_type_hints(flash_attention) | get_type_hints(function)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            shown = f"{value!r} of type " if value is None or isinstance(value, (bool, int, float, str)) else ""
            return f"{name} must be {_words(hints[name])}; got {shown}{_name(type(value))}"
    return None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(value: object, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint is float:
        return hasattr(value, "__float__")
    if hint is int:
        return hasattr(value, "__index__")
    kind = get_origin(hint) or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "None"
    inner = " of " + _words(get_args(hint)[0]) if get_args(hint) else ""
    return _name(get_origin(hint) or hint) + inner


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ in ("builtins", "collections.abc") else f"{kind.__module__}.{kind.__name__}"
