"""A private Slurm: its configuration files and its daemons."""

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
    """Return the programs that a private cluster needs and this machine lacks."""
    path = os.environ["PATH"] + os.pathsep + SBIN
    needed = NEEDED + ACCOUNTING if accounting else NEEDED
    return [name for name in needed if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Cluster:
    """A cluster of `nodes` slurmds. `folder` holds its configuration, state, logs and pid files."""

    folder: Path
    nodes: int = 3
    gpus: int = 2  # per node; they are fake: character devices that nobody opens
    cpus: int = 4  # per node, whatever the host has
    mem_mb: int = 8000
    accounting: bool = True
    prefix: str = "n"  # of the nodes' names

    @property
    def env(self) -> dict[str, str]:
        """The variables that make a process talk to this cluster and to no other."""
        path = os.environ["PATH"]
        if SBIN not in path:
            path += os.pathsep + SBIN
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
            "MYSQL_UNIX_PORT": str(self.folder / "mysql.sock"),  # read by slurmdbd's client library
        }

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of this cluster and return its output.

        Raises UserError with the command's message if it fails.
        """
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True)
        if check and done.returncode:
            reason = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
            raise UserError(f"{' '.join(command)}: {reason}; the logs are in {self.folder}")
        return done.stdout

    # ---- start

    def start(self) -> None:
        """Write the configuration, start the daemons, wait until every node is idle.

        Raises UserError if a program is missing.
        """
        if absent := missing(self.accounting):
            packages = "slurmctld slurmd slurm-client munge"
            if self.accounting:
                packages += " slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core"
            names = ", ".join(absent)
            raise UserError(f"{names}: not installed; apt-get install --no-install-recommends {packages}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir(exist_ok=True)
        self._write_configuration()
        self._name_nodes()
        folder = self.folder
        self.run(
            "munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        if self.accounting:
            self._start_accounting()
        self.run("slurmctld")
        for node in range(1, self.nodes + 1):
            self.start_node(f"{self.prefix}{node}")
        self._wait(lambda: len(self._idle_nodes()) == self.nodes, "idle nodes")

    def _idle_nodes(self) -> list[str]:
        listing = self.run("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N", check=False)
        return listing.split()

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node, also after a failure."""
        self.run("slurmd", "-N", name)

    def pid(self, daemon: str) -> int:
        """Return the process number of a daemon, for example of `slurmd.n2`."""
        return int((self.folder / f"{daemon}.pid").read_text())

    def _write_configuration(self) -> None:
        folder = self.folder
        is_root = os.getuid() == 0
        host = socket.gethostname().split(".")[0]
        user = getpass.getuser()
        dbd_port = free_port()
        freezer = Path("/sys/fs/cgroup/freezer")
        proctrack = "cgroup" if is_root and os.access(freezer, os.W_OK) else "pgid"
        names = f"{self.prefix}[1-{self.nodes}]"
        devices = f"{self._devices(is_root)}[0-{self.gpus - 1}]"
        files = {
            "cgroup.conf": "CgroupMountpoint=/sys/fs/cgroup\nCgroupPlugin=cgroup/v1\n",
            "gres.conf": f"NodeName={names} Name=gpu File={devices} Flags=nvidia_gpu_env\n",
            "slurmdbd.conf": DBD.format(folder=folder, host=host, user=user, port=dbd_port),
        }
        lines = [
            CONF.format(folder=folder, host=host, user=user, port=free_port(), proctrack=proctrack),
        ]
        if self.accounting:
            lines.append(ACCOUNTING_CONF.format(folder=folder, port=dbd_port))
        for node in range(1, self.nodes + 1):
            where = f"NodeName={self.prefix}{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(
                f"{where} CPUs={self.cpus} RealMemory={self.mem_mb} Gres=gpu:{self.gpus} State=UNKNOWN\n"
            )
        lines.append(PARTITIONS.format(nodes=names))
        files["slurm.conf"] = "".join(lines)
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)
        if not (folder / "munge.key").exists():
            (folder / "munge.key").write_bytes(os.urandom(128))
            (folder / "munge.key").chmod(0o400)

    def _devices(self, is_root: bool) -> str:
        if not is_root:
            return "/dev/tty"
        for number in range(self.gpus):
            with suppress(FileExistsError):
                os.mknod(self.folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        return str(self.folder / "nvidia")

    def _name_nodes(self) -> None:
        """Make the nodes' names resolve, by a line in /etc/hosts: ranks meet at the first one."""
        names = [f"{self.prefix}{node}" for node in range(1, self.nodes + 1)]
        if os.access(HOSTS, os.W_OK):
            self._edit_hosts(f"127.0.0.1 {' '.join(names)}")
        elif set(names) - set(HOSTS.read_text().split()):
            raise UserError(
                f"{HOSTS}: does not name the nodes {', '.join(names)}; "
                f"as root, add the line '127.0.0.1 {' '.join(names)}' once"
            )

    def _edit_hosts(self, line: str) -> None:
        """Replace this cluster's line. Other clusters' lines stay."""
        mark = f"# dev_slurm {self.folder}"
        with locked(HOSTS), open(HOSTS, "r+") as hosts:
            kept = [other for other in hosts.read().splitlines() if not other.endswith(mark)]
            if line:
                kept.append(f"{line} {mark}")
            hosts.seek(0)
            hosts.truncate()
            hosts.write("\n".join(kept).rstrip("\n") + "\n")

    def _start_accounting(self) -> None:
        folder = self.folder
        data = folder / "mysql"
        sock = folder / "mysql.sock"
        base = ["--no-defaults", f"--user={getpass.getuser()}", f"--datadir={data}"]
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
        grant = (
            "create user if not exists slurm@localhost identified by 'slurm'; "
            "grant all on slurm_acct_db.* to slurm@localhost;"
        )
        self.run(*sql, f"create database if not exists slurm_acct_db; {grant}")
        self.run("slurmdbd")
        self._wait(self._is_registered, "slurmdbd")

    def _is_registered(self) -> bool:
        """Tell whether slurmdbd knows the cluster; if not, ask it to add the cluster."""
        known = self.run("sacctmgr", "-n", "list", "cluster", "format=cluster", check=False)
        if "lab" in known:
            return True
        self.run("sacctmgr", "-i", "add", "cluster", "lab", check=False)
        return False

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_LIMIT_S
        while not condition():
            if time.monotonic() > end:
                raise UserError(
                    f"{what}: not there after {START_LIMIT_S:.0f} s; see the logs in {self.folder}"
                )
            time.sleep(0.05)

    # ---- stop

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, and remove our line from /etc/hosts."""
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "--me", check=False)
            end = time.monotonic() + 10
            while self._has_active_jobs() and time.monotonic() < end:
                time.sleep(0.1)
        for daemons in (["slurmd.*.pid", "slurmctld.pid"], ["slurmdbd.pid"], ["mariadb.pid", "munged.pid"]):
            end_processes([file for pattern in daemons for file in self.folder.glob(pattern)])
        groups = Path("/sys/fs/cgroup/freezer").glob(f"slurm_{self.prefix}[0-9]*/**/")
        for group in sorted(groups, reverse=True):
            with suppress(OSError):
                group.rmdir()
        if os.access(HOSTS, os.W_OK):
            self._edit_hosts("")

    def _has_active_jobs(self) -> bool:
        return bool(self.run("squeue", "-h", "--me", "-t", "R,CG,S", check=False).strip())


def end_processes(pid_files: list[Path], limit_s: float = 15.0) -> None:
    """Send SIGTERM to the processes named in the files, and SIGKILL after `limit_s`."""
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
        os.waitpid(pid, os.WNOHANG)  # otherwise a child of ours would stay a zombie
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
