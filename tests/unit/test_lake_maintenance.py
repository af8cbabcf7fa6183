"""Looking after real tables: rows stay, needed files stay, dry runs change nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
from lepton.errors import LakeError, RegistryError
from lepton.lake import compaction
from lepton.lake.files import write_files
from lepton.lake.log import load_version
from lepton.lake.maintenance import checkpoint, optimize, restore, vacuum
from lepton.lake.orphans import path_below
from lepton.lake.read import unchecked_files
from lepton.lake.vectors import file_of
from lepton.registry import Registry
from lepton.registry.protection import needed_versions
from lepton.telemetry import Carrier, spans_of

VECTORS = Path(__file__).parents[1] / "data/delta-tables/dv-partitioned-with-checkpoint/table"


def grown(path: Path, hours: int = 0) -> str:
    """Versions 0 and 1 add a file each, 2 replaces both, 3 replaces that one."""
    keep = {"delta.deletedFileRetentionDuration": f"interval {hours} hours"}
    write_deltalake(str(path), pa.table({"x": [1, 2]}), configuration=keep)
    for rows, mode in (([3], "append"), ([4, 5], "overwrite"), ([6], "overwrite")):
        lepton.write(pa.table({"x": rows}), path, mode=mode)
    return str(path)


def parquet(path: str) -> set[str]:
    return {p.name for p in Path(path).rglob("*.parquet") if "_delta_log" not in p.parts}


def values(uri: str, version: int | None = None) -> list[int]:
    return sorted(lepton.table(uri, version=version).to_arrow()["x"].to_pylist())


def everything(uri: str) -> list[str]:
    rows = lepton.table(uri).to_arrow().to_pylist()
    return sorted(json.dumps(r, default=str, sort_keys=True) for r in rows)


def test_vacuum_keeps_what_is_protected(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    before = parquet(uri)
    plan = vacuum(uri, protect=[1])
    assert parquet(uri) == before
    assert plan.dry_run
    done = vacuum(uri, protect=[1], dry_run=False)
    assert (done.removed, done.removed_bytes) == (plan.removed, plan.removed_bytes)
    assert before - parquet(uri) == set(done.removed)
    assert len(done.removed) == 1
    assert values(uri, 1) == [1, 2, 3]
    assert values(uri) == [6]
    with pytest.raises(LakeError, match="vacuumed"):
        lepton.table(uri, version=2).to_arrow()


@pytest.mark.parametrize("root", ["{}/", "file://{}/"], ids=["absolute", "address"])
def test_vacuum_knows_files_however_the_log_spells_them(tmp_path: Path, root: str) -> None:
    uri = grown(tmp_path / "t")
    for commit in (Path(uri) / "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in commit.read_text().splitlines()]
        for action in actions:
            for kind in ("add", "remove"):
                if kind in action:
                    action[kind]["path"] = root.format(uri) + action[kind]["path"]
        commit.write_text("".join(json.dumps(a) + "\n" for a in actions))
    for crc in (Path(uri) / "_delta_log").glob("*.crc"):
        crc.unlink()

    done = vacuum(uri, protect=[1], dry_run=False)

    assert len(done.removed) <= 1
    assert values(uri, 1) == [1, 2, 3]
    assert values(uri) == [6]


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "file://{0}", "{1}/x/../t", "{1}/link"])
def test_a_version_is_protected_under_any_name_of_its_table(tmp_path: Path, spelled: str) -> None:
    uri = grown(tmp_path / "t")
    (tmp_path / "link").symlink_to(uri)
    run = tmp_path / "home" / "runs" / "r"
    run.mkdir(parents=True)
    named = spelled.format(uri, tmp_path)
    (run / "run.json").write_text(json.dumps({"table": "other@0", "tables": [f"{named}@1"]}))

    assert set(needed_versions(uri, home=tmp_path / "home")) == {1}


def test_files_under_a_foreign_address_are_never_guessed() -> None:
    assert path_below("s3://b/t", "p=1/a.parquet") == "p=1/a.parquet"
    assert path_below("s3://b/t", "s3://b/t/a.parquet") == "a.parquet"
    with pytest.raises(LakeError, match="nothing was deleted"):
        path_below("s3://b/t", "s3a://b/t/a.parquet")


def test_vacuum_keeps_what_the_retention_needs(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t", hours=24)
    assert vacuum(uri, dry_run=False).removed == ()
    with pytest.raises(LakeError, match=r"t@3 keeps.*nothing was deleted"):
        vacuum(uri, retention_hours=0, dry_run=False)
    assert values(uri, 2) == [4, 5]


def test_vacuum_with_an_unknown_version_deletes_nothing(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    before = parquet(uri)
    with pytest.raises(LakeError, match="protected version 9 cannot be opened"):
        vacuum(uri, protect=[9], dry_run=False)
    assert parquet(uri) == before


def test_vacuum_spares_live_and_protected_deletion_vectors_only(tmp_path: Path) -> None:
    uri = str(shutil.copytree(VECTORS, tmp_path / "t"))
    for path in Path(uri).rglob("*.*"):
        os.utime(path, (0, 0))

    def vectors(*versions: int | None) -> set[str]:
        snapshots = [lepton.table(uri, version=v) for v in versions]
        live = (f.vector for s in snapshots for f in s.load().files)
        return {str(file_of(v)) for v in live if v}

    rows = everything(uri)
    older = lepton.table(uri, version=5).to_arrow().sort_by("col2")
    dead = DeltaTable(uri).vacuum(0, dry_run=True, enforce_retention_duration=False, full=True)
    live, needed = vectors(None), vectors(None, 5)
    assert live < needed
    assert needed < {p.name for p in Path(uri).rglob("*.bin")} <= set(dead)
    vacuum(uri, protect=[5], dry_run=False)
    load_version.cache_clear()
    assert everything(uri) == rows
    assert lepton.table(uri, version=5).to_arrow().sort_by("col2").equals(older)
    assert {p.name for p in Path(uri).rglob("*.bin")} == needed
    vacuum(uri, dry_run=False)
    assert everything(uri) == rows
    assert {p.name for p in Path(uri).rglob("*.bin")} == live


def test_vacuum_removes_what_a_writer_left_that_came_to_nothing(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    (orphan,) = write_files(pa.table({"x": [7]}), uri)
    assert orphan.path in vacuum(uri, protect=[0, 1, 2]).removed
    vacuum(uri, protect=[0, 1, 2], dry_run=False)
    assert orphan.path not in parquet(uri)
    assert values(uri, 2) == [4, 5]

    kept = grown(tmp_path / "kept", hours=24)
    (under_way,) = write_files(pa.table({"x": [7]}), kept)
    assert vacuum(kept, dry_run=False).removed == ()
    assert under_way.path in parquet(kept)


def test_vacuum_keeps_change_data_for_the_retention(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    keep = {
        "delta.deletedFileRetentionDuration": "interval 24 hours",
        "delta.enableChangeDataFeed": "true",
    }
    write_deltalake(uri, pa.table({"x": [1, 2]}), configuration=keep)
    DeltaTable(uri).delete("x = 1")
    assert len(list(Path(uri, "_change_data").iterdir())) == 1
    assert vacuum(uri, dry_run=False).removed == ()
    DeltaTable(uri).alter.set_table_properties(
        {"delta.deletedFileRetentionDuration": "interval 0 hours"}
    )
    assert len(vacuum(uri, dry_run=False).removed) == 2, "the replaced file and its change data"
    assert values(uri) == [2]


def test_optimize_keeps_the_rows(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for i in range(6):
        rows = pa.table({"part": ["a", "b"], "x": [i, -i]})
        lepton.write(rows, uri, partition_by=["part"] if i == 0 else None)
    rows = everything(uri)
    plan = optimize(uri, dry_run=True)
    assert (len(plan.removed), plan.version, lepton.table(uri).version) == (12, 5, 5)
    one = optimize(uri, partition={"part": "a"})
    assert (len(one.removed), len(one.added)) == (6, 1)
    assert everything(uri) == rows
    assert lepton.table(uri).history()[0].operation == "OPTIMIZE"
    assert lepton.table(uri).changes(5).num_rows == 0
    rest = optimize(uri, zorder=["x"])
    assert unchecked_files(lepton.table(uri).load()) == ()
    assert len(lepton.table(uri).files()) == len(rest.added) == 2
    assert everything(uri) == rows
    assert optimize(uri).version == rest.version, "nothing left to do, so no commit"


def test_optimize_makes_files_of_about_the_size_it_is_asked_for(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for i in range(9):
        lepton.write(pa.table({"x": [i]}), uri)
    size = max(lepton.table(uri).statistics()["bytes"].to_pylist())
    done = optimize(uri, target_bytes=3 * size)
    assert (len(done.removed), len(done.added), done.version) == (9, 3, 9)
    assert values(uri) == list(range(9))
    assert unchecked_files(lepton.table(uri).load()) == ()
    assert vacuum(uri).removed == (), "nothing is left over"


def test_optimize_that_another_commit_comes_before_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = grown(tmp_path / "t")
    lepton.write(pa.table({"x": [7]}), uri)
    real = compaction.commit_changes

    def late(*given: Any, **named: Any) -> None:
        lepton.write(pa.table({"x": [77]}), uri)
        real(*given, **named)

    monkeypatch.setattr(compaction, "commit_changes", late)
    before = values(uri)
    files = parquet(uri)
    with pytest.raises(LakeError, match=r"t@4: another writer changed it meanwhile"):
        optimize(uri)
    assert values(uri) == sorted([*before, 77])
    assert len(parquet(uri) - files) == 1


def test_files_of_a_commit_that_may_still_land_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = grown(tmp_path / "t")
    lepton.write(pa.table({"x": [7]}), uri)
    before, real = values(uri), compaction.commit_changes
    lands: list[Any] = []

    def unanswered(*given: Any, **named: Any) -> None:
        lands.append(lambda: real(*given, **named))
        raise OSError("Generic S3 error: request timed out")

    monkeypatch.setattr(compaction, "commit_changes", unanswered)
    with pytest.raises((LakeError, OSError)):
        optimize(uri)
    assert values(uri) == before
    lands[0]()  # the store has taken it after all
    assert values(uri) == before


def test_optimize_refuses_what_is_not_there(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    with pytest.raises(LakeError, match=r"t@3 has no column y"):
        optimize(uri, zorder=["y"])
    with pytest.raises(LakeError, match=r"t@3 has no partition column x"):
        optimize(uri, partition={"x": 1})
    with pytest.raises(ValueError, match="target_bytes"):
        optimize(uri, target_bytes=0)
    assert lepton.table(uri).version == 3


def test_optimize_keeps_deleted_rows_deleted(tmp_path: Path) -> None:
    uri = str(shutil.copytree(VECTORS, tmp_path / "t"))
    rows = everything(uri)
    optimize(uri)
    assert everything(uri) == rows


def test_restore_and_checkpoint(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    plan = restore(uri, 1, dry_run=True)
    assert (len(plan.removed), len(plan.added), lepton.table(uri).version) == (1, 2, 3)
    done = restore(uri, 1, trace=Carrier("", str(tmp_path / "traces")))
    assert (done.added, done.version) == (plan.added, 4)
    assert values(uri) == [1, 2, 3]
    assert checkpoint(uri, dry_run=True).version == 4
    assert not list(Path(uri).glob("_delta_log/*.checkpoint.parquet"))
    checkpoint(uri)
    Path(uri, "_delta_log", f"{0:020}.json").unlink()
    assert values(uri) == [1, 2, 3]
    assert [s.name for s in spans_of(str(tmp_path / "traces"))] == ["lepton.restore"]


def test_restore_of_lost_files_changes_nothing(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    vacuum(uri, dry_run=False)
    with pytest.raises(LakeError, match=r"cannot restore version 1 of table .*t@3"):
        restore(uri, 1)
    with pytest.raises(LakeError, match="has no version 8"):
        restore(uri, 8)
    assert (lepton.table(uri).version, values(uri)) == (3, [6])


def test_models_and_unfinished_runs_protect_their_versions(tmp_path: Path) -> None:
    uri = grown(tmp_path / "t")
    for name, version, done in (("going", 2, False), ("over", 0, True)):
        folder = tmp_path / "home/runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"table": f"{uri}@{version}"}))
        if done:
            (folder / "done.json").write_text("{}")
    Registry(f"{tmp_path}/home/registry").register(
        "m", checkpoint="c", manifest_sha256="0", lineage={"table": uri, "table_version": 1}
    )
    needed = needed_versions(uri, tmp_path / "home")
    assert needed == {1: ("model m version 1",), 2: ("run going",)}
    assert vacuum(uri, protect=needed, dry_run=False).removed == ()
    assert needed_versions(tmp_path / "other", tmp_path / "home") == {}
    (tmp_path / "home/runs/going/run.json").write_text("{")
    with pytest.raises(RegistryError, match=r"going/run\.json"):
        needed_versions(uri, tmp_path / "home")
