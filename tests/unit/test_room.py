"""How many workers fit on a cluster, and what is said to be missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.training import waiting
from lepton.training.room import fitting, less_a_cpu, missing

TWO = [{"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.5}]


def test_a_worker_needs_all_of_its_resources_on_one_node() -> None:
    assert fitting(TWO, {"CPU": 1}) == 2, "three CPUs, but only two whole workers"
    assert fitting(TWO, {"CPU": 1, "GPU": 1}) == 1
    assert fitting(TWO, {"CPU": 0.5}) == 6
    assert fitting(TWO, {"CPU": 0.1}) == 30
    assert fitting([], {"CPU": 1}) == 0
    assert fitting(TWO, {"CPU": 1, "GPU": 0}) == 2


def test_what_is_missing_is_named() -> None:
    free = [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    whole = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}]

    said = missing(2, {"CPU": 1, "GPU": 1}, free, whole)
    assert said.startswith("2 workers need 1 CPU, 1 GPU each, there is room for 1")
    assert "GPU: 2 needed, 1 free of 2" in said
    assert "CPU:" not in said
    assert "would hold" not in said
    assert "the cluster would hold 2" in missing(3, {"GPU": 1}, free, whole)
    assert "the most that any node has is 4 CPU, 0 TPU" in missing(
        1, {"CPU": 1, "TPU": 1}, free, whole
    )
    assert "in parts too small" in missing(1, {"CPU": 2}, free, whole)


AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU"]), st.integers(0, 4).map(float))


@given(st.lists(AMOUNTS, max_size=4), AMOUNTS.filter(lambda each: any(each.values())))
def test_what_fits_leaves_nothing_over(
    nodes: list[dict[str, float]], each: dict[str, float]
) -> None:
    found = fitting(nodes, each)

    assert all(found * need <= sum(n.get(k, 0) for n in nodes) for k, need in each.items())
    assert found == sum(fitting([node], each) for node in nodes)
    assert str(found) in missing(found + 1, each, nodes, nodes)


def test_readers_find_a_cpu_beside_the_workers() -> None:
    assert less_a_cpu(TWO) == [{"CPU": 0.5, "GPU": 1.0}, {"CPU": 1.5}]
    assert less_a_cpu([{"CPU": 0.5}]) == [{"CPU": 0.0}]
    assert less_a_cpu([{"GPU": 1.0}]) == [{"GPU": 1.0, "CPU": 0.0}]
    assert less_a_cpu([]) == []


@pytest.mark.parametrize(
    ("left", "stepped", "lines"), [(0.5, False, 1), (1, False, 0), (0, True, 0)]
)
def test_a_run_whose_readers_have_no_cpu_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left: float,
    stepped: bool,
    lines: int,
) -> None:
    monkeypatch.setattr(waiting, "_free", lambda: [{"CPU": left}])
    monkeypatch.setattr(waiting, "READ_S", 0)
    looked_at = waiting.Waiting("r", 2, {"CPU": 1}, reading=True)
    for _ in range(3):
        looked_at.look(started=True, stepped=stepped)

    said = capsys.readouterr().err
    assert said.count("run 'r' waits for rows") == said.count("\n") == lines
