"""The checker behind the import hook: array shapes, and nothing that the package itself refuses.

A name or number that a user may get wrong is refused by the package with an `LmdError`. Tests must
be able to reach that refusal, so hints that mention no array are left unchecked here.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray
from torch import Tensor


def mentions_array(hint: object) -> bool:
    """Whether an annotation says anything of an array."""
    if isinstance(hint, type) and issubclass(hint, Tensor | AbstractArray):
        return True
    return any(mentions_array(part) for part in get_args(hint))


def check(function: Callable) -> Callable:
    """`beartype` for the arguments and results that are arrays."""
    for name, hint in list(getattr(function, "__annotations__", {}).items()):
        if not mentions_array(hint):
            function.__annotations__[name] = Any
    return beartype(function)
