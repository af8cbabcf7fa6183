"""What may pass is asked again, what stays is not."""

import pytest
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lepton.lake.storage import TRIES, again, passes

CUT = "Generic S3 error\n ↳ error reading a body from connection"


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (DeltaError(f"Kernel error -> {CUT}"), True),
        (OSError("Error performing GET: Server returned 503: SlowDown"), True),
        (OSError("error sending request: operation timed out"), True),
        (OSError("Generic S3 error: Server returned 403 PermissionDenied"), False),
        (OSError("Generic S3 error: NoSuchBucket"), False),
        (FileNotFoundError(f"no file: {CUT}"), False),
        (CommitFailedError(f"too late: {CUT}"), False),
        (TableNotFoundError("503"), False),
        (ValueError("column x is no number"), False),
    ],
)
def test_only_what_may_pass_is_asked_again(error: Exception, may_pass: bool) -> None:
    asked = 0

    def ask() -> int:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise error
        return asked

    assert passes(error) == may_pass
    if may_pass:
        assert again(ask) == 3
    else:
        with pytest.raises(type(error)):
            again(ask)
        assert asked == 1


def test_what_does_not_pass_is_told_in_the_end() -> None:
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        raise OSError(CUT)

    with pytest.raises(OSError, match="Generic S3"):
        again(ask)
    assert asked == TRIES
