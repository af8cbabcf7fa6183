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
# # From your own table to your own served model
#
# Machines report their temperature, vibration and site; some faulted. We write the reports to a
# Delta table, train our own torch loop on two elastic workers, serve the model behind a gate, ask
# it, and turn its answers and the labels that arrive later into the next training table.
#
# This file is a script (`python notebooks/quickstart.py`), a job
# (`ray job submit --working-dir . -- python notebooks/quickstart.py`) and, as `quickstart.ipynb`, a
# notebook. On several machines, set `LEPTON_HOME` to a folder that all of them see.

# %%
import os
import tempfile

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

import lepton

if "LEPTON_HOME" not in os.environ:
    os.environ["LEPTON_HOME"] = tempfile.mkdtemp(prefix="lepton-quickstart-")
HOME = os.environ["LEPTON_HOME"]

# %% [markdown]
# ## A table
# Some temperatures are missing. `assign_split` puts a key into the same split for ever.

# %%
from lepton.preprocess import assign_split

rng = np.random.default_rng(7)
N = 4000
temperature, vibration = rng.normal(60, 12, N), rng.gamma(2.0, 1.5, N)
site = rng.choice(["Lyon", "Oslo", "Turin"], N)
risk = (temperature - 60) / 12 + vibration - 3 + (site == "Turin")
reports = pa.table(
    {
        "id": np.arange(N),
        "temperature": pa.array(np.where(rng.random(N) < 0.05, np.nan, temperature)),
        "vibration": vibration.astype("float32"),
        "site": site,
        "fault": (risk > 0.8).astype("int64"),
    }
)
lepton.write(assign_split(reports, key="id"), f"{HOME}/lake/machines", mode="overwrite")
table = lepton.table(f"{HOME}/lake/machines")
train, test = table.where("split = 'train'"), table.where("split = 'test'")
print(f"{table}: {train.count_rows()} rows to train, {test.count_rows()} to test")

# %% [markdown]
# ## A preparation, fitted once, used by the stream and by the service alike

# %%
prepare = lepton.Preparation.fit(
    train,
    fill={"temperature": "median"},
    standard=["temperature", "vibration"],
    categories=["site"],
)
stream = train.stream(
    batch_size=256,
    seed=0,
    epochs=6,
    columns=["temperature", "vibration", "site", "fault"],
    transform=prepare,
)

# %% [markdown]
# ## Your own net and loop
# `forward` takes columns by their names. Sum the loss; `worker.step` does the rest.


# %%
class FaultNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.site = torch.nn.Embedding(4, 3)  # three sites and "unknown"
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
        )

    def forward(self, temperature, vibration, site):
        numbers = torch.stack([temperature, vibration], dim=1)
        return self.layers(torch.cat([numbers, self.site(site)], dim=1))


def loop(worker):
    torch.manual_seed(0)
    net = FaultNet()
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    worker.attach(net=net, opt=opt)
    for batch in worker.batches():
        scores = net(batch["temperature"], batch["vibration"], batch["site"])
        worker.step(functional.cross_entropy(scores, batch["fault"], reduction="sum"))


# %% [markdown]
# ## Train, evaluate, register, promote
# `workers=(1, 2)`: elastic on Ray Train. Kill one of them if you like: the run goes on.

# %%
run = lepton.train(loop, stream, workers=(1, 2), name=f"machines-{table.version}")
evaluation = lepton.evaluate(run, test, label="fault")
model = lepton.register(run, "machines", metrics=evaluation.metrics)
app = lepton.promote(model, gate=["accuracy >= 0.9", "f1 >= champion - 0.05"], replicas=(1, 2))
print(
    f"{run.steps} steps, accuracy {evaluation.metrics['accuracy']:.3f}, "
    f"version {model.version} at {app.url}"
)

# %% [markdown]
# ## Ask it over HTTP

# %%
asked = test.head(5)
answers, faults = app.predict(asked)["output"].argmax(1), asked["fault"].to_pylist()
print(f"answers {answers.tolist()}, labels {faults}")

# %% [markdown]
# ## Close the loop
# Each answer is a row of the inference log. Labels arrive later, keyed by request; joined, they
# are the next training table.

# %%
app.flush()  # or wait: the log is committed within a second
log = lepton.table(f"{HOME}/answers/machines").to_arrow()
labels = log.select(["request_id", "row"]).append_column(
    "fault", pa.array([faults[row] for row in log["row"].to_pylist()])
)
lepton.write(labels, f"{HOME}/lake/machine_labels", mode="overwrite")
again = lepton.feedback("machines", labels=f"{HOME}/lake/machine_labels")
print(f"{again.count_rows()} labelled answers in {again}")

# %% [markdown]
# The service runs until it is closed. A Ray that this script or kernel started ends with it.

# %%
app.close()
