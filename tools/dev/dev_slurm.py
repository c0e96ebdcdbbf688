"""Run a private Slurm on this host, for trying and testing.

Needs Debian's slurmctld, slurmd, slurm-client and munge (for sacct also slurmdbd,
slurm-wlm-mysql-plugin, mariadb-server-core and mariadb-client-core).
Everything lives in one folder and on 127.0.0.1. No real cluster is touched.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command_line import parser
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


EXAMPLES = """\
  python tools/dev/dev_slurm.py start --nodes 2     prints the variable to set
  python tools/dev/dev_slurm.py status
  python tools/dev/dev_slurm.py stop
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/dev/dev_slurm.py", __doc__, EXAMPLES)
    words.add_argument(
        "action",
        choices=("start", "stop", "status", "hold"),
        help="hold: start, then stop when standard input ends",
    )
    folder = Path.home() / ".cache" / "dev_slurm"
    words.add_argument("--folder", metavar="DIR", type=Path, default=folder, help="folder of the cluster")
    words.add_argument("--nodes", metavar="N", type=int, default=3, help="number of nodes")
    words.add_argument("--prefix", metavar="TEXT", default="n", help="prefix of the nodes' names")
    words.add_argument(
        "--cpus", metavar="N", type=int, default=4, help="processors per node that Slurm is told of"
    )
    words.add_argument(
        "--no-accounting",
        dest="accounting",
        action="store_false",
        help="run no slurmdbd; sacct then does not work",
    )
    args = words.parse_args(argv)
    cluster = Cluster(
        args.folder.absolute(), args.nodes, cpus=args.cpus, accounting=args.accounting, prefix=args.prefix
    )
    if args.action == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
        elsewhere = [] if args.folder == folder else ["--folder", str(args.folder)]
        stop = shlex.join(["python", "tools/dev/dev_slurm.py", "stop", *elsewhere])
        print(f"# then: python launch.py --cluster slurm ...; to end it: {stop}")
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
