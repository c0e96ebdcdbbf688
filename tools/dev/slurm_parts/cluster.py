"""A private Slurm: its files, its daemons, and how they end."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.rundir.lock import locked
from pipeline.runtime.ports import free_port
from tools.dev.slurm_parts.templates import ACCOUNTING_CONF, CONF, DBD, PARTITIONS

SBIN = "/usr/sbin:/sbin"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
HOSTS = Path("/etc/hosts")
START_LIMIT_S = 40.0


def missing(accounting: bool = True) -> list[str]:
    """Programs that a private cluster needs and this machine lacks."""
    path = os.environ["PATH"] + os.pathsep + SBIN
    return [name for name in NEEDED + ACCOUNTING * accounting if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Cluster:
    """A cluster of `nodes` slurmds; `folder` holds its configuration, state, logs and pid files."""

    folder: Path
    nodes: int = 3
    gpus: int = 2  # fake ones per node: character devices that nobody opens
    cpus: int = 4  # per node, as Slurm believes
    mem_mb: int = 8000
    accounting: bool = True
    prefix: str = "n"  # of the nodes' names

    @property
    def env(self) -> dict[str, str]:
        """What a process must inherit to talk to this cluster and to no other."""
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + (os.pathsep + SBIN if SBIN not in os.environ["PATH"] else ""),
            "MYSQL_UNIX_PORT": str(
                self.folder / "mysql.sock"
            ),  # slurmdbd's client library finds the database by it
        }

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of a command of this cluster. Raises UserError with what it said on failure."""
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True)
        if check and done.returncode:
            raise UserError(
                f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}; logs are in {self.folder}"
            )
        return done.stdout

    # ---- start

    def start(self) -> None:
        """Write the configuration, start the daemons, wait until every node is idle. Raises UserError where something is missing."""
        if absent := missing(self.accounting):
            packages = (
                "slurmctld slurmd slurm-client munge"
                + " slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core" * self.accounting
            )
            raise UserError(
                f"{', '.join(absent)}: not installed; apt-get install --no-install-recommends {packages}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir(exist_ok=True)
        self._write_configuration()
        self._name_nodes()
        folder = self.folder
        self.run(
            "munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        if self.accounting:
            self._start_accounting()
        self.run("slurmctld")
        for node in range(1, self.nodes + 1):
            self.start_node(f"{self.prefix}{node}")
        self._wait(
            lambda: (
                len(self.run("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N", check=False).split())
                == self.nodes
            ),
            "idle nodes",
        )

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node, at first or after a failure."""
        self.run("slurmd", "-N", name)

    def pid(self, daemon: str) -> int:
        """Process number of a daemon, `slurmd.n2` say."""
        return int((self.folder / f"{daemon}.pid").read_text())

    def _write_configuration(self) -> None:
        folder, root = self.folder, os.getuid() == 0
        freezer = Path("/sys/fs/cgroup/freezer")
        names = f"{self.prefix}[1-{self.nodes}]"
        files = {
            "cgroup.conf": "CgroupMountpoint=/sys/fs/cgroup\nCgroupPlugin=cgroup/v1\n",
            "gres.conf": f"NodeName={names} Name=gpu File={self._devices(root)}[0-{self.gpus - 1}] Flags=nvidia_gpu_env\n",
            "slurmdbd.conf": DBD.format(
                folder=folder,
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                port=free_port(),
            ),
        }
        dbd_port = files["slurmdbd.conf"].split("DbdPort=")[1].split()[0]
        lines = [
            CONF.format(
                folder=folder,
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                port=free_port(),
                proctrack="cgroup" if root and os.access(freezer, os.W_OK) else "pgid",
            )
        ]
        if self.accounting:
            lines.append(ACCOUNTING_CONF.format(folder=folder, port=dbd_port))
        host = socket.gethostname().split(".")[0]
        for node in range(1, self.nodes + 1):
            where = f"NodeName={self.prefix}{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(
                f"{where} CPUs={self.cpus} RealMemory={self.mem_mb} Gres=gpu:{self.gpus} State=UNKNOWN\n"
            )
        lines.append(PARTITIONS.format(nodes=f"{self.prefix}[1-{self.nodes}]"))
        files["slurm.conf"] = "".join(lines)
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)
        if not (folder / "munge.key").exists():
            (folder / "munge.key").write_bytes(os.urandom(128))
            (folder / "munge.key").chmod(0o400)

    def _devices(self, root: bool) -> str:
        if not root:
            return "/dev/tty"
        for number in range(self.gpus):
            with suppress(FileExistsError):
                os.mknod(self.folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        return str(self.folder / "nvidia")

    def _name_nodes(self) -> None:
        """The first node's name is the ranks' meeting point, so it must resolve: lines of our own in /etc/hosts."""
        names = [f"{self.prefix}{node}" for node in range(1, self.nodes + 1)]
        if os.access(HOSTS, os.W_OK):
            self._edit_hosts(f"127.0.0.1 {' '.join(names)}")
        elif set(names) - set(HOSTS.read_text().split()):
            raise UserError(
                f"{HOSTS}: does not name the nodes {', '.join(names)}; add '127.0.0.1 {' '.join(names)}' as root, once"
            )

    def _edit_hosts(self, line: str) -> None:
        """Replace this cluster's line, other clusters' lines stay."""
        mark = f"# dev_slurm {self.folder}"
        with locked(HOSTS), open(HOSTS, "r+") as hosts:
            kept = "".join(
                other for other in hosts.read().splitlines(True) if not other.endswith(f"{mark}\n")
            )
            hosts.seek(0)
            hosts.truncate()
            hosts.write(kept.rstrip("\n") + "\n" + (f"{line} {mark}\n" if line else ""))

    def _start_accounting(self) -> None:
        folder, user = self.folder, getpass.getuser()
        data, sock = folder / "mysql", folder / "mysql.sock"
        base = ["--no-defaults", f"--user={user}", f"--datadir={data}"]
        if not data.exists():
            self.run(
                "mariadb-install-db", *base, "--auth-root-authentication-method=normal", "--skip-test-db"
            )
        options = [
            "--skip-networking",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        ]
        sizes = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M"]
        command = [
            "mariadbd",
            *base,
            f"--socket={sock}",
            f"--pid-file={folder}/mariadb.pid",
            *options,
            *sizes,
        ]
        with open(folder / "mariadb.log", "a") as log:
            subprocess.Popen(
                command, env={**os.environ, **self.env}, stdout=log, stderr=log, start_new_session=True
            )
        sql = ["mariadb", "--no-defaults", "-S", str(sock), "-u", "root", "-e"]
        self._wait(
            lambda: subprocess.run([*sql, "select 1"], capture_output=True).returncode == 0, "the database"
        )
        grant = "create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;"
        self.run(*sql, f"create database if not exists slurm_acct_db; {grant}")
        self.run("slurmdbd")
        self._wait(
            lambda: (
                "lab" in self.run("sacctmgr", "-n", "list", "cluster", "format=cluster", check=False)
                or self._add_cluster()
            ),
            "slurmdbd",
        )

    def _add_cluster(self) -> bool:
        self.run("sacctmgr", "-i", "add", "cluster", "lab", check=False)
        return False

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_LIMIT_S
        while not condition():
            if time.monotonic() > end:
                raise UserError(
                    f"{what}: not there after {START_LIMIT_S:.0f} s; the logs are in {self.folder}"
                )
            time.sleep(0.05)

    # ---- stop

    def stop(self) -> None:
        """Cancel what runs, end the daemons by pid, and take our lines out of /etc/hosts."""
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "--me", check=False)
            end = time.monotonic() + 10
            while (
                time.monotonic() < end
                and self.run("squeue", "-h", "--me", "-t", "R,CG,S", check=False).strip()
            ):
                time.sleep(0.1)
        for daemons in (["slurmd.*.pid", "slurmctld.pid"], ["slurmdbd.pid"], ["mariadb.pid", "munged.pid"]):
            end_processes([file for pattern in daemons for file in self.folder.glob(pattern)])
        for group in sorted(
            Path("/sys/fs/cgroup/freezer").glob(f"slurm_{self.prefix}[0-9]*/**/"), reverse=True
        ):
            with suppress(OSError):
                group.rmdir()
        if os.access(HOSTS, os.W_OK):
            self._edit_hosts("")


def end_processes(pid_files: list[Path], limit_s: float = 15.0) -> None:
    """SIGTERM to the processes in the files, SIGKILL to those that are still there after `limit_s`."""
    pids = []
    for file in pid_files:
        with suppress(ValueError, FileNotFoundError):
            pids.append(int(file.read_text()))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + limit_s
        while pids and time.monotonic() < end:
            pids = [pid for pid in pids if _alive(pid)]
            time.sleep(0.05)
    for file in pid_files:
        file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # one of our own children would stay a zombie
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
