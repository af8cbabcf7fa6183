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
# # The stream under Lightning
#
# `lightning.Trainer` keeps its loop; lepton feeds it. Each process takes its rank's shard of the
# stream, so every row comes once an epoch at any number of processes, and the shard's cursor goes
# into Lightning's checkpoints, so a resumed training goes on at the very next batch.
#
# It needs `pip install 'lepton[examples]'`.

# %%
import os
import tempfile
from pathlib import Path

import lightning
import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional

import lepton

HOME = Path(os.environ.get("LEPTON_HOME") or tempfile.mkdtemp(prefix="lepton-lightning-"))
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

# %% [markdown]
# Points, and which of three corners is the nearest.

# %%
x = np.random.default_rng(0).normal(size=(960, 3)).astype("float32")
table = lepton.write(pa.table({"x": list(x), "y": x.argmax(1)}), HOME / "lake/points")
stream = table.stream(batch_size=32, epochs=2, seed=1, lanes=4)
print(f"{table}: {table.count_rows()} rows, {stream.steps} steps")

# %% [markdown]
# A module as ever. The shard goes where a DataLoader would; its cursor is saved and loaded with
# the module's checkpoint. All epochs of the stream are one of Lightning's.


# %%
class Module(lightning.LightningModule):
    def __init__(self, shard: lepton.Shard):
        super().__init__()
        self.shard = shard
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        )
        self.losses: list[float] = []

    def training_step(self, batch, _):
        loss = functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["cursor"] = self.shard.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.shard.load_state_dict(checkpoint["cursor"])


def train(resume: Path | None = None) -> Module:
    """Train to the end, from the beginning or from a checkpoint."""
    lightning.seed_everything(0, verbose=False)
    module = Module(stream.shard(RANK, WORLD_SIZE))
    keep = ModelCheckpoint(HOME / "lightning", "{step}", every_n_train_steps=40, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=stream.steps,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
    )
    trainer.fit(module, module.shard, ckpt_path=None if resume is None else str(resume))
    return module


# %% [markdown]
# Train in one go, and then once more from the checkpoint in the middle: the rest is the same,
# because the rows are.

# %%
whole = train()
rest = train(resume=HOME / "lightning" / "step=40.ckpt")
print(f"{len(whole.losses)} steps, loss {whole.losses[0]:.2f} to {whole.losses[-1]:.2f}")
apart = np.abs(np.subtract(whole.losses[40:], rest.losses)).max()
print(f"resumed at step 40: {len(rest.losses)} losses within {apart:.4f}")
