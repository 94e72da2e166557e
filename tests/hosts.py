"""Hosts of a network, on this machine: each has its own name, address, loopback and processes.

A host is a set of Linux namespaces that its first process keeps. That one reads from a pipe, so it
ends with the process that made it, however that ends; the kernel then ends all others of the host,
and takes its interfaces away. A switch between the hosts is one more namespace of the network.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import processes

TOOLS = ("ip", "nsenter", "unshare", "mount", "hostname", "sh")
PORT = 29500  # of the meeting point, on the first host that is left
ALL = ("--net", "--uts", "--mount", "--pid")


def why_not(tool=""):
    """Why there can be no hosts here, or links that need `tool`; "" if there can be."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux, and root, for namespaces"
    if missing := [name for name in (*TOOLS, *filter(None, [tool])) if shutil.which(name) is None]:
        return f"needs {', '.join(missing)}"
    done = subprocess.run(
        ["unshare", *ALL, "--fork", "--mount-proc", "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"needs namespaces and veth: {done.stderr.strip()}" if done.returncode else ""


class Hosts:
    """So many hosts, host0, host1, ..., in a `with`; skip with `why_not` before."""

    def __init__(self, count):
        self.count = count
        self.names = [f"host{k}" for k in range(count)]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            known = "".join(f"10.77.0.{k + 1} {name}\n" for k, name in enumerate(self.names))
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + known)
            mount = f"mount --bind {shlex.quote(str(folder / 'hosts'))} /etc/hosts"
            self.switch = self._hold(stack, ["unshare", "--net"], "ip link add hub type bridge")
            self._in_switch("ip link set hub up")
            isolated = ["unshare", *ALL, "--fork", "--mount-proc", "--kill-child"]
            self.firsts = []
            for k, name in enumerate(self.names):
                holder = self._hold(stack, isolated, f"hostname {name} && {mount}")
                children = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
                self.firsts.append(int(children[0]))
                self._in_switch(f"ip link add port{k} type veth peer name eth0 netns {children[0]}")
                self._in_switch(f"ip link set port{k} master hub up")
                for line in (f"addr add 10.77.0.{k + 1}/24 dev eth0", "link set eth0 up"):
                    self._ip(k, line)
                self._ip(k, "link set lo up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    @staticmethod
    def _hold(stack, unshare, prepare):
        """A process in new namespaces that stays while this one does: its number."""
        command = [*unshare, "sh", "-c", f"{prepare} && echo ready && exec cat"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        p = subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL, text=True)
        stack.callback(Hosts._release, p)
        assert p.stdout.readline() == "ready\n"
        return p.pid

    @staticmethod
    def _release(p):
        p.stdin.close()
        p.wait()
        p.stdout.close()

    def _in_switch(self, line):
        self._run(["nsenter", "--target", str(self.switch), "--net", *line.split()])

    def _ip(self, k, line):
        self._run(["nsenter", "--target", str(self.firsts[k]), "--net", "ip", *line.split()])

    @staticmethod
    def _run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout

    # What happens on hosts ------------------------------------------------------------------------

    def start(self, k, command, **environment):
        """A command on host k, as a `processes.Child`."""
        enter = ["nsenter", "--target", str(self.firsts[k]), *ALL, f"--wdns={os.getcwd()}"]
        return processes.Child([*enter, *command], env=processes.environment() | environment)

    def torchrun(self, command, per_node=1, options=(), **environment):
        """torchrun of a script and its arguments on all hosts that are left: a child for each."""
        options = [
            *("--nnodes", str(len(self.alive)), "--nproc-per-node", str(per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.names[self.alive[0]]}:{PORT}"),
            *("--rdzv-id", "twa", *options),
        ]
        run = [sys.executable, "-m", "torch.distributed.run", *options, *command]
        return [self.start(k, run, **environment) for k in self.alive]

    @property
    def alive(self):
        """Numbers of the hosts that are not killed."""
        return [k for k, first in enumerate(self.firsts) if first]

    def kill(self, k):
        """Ends a host with all of its processes, and its interface."""
        os.kill(self.firsts[k], 9)
        self.firsts[k] = 0

    def cut(self, k):
        """Takes the plug of host k out of the switch."""
        self._in_switch(f"ip link set port{k} down")

    def mend(self, k):
        """Puts it back."""
        self._in_switch(f"ip link set port{k} up")

    def slow(self, k, *discipline):
        """A queueing discipline on the way to host k; OSError where the kernel has none such."""
        self._in_switch(f"tc qdisc add dev port{k} root {' '.join(discipline)}")

    def sent(self, k):
        """Bytes that have left host k."""
        at = ["nsenter", "--target", str(self.firsts[k]), "--net", "cat", "/proc/net/dev"]
        line = next(line for line in self._run(at).splitlines() if "eth0:" in line)
        return int(line.split()[9])
