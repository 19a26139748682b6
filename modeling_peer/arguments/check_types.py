# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The types of arguments, checked against the signature of the function that gets them."""

import functools
import inspect
import re
import reprlib
import types
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin


Function = TypeVar("Function", bound=Callable)

# A NumPy integer is an `int` here, and an integer is a `float`. `bool` is neither.
_NUMBERS: dict[Any, type] = {int: Integral, float: Real}


def check_types(function: Function) -> Function:
    """
    Decorate a function so that it raises `TypeError` for an argument that is not of its annotated type. The message
    names the argument, what was found and what was expected. Nothing is converted. A class in quotes is compared
    by its name. Elements of anything but a list, tuple or set are not checked.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own error names the function
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                check_type(name, value, signature.parameters[name].annotation)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_type(name: str, value: Any, expected: Any) -> None:
    """Raise `TypeError` if an argument or a field `name` is not of its annotated type."""
    if not _is_of_type(value, expected):
        wanted = expected.__name__ if isinstance(expected, type) else re.sub(r"\w+\.", "", str(expected))
        raise TypeError(
            f"`{name}` must be of type {wanted}, got {reprlib.repr(value)} of type {type(value).__name__}."
        )


def _is_of_type(value, expected):
    origin, choices = get_origin(expected) or expected, get_args(expected)
    if origin in (inspect.Parameter.empty, Any):
        return True
    if isinstance(origin, str):
        return not origin.isidentifier() or any(each.__name__ == origin for each in type(value).__mro__)
    if origin in (Union, types.UnionType):
        return any(_is_of_type(value, each) for each in choices)
    if origin is Literal:  # which of the values there are, the function says itself
        return isinstance(value, tuple(map(type, choices)))
    if origin in _NUMBERS:
        return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
    if not isinstance(value, types.NoneType if origin is None else origin):
        return False
    if origin not in (Iterable, list, set):
        return True
    # A string or a dict is an iterable, but never what is meant by one. Others may be used up by a look.
    elements = value if choices and isinstance(value, (list, tuple, set)) else ()
    return not isinstance(value, (str, bytes, dict)) and all(_is_of_type(each, choices[0]) for each in elements)
