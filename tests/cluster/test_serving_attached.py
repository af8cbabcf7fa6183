"""A model served on a cluster that others started: it outlives whoever started it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

import lepton
from lepton import cluster
from tests.cluster.two_nodes import two_node_cluster
from tests.unit.served import register_model

ATTACH = """
import json, sys
import httpx
import lepton
app = lepton.app("m")
answers = app.predict({"x": [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]})["output"]
rows = {"rows": [{"x": [0.0, 1.0, 2.0]}]}
plain = httpx.post(f"{app.url}/predict", json=rows, timeout=120).json()["rows"]
print(json.dumps([app.url, app.state(), answers.tolist(), plain[0]["output"]]))
"""
CLOSE = """
import lepton
app = lepton.app("m")
app.close()
try:
    lepton.app("m")
except lepton.LeptonError as error:
    print(error)
"""


def test_a_served_model_outlives_its_driver_and_others_attach_to_it(tmp_path: Path) -> None:
    home = register_model(tmp_path / "home", "m")
    expected = lepton.load("m", home=home).predict({"x": [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]})
    port = str(cluster.free_ports(1)[0])
    with two_node_cluster(tmp_path / "cluster") as nodes:
        started = nodes.run("lepton", "serve", "m", "--home", str(home), "--port", port)
        assert started.returncode == 0, started.stderr[-2000:]
        told = re.search(r"serving at (http://\S+)", started.stdout)
        again = nodes.run("lepton", "serve", "m", "--home", str(home))
        for _ in range(2):  # each of them a process of its own, which ends
            asked = nodes.run("python", "-c", ATTACH)
            assert asked.returncode == 0, asked.stderr[-2000:]
            url, state, answers, plain = json.loads(asked.stdout.splitlines()[-1])
            assert state == "ready"
            assert np.allclose(answers, expected["output"], atol=1e-6)
            assert np.allclose(plain, expected["output"][0], atol=1e-6)
        closed = nodes.run("python", "-c", CLOSE)

    assert told is not None
    assert told[1].startswith(f"http://127.0.0.1:{port}/")
    assert told[1].startswith(url)
    assert again.returncode == 0
    assert told[1] in again.stdout
    assert "is not being served here" in closed.stdout
