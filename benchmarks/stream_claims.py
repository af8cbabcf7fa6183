"""What the benchmark's figures say about lepton's goals; pure."""

from __future__ import annotations

from typing import Any

from benchmarks.claims import Claim
from benchmarks.claims import claim as one_claim

SCAN_GOAL = {"numeric": 0.70, "images": 0.80}
OWN = ("lepton", "scan")


def claims_of(found: dict[str, Any], rounds: int, *, quick: bool) -> list[Claim]:
    """Return the claims, each with its value and goal; a value that was not measured is None."""
    claims: list[Claim] = []

    def claim(text: str, value: float | None, goal: float | None, unit: str, sign: int = 1) -> None:
        scope = " (quick)" if quick else ""
        claims.append(one_claim(text + scope, value, goal, unit, sign, runs=rounds))

    for table, result in found["tables"].items():
        peers: dict[str, Any] = result["peers"]
        worker = _of(peers, "lepton", "rate")
        ratio = _of(peers, "lepton", "ratio")
        claim(f"{table}: worker engine, shuffled, to the scan", ratio, SCAN_GOAL.get(table), "x")
        for own, whose in ((True, "the table"), (False, "a converted copy")):
            best, name = best_shuffling(peers, own_files=own)
            text = f"{table}: worker engine to {name}, best that shuffles {whose}"
            claim(text, _by(worker, best), 1, "x")
        hf = _of(peers, "hf_stream", "rate")
        claim(f"{table}: worker engine to Hugging Face's arrow stream", _by(worker, hf), 1, "x")
        mapped = _of(peers, "hf", "rate")
        text = f"{table}: worker engine to Hugging Face's uncompressed mapped copy"
        claim(text, _by(worker, mapped), None, "x")
        taken = _of(peers, "scan_taken", "rate")
        claim(f"{table}: worker engine to a scan that permutes", _by(worker, taken), None, "x")
        unshuffled = _of(peers, "lepton_in_order", "rate")
        claim(f"{table}: shuffled to unshuffled", _by(worker, unshuffled), None, "x")
        ray, ours = _of(peers, "ray", "rate"), _of(peers, "lepton_ray", "rate")
        claim(f"{table}: ray_data engine to read_delta, both warm", _by(ours, ray), 2, "x")
        if "lepton_ray_heavy" in peers:
            heavy = _by(_of(peers, "lepton_ray_heavy", "rate"), _of(peers, "ray_heavy", "rate"))
            claim(f"{table}: ray_data engine to Ray Data, heavy transform", heavy, 0.95, "x")
        claim(f"{table}: first batch", _of(peers, "lepton", "first_s"), 0.2, "s", -1)
        claim(f"{table}: peak memory of a rank", _of(peers, "lepton", "peak_mb"), 600, "MB", -1)
    for table, places in found["resume"].items():
        for at, one in places.items():
            claim(f"{table}: resume at {at}", one.get("seconds"), 0.5, "s", -1)
    return claims


def best_shuffling(peers: dict[str, Any], *, own_files: bool) -> tuple[float | None, str]:
    """Return the rate and name of the fastest peer, not ours, that shuffles.

    Args:
        peers: what was measured.
        own_files: of those that read the table's files; else of those that read their own copy.
    """
    others = {
        name: one["rate"]
        for name, one in peers.items()
        if one.get("shuffles") and not name.startswith(OWN)
        if (one["copy"] == "delta") == own_files
    }
    if not others:
        return None, "no peer"
    name = max(others, key=lambda n: others[n])
    return others[name], name


def _of(peers: dict[str, Any], name: str, key: str) -> float | None:
    return peers.get(name, {}).get(key)


def _by(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base
