"""Runs fleets over two Slurm nodes and breaks them, as the login node of cluster.sh: check.py PROGRAM FOLDER [CASE ...]

Each case ends with the same questions: has every client an answer or an error, and is any process, listener or file of shared
memory left?
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PROGRAM, FOLDER = sys.argv[1], Path(sys.argv[2])
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
NODES = {"n1": "10.77.0.11", "n2": "10.77.0.12"}
OUTSIDE = set(os.listdir("/dev/shm"))


def run(*words, check=True, timeout=60):
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=FOLDER)
    if check and done.returncode != 0:
        raise AssertionError(f"{words} ended with {done.returncode}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def until(what, condition, timeout):
    """The seconds until the condition holds."""
    begun = time.monotonic()
    while True:
        found = condition()
        if found:
            return time.monotonic() - begun
        if time.monotonic() - begun > timeout:
            raise AssertionError(f"{what}: not within {timeout} s")
        time.sleep(0.005)


class Process:
    """A process of a node, which is a host name here."""

    def __init__(self, pid):
        self.pid = pid
        self.words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        self.parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])

    def is_of(self, *words):
        return self.words[1 : 1 + len(words)] == list(words) and self.words[0] == PROGRAM


def processes():
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.append(Process(int(pid)))
        except (OSError, IndexError, ValueError):
            pass
    return found


def ours():
    return [p for p in processes() if p.words and (p.words[0] == PROGRAM or p.words[0] == "srun")]


def listeners():
    found = []
    for node in NODES:
        shown = run("nsenter", f"--net=/run/netns/{node}", "ss", "-Htln")
        found += [line for line in shown.splitlines() if re.search(r":(7[1-6]\d\d|9100|5[56]\d\d)\s", line)]
    return found


def shared_memory():
    return set(os.listdir("/dev/shm")) - OUTSIDE


class Fleet:
    """A job with two prefill and two decode engines, one of each on each node."""

    def __init__(self, *arguments, time_limit="10", drain_before="2m"):
        words = ["2p2d-nixl", "--engine", "sim", "--host", "0.0.0.0", *arguments]
        self.job = run(
            *[PROGRAM, "slurm", "submit", "--nodes", "2", "--gpus-per-node", "2"],
            *["--time", time_limit, "--drain-before", drain_before, *words],
        ).strip()
        self.output = FOLDER / f"xpyd-{self.job}.out"
        until("ready", self.is_ready, 90)

    def is_ready(self):
        assert self.is_alive(), f"the job has ended: {self.said()[-3000:]}"
        return re.search(r"^ready: ", self.said(), re.M)

    def said(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def is_alive(self):
        return bool(run("squeue", "--noheader", "--jobs", self.job, check=False).strip())

    def status(self):
        # Reads the control socket of the node that runs xpyd.
        return json.loads(run(PROGRAM, "status", "--json", "--job", self.job))

    def states(self):
        return {engine["id"]: engine["state"] for engine in self.status()["engines"]}

    def remote(self, engine):
        """The process of an engine on the other node."""
        number, role = int(engine[-1]), engine[:-1]
        port = str((7100 if role == "prefiller" else 7200) + number - 1)
        return next(p for p in processes() if p.is_of("sim") and port in p.words and p.words[p.words.index("--port") + 1] == port)

    def relay(self, engine):
        """The relay of an engine: its `srun` started the agent that is the shim's parent of the engine."""
        for relay in (p for p in processes() if p.is_of("node", "relay")):
            value = Path(f"/proc/{relay.pid}/environ").read_bytes().decode()
            if f'"id":"{engine}"' in value:
                return relay
        raise AssertionError(f"no relay of {engine}")

    def srun(self, engine):
        relay = self.relay(engine).pid
        return next(p for p in processes() if p.parent == relay and p.words[0] == "srun")

    def agent(self, engine):
        tree = {p.pid: p for p in processes()}
        process = self.remote(engine)
        while not process.is_of("node", "agent"):
            process = tree[process.parent]
        return process

    def shim(self, engine):
        return {p.pid: p for p in processes()}[self.remote(engine).parent]

    def serving(self, engine):
        # The nodes share this machine, so its control socket is also here, and no step of Slurm takes part.
        shown = run(PROGRAM, "status", "--json", check=False)
        engines = json.loads(shown)["engines"] if shown else []
        return any(found["id"] == engine and found["state"] == "ready" for found in engines)


