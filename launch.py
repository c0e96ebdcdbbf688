"""Launch runs: their stages from shard to eval, on this machine or on a cluster.

Without words it runs a demo on faces that the project draws itself. A finished stage is left out, so the
same command continues what was stopped. docs/configuration.md lists all keys.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.command_line import parser
from pipeline.config import load as configuration
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.sweep import read_sweep, with_command_line
from pipeline.errors import ConfigError, exit_code
from pipeline.prepare import (
    evaluates_only,
    prepare,
    recorded,
    require_continuable,
    resolved,
    schedule_note,
)
from pipeline.rundir.layout import shared_dir
from pipeline.rundir.redact import redact
from pipeline.stages import STAGES
from slurm.announce import data_line, opening
from slurm.chain import Chain, Run, parse_stages, plan
from slurm.executors import Executor, executor_named

CONFIGS = Path(__file__).resolve().parent / "configs"
DEMO_CONFIGS = ["sigma_cvae", "sigma_cvae_nf"]
DEMO_OVERLAY = "demo"
EXAMPLES = """\
  python launch.py                                            the demo: two variants on drawn faces
  python launch.py --config sigma_cvae_nf shard.source=/data/celeba
                                                              train on CelebA, on this machine
  python launch.py --config paper name=narrow model.z_dim=64  a variant; every key can be set
  python launch.py --run-dir runs/x train.images=300000       train a run longer (images seen in all)
  python launch.py --run-dir runs/x --stages eval eval.n=10000
                                                              evaluate it again, on 10,000 images
  python launch.py --cluster slurm --config paper shard.source=/data/celeba
                                                              the whole chain on a cluster
  python launch.py --cluster slurm --config paper --dry-run   show configuration and sbatch scripts
  python launch.py --cluster slurm --sweep configs/sweeps/paper_table.yaml
                                                              variants x seeds, and a table of them
"""


# ---- arguments


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. A word with '=' is an override wherever it stands."""
    words = parser("launch.py", __doc__, EXAMPLES)
    add = words.add_argument
    add("overrides", metavar="key=value", nargs="*", help="e.g. train.batch_size=256 (images, global)")
    add("--cluster", metavar="NAME", help="configs/cluster/NAME.yaml, or a .yaml file (default: local)")
    add(
        "--config",
        metavar="NAME",
        nargs="+",
        action="extend",  # `--config a --config b` is `--config a b`
        default=[],
        help="a run for each configs/NAME.yaml or .yaml file",
    )
    add(
        "--overlay",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="configs/overlays/NAME.yaml, for every run",
    )
    add("--sweep", metavar="FILE", type=_folder, help="a run for each configuration x grid x seed in FILE")
    add(
        "--stages",
        metavar="A,B",
        help="of shard,train,tune,refine,steer,classifier,eval (default: all); complete ones are left out",
    )
    add(
        "--run-dir",
        metavar="RUN_DIR",
        type=_folder,
        help="run directory to go on with (default: runs_dir/name)",
    )
    add("--dry-run", action="store_true", help="print the configuration and the jobs; write nothing")
    add("--wait", action="store_true", help="on a cluster: follow the jobs; Ctrl-C leaves them running")
    add(
        "--no-preflight",
        dest="preflight",
        action="store_false",
        help="start without the checks of paths, space, GPUs and stores",
    )
    argv = sys.argv[1:] if argv is None else argv
    args = words.parse_intermixed_args(argv)
    for names in (args.config, args.overlay):  # a list of names takes the overrides that follow it
        args.overrides += [name for name in names if "=" in name]
        names[:] = [name for name in names if "=" not in name]
    given = set(args.overrides)
    args.overrides = [word for word in argv if word in given]  # a later one wins
    _require_separated(args)
    return args


def _require_separated(args: argparse.Namespace) -> None:
    """Raise ConfigError if stages are separated by blanks, other names by commas, or an option is missing."""
    named = (args.stages or "").replace(",", " , ").split()
    stray = [word for word in args.overrides if word.strip(",") in STAGES]
    stages = [word.strip(",") for word in [*named, *stray] if word != ","]
    if stray or len(stages) > named.count(",") + 1:
        raise ConfigError(
            f"--stages: stages are joined by commas, without blanks: --stages {','.join(stages)}"
        )
    for option, names in (("--config", args.config), ("--overlay", args.overlay)):
        for name in names:
            if "," in name:
                apart = " ".join(filter(None, name.split(",")))
                raise ConfigError(f"{option} {name}: names are separated by blanks: {option} {apart}")
    for word in args.overrides:
        if "=" not in word and _file(word, CONFIGS).is_file():
            raise ConfigError(f"{word!r}: a configuration is named by an option: --config {word}")
        if "=" not in word and (Path(word) / "config.yaml").is_file():
            raise ConfigError(f"{word!r}: a run directory is named by an option: --run-dir {word}")


def _folder(path: str) -> Path:
    return Path(path).expanduser().absolute()


# ---- arguments -> runs


