"""Triton's interpreter, made three times as fast; what it computes is the same.

Wherever a kernel calls a device function, it goes through every name of `triton.language` again, to put its
own in the place of those that the launch has replaced already. It adds up integers three times, twice of them
to see that 32 bits do, which at a test's sizes they do. And it spells types out that it has spelt out before.
"""

from __future__ import annotations

import functools

CHECKED = "3.6."  # of which the names below are


def hasten() -> None:
    """Replace the names of `triton.language` once a launch, in each module that kernels see it as."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith(CHECKED) or hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _remember_types(interpreter)
    replace, language = interpreter._patch_lang, interpreter.tl
    scopes = {}  # of the launch that is under way, by the modules that are seen

    @functools.wraps(replace)
    def replace_once(function):
        there = {id(value) for value in function.__globals__.values()}
        seen = tuple(id(module) in there for module in (language, language.core))
        if seen in scopes:
            return None  # a device function's scope is not asked for
        scope = scopes[seen] = replace(function)
        if len(scopes) == 1:
            scope.restore = functools.partial(restore, scope.restore)
        return scope

    def restore(of_launch):
        _, *of_functions = scopes.values()
        for scope in reversed(of_functions):
            scope.restore()
        scopes.clear()
        of_launch()

    interpreter._patch_lang = replace_once


def _remember_types(interpreter) -> None:
    core = interpreter.tl.core
    numpy_type, tuple_type = interpreter._get_np_dtype, core._type_for_tuple_values

    @functools.cache
    def of_scalar(name):
        return numpy_type(core.dtype(name))

    @functools.cache
    def of_shape(*sizes):
        return tuple_type([core.constexpr(size) for size in sizes])

    def remembered(values, fields=None):
        sizes = [value.value if type(value) is core.constexpr else value for value in values]
        if fields is None and all(type(size) is int for size in sizes):
            return of_shape(*sizes)
        return tuple_type(values, fields)

    def of_element(dtype):
        return numpy_type(dtype.scalar) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar.name)

    interpreter._get_np_dtype = of_element
    core._type_for_tuple_values = remembered