class Clients:
    """Clients that stream without a pause, each of whose requests ends with [DONE], an error event or an HTTP error."""

    def __init__(self, count=8):
        self.right = self.errors = self.silent = self.refused = 0
        self.is_over = False
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.ask) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def ask(self):
        while not self.is_over:
            kind = self.one()
            if kind == "refused":
                time.sleep(0.2)
            with self.lock:
                setattr(self, kind, getattr(self, kind) + 1)

    def one(self):
        connection = http.client.HTTPConnection(NODES["n1"], 9100, timeout=40)
        body = {"model": MODEL, "prompt": "word " * 50, "max_tokens": 60, "stream": True}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return "refused"
        try:
            text = answer.read().decode()
        except (OSError, http.client.HTTPException):
            return "silent"
        if answer.status != 200 or '"error"' in text:
            return "errors"
        return "right" if text.endswith("data: [DONE]\n\n") else "silent"

    def end(self):
        self.is_over = True
        for thread in self.threads:
            thread.join(60)
        return f"{self.right} right, {self.errors} errors, {self.silent} cut, {self.refused} refused"


def busy_fleet(answers):
    """A fleet with clients that have this number of answers."""
    fleet, clients = Fleet(), Clients()
    until("answers", lambda: clients.right > answers, 30)
    return fleet, clients


def nothing_is_left(timeout=40):
    until("no process", lambda: not ours(), timeout)
    assert not listeners(), listeners()
    assert not shared_memory(), shared_memory()
    assert not list(FOLDER.glob("**/.xpyd-shared-*"))


def engine_case(name, victim, deadline, engine="decoder2"):
    """Breaks an engine of the other node: it leaves the view, comes back, and the others serve meanwhile."""
    fleet, clients = busy_fleet(20)
    process = victim(fleet)
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    until("it leaves the view", lambda: not fleet.serving(engine), deadline)
    noticed = time.monotonic() - begun
    back = until("it serves again", lambda: fleet.serving(engine), 60)
    answers = clients.end()
    assert clients.silent == clients.refused == 0, answers
    run(PROGRAM, "down", "--job", fleet.job, timeout=90)
    nothing_is_left()
    return f"noticed after {1e3 * noticed:.0f} ms, serves again after {back:.1f} s; {answers}"


def up_and_down():
    fleet = Fleet()
    status = fleet.status()
    nodes = {engine["id"]: engine.get("node") for engine in status["engines"]}
    assert nodes == {"prefiller1": None, "prefiller2": "n2", "decoder1": None, "decoder2": "n2"}, nodes
    assert "10.77.0.12" in run(PROGRAM, "logs", "decoder2", "--job", fleet.job)
    table = run(PROGRAM, "status", "--job", fleet.job)
    assert "n2:7201" in table, table
    clients = Clients()
    until("answers", lambda: clients.right > 40, 60)
    answers = clients.end()
    assert clients.errors == clients.silent == clients.refused == 0, answers
    begun = time.monotonic()
    said = subprocess.run([PROGRAM, "down", "--job", fleet.job], capture_output=True, text=True, timeout=90, cwd=FOLDER)
    took = time.monotonic() - begun
    assert said.returncode == 0, said
    nothing_is_left()
    assert "no process and no listener is left" in fleet.said(), fleet.said()[-500:]
    return f"{answers}; down after {took:.1f} s"


def restart_and_drain():
    fleet, clients = busy_fleet(10)
    run(PROGRAM, "restart", "decoder2", "--job", fleet.job, timeout=90)
    run(PROGRAM, "drain", "prefiller2", "--job", fleet.job, timeout=90)
    answers = clients.end()
    assert clients.errors == clients.silent == 0, answers
    assert fleet.states()["prefiller2"] == "stopped", fleet.states()
    run(PROGRAM, "down", "--job", fleet.job, timeout=90)
    nothing_is_left()
    return answers


def head_is_killed():
    fleet, clients = busy_fleet(10)
    head = next(p for p in processes() if p.is_of("up"))
    begun = time.monotonic()
    os.kill(head.pid, signal.SIGKILL)
    nothing_is_left()
    took = time.monotonic() - begun
    return f"nothing left after {took:.1f} s; {clients.end()}"


