"""Checkpoints: whole or invisible.

A checkpoint is a folder of data files and a *manifest* beside it, put in place last, only if its
name is free. The manifest holds the SHA-256 of every data file: what it does not vouch for does not
exist. Tensors are safetensors; everything else is JSON. No pickle. The same on a file system and on
an object store:

A sharded model's tensors are in a file for each rank and put together by whoever reads them.

    checkpoints/
      step-00000120.json          the manifest: the commit point
      data/step-00000120-<id>/    state.safetensors, state.json, answers.safetensors
      data/base-00000100-<id>/    what several checkpoints share: program.pt2, and base.safetensors
                                  where a run keeps only what it trains
"""

from lepton.checkpoints.manifest import VERSION, Manifest
from lepton.checkpoints.reading import BASE, STATE, TREE, all_of, latest, load, restore, verify
from lepton.checkpoints.states import flatten, joined, split
from lepton.checkpoints.writing import (
    ANSWERS,
    PROGRAM,
    prune,
    remove,
    save,
    write,
    write_shard,
    write_shared,
)

__all__ = [
    "ANSWERS",
    "BASE",
    "PROGRAM",
    "STATE",
    "TREE",
    "VERSION",
    "Manifest",
    "all_of",
    "flatten",
    "joined",
    "latest",
    "load",
    "prune",
    "remove",
    "restore",
    "save",
    "split",
    "verify",
    "write",
    "write_shard",
    "write_shared",
]
