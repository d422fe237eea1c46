"""What can go wrong that a user can put right. Programs print these without a traceback and exit with code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Expected, found, which knob, what to run next: the message is all that the user sees."""


class RecipeError(UserError):
    """The recipe, a DeepSpeed config or a command line contradicts itself or what lies on disk."""


class DataError(UserError):
    """A shard folder is missing, broken, or has more bad samples than the recipe allows."""


class CacheError(UserError):
    """A teacher cache is missing, incomplete, or was made for something else."""


class SampleError(Exception):
    """One bad sample: counted, recorded with its key and reason, and skipped."""


@contextmanager
def as_sample_error(what: str) -> Iterator[None]:
    """Around a call of a library that is given one sample: whatever it raises about the sample becomes a SampleError.

    A missing package or too little memory is no fault of the sample and passes through.
    """
    try:
        yield
    except (UserError, SampleError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise SampleError(f"{what} refused it: {type(error).__name__}: {error}") from error
