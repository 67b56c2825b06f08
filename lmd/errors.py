"""One shape for every refusal: what was found, what was expected, what to do."""


class LmdError(ValueError):
    """Bad input, said so that the reader can act on it.

    Args:
        found: what was met, with the offending value.
        expected: what would have been right.
        todo: the next thing to do about it.
    """

    def __init__(self, found: str, expected: str, todo: str) -> None:
        self.found, self.expected, self.todo = found, expected, todo
        super().__init__(f"found {found}; expected {expected}. {todo}")

    def __reduce__(self) -> tuple[type["LmdError"], tuple[str, str, str]]:
        """How it gets from a process to the one that waits for it."""
        return LmdError, (self.found, self.expected, self.todo)