def resolve(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the command line asks for. Raises ConfigError."""
    overlays = [_file(name, CONFIGS / "overlays") for name in args.overlay]
    if args.run_dir and not (args.config or args.sweep):
        return [_continued(args, overlays)]
    cluster = _file(args.cluster or "local", CONFIGS / "cluster")
    if args.sweep:
        return _swept(args, [cluster, *overlays])
    configs = args.config
    if not configs:
        configs = DEMO_CONFIGS
        overlays = [_file(DEMO_OVERLAY, CONFIGS / "overlays"), *overlays]
    if args.run_dir and len(configs) > 1:
        raise ConfigError(
            f"--run-dir {args.run_dir}: it holds one run, "
            f"but there are {len(configs)} configurations: {', '.join(configs)}"
        )
    runs = []
    for name in configs:
        config = configuration.load([_file(name, CONFIGS), cluster, *overlays], args.overrides)
        runs.append(_run(config, args.run_dir))
    return _distinct(runs)


def _swept(args: argparse.Namespace, files: list[Path]) -> list[Run]:
    """Return one run for each cell of the sweep; the command line holds for all. Raises ConfigError."""
    if args.config or args.run_dir:
        raise ConfigError(
            f"--sweep {args.sweep}: the file names its configurations, "
            "so --config and --run-dir cannot be given with it"
        )
    runs = []
    for cell in read_sweep(args.sweep):
        overrides = with_command_line(cell, args.overrides, args.sweep)
        config = configuration.load([_file(cell.config, CONFIGS), *files], overrides)
        runs.append(_run(config, None))
    return _distinct(runs)


def _continued(args: argparse.Namespace, overlays: list[Path]) -> Run:
    """Return the run recorded in --run-dir. It stays on its cluster unless --cluster names another."""
    base = recorded(args.run_dir)
    if base is None:
        raise ConfigError(
            f"--run-dir {args.run_dir}: there is no config.yaml in it, so there is no run to continue; "
            "give --config to start one"
        )
    files = overlays
    if args.cluster:
        base = replace(base, cluster=ClusterConfig())
        files = [_file(args.cluster, CONFIGS / "cluster"), *overlays]
    return _run(configuration.load(files, args.overrides, base), args.run_dir)


def _run(config: RunConfig, run_dir: Path | None) -> Run:
    config = resolved(config)
    return Run(config, run_dir or Path(config.runs_dir) / config.name)


def _distinct(runs: list[Run]) -> list[Run]:
    """Return `runs`. Raises ConfigError if two of them share a directory."""
    seen = set()
    for run in runs:
        if run.run_dir in seen:
            raise ConfigError(
                f"key 'name': several runs of this launch are called {run.config.name!r} "
                f"and would share {run.run_dir}; give each its own name"
            )
        seen.add(run.run_dir)
    return runs


def _file(name: str, folder: Path) -> Path:
    return Path(name).expanduser() if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"


# ---- runs -> jobs


def describe(runs: list[Run], chain: Chain, executor: Executor) -> str:
    """Return what a launch would do, as text: data, configurations, notes and jobs."""
    parts = [f"# {line}" for line in dict.fromkeys(data_line(run.config) for run in runs)]
    for run in runs:
        parts.append(f"# {run.run_dir / 'config.yaml'}\n{redact(configuration.dump(run.config))}")
    parts += [f"# {note}\n" for note in chain.notes]
    parts += executor.describe(chain)
    return "\n".join(parts)


def require_wanted(runs: list[Run], stages: list[str]) -> None:
    """Raise ConfigError if a stage that was asked for by name is part of no run."""
    for stage in stages:
        if not any(STAGES[stage].wanted(run.config) for run in runs):
            raise ConfigError(
                f"--stages {stage}: key '{stage}.images': is 0, so no run has this stage; "
                "set its length in images"
            )


def _marked(run: Run, stages: list[str]) -> Run:
    return replace(run, evaluates_only=evaluates_only(run.run_dir, run.config, stages))


def _forgotten_source(args: argparse.Namespace, runs: list[Run]) -> list[str]:
    """Warn if a configuration for real images is about to be trained on drawn ones."""
    drawn = [run.config for run in runs if not (run.config.shard.source or run.config.data.shards)]
    new = args.config or args.sweep
    meant = DEMO_OVERLAY in args.overlay or any(word.startswith("toy.") for word in args.overrides)
    if not drawn or not new or meant:
        return []
    return [
        "key 'shard.source': is empty, so the runs train on faces drawn by this project; "
        "for real images add shard.source=FOLDER"
    ]


def main(argv: list[str] | None = None) -> None:
    """Resolve the runs, check everything, then start the jobs.

    Raises UserError, or SystemExit 1 if a stage failed and 130 after Ctrl-C.
    """
    args = arguments(argv)
    stages = parse_stages(args.stages)
    runs = [_marked(run, stages) for run in resolve(args)]
    for run in runs:
        require_continuable(run.run_dir, run.config)
    if args.stages:
        require_wanted(runs, stages)
    executor = executor_named(runs[0].config.cluster.executor)
    chain = executor.without_queued(runs, plan(runs, stages))
    if args.dry_run:
        print(describe(runs, chain, executor))
        return
    lengths = [schedule_note(run.run_dir, run.config) for run in runs]
    first_lines = opening(runs, chain, executor.place(runs[0]))
    warnings = executor.check(runs, chain, args.preflight)
    print("\n".join([*first_lines, *filter(None, lengths)]), flush=True)
    for warning in [*_forgotten_source(args, runs), *warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    if not (chain.steps or chain.queued):
        return
    for run in runs if chain.steps else []:
        prepare(run.run_dir, run.config, stages, keep=run.evaluates_only)
    sweep = shared_dir(runs[0].config).parent / "_sweeps" / args.sweep.stem if args.sweep else None
    executor.launch(runs, chain, sweep, args.wait)


if __name__ == "__main__":
    sys.exit(exit_code(main))
