"""Every error a user can meet, each with the exit code its job ends with.

A message has four parts: what is wrong, the value, what is allowed, what to do.
"""


class QbatchError(Exception):
    """Base of all errors raised on purpose; exit code 1 marks a bug in qbatch."""

    exit_code = 1


class ConfigError(QbatchError, ValueError):
    """A setting or a combination of settings cannot work."""

    exit_code = 2


class NoInputError(QbatchError):
    """The input exists in name only: no object of a known format lies there."""

    exit_code = 3


class BadInputError(QbatchError):
    """More bad rows or files than the operator allows."""

    exit_code = 4


class CommitRaceLostError(QbatchError):
    """Another writer published the generation this job wanted to publish."""

    exit_code = 5


class LeaseHeldError(QbatchError):
    """Another job works here, and this one was not to wait any longer."""

    exit_code = 5


class StalledError(QbatchError):
    """The pipeline made no progress for longer than the stall limit."""

    exit_code = 6


class QualityGateError(QbatchError):
    """The output exists but is not good enough to publish."""

    exit_code = 7


class StorageError(QbatchError):
    """The storage cannot be used: unreachable, forbidden, or without conditional PUT."""

    exit_code = 8


class ObjectExistsError(QbatchError):
    """A create-only write met an object of the same name."""

    exit_code = 5


class SourceChangedError(QbatchError):
    """An input object was replaced or deleted after the job planned its work."""

    exit_code = 4


class IntegrityError(QbatchError):
    """Stored bytes or counts contradict what was recorded about them."""
