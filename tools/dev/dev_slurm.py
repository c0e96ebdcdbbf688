"""Run a private Slurm on this host, for trying and testing.

    python tools/dev/dev_slurm.py start|stop|status|hold [--folder DIR]

Needs Debian's slurmctld, slurmd, slurm-client and munge (for sacct also slurmdbd,
slurm-wlm-mysql-plugin, mariadb-server-core and mariadb-client-core).
Everything lives in one folder and on 127.0.0.1. No real cluster is touched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.errors import exit_code
from tools.dev.slurm_parts.cluster import Cluster


def hold(cluster: Cluster) -> None:
    """Run the cluster until standard input ends, at the latest with the process behind it."""
    try:
        cluster.start()
        print("ready", flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/dev/dev_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        choices=("start", "stop", "status", "hold"),
        help="hold: start, then stop when standard input ends",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path.home() / ".cache" / "dev_slurm",
        help="folder of the cluster (default: %(default)s)",
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--prefix", default="n", help="prefix of the nodes' names (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=4, help="processors per node that Slurm is told of")
    parser.add_argument(
        "--no-accounting",
        dest="accounting",
        action="store_false",
        help="run no slurmdbd; sacct then does not work",
    )
    args = parser.parse_args()
    cluster = Cluster(
        args.folder.absolute(), args.nodes, cpus=args.cpus, accounting=args.accounting, prefix=args.prefix
    )
    if args.action == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
        print("# then: python launch.py --cluster slurm ...; to end it: python tools/dev/dev_slurm.py stop")
    elif args.action == "hold":
        hold(cluster)
    elif args.action == "stop":
        cluster.stop()
    else:
        print(
            cluster.run("sinfo", "-N", "-p", "gpu", "-o", "%N %T %G %c %m"),
            cluster.run("squeue", "-o", "%i %j %T %M %R"),
            sep="\n",
            end="",
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
