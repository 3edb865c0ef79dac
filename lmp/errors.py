"""The one kind of error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: a file, a key, a shape. The command line prints one line and exits with 2.

    Args:
        problem: what is wrong, naming the file, key or shape.
        remedy: what to do about it, as an imperative.
    """

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} -> {self.remedy}"


EXIT_DONE = 0
"""Finished, or stopped as agreed."""
EXIT_USER = 2
"""The user's configuration or input."""
EXIT_RESTARTS = 3
"""Too many restarts."""
EXIT_AGAIN = 75
"""Try again: a peer died."""
