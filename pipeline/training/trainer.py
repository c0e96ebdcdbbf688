"""The trainer: weights, optimizer and data of one rank, and one optimizer step."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvae.model import CVAE
from pipeline.data.loader import Batch, pinned
from pipeline.data.order import FIRST_STREAM, NEWEST_STREAM
from pipeline.errors import CheckpointError
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.context import Context
from pipeline.runtime.split import ceil_div
from pipeline.training.build import build_model, distribute
from pipeline.training.checkpoints.store import Checkpoint, Checkpoints
from pipeline.training.checkpoints.weights import load_model, require_same, restore, state_tensors
from pipeline.training.health import complaints
from pipeline.training.inputs import Inputs
from pipeline.training.objectives import objective_of
from pipeline.training.objectives.code import CodeFit
from pipeline.training.objectives.moments import code_spread, fit_anomaly, fit_control
from pipeline.training.objectives.steer import SteerFit
from pipeline.training.optim import Ema, Precision, kl_weight, learning_rate, make_optimizer
from pipeline.training.phases import Phase, finished
from pipeline.training.step.arithmetic import StepArithmetic
from pipeline.training.step.flat import FlatWeights
from pipeline.training.step.modes import choose_step, use_side_stream
from pipeline.training.steps import BadSteps, Record
from pipeline.training.validation import validate

PRIOR = "conditional_prior."  # names of the prior's weights begin so


class Trainer:
    """Weights, optimizer and data of one rank.

    `step` is the only clock: data, noise, schedules and file names follow from it.
    """

    def __init__(self, phase: Phase, context: Context) -> None:
        config = phase.config
        train = config.train
        self.phase = phase
        self.config = config
        self.ranks = context.ranks
        self.device = context.ranks.device
        self.stop = context.stop
        self.log = context.log
        self.run_dir = context.run_dir
        if train.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports a compiler
            torch.use_deterministic_algorithms(train.deterministic)
        torch.backends.cudnn.benchmark = not train.deterministic
        use_side_stream(self.device)
        self.inputs = Inputs(config, self.ranks, self.log)
        self.precision = Precision(train.precision, self.ranks)

        self.model = build_model(config, self.inputs, self.precision, self.device)
        self.start = ""  # the finished phase before
        self.start_validation: dict[str, float] = {}
        if phase.start:
            self._follow(phase.start)
        self.objective = objective_of(phase, self.model, self.inputs.calibration, self.ranks)
        self._open_stream(NEWEST_STREAM)
        self.weights = FlatWeights(self.model)
        self.ema = Ema(self.model, self.weights, train.ema_decay)
        self.weights.gather_gradients()
        self.optimizer = make_optimizer(self.weights, config.optim)

        folder = layout.checkpoints_dir(self.run_dir, phase.name)
        self.checkpoints = Checkpoints(folder, train.keep_checkpoints, train.keep_every)
        self.step = 0
        self.validated = False  # the checkpoint that this attempt began from
        self.last_step = ceil_div(train.images, train.batch_size)
        self.weak_step = max(1, round(phase.weak * self.last_step)) if phase.weak else 0  # 0: never
        self.started = time.monotonic()
        self.seconds_before = 0.0  # of earlier attempts
        forward = distribute(self.objective, self.model, self.precision, self.ranks)
        self.arithmetic = StepArithmetic(
            self.objective,
            forward,
            self._to_inputs,
            self.weights,
            self.optimizer,
            self.ema,
            self.precision,
            self.ranks,
            train,
            config.optim,
        )
        blank = self.batches.blank()
        self.run_step = choose_step(self.arithmetic, blank, self.device, train, self.log)

    def _open_stream(self, stream: int) -> None:
        """Draw order and random numbers from this stream of pipeline/data/order.py (all ranks)."""
        self.stream = stream
        self.batches = self.inputs.batches(self.objective.noise_width, stream)

    def _start_from(self, run_dir: Path) -> None:
        """Take over the averaged weights of another run. Raises CheckpointError if they do not fit."""
        theirs, info = load_model(run_dir, "best", "ema", self.device, "train")
        where = f"key 'train.init_from': {run_dir}"
        if list(info.attributes) != list(self.inputs.attributes):
            raise CheckpointError(
                f"{where}: its model reads {', '.join(info.attributes)}, but this run "
                f"{', '.join(self.inputs.attributes)}; give data.attributes the same names in the same order"
            )
        try:
            for model in (self.model, self.ema.model):
                model.load_state_dict(theirs.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{where}: its weights do not fit this model: {reason}") from None
        self.log.info("starting from the weights of %s", info.file)

    def _follow(self, phase: str) -> None:
        """Take over the averaged weights of the phase before, except those of another prior (all ranks)."""
        self.start = finished(phase, self.run_dir)
        if not self.start:
            raise CheckpointError(f"{self.run_dir}: the stage {phase} is not finished; run it first")
        theirs, info = load_model(self.run_dir, self.phase.start_from, "ema", self.device, phase)
        weights = theirs.state_dict()
        if self.phase.name == "refine":
            weights = {name: value for name, value in weights.items() if not name.startswith(PRIOR)}
        self.model.load_state_dict(self.model.state_dict() | weights)
        averaged = {name: value for name, value in info.validation.items() if name.startswith("val_ema/")}
        raw = {name.replace("val_ema/", "val_raw/"): value for name, value in averaged.items()}
        self.start_validation = averaged | raw  # both sets of weights begin with the averaged ones
        if self.phase.name == "refine":
            spread = code_spread(self.model, self.inputs.calibration, self.ranks)
            self.model.conditional_prior.standardise(*spread)
        fit_control(self.model, self.inputs.whole_training, self.ranks)
        fit_anomaly(self.model, self.inputs.whole_training, self.ranks)
        self.log.info("starting from the weights of %s", info.file)

    @property
    def images(self) -> int:
        """Images trained on so far."""
        return self.step * self.config.train.batch_size

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints: half of the steps that a crash may cost.

        At a crash the newest checkpoint may still be on its way to the disk.
        """
        return max(1, self.config.train.max_lost_steps // 2)

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.started

    def sections(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that continues it, shards' content included."""
        content = self.inputs.shards.content_digest
        sections = {**layout.trained_sections(self.config), "shards_content": content}
        if self.start:
            sections["start"] = self.start
        if isinstance(self.objective, SteerFit):
            sections["guides"] = self.objective.guides.digests
        if self.phase.code_noise:
            sections["code_noise"] = self.phase.code_noise
        if self.phase.name == "refine":
            sections["attribute_dropout"] = self.phase.attribute_dropout
        return sections

    def resume(self) -> None:
        """Continue from the newest intact checkpoint; without one, start with `train.init_from` if it is set.

        Rank 0 chooses the checkpoint; all ranks read it. Raises CheckpointError if none is intact or the
        configuration or the shards have changed.
        """
        chosen = None
        if self.ranks.is_main:
            self.checkpoints.clear_unfinished()
            chosen = self.checkpoints.newest(set_aside=True)
            if chosen and chosen.meta["sections"].get("start", "") != self.start:
                self.log.warning("began from another training; beginning again after %s", self.start)
                self.checkpoints.replace_all()
                chosen = None
        step = self.ranks.text_from_main(str(chosen.step) if chosen else "")
        if step:
            self._continue_from(chosen or self.checkpoints.read(int(step)))
        elif self.config.train.init_from:
            self._start_from(Path(self.config.train.init_from))
        if self.ranks.is_main:
            shards = self.inputs.shards
            write_json(self.run_dir / "inputs.json", {"shards": shards.content_digest, "size": shards.size})

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of this run (all ranks). Raises CheckpointError if anything else changed."""
        now = self.sections()
        then = {key: now[key] for key in ("attribute_dropout",) if key in now}  # older ones do not hold it
        require_same(then | checkpoint.meta["sections"], now, self.run_dir)
        restore(checkpoint, self.model, self.ema.model, self.weights, self.optimizer)
        if checkpoint.meta["scaler"]:  # empty after another precision than fp16
            self.precision.scaler.load_state_dict(checkpoint.meta["scaler"])
        self._open_stream(checkpoint.meta.get("stream", FIRST_STREAM))  # older checkpoints do not name it
        self.step = checkpoint.step
        self.validated = bool(checkpoint.meta["validation"])
        self.seconds_before = checkpoint.meta["seconds"]
        self.log.info("resuming at step %d", self.step)
        rate = learning_rate(self.images, self.config.train.images, self.config.optim)
        schedule, images = self.config.optim.schedule, self.config.train.images
        self.log.info("learning rate: %.3g, on the %s schedule over %d images", rate, schedule, images)

    def prepare(self, step: int) -> Batch:
        """Return this rank's share of a step's batch (runs in the prefetch thread)."""
        batch = self.batches.at(step)
        return pinned(batch) if self.device.type == "cuda" else batch

    def _to_inputs(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.batches.to_inputs(batch, self.precision.dtype)

    def train_step(self, batch: Batch) -> Record:
        """Make one optimizer step on the global batch (all ranks); this rank's share may be empty."""
        train = self.config.train
        beta = kl_weight(self.images, train.kl_warmup_images)
        lr = learning_rate(self.images, train.images, self.config.optim)
        controls = [beta, lr, self.ema.pace(self.step), float(self.stop.requested)]
        numbers = self.run_step(batch, controls)
        self.step += 1
        if self.step == self.weak_step:
            self._keep_weak()
        return Record(self.step, {"beta": beta, "lr": lr}, self.arithmetic.names, numbers, batch.indices)

    def _keep_weak(self) -> None:
        """Keep the averaged prior as it is now, for guidance; every rank has the same."""
        averaged: CVAE = self.ema.model  # type: ignore[assignment]
        for model in (self.model, averaged):
            model.conditional_prior.keep_weak(averaged.conditional_prior)

    def validate(self) -> dict[str, float]:
        """Return the values of the val split for the raw and the averaged weights (all ranks)."""
        if isinstance(self.objective, CodeFit):
            return self._validate_part(self.objective)
        values: dict[str, float] = {}
        averaged: CVAE = self.ema.model  # type: ignore[assignment]
        for name, model in (("val_raw", self.model.eval()), ("val_ema", averaged)):
            result = validate(model, self.inputs.held_out, self.inputs.calibration, self.ranks)
            values |= {f"{name}/{key}": value for key, value in result.items()}
        self.model.train()
        names = ("loss", "bits_per_dim", "mse", "kl", "active_units")
        self.log.info(
            "step %d: val loss %.1f nats (%.4f bits/dim), mse %.5f, kl %.1f, %d active units",
            self.step,
            *(values[f"val_ema/{name}"] for name in names),
        )
        if self.ranks.is_main and self.images >= self.config.train.kl_warmup_images:
            for complaint in complaints(values, self.config.model):
                self.log.warning("step %d: %s", self.step, complaint)
        return values

    def _validate_part(self, objective: CodeFit) -> dict[str, float]:
        """Return the loss on held-out codes; everything else was measured in the phase before."""
        values = dict(self.start_validation)
        averaged: CVAE = self.ema.model  # type: ignore[assignment]
        for name, model in (("val_raw", self.model.eval()), ("val_ema", averaged)):
            fit = objective.of(model)
            values[f"{name}/loss"] = fit.held_out_loss(self.inputs.held_out, self.ranks)
        self.model.train()
        loss, what = values["val_ema/loss"], self.phase.name
        self.log.info("step %d: loss of %s on held-out codes %.4g", self.step, what, loss)
        return values

    def testify(self, bad_steps: BadSteps) -> Path:
        """Write what led to a divergence: steps, terms, and the keys of this rank's samples."""
        name = f"step_{self.step:08d}_rank{self.ranks.rank}.json"
        file = layout.train_dir(self.run_dir, self.phase.name) / "forensics" / name
        steps = []
        for record, values in bad_steps:
            terms = {key: str(value) for key, value in values.items()}
            samples = self.inputs.shards.keys(record.indices)
            steps.append({"step": record.step, "terms": terms, "samples": samples})
        content = {
            "seed": self.config.seed,
            "precision": self.precision.name,
            "world_size": self.ranks.world_size,
            "steps": steps,
        }
        write_json(file, content)
        return file

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint."""
        return state_tensors(self.model, self.ema.model, self.weights, self.optimizer)

    def meta(self, validation: dict[str, float] | None) -> dict[str, Any]:
        """Return the JSON of a checkpoint; `validation` is None if none was made at this step."""
        return {
            "images": self.images,
            "seconds": self.seconds,
            "attributes": list(self.inputs.attributes),
            "size": self.inputs.shards.size,
            "sections": self.sections(),
            "scaler": self.precision.scaler.state_dict(),
            "stream": self.stream,
            "validation": validation,
            "world_size": self.ranks.world_size,
            "precision": self.precision.name,
            "torch": torch.__version__,
        }

    def summary(self) -> dict[str, Any]:
        """Return the content of done.json."""
        on_gpu = self.device.type == "cuda"
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak_gpu_mib = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
        return {
            "step": self.step,
            "start": self.start,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "world_size": self.ranks.world_size,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "precision": self.precision.name,
            "peak_memory_mib": round(peak_mib),
            "peak_gpu_memory_mib": round(peak_gpu_mib),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
