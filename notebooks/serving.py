# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A new version in a blink, and no request lost
#
# A model answers while its users keep asking. Its next version is asked in silence first, then
# answers half of the users, then all; and goes back again. Nobody's request fails.
#
# This file is a script, a job and, as `serving.ipynb`, a notebook, like the quickstart.

# %%
import os
import tempfile
import threading

import httpx
import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

import lepton
from lepton.promotion import CanaryRule, beats
from lepton.serving import score

if "LEPTON_HOME" not in os.environ:
    os.environ["LEPTON_HOME"] = tempfile.mkdtemp(prefix="lepton-serving-")
HOME = os.environ["LEPTON_HOME"]

# %% [markdown]
# ## Two versions of a model
# The second one trains for longer. `train` with one worker runs right here.

# %%
x = np.random.default_rng(0).normal(size=(4000, 4)).astype("float32")
rows = pa.table({"x": list(x), "label": (x[:, 0] * x[:, 1] > 0).astype("int64")})
table = lepton.write(rows, f"{HOME}/lake/signs", mode="overwrite")


def loop(worker):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=1e-2))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["label"], reduction="sum"))


models = []
for epochs in (2, 8):
    run = lepton.train(
        loop, table.stream(batch_size=200, epochs=epochs), name=f"signs-{table.version}-{epochs}"
    )
    judged = lepton.evaluate(run, table, label="label")
    models.append(lepton.register(run, "signs", metrics=judged))
app = lepton.promote(models[0], replicas=(1, 2))
print(f"version {models[0].version} answers at {app.url}")

# %% [markdown]
# ## Ask in any form: a frame, arrays, or plain rows with curl
# `curl $URL/predict -d '{"rows": [{"x": [1, 1, 0, 0]}]}'`; `$URL/openapi.json` describes it.

# %%
some = table.head(3)
from_frame = app.predict(some.to_pandas())["output"]
from_array = app.predict({"x": x[:3]})["output"]
plain = httpx.post(f"{app.url}/predict", json={"rows": some.select(["x"]).to_pylist()}).json()
same = np.allclose(from_frame, from_array) and np.allclose(
    from_array, [row["output"] for row in plain["rows"]], atol=1e-6
)
print(f"three forms, the same answers: {same}")

# %% [markdown]
# ## Users who never stop asking

# %%
answered, failed, enough = [], [], threading.Event()


def ask():
    with httpx.Client(timeout=30) as http:
        for i in iter(int, 1):
            if enough.is_set():
                return
            reply = http.post(
                f"{app.url}/predict",
                json={"rows": [{"x": x[i % len(x)].tolist()}]},
                headers={"x-user": f"user-{np.random.randint(20)}"},
            )
            (answered if reply.status_code == 200 else failed).append(reply)


users = [threading.Thread(target=ask) for _ in range(2)]
for user in users:
    user.start()

# %% [markdown]
# ## Shadow, canary, champion
# The gate wants it small, and right more often on the same rows than chance explains. In the shadow
# it is asked what the champion is asked, and its answers are only compared. As canary it answers
# half of the users, always the same half (`by`). Then one commit makes it the champion.

# %%
rule = CanaryRule(bake_s=2, min_requests=20, max_difference=0.5)
lepton.promote(
    models[1],
    gate=["accuracy >= champion", "size_mb <= 1", beats(table, label="label")],
    shadow=1.0,
    canary=0.5,
    by="x-user",
    rule=rule,
    on_change=print,
)

# %% [markdown]
# ## And back

# %%
state = lepton.rollback("signs", reason="to show it")
print(f"version {state.pointer.champion} is champion again")
enough.set()
for user in users:
    user.join()
print(f"{len(failed)} requests failed; versions {sorted({r.json()['version'] for r in answered})}")

# %% [markdown]
# ## What the log knows
# Every answer is a row of a Delta table; the shadow's are in it too, and went to nobody.

# %%
app.flush()
log = lepton.table(f"{HOME}/answers/signs").to_arrow()
seen = set(zip(log["version"].to_pylist(), log["variant"].to_pylist(), strict=True))
print(sorted(seen))

# %% [markdown]
# ## A whole table by the same code

# %%
found = score("signs", table.where("label = 1"), f"{HOME}/lake/signs_answers")
print(f"{found.count_rows()} rows answered in {found}")

# %%
app.close()
