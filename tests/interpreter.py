"""Triton's interpreter, made nearly twice as fast.

Wherever a kernel calls a device function, it goes through every name of `triton.language` again, to put its
own in the place of those that the launch has replaced already.
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
