"""What ranks report as failures, as the errors that callers get."""

from __future__ import annotations

import msgspec

from drumline.errors import DrumlineError, EncodingError, InvalidPayload, SetupFailed, WorkerError
from drumline.protocol import Failure


def from_failure(rank: int, failure: Failure) -> tuple[DrumlineError, bool]:
    """Return a rank's failure as the error for the caller, and whether it only says that a peer is gone."""
    if failure.kind == "invalid":
        return InvalidPayload(failure.message, detail=msgspec.json.decode(failure.detail)), False
    if failure.kind == "encoding":
        return EncodingError(failure.message), False
    error = WorkerError(
        failure.message, rank=rank, exception_type=failure.exception_type, remote_traceback=failure.traceback
    )
    return error, failure.kind == "peer"


def from_setup(rank: int, failure: Failure) -> tuple[SetupFailed, bool]:
    """The same for a failed ``setup()``."""
    error = SetupFailed(
        failure.message, rank=rank, exception_type=failure.exception_type, remote_traceback=failure.traceback
    )
    return error, failure.kind == "peer"
