"""The loop of a training on all ranks, shared by the stages train, tune, refine and steer.

Training can stop and resume at any step, and any number of ranks follows the same trajectory.
"""

from __future__ import annotations

from pipeline.data.loader import Prefetcher
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.context import Context
from pipeline.runtime.node import node_monitor
from pipeline.runtime.owner import Ownership, owned
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.watchdog import Watchdog
from pipeline.tracking.sync import LiveSync
from pipeline.training.checkpoints.saver import MainRecorder, Recorder, Saver
from pipeline.training.fixed_noise import draw_fixed_noise
from pipeline.training.phases import Phase
from pipeline.training.profile import profiler
from pipeline.training.steps import StepMonitor
from pipeline.training.trainer import Trainer


def run(phase: Phase, context: Context) -> None:
    """Train from the newest intact checkpoint until the phase's images were seen (all ranks).

    Raises Stopped after a stop signal, CheckpointError if the configuration or the shards changed,
    TrainingDiverged after several non-finite losses in a row, OwnedError if another process trains this
    run, StorageError if the disk refuses. Exits with the watchdog's code if a rank does not answer.
    """
    folder = layout.train_dir(context.run_dir, phase.name)
    with (
        owned(folder, context.ranks, context.job) as owner,
        Watchdog(context.ranks, phase.config.train.stall_s, folder, context.log) as watchdog,
        node_monitor(context),
    ):
        trainer = Trainer(phase, context)
        trainer.resume()
        recorder = open_recorder(context, trainer, owner)
        train(context, trainer, recorder, watchdog)


def open_recorder(context: Context, trainer: Trainer, owner: Ownership | None) -> Recorder:
    """Return the recorder of this rank; the owner of the run directory is rank 0."""
    if owner is None:
        return Recorder()
    folder = layout.train_dir(context.run_dir, trainer.phase.name)
    metrics = MetricsLog(folder / "metrics.jsonl", trainer.step)
    saver = Saver(trainer.checkpoints, metrics.sync, owner.check)
    live = LiveSync(context.run_dir, log=context.log)
    excluded = trainer.inputs.excluded
    if excluded:
        shards, samples = float(len(excluded)), float(sum(excluded.values()))
        metrics.append(trainer.step, {"data/excluded_shards": shards, "data/excluded_samples": samples})
    return MainRecorder(folder, metrics, saver, live)


def train(context: Context, trainer: Trainer, recorder: Recorder, watchdog: Watchdog) -> None:
    """Run the loop (all ranks); rank 0's recorder alone writes."""
    settings, last = trainer.config.train, trainer.last_step
    monitor = StepMonitor(settings, trainer.step, last, recorder, context.log, trainer.testify)
    folder = layout.train_dir(context.run_dir, trainer.phase.name)
    trace = folder / f"trace_rank{context.ranks.rank}.json"
    batches = Prefetcher(trainer.prepare, trainer.step, last)
    try:
        if trainer.step >= last and not trainer.validated:  # the run was shortened after a stop
            with watchdog.paused():
                save(trainer, recorder, validate(context, trainer))
        with profiler(settings.profile, trace) as profile:
            for batch in monitor.timed(batches):
                watchdog.at(trainer.step)
                # The monitor reads numbers one step late, so the host never waits for the device,
                # and every rank acts on the same step.
                stopping = monitor.push(trainer.train_step(batch))
                profile()
                validating = trainer.step % settings.val_interval == 0 or trainer.step == last
                saving = validating or stopping or trainer.step % trainer.save_interval == 0
                if saving:
                    with watchdog.paused():
                        stopping = monitor.flush() or stopping
                        validation = validate(context, trainer) if validating else None
                        save(trainer, recorder, validation)
                recorder.poll()
                if stopping and trainer.step < last:
                    raise Stopped(f"by a signal, saved at step {trainer.step} of {last}")
    finally:
        trainer.inputs.shards.close()  # first: the prefetch thread may wait for a tar
        batches.close()
        with watchdog.paused():
            recorder.close()
    recorder.finish(trainer.summary())
    context.log.info("done: %d images in %.0f s", trainer.images, trainer.seconds)


def validate(context: Context, trainer: Trainer) -> dict[str, float]:
    """Validate (all ranks), and draw what the averaged weights make of fixed noise (rank 0)."""
    values = trainer.validate()
    if context.ranks.is_main:
        picture = layout.progress_picture(context.run_dir, trainer.step, trainer.phase.name)
        try:
            draw_fixed_noise(trainer.ema.model, trainer.inputs.held_out, picture)  # type: ignore[arg-type]
        except OSError as error:  # if the disk is full, the checkpoint that follows stops the training
            context.log.warning("no picture of step %d: %s", trainer.step, error)
    return values


def save(trainer: Trainer, recorder: Recorder, validation: dict[str, float] | None) -> None:
    """Start to write a checkpoint (rank 0)."""
    # If a crash may cost one step only, no step may start before the checkpoint is durable.
    wait = trainer.config.train.max_lost_steps == 1
    recorder.save(trainer.step, trainer.state(), trainer.meta(validation), wait)
