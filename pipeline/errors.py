"""Errors that a user can fix. Programs print a UserError without a traceback and exit with code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REQUEUE_EXIT = 75
"""Exit code of a job that was asked to end (SIGTERM, SIGUSR1) and has written its checkpoint: start it again. It is
sysexits' EX_TEMPFAIL; 1 is a crash and 2 an error that starting again will not mend."""


class UserError(Exception):
    """Base class. The message is all that the user sees.

    It says what was expected, what was found, which setting it is about and which command to run next.
    """


class RecipeError(UserError):
    """The recipe, a DeepSpeed config or a command line contradicts itself or the files on disk."""


class DataError(UserError):
    """A shard folder is missing or broken, or has more bad samples than the recipe allows."""


class CacheError(UserError):
    """A teacher cache is missing or incomplete, or was made from other models, data or settings."""


class CheckpointError(UserError):
    """A step's checkpoint cannot be written, or none that is there can be read."""


class DivergedError(UserError):
    """The loss or gradient of too many updates in a row was not finite."""


class StorageError(UserError):
    """A file system does not show to one host what another has written, or cannot take what is to be written."""


class BenchmarkError(UserError):
    """A benchmark was run and left no score."""


class SampleError(Exception):
    """One bad sample. It is skipped, counted, and recorded with its key and the reason."""


@contextmanager
def as_sample_error(what: str) -> Iterator[None]:
    """Turn any exception of the wrapped code into a SampleError. `what` names the library in the message.

    It wraps a call that gives one sample to a library. A missing package (ImportError) or too little memory
    (MemoryError) is not the sample's fault, so these are not converted. UserError and SampleError are not either.
    """
    try:
        yield
    except (UserError, SampleError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise SampleError(f"{what} refused it: {type(error).__name__}: {error}") from error
