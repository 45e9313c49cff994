"""The errors a user may meet: every message says what was got, what was expected and what to do, on one line."""

from __future__ import annotations

import copyreg
from typing import ClassVar


class LowRankError(Exception):
    """Base of all errors raised on purpose.

    Args:
        got: What was found, with names and numbers.
        expected: What would have been right.
        do: What the user can do about it, as an imperative.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, got: str, expected: str, do: str) -> None:
        self.got, self.expected, self.do = got, expected, do
        super().__init__(f"got {_one_line(got)}; expected {_one_line(expected)}; {_one_line(do)}")

    def __reduce__(self) -> tuple[object, ...]:
        """As it is, for another process: its message is not what it was made from."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # pyright: ignore[reportAttributeAccessIssue] - undocumented, but what pickle itself uses


class InputError(LowRankError):
    """A file, an array or an option given by the user cannot be used (exit code 2)."""


class ProviderError(LowRankError):
    """The execution provider asked for cannot run this model here (exit code 2)."""


class PassError(LowRankError):
    """A pass failed or left an invalid model behind (exit code 4). Names the pass and, where known, the node."""

    exit_code: ClassVar[int] = 4

    def __init__(self, pass_name: str, node: str | None, got: str, expected: str, do: str) -> None:
        self.pass_name, self.node = pass_name, node
        where = f"pass {pass_name!r}" + (f", node {node!r}" if node else "")
        super().__init__(f"{got} in {where}", expected, do)


class InvalidResultError(LowRankError):
    """The optimized model is invalid or misses a stated error limit; nothing was written (exit code 4)."""

    exit_code: ClassVar[int] = 4


class NonFiniteResultError(InvalidResultError):
    """The optimized model gives NaN or infinity where the original does not."""


class GoalNotReachedError(LowRankError):
    """The goal could not be reached; the best model found was written (exit code 3)."""

    exit_code: ClassVar[int] = 3


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
