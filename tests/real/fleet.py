"""One fleet of real engines: start by xpyd in a separate folder, requests over HTTP, and a search for leftovers."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
MODEL = "tiny"
START_DEADLINE_SECONDS = 900
STOP_DEADLINE_SECONDS = 120


# The key of the engines, which xpyd generates for each run. The proxy needs none and ignores it.
engine_key_file = None


def engine_key():
    """The key of the engines of the current run; any text if there is none."""
    return engine_key_file.read_text().strip() if engine_key_file and engine_key_file.exists() else "none"


def request(url, body=None, stream=False):
    """The body of a response, or the data of its events."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {engine_key()}"}
    call = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(call, timeout=900) as answer:
        if not stream:
            return answer.read().decode()
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.headers["content-type"]
        return [line[6:].strip().decode() for line in answer if line.startswith(b"data: ")]


class Fleet:
    """`xpyd up --profile cpu-1p1d` on real vLLM, with optional further settings."""

    def __init__(self, xpyd, folder, connector, settings=(), model="tiny-llama"):
        self.xpyd, folder = pathlib.Path(xpyd).resolve(), pathlib.Path(folder).resolve()
        self.shared_before = set(os.listdir("/dev/shm"))
        # Every process of the run inherits this working directory, by which the script finds it.
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="xpyd-real-")).resolve()
        global engine_key_file
        engine_key_file = self.place / "xpyd/default/engine-key"
        self.environment = os.environ | {
            "PYTHONPATH": str(HERE / "site"),
            "XDG_RUNTIME_DIR": str(self.place),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "LMCACHE_TRACK_USAGE": "false",
        }
        self.command = [str(self.xpyd), "up", "--profile", "cpu-1p1d", "--connector", connector]
        self.command += ["--model", str(folder / model), "--logs", str(self.place / "logs")]
        own = (f"served_model_name={MODEL}", f"vllm.program={folder}/venv/bin/vllm", "force_connector=true")
        for override in (*own, *settings):
            self.command += ["--set", override]
        self.command += ["--set", f"port_offset={self.free_offset()}"]
        print(f"== {connector}: {' '.join(self.command)}", flush=True)
        self.up()

    def free_offset(self):
        """The port offset at which no port of the profile has a listener."""
        plan = json.loads(self.run("plan", *self.command[2:], "--json"))["plan"]
        ports, taken = ports_of(plan), listeners()
        return next(offset for offset in range(0, 20_000, 100) if not taken & {port + offset for port in ports})

    def up(self):
        """Starts the first xpyd of the run, or another one after it."""
        self.began = time.monotonic()
        environment = self.environment
        self.process = subprocess.Popen(self.command, env=environment, cwd=self.place, stderr=subprocess.PIPE, text=True)
        self.lines, self.changed = [], threading.Condition()
        self.relaying = threading.Thread(target=self.relay)
        self.relaying.start()

    def relay(self):
        for line in self.process.stderr:
            print(f"  {time.monotonic() - self.began:6.1f} s  {line.rstrip()}", flush=True)
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.lines.append("(end)")
            self.changed.notify_all()

    def wait_for_line(self, text):
        """Waits until xpyd has printed a line with `text`."""
        def seen():
            return any(text in line or line == "(end)" for line in self.lines)

        with self.changed:
            came = self.changed.wait_for(seen, START_DEADLINE_SECONDS) and any(text in line for line in self.lines)
        assert came, f"no line with {text!r}; logs in {self.place}"

    def run(self, *arguments):
        """Runs another xpyd command for this run, and returns its output."""
        command = [str(self.xpyd), *arguments]
        done = subprocess.run(command, env=self.environment, cwd=self.place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"xpyd {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}"
        return done.stdout

    def engine(self, name):
        """The entry of one engine in `xpyd status`."""
        engines = json.loads(self.run("status", "--json"))["engines"]
        return next(engine for engine in engines if engine["id"] == name)

    def plan(self):
        return json.loads((self.place / "logs/latest/plan.json").read_text())

    def proxy(self):
        return f"http://127.0.0.1:{self.plan()['proxy']['port']}"

    def decoder(self):
        engine = next(engine for engine in self.plan()["engines"] if engine["role"] == "decode")
        return f"http://127.0.0.1:{engine['endpoint']['port']}"

    def ports(self):
        return ports_of(self.plan())

    def processes(self):
        """The processes of the run: process id and command line."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.place):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace").strip()
            except OSError:
                continue
        return found

    def stop(self):
        """Sends Ctrl+C, and checks that nothing of the run is left."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(STOP_DEADLINE_SECONDS)
        print(f"  Ctrl+C to exit: {time.monotonic() - began:.1f} s, code {status}")
        assert status == 0, f"exit code {status}"
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self):
        left = self.processes()
        assert not left, f"processes are left: {left}"
        listening = self.ports() & listeners()
        assert not listening, f"listeners are left: {listening}"
        # All processes of this run are gone, so shared memory in use belongs to another program.
        shared = set(os.listdir("/dev/shm")) - self.shared_before - shared_in_use()
        assert not shared, f"files in /dev/shm are left: {shared}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.relaying.join()


def ports_of(plan):
    return {use["port"] for engine in plan["engines"] for use in engine["ports"]} | {plan["proxy"]["port"]}


def shared_in_use():
    """Files in /dev/shm that processes have mapped or open."""
    names = set()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            mapped = [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
            opened = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        names |= {path.strip().removeprefix("/dev/shm/") for path in mapped + opened if path.startswith("/dev/shm/")}
    return names


def listeners():
    """Ports with a listener."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports
