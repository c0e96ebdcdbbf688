"""The trainer: weights, optimizer and data of one rank, and one optimizer step."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvae.losses import Losses
from cvae.model import CVAE
from pipeline.config.schema import RunConfig
from pipeline.data.loader import Batch, TrainBatches, pinned
from pipeline.data.shards import Shards
from pipeline.data.staging import staged
from pipeline.errors import DataError
from pipeline.reporting.fixed_noise import draw_fixed_noise
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.context import Context
from pipeline.runtime.split import ceil_div, share
from pipeline.training.checkpoint import Checkpoints, load_model, require_same, restore, state_tensors
from pipeline.training.health import complaints
from pipeline.training.optim import Ema, Precision, kl_weight, learning_rate, make_optimizer
from pipeline.training.saver import Saver
from pipeline.training.steps import Record
from pipeline.training.validation import calibration_part, validate, whole_split

RECORDED = ("loss", "nll", "kl", "log_det", "mse", "sigma", "grad_norm", "bad", "stop")


class Trainer:
    """Weights, optimizer and data of one rank. `step` is the only clock: data, noise, schedules and file names follow from it."""

    def __init__(self, config: RunConfig, context: Context) -> None:
        self.config, self.ranks, self.stop, self.log, self.run_dir = (
            config,
            context.ranks,
            context.stop,
            context.log,
            context.run_dir,
        )
        train, self.device = config.train, context.ranks.device
        torch.use_deterministic_algorithms(train.deterministic)
        torch.backends.cudnn.benchmark = not train.deterministic
        shards = staged(layout.shards_dir(config), config.data.stage_to, context.log, config.data.damaged)
        self.shards = Shards(shards, "train", config.data.verify, config.data.damaged)
        self.attributes = config.data.attributes or self.shards.attribute_names
        held_out = Shards(shards, "val", config.data.verify, config.data.damaged)
        self.excluded = self.shards.excluded | held_out.excluded
        if self.ranks.text_from_main(json.dumps(self.excluded)) != json.dumps(self.excluded):
            raise DataError(
                f"{shards}: rank {self.ranks.rank} finds other shards damaged than rank 0: {', '.join(self.excluded) or 'none'}"
            )
        self.held_out = whole_split(held_out, self.attributes)
        self.calibration = calibration_part(self.shards, self.attributes)
        self.precision = Precision(train.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = CVAE(config.model, self.shards.size, len(self.attributes)).to(
            self.device, self.precision.dtype
        )
        if train.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.model, train.ema_decay)
        if train.init_from:
            self._start_from(train.init_from)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.batches = TrainBatches(
            self.shards,
            config.data,
            config.seed,
            train.batch_size,
            self.model.z_dim,
            self.ranks.rank,
            self.ranks.world_size,
        )
        self.checkpoints = Checkpoints(
            layout.checkpoints_dir(self.run_dir), train.keep_checkpoints, train.keep_every
        )
        self.step, self.started, self.seconds_before = 0, time.monotonic(), 0.0
        self.forward: nn.Module = self._distribute()

    def _start_from(self, run_dir: str) -> None:
        theirs, info = load_model(Path(run_dir), "best", "ema", self.device)
        self.model.load_state_dict(theirs.state_dict())
        self.ema.model.load_state_dict(theirs.state_dict())
        self.log.info("weights of %s", info.file)

    def _distribute(self) -> nn.Module:
        """Wrap in DDP and prime it: DDP rebuilds its buckets after its first backward pass, so that pass must not be a counted
        one, else a resumed run sums gradients in another order (all ranks)."""
        if self.ranks.world_size == 1:
            return self.model
        wrapped = DistributedDataParallel(
            self.model, device_ids=[self.device] if self.device.type == "cuda" else None
        )
        shapes = (3, self.shards.size, self.shards.size), (len(self.attributes),), (self.model.z_dim,)
        blank = [torch.zeros((1, *shape), device=self.device, dtype=self.precision.dtype) for shape in shapes]
        with self.precision.autocast():
            wrapped(*blank, 1.0, 1.0).objective.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return wrapped

    @property
    def images(self) -> int:
        """Images seen by the steps done."""
        return self.step * self.config.train.batch_size

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints: half of what a crash may cost, since the newest may still be on its way to the disk then."""
        return max(1, self.config.train.max_lost_steps // 2)

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.started

    def sections(self) -> dict[str, Any]:
        """What a checkpoint must share with the configuration that continues it, the shards' content included."""
        return {**layout.trained_sections(self.config), "shards_content": self.shards.content_digest}

    def resume(self) -> None:
        """Continue from the newest valid checkpoint, if there is one (all ranks read the file that rank 0 has chosen)."""
        chosen = None
        if self.ranks.is_main:
            self.checkpoints.clear_unfinished()
            chosen = self.checkpoints.newest(set_aside=True)
            write_json(
                self.run_dir / "inputs.json", {"shards": self.shards.content_digest, "size": self.shards.size}
            )
        step = self.ranks.text_from_main(str(chosen.step) if chosen else "")
        if not step:
            return
        checkpoint = chosen or self.checkpoints.read(int(step))
        require_same(checkpoint.meta["sections"], self.sections(), self.run_dir)
        restore(checkpoint, self.model, self.ema.model, self.optimizer)
        self.precision.scaler.load_state_dict(checkpoint.meta["scaler"])
        self.step, self.seconds_before = checkpoint.step, checkpoint.meta["seconds"]
        self.log.info("resuming at step %d", self.step)

    def prepare(self, step: int) -> Batch:
        """This rank's share of a step's batch, ready to be fetched by the device (runs in the prefetch thread)."""
        batch = self.batches.at(step)
        return pinned(batch) if self.device.type == "cuda" else batch

    def reduce_sum(self, sums: Tensor) -> Tensor:
        """The one all-reduce of a step's numbers: the sums of the loss [4] and, riding along, this rank's wish to stop."""
        self.reduced = self.ranks.reduce_sum(
            torch.cat([sums, sums.new_full((1,), float(self.stop.requested))])
        )
        return self.reduced[:-1]

    def train_step(self, batch: Batch) -> Record:
        """One optimizer step on the global batch, of which `batch` is this rank's share (all ranks; the share may be empty)."""
        train, optim, precision, model = self.config.train, self.config.optim, self.precision, self.model
        beta = kl_weight(self.images, train.kl_warmup_images)
        lr = learning_rate(self.images, train.images, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y, noise = self.batches.to_device(batch, self.device, precision.dtype)
        # The number of micro-batches follows from global numbers only: ranks that disagree would wait for each other for ever.
        largest_share = ceil_div(train.batch_size, self.ranks.world_size)
        n_micro = ceil_div(largest_share, train.micro_batch) if train.micro_batch else 1
        parts = [share(len(x), i, n_micro) for i in range(n_micro)]
        micro = [(x[p.start : p.stop], y[p.start : p.stop], noise[p.start : p.stop]) for p in parts]
        reduce_sum: Callable[[Tensor], Tensor] = self.reduce_sum
        if (
            n_micro > 1
        ):  # the variance of the whole batch must be known before the first micro-batch's gradient
            with torch.no_grad(), precision.autocast():
                total = self.reduce_sum(
                    torch.stack([torch.stack([s.double() for s in model.sums(*m)]) for m in micro]).sum(0)
                )
            reduce_sum = lambda _: total  # noqa: E731
        for i, m in enumerate(micro):
            waits = i < n_micro - 1 and isinstance(self.forward, DistributedDataParallel)
            with self.forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with precision.autocast():
                    losses: Losses = self.forward(
                        *m, beta, self.ranks.world_size / train.batch_size, reduce_sum
                    )
                precision.scaler.scale(losses.objective).backward()
        precision.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or float("inf"))
        # Loss and gradients are the same on all ranks, so all skip a bad step, on the device and without asking the host.
        bad = ~(losses.loss.isfinite() & grad_norm.isfinite())
        if precision.scaler.is_enabled():
            precision.scaler.step(self.optimizer)
            precision.scaler.update()
            bad = ~losses.loss.isfinite()  # a finite loss with infinite gradients is the scaler's business
        else:
            self.optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]  # the fused kernel skips where it is 1
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(model, self.step)
        self.step += 1
        shown = (
            losses.loss,
            losses.nll,
            losses.kl,
            losses.log_det,
            losses.mse / 4,
            losses.s2.sqrt(),
            grad_norm,
            bad,
            self.reduced[-1],
        )
        return Record(
            self.step,
            {"beta": beta, "lr": lr},
            RECORDED,
            torch.stack([t.detach().double() for t in shown]),
            batch.indices,
        )

    def validate(self) -> dict[str, float]:
        """ELBO on the val split for the raw and the averaged weights (all ranks)."""
        values: dict[str, float] = {}
        for name, model in (("val_raw", self.model.eval()), ("val_ema", self.ema.model)):
            result = validate(model, self.held_out, self.calibration, self.ranks)  # type: ignore[arg-type]
            values |= {f"{name}/{k}": v for k, v in result.items()}
        self.model.train()
        text = "step %d: val loss %.1f nats (%.4f bits/dim), mse %.5f, kl %.1f, %d active units"
        self.log.info(
            text,
            self.step,
            *(values[f"val_ema/{k}"] for k in ("loss", "bits_per_dim", "mse", "kl", "active_units")),
        )
        if self.ranks.is_main:
            self._look(values)
        return values

    def _look(self, values: dict[str, float]) -> None:
        """Say what is wrong with a validation's numbers, and draw what the averaged weights make of fixed noise (rank 0)."""
        if self.images >= self.config.train.kl_warmup_images:
            for complaint in complaints(values, self.config.model):
                self.log.warning("step %d: %s", self.step, complaint)
        try:
            draw_fixed_noise(self.ema.model, self.held_out, layout.progress_picture(self.run_dir, self.step))  # type: ignore[arg-type]
        except (
            OSError
        ) as error:  # the checkpoint that follows stops the training where it cannot be written either
            self.log.warning("no picture of step %d: %s", self.step, error)

    def testify(self, bad_steps: list[tuple[Record, dict[str, float]]]) -> Path:
        """Write what led to a divergence: steps, terms, and the keys of this rank's samples."""
        file = (
            layout.train_dir(self.run_dir) / "forensics" / f"step_{self.step:08d}_rank{self.ranks.rank}.json"
        )
        steps = [
            {
                "step": record.step,
                "terms": {k: str(v) for k, v in values.items()},
                "samples": self.shards.keys(record.indices),
            }
            for record, values in bad_steps
        ]
        write_json(
            file,
            {
                "seed": self.config.seed,
                "precision": self.precision.name,
                "world_size": self.ranks.world_size,
                "steps": steps,
            },
        )
        return file

    def save(
        self, saver: Saver | None, metrics: MetricsLog | None, validation: dict[str, float] | None
    ) -> None:
        """Start to write a checkpoint (rank 0)."""
        if saver is None or metrics is None:
            return
        if validation:
            metrics.append(self.step, validation)
        meta = {
            "images": self.images,
            "seconds": self.seconds,
            "attributes": list(self.attributes),
            "size": self.shards.size,
            "sections": self.sections(),
            "scaler": self.precision.scaler.state_dict(),
            "validation": validation,
            "world_size": self.ranks.world_size,
            "precision": self.precision.name,
            "torch": torch.__version__,
        }
        saver.save(self.step, state_tensors(self.model, self.ema.model, self.optimizer), meta)
        if self.config.train.max_lost_steps == 1:  # no step may be made while one is on its way
            saver.wait()

    def summary(self) -> dict[str, Any]:
        """What done.json says."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        gpu = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else 0.0
        return {
            "step": self.step,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "world_size": self.ranks.world_size,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "precision": self.precision.name,
            "peak_memory_mib": round(peak),
            "peak_gpu_memory_mib": round(gpu),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
