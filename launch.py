"""Launch runs: `python launch.py` trains and evaluates the demo here, `--cluster slurm` does it on a cluster."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config import load as configuration
from pipeline.config.paths import absolute_paths
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.errors import ConfigError, exit_code
from pipeline.prepare import prepare, recorded, require_continuable
from pipeline.rundir.layout import shared_dir
from slurm.chain import Chain, Run, parse_stages, plan
from slurm.sweep import read_sweep

CONFIGS = Path(__file__).resolve().parent / "configs"
DEMO_CONFIGS, DEMO_OVERLAY = ["sigma_cvae", "sigma_cvae_nf"], "demo"
EPILOG = """\
examples:
  launch.py                                                   the demo: two variants on faces drawn here, compared
  launch.py --cluster slurm --config paper shard.source=/data/celeba      on a cluster
  launch.py --config paper name=narrow model.z_dim=64 train.batch_size=256  a variant; every key can be set
  launch.py --run-dir runs/x train.images=300000              train a run longer
  launch.py --run-dir runs/x --stages eval eval.n=10000       evaluate it once more
  launch.py --cluster slurm --config paper --dry-run          configuration and sbatch scripts, nothing written
  launch.py --cluster slurm --sweep configs/sweeps/paper_table.yaml       variants x seeds, and a table of them
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; words with '=' are overrides wherever they stand."""
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help="configs/cluster/NAME.yaml or a .yaml file (default: local)"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        nargs="+",
        default=[],
        help="configs/NAME.yaml or .yaml files, each one run",
    )
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        type=Path,
        help="configs x grid x seeds of a YAML file, each one run, and a table of them",
    )
    parser.add_argument(
        "--overlay",
        metavar="NAME",
        nargs="+",
        default=[],
        help="configs/overlays/NAME.yaml or .yaml files, on every run",
    )
    parser.add_argument(
        "--stages",
        metavar="A,B",
        help="shard,train,classifier,eval or some of them (default: all that are not complete)",
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=_folder,
        help="of one run (default: runs_dir/name); continues the run that is there",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration and the jobs, do nothing"
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="on a cluster: follow the jobs until they end; Ctrl-C leaves them alone",
    )
    parser.add_argument(
        "--no-preflight",
        dest="preflight",
        action="store_false",
        help="on a cluster: submit without checking first",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="e.g. train.batch_size=256 (the global batch)"
    )
    args = parser.parse_intermixed_args(argv)
    for names in (args.config, args.overlay):  # a list of names swallows the overrides behind it
        args.overrides += [name for name in names if "=" in name]
        names[:] = [name for name in names if "=" not in name]
    return args


def resolve(args: argparse.Namespace) -> list[Run]:
    """The runs that the command line asks for; raises ConfigError."""
    overlays = [_file(name, CONFIGS / "overlays") for name in args.overlay]
    if args.run_dir and not (args.config or args.sweep):
        return [_continued(args, overlays)]
    cluster = _file(args.cluster or "local", CONFIGS / "cluster")
    if args.sweep:
        return _sweep(args, [cluster, *overlays])
    configs = args.config or DEMO_CONFIGS
    if not args.config:
        overlays.insert(0, _file(DEMO_OVERLAY, CONFIGS / "overlays"))
    if args.run_dir and len(configs) > 1:
        raise ConfigError(
            f"--run-dir {args.run_dir}: is for one run, but there are {len(configs)} configurations: {', '.join(configs)}"
        )
    return _distinct(
        [
            _run(configuration.load([_file(name, CONFIGS), cluster, *overlays], args.overrides), args.run_dir)
            for name in configs
        ]
    )


def _sweep(args: argparse.Namespace, files: list[Path]) -> list[Run]:
    """One run for each cell of the sweep; what stands on the command line holds for all of them."""
    if args.config or args.run_dir:
        raise ConfigError(
            f"--sweep {args.sweep}: names its configurations itself, so neither --config nor --run-dir may be given"
        )
    cells = read_sweep(args.sweep)
    return _distinct(
        [
            _run(
                configuration.load([_file(c.config, CONFIGS), *files], [*args.overrides, *c.overrides]), None
            )
            for c in cells
        ]
    )


def _distinct(runs: list[Run]) -> list[Run]:
    for run in runs:
        if [other.run_dir for other in runs].count(run.run_dir) > 1:
            raise ConfigError(
                f"key 'name': {run.config.name!r} is the name of several of these runs, which would share {run.run_dir}"
            )
    return runs


def _continued(args: argparse.Namespace, overlays: list[Path]) -> Run:
    """The run recorded in --run-dir, on the cluster that it was launched on unless another is given."""
    base = recorded(args.run_dir)
    if base is None:
        raise ConfigError(
            f"--run-dir {args.run_dir}: no config.yaml in it, so there is no run to continue; give --config for a new one"
        )
    files = overlays
    if args.cluster:
        base = replace(base, cluster=ClusterConfig())
        files = [_file(args.cluster, CONFIGS / "cluster"), *overlays]
    return _run(configuration.load(files, args.overrides, base), args.run_dir)


def _run(config: RunConfig, run_dir: Path | None) -> Run:
    config = absolute_paths(config)
    return Run(config, run_dir or Path(config.runs_dir) / config.name)


def _folder(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _file(name: str, folder: Path) -> Path:
    return Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"


def run_here(runs: list[Run], chain: Chain, stages: list[str], sweep: Path | None) -> None:
    """Run the chain on this machine, then show what came out; raises SystemExit 130 after Ctrl-C."""
    from pipeline.rundir.redact import redact
    from pipeline.tracking.mlflow_store import tracking_uri
    from pipeline.tracking.sync import sync_run
    from slurm.here import run_all

    try:
        run_all(chain, after_each=sync_run)
    except KeyboardInterrupt:
        print(f"stopped; continue with: python {shlex.join(sys.argv)}", file=sys.stderr)
        raise SystemExit(130) from None
    if "eval" in stages:
        from slurm.finish import finish

        print("\n" + finish([run.run_dir for run in runs], sweep))
        if runs[0].config.tracking.enabled:
            print(f"MLflow: mlflow ui --backend-store-uri {redact(tracking_uri(runs[0].config))}")


def run_on_slurm(runs: list[Run], chain: Chain, sweep: Path | None, wait: bool) -> None:
    """Submit the chain; with `wait` follow it. Raises SystemExit 1 where a stage failed, 130 where Ctrl-C ended the following."""
    from slurm.launcher import submit_all
    from slurm.status import as_table, follow, survey

    submit_all(chain, runs, sweep)
    run_dirs = [run.run_dir for run in runs]
    where = shlex.join(map(str, run_dirs))
    if not wait:
        print(f"follow: python tools/status.py --follow {where}")
        return
    try:
        for line in follow(run_dirs):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"the jobs go on; follow them again: python tools/status.py --follow {where}", file=sys.stderr)
        raise SystemExit(130) from None
    statuses = survey(run_dirs)
    print(as_table(statuses))
    if any(status.state != "COMPLETED" for status in statuses):
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    """Resolve, check everything, then submit or run here. Raises UserError, or SystemExit 1 where a stage failed."""
    args = arguments(argv)
    stages = parse_stages(args.stages)
    runs = resolve(args)
    for run in runs:
        require_continuable(run.run_dir, run.config)
    chain = plan(runs, stages, explicit=args.stages is not None)
    if args.dry_run:
        from slurm.dryrun import describe

        print(describe(runs, chain))
        return
    on_slurm = runs[0].config.cluster.executor == "slurm"
    if on_slurm:
        from slurm.launcher import require_slurm
        from slurm.preflight import preflight

        require_slurm()
        for warning in preflight(runs, chain) if args.preflight else ():
            print(f"warning: {warning}", file=sys.stderr)
    for run in runs:
        prepare(run.run_dir, run.config, stages)
        print(f"{run.config.name}: {run.run_dir}")
    for note in chain.notes:
        print(note)
    sweep = shared_dir(runs[0].config).parent / "_sweeps" / args.sweep.stem if args.sweep else None
    if on_slurm:
        run_on_slurm(runs, chain, sweep, args.wait)
    else:
        run_here(runs, chain, stages, sweep)


if __name__ == "__main__":
    sys.exit(exit_code(main))
