"""A service on two machines: each has an ingress of its own, and one of them is lost."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from tests.cluster.two_machines import Machine, two_machines

DRIVER = "tests.cluster.machines_driver"


def ask(machine: Machine, requests: int, *urls: str) -> dict[str, Any]:
    return json.loads(machine.run(DRIVER, "ask", str(requests), *urls).splitlines()[-1])


def test_every_machine_answers_and_the_loss_of_one_is_outlived() -> None:
    with two_machines() as (head, worker):
        served = json.loads(head.run(DRIVER, "serve", str(head.folder / "home")).splitlines()[-1])
        where = urlsplit(served["url"])
        urls = [f"http://{m.address}:{where.port}{where.path}" for m in (head, worker)]
        asked = [ask(machine, 200, *urls) for machine in (head, worker)]
        worker.kill()
        left, lost = ask(head, 300, urls[0]), ask(head, 1, urls[1])

    for found in asked:
        assert found["failed"] == []
        answered = [key.split() for key in found["answers"]]
        assert {url for url, _ in answered} == set(urls)
        assert len({replica for _, replica in answered}) == 2
    assert left["failed"] == []
    assert sum(left["answers"].values()) == 300
    assert len(lost["failed"]) == 1
