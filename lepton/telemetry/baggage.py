"""W3C Baggage: a few words that go along with a trace, as a header. Pure.

https://www.w3.org/TR/baggage/ ; lepton's own words are the run, the model and its version, and the
table with its version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

MOST_BYTES = 8192
MOST_ENTRIES = 64

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PLAIN = "!#$&'()*+-./:<=>?@[]^_`{|}~"


def header_of(entries: Mapping[str, object]) -> str:
    """Return entries as a header; what is beyond the standard's limits is left out, last first.

    Raises:
        ValueError: a key holds what a header must not.
    """
    members: list[str] = []
    size = 0
    for key, value in list(entries.items())[:MOST_ENTRIES]:
        if not _TOKEN.fullmatch(key):
            raise ValueError(f"baggage key {key!r} must be letters, digits and !#$%&'*+.^_`|~-")
        member = f"{key}={quote(str(value), safe=_PLAIN)}"
        size += len(member) + bool(members)
        if size > MOST_BYTES:
            break
        members.append(member)
    return ",".join(members)


def entries_of(header: str) -> dict[str, str]:
    """Return a header's entries, without their properties; malformed ones are left out."""
    found: dict[str, str] = {}
    for member in header[:MOST_BYTES].split(",")[:MOST_ENTRIES]:
        key, equals, value = member.split(";")[0].partition("=")
        if equals and _TOKEN.fullmatch(key.strip()):
            found[key.strip()] = unquote(value.strip())
    return found
