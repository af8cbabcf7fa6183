"""Who gets the canary: by chance, or always the same one for the same user. Pure."""

from __future__ import annotations

import random
from hashlib import blake2b


def place_of(key: str, model: str) -> float:
    """Return where a key lies in [0, 1), the same at every replica.

    A key whose place is below the canary's share gets the canary, so that a growing share keeps
    those who have it already. The model's name keeps one user from being first everywhere.
    """
    digest = blake2b(f"{model}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def gets_it(share: float, key: str | None, model: str) -> bool:
    """Whether a request is among a share; by chance where it has no key."""
    place = place_of(key, model) if key else random.random()  # noqa: S311 - a coin, no secret
    return place < share