def node_is_cut_off():
    fleet, clients = busy_fleet(10)
    begun = time.monotonic()
    run("ip", "link", "set", "vn2", "down")
    try:
        until("decoder2 leaves the view", lambda: not fleet.serving("decoder2"), 30)
        noticed = time.monotonic() - begun
        until("n2 has ended its engines", lambda: not [p for p in processes() if p.is_of("node", "agent")], 30)
        ended = time.monotonic() - begun
        right = clients.right
        until("the others serve", lambda: clients.right > right + 20, 60)
    finally:
        run("ip", "link", "set", "vn2", "up")
    answers = clients.end()
    assert clients.silent == clients.refused == 0, answers
    back = until("decoder2 serves again", lambda: fleet.serving("decoder2") or not fleet.is_alive(), 120)
    run(PROGRAM, "down", "--job", fleet.job, timeout=90)
    nothing_is_left(60)
    return f"noticed after {noticed:.1f} s, engines there ended after {ended:.1f} s, back {back:.1f} s after the link; {answers}"


def cancelled():
    fleet, clients = busy_fleet(10)
    begun = time.monotonic()
    run("scancel", fleet.job)
    nothing_is_left()
    took = time.monotonic() - begun
    answers = clients.end()
    assert clients.silent == 0, answers
    return f"nothing left after {took:.1f} s; {answers}"


def time_is_over():
    fleet = Fleet(time_limit="2", drain_before="30s")
    clients = Clients()
    until("the job ends", lambda: not fleet.is_alive(), 180)
    nothing_is_left()
    assert "no process and no listener is left" in fleet.said(), fleet.said()[-500:]
    answers = clients.end()
    assert clients.silent == 0, answers
    return answers


def slurmd_is_killed():
    """Without its slurmd, a node goes on with its steps."""
    fleet = Fleet()
    daemon = next(p for p in processes() if p.words[:1] == ["slurmd"] and p.words[-1] == "n2")
    os.kill(daemon.pid, signal.SIGKILL)
    clients = Clients()
    until("answers", lambda: clients.right > 40, 60)
    answers = clients.end()
    assert clients.errors == clients.silent == clients.refused == 0, answers
    command = "hostname n2; exec slurmd -D -N n2"
    subprocess.Popen(
        ["nsenter", "--net=/run/netns/n2", "unshare", "--uts", "sh", "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run(PROGRAM, "down", "--job", fleet.job, timeout=90)
    nothing_is_left()
    return answers


CASES = {
    "up and down": up_and_down,
    "restart and drain": restart_and_drain,
    "SIGKILL of an engine": lambda: engine_case("engine", lambda fleet: fleet.remote("decoder2"), 5),
    "SIGKILL of its shim": lambda: engine_case("shim", lambda fleet: fleet.shim("decoder2"), 5),
    "SIGKILL of its agent": lambda: engine_case("agent", lambda fleet: fleet.agent("decoder2"), 5),
    "SIGKILL of srun": lambda: engine_case("srun", lambda fleet: fleet.srun("decoder2"), 5),
    "SIGKILL of its relay": lambda: engine_case("relay", lambda fleet: fleet.relay("decoder2"), 5),
    "SIGKILL of slurmd": slurmd_is_killed,
    "SIGKILL of xpyd": head_is_killed,
    "a node is cut off": node_is_cut_off,
    "scancel": cancelled,
    "time limit": time_is_over,
}


def main():
    failed = 0
    for name in sys.argv[3:] or CASES:
        begun = time.monotonic()
        try:
            result = "ok      " + CASES[name]()
        except (AssertionError, OSError, subprocess.SubprocessError, StopIteration, KeyError) as error:
            failed += 1
            result = f"FAILED  {type(error).__name__}: {error}"
            run("scancel", "--user", "root", check=False)
            time.sleep(8)
            for process in ours():
                os.kill(process.pid, signal.SIGKILL)
            for path in shared_memory():
                (Path("/dev/shm") / path).unlink(missing_ok=True)
        print(f"{name:22} {time.monotonic() - begun:5.1f} s  {result}", flush=True)
    return 1 if failed else 0


sys.exit(main())
