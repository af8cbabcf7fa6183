"""HAProxy ends with the Ray that it was started for, however that ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

DRIVER = """
from lepton import cluster
cluster.connect(object_store_memory=2**27)
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    async def __call__(self, request):
        return "hello"

serve.start(http_options={"host": "127.0.0.1", "port": cluster.free_ports(1)[0]})
serve.run(Hello.bind())
print(cluster._FOLDERS[0], flush=True)
input()
"""


def serving(folder: str) -> list[str]:
    """HAProxy processes of that folder."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"haproxy") and any(folder.encode() in w for w in words):
            found.append(path.parent.name)
    return found


def test_no_haproxy_is_left_when_the_driver_is_killed(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip()
        assert folder, (tmp_path / "log").read_text()[-2000:]
        assert serving(folder)
        driver.send_signal(signal.SIGKILL)
        end = time.monotonic() + 180
        while serving(folder):
            assert time.monotonic() < end, "HAProxy goes on without its Ray"
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
        log.close()
