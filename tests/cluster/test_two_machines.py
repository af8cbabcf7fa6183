"""A service on two machines: each has an ingress of its own, and one of them is lost."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
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
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(ask, machine, 200, *urls) for machine in (head, worker)]
            asked = [one.result() for one in both]
            under = threads.submit(ask, head, 1000, urls[0])
            time.sleep(3)  # it takes a second to begin
            worker.lose()
            left = under.result()
        lost = ask(head, 1, urls[1])

    assert "say host='0.0.0.0'" in "".join(served["warned"][0])
    assert served["warned"][1] == []
    for found in asked:
        assert found["failed"] == []
        answered = [key.split() for key in found["answers"]]
        assert {url for url, _ in answered} == set(urls)
        assert len({replica for _, replica in answered}) == 2
    # what was under way to a machine that went silent, by this one connection
    assert len(left["failed"]) <= 1
    assert sum(left["answers"].values()) == 1000 - len(left["failed"])
    assert len(lost["failed"]) == 1
