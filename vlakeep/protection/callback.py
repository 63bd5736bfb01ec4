"""Graded gains in the Trainer of transformers: one callback.

    Trainer(model, args, train_dataset=data, callbacks=[ProtectCallback(bases, target=0.01, probe=Probe(held_out))])

Checkpoints hold plain PEFT adapters, and beside each the handle's state, with which resume_from_checkpoint goes on.
"""

from pathlib import Path
from typing import Optional

from vlakeep.core.compat import import_timm
from vlakeep.protection.bases import Bases
from vlakeep.protection.handle import Handle, protect, read_state

import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
from transformers.trainer_callback import TrainerCallback  # noqa: E402

STATE_FILE = "vlakeep_protect.safetensors"


class ProtectCallback(TrainerCallback):
    """`handle` is there while training and after it; merge() comes at the end of training, before trainer.save_model()."""

    def __init__(self, bases, resume_from: Optional[str] = None, **options):
        """bases: Bases or the path of their file. options: of `protect`. resume_from: the checkpoint folder, where it is not
        output_dir/checkpoint-STEP."""
        self._bases = bases if isinstance(bases, Bases) else Bases.load(bases)
        self._resume_from, self._options = resume_from, options
        self.handle: Optional[Handle] = None

    def on_train_begin(self, args, state, control, model=None, **more):
        """ValueError: a checkpoint without the handle's state, or load_best_model_at_end, which would load an adapter below the gains."""
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end loads an adapter into a protected model at the end: leave it out and take the "
                             "checkpoint that you want, each of which is a plain adapter")
        saved = None
        if state.global_step > 0:
            given = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
            folder = Path(self._resume_from or given or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / STATE_FILE).is_file():
                raise ValueError(f"no {STATE_FILE} in {folder}: name the checkpoint that is resumed with "
                                 "ProtectCallback(..., resume_from=FOLDER)")
            saved = read_state(folder / STATE_FILE)
        self.handle = protect(model, self._bases, state=saved, **self._options)

    def on_step_end(self, args, state, control, **more):
        self.handle.step()

    def on_save(self, args, state, control, **more):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.handle.save(folder / STATE_FILE)

    def on_train_end(self, args, state, control, **more):
        self.handle.merge()
