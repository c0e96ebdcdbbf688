"""The train stage: a conditional VAE on all ranks, resumable at any step, the same trajectory on any number of ranks."""

from __future__ import annotations

from pipeline.config.schema import RunConfig
from pipeline.data.loader import Prefetcher
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.context import Context
from pipeline.runtime.owner import Ownership, owned
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.split import ceil_div
from pipeline.runtime.watchdog import Watchdog
from pipeline.tracking.sync import LiveSync
from pipeline.training.profile import profiler
from pipeline.training.saver import Saver
from pipeline.training.steps import StepMonitor
from pipeline.training.trainer import Trainer


def run(config: RunConfig, context: Context) -> None:
    """Train until `train.images` images were seen, from the newest valid checkpoint on (all ranks).

    Raises Stopped once a stop signal was honoured, CheckpointError where the configuration or the shards changed,
    TrainingDiverged after several non-finite losses in a row, OwnedError where another process trains this run,
    StorageError where the disk refuses. Leaves with Watchdog's exit code where a rank does not answer.
    """
    folder = layout.train_dir(context.run_dir)
    with (
        owned(folder, context.ranks, context.job) as owner,
        Watchdog(context.ranks, config.train.stall_s, folder, context.log) as watchdog,
    ):
        train_on(config, context, owner, watchdog)


def train_on(config: RunConfig, context: Context, owner: Ownership | None, watchdog: Watchdog) -> None:
    """The loop (all ranks); rank 0 alone has an `owner`, and writes."""
    train, folder = config.train, layout.train_dir(context.run_dir)
    trainer = Trainer(config, context)
    trainer.resume()
    last = ceil_div(train.images, train.batch_size)
    metrics = MetricsLog(folder / "metrics.jsonl", trainer.step) if owner else None
    if metrics and trainer.excluded:
        counts = {
            "data/excluded_shards": float(len(trainer.excluded)),
            "data/excluded_samples": float(sum(trainer.excluded.values())),
        }
        metrics.append(trainer.step, counts)
    live = LiveSync(context.run_dir, log=context.log) if owner else None
    saver = Saver(trainer.checkpoints, metrics.sync, owner.check) if metrics and owner else None
    monitor = StepMonitor(
        metrics,
        context.log,
        train.log_interval,
        train.max_bad_steps,
        trainer.step,
        last,
        train.batch_size,
        trainer.testify,
    )
    batches = Prefetcher(trainer.prepare, trainer.step, last)
    try:
        with profiler(train.profile, folder / f"trace_rank{context.ranks.rank}.json") as profile:
            for batch in monitor.timed(batches):
                watchdog.at(trainer.step)
                # Numbers are read one step late: the host never waits for the device, and every rank acts at the same step.
                stopping = monitor.push(trainer.train_step(batch))
                profile()
                validating = trainer.step % train.val_interval == 0 or trainer.step == last
                if validating or stopping or trainer.step % trainer.save_interval == 0:
                    with watchdog.paused():
                        stopping = monitor.flush() or stopping
                        trainer.save(saver, metrics, trainer.validate() if validating else None)
                if saver:
                    saver.poll()
                if stopping and trainer.step < last:
                    raise Stopped(f"by a signal, saved at step {trainer.step} of {last}")
    finally:
        batches.close()
        with watchdog.paused():
            if saver:
                saver.close()  # a checkpoint on its way is worth waiting for, whatever has happened
            if live:
                live.stop()
    if saver:
        write_json(
            folder / "done.json", trainer.summary() | {"checkpoints_blocked_s": round(saver.blocked_s, 3)}
        )
        context.log.info("done: %d images in %.0f s", trainer.images, trainer.seconds)
