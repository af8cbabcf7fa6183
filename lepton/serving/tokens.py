"""Tokens in a file, which may change while replicas run: who may ask is as the file says.

A line is ``NAME=TOKEN``, or ``NAME=TOKEN MODEL,MODEL`` for some models only, or ``NAME=sha256:HEX``
to keep the token itself out of the file; ``#`` begins a comment. To change a token without refusing
anybody, list the new one under the same name, give it to those who ask, and take the old one away.

Invariant: a file that is gone, empty or wrong changes nothing; who could ask before still can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lepton.serving.access import Access, Grant, grant

VARIABLE = "LEPTON_SERVE_TOKENS_FILE"
LOOK_S = 0.5

log = logging.getLogger("lepton")


def grants_of(text: str, path: str) -> tuple[Grant, ...]:
    """Read a file's text.

    Raises:
        ValueError: a line is wrong, or there is none; the message repeats no token.
    """
    found: list[Grant] = []
    for at, line in enumerate(text.splitlines(), start=1):
        told = line.partition("#")[0].strip()
        if not told:
            continue
        name, equals, rest = (part.strip() for part in told.partition("="))
        words = rest.split()
        if not name or not equals or not 1 <= len(words) <= 2:
            raise ValueError(f"line {at} of {path} must be NAME=TOKEN or NAME=TOKEN MODEL,MODEL")
        models = [m.strip() for m in words[1].split(",") if m.strip()] if len(words) == 2 else []
        if len(words) == 2 and not models:
            raise ValueError(f"line {at} of {path} names no model after its token: leave that out")
        token = words[0]
        try:
            if token.startswith("sha256:"):
                digest = token.removeprefix("sha256:").lower()
                found.append(Grant(name=name, sha256=digest, models=tuple(models)))
            else:
                found.append(grant(name, token, models))
        except ValueError as e:
            raise ValueError(f"line {at} of {path}: {e}") from e
    if not found:
        raise ValueError(f"{path} lists no token, so nobody could ask: write NAME=TOKEN into it")
    return tuple(found)


def read_grants(path: str) -> tuple[Grant, ...]:
    """Read a file.

    Raises:
        ValueError: as for :func:`grants_of`, or it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read the tokens in {path}: {why}") from e
    return grants_of(text, path)


class FileAccess(Access):
    """Checks the header of each request against a file that may change.

    Args:
        path: of the file.
        model: which they ask here.
        look_s: seconds between two looks at the file.

    Raises:
        ValueError: the file is wrong from the beginning.
    """

    def __init__(self, path: str, model: str, look_s: float = LOOK_S) -> None:
        self._path = path
        self._look_s = look_s
        self._seen = _state_of(path)
        self._next = time.monotonic() + look_s
        Access.__init__(self, read_grants(path), model)

    def refusal(self, header: bytes | None) -> tuple[int, str] | None:
        """Return why a request with that Authorization header is refused, or None."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._look_s
            self._look()
        return Access.refusal(self, header)

    def _look(self) -> None:
        state = _state_of(self._path)
        if state == self._seen:
            return
        self._seen = state  # and so what is wrong is said once
        try:
            self.know(read_grants(self._path))
        except ValueError as e:
            log.warning("tokens stay as they were: %s", e)


def _state_of(path: str) -> Sequence[int]:
    """Differs whenever the file does; a link that points elsewhere now counts, too."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
