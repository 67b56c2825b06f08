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
    """`beartype` for the arguments and results that are arrays; without any, nothing."""
    hints = getattr(function, "__annotations__", {})
    others = [name for name, hint in hints.items() if not mentions_array(hint)]
    if len(others) == len(hints):
        return function
    hints.update(dict.fromkeys(others, Any))
    return beartype(function)
