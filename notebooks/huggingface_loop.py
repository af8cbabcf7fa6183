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
# # The stream under a Hugging Face Trainer
#
# `transformers.Trainer` keeps its loop; lepton feeds it. Each process takes its rank's shard of the
# stream, so every row comes once an epoch at any number of processes,
# and the shard's cursor goes into the Trainer's checkpoints, so a resumed training goes on at the
# very next batch without reading the ones before again.
#
# It needs `pip install 'lepton[examples]'`. No weights are downloaded: the model is a tiny one.

# %%
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import lepton

HOME = Path(os.environ.get("LEPTON_HOME") or tempfile.mkdtemp(prefix="lepton-huggingface-"))
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

# %% [markdown]
# Sentences of 12 made-up words; the label says whether the first word comes again.

# %%
random = np.random.default_rng(0)
words = random.integers(2, 30, (480, 12))
again = random.random(480) < 0.5
words[again, 6] = words[again, 0]
labels = (words[:, 1:] == words[:, :1]).any(1).astype("int64")
table = lepton.write(pa.table({"input_ids": list(words), "labels": labels}), HOME / "lake/words")
stream = table.stream(batch_size=32, epochs=2, seed=1, lanes=4)
print(f"{table}: {table.count_rows()} rows, {stream.steps} steps")

# %% [markdown]
# The Trainer asks for its batches in one place. What it gets there is the shard itself: no
# sampler, no collator, no sharding by the Trainer on top of it.


# %%
class Fed(Trainer):
    """A Trainer whose batches come from a shard."""

    def __init__(self, shard: lepton.Shard, **options):
        super().__init__(**options, callbacks=[Cursor(shard)])
        self.shard = shard

    def get_train_dataloader(self):
        return self.shard


class Cursor(TrainerCallback):
    """Keeps the shard's cursor in the Trainer's checkpoints."""

    def __init__(self, shard: lepton.Shard):
        self.shard = shard

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "cursor.json").write_text(json.dumps(self.shard.state_dict()))


def train(steps: int, resume: Path | None = None) -> Trainer:
    """Train up to a step, from the beginning or from a checkpoint."""
    shard = stream.shard(RANK, WORLD_SIZE)
    if resume is not None:
        shard.load_state_dict(json.loads((resume / "cursor.json").read_text()))
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=2,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(HOME / "trainer"),
        max_steps=steps,
        save_steps=20,
        logging_steps=1,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        ignore_data_skip=True,  # the shard stands where it has to
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Fed(shard, model=model, args=arguments)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


# %% [markdown]
# Train in one go, and then once more from the checkpoint in the middle: the second half is the
# same, because the rows are.


# %%
def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


whole = train(stream.steps)
rest = train(stream.steps, resume=HOME / "trainer" / "checkpoint-20")
print(f"loss {np.mean(losses(whole)[:10]):.2f} to {np.mean(losses(whole)[-10:]):.2f}")
apart = np.abs(np.subtract(losses(whole)[20:], losses(rest)[-(stream.steps - 20) :])).max()
print(f"resumed at step 20: {stream.steps - 20} losses within {apart:.4f}")
