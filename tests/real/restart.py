"""Restarts, kills and hangs engines of one fleet under load: restart.py XPYD FOLDER CONNECTOR.

With two prefill engines and one decode engine, a restarted prefill engine meets a busy decode engine, and a restarted decode
engine meets prefill engines that knew its previous incarnation.
"""

import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.error

from check import PROMPTS, TRANSFERRED, counter
from fleet import MODEL, Fleet, request

BACK_DEADLINE_SECONDS = 900
STALL_SECONDS = 20
CLIENTS = 2
SETTINGS = ("prefill.count=2", f"deadlines.stall={STALL_SECONDS}s", "restart.max_restarts=20")
# The largest difference in log probability that rounding can reverse, as in the canary.
NEAR_TIE = 0.5


def body(prompt, **more):
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 16} | more


class Reference:
    """The answers of the decode engine alone, with the tokens that were nearly as likely."""

    def __init__(self, decoder, prompt):
        choice = json.loads(request(f"{decoder}/v1/completions", body(prompt, logprobs=5)))["choices"][0]
        self.text, self.logprobs = choice["text"], choice["logprobs"]

    def verdict(self, text):
        """Returns `equal`, `near tie` if rounding can decide, or `wrong`."""
        if text == self.text:
            return "equal"
        so_far = ""
        for token, best, others in zip(*(self.logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs"))):
            if not text.startswith(so_far + token):
                near = [other for other, logprob in others.items() if logprob >= best - NEAR_TIE]
                return "near tie" if any(text.startswith(so_far + other) for other in near) else "wrong"
            so_far += token
        return "wrong"


class Load:
    """Clients that send requests all the time. Each answer is checked at once."""

    def __init__(self, proxy, references):
        self.proxy, self.references, self.done = proxy, references, threading.Event()
        self.counts, self.wrong = {"equal": 0, "near tie": 0, "refused": 0}, []
        self.threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(CLIENTS)]

    def ask(self, number):
        for prompt in itertools.islice(itertools.cycle(self.references), number, None):
            if self.done.is_set():
                return
            try:
                events = request(f"{self.proxy}/v1/completions", body(prompt, stream=True), stream=True)
            except urllib.error.HTTPError as error:
                self.judge("refused" if error.code >= 500 and "error" in json.loads(error.read()) else f"{error}")
                self.done.wait(0.5)
                continue
            except OSError as error:
                self.judge(f"no answer: {error!r}")
                continue
            self.judge(self.verdict(prompt, events))

    def verdict(self, prompt, events):
        if events[-1:] != ["[DONE]"]:
            return f"a silent end after {events[-1:]}"
        whole = [json.loads(event) for event in events[:-1]]
        if any("error" in event for event in whole):
            return "refused"
        text = "".join(choice["text"] for event in whole for choice in event["choices"])
        verdict = self.references[prompt].verdict(text)
        return verdict if verdict in self.counts else f"{prompt[:30]!r}: {text!r} and not {self.references[prompt].text!r}"

    def judge(self, verdict):
        if verdict in self.counts:
            self.counts[verdict] += 1
        else:
            self.wrong.append(verdict)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        for thread in self.threads:
            thread.join()


def tree(leader):
    """The names of an engine's processes, by process id and start time, so that a reused id is recognised."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                # The fields after the name, which can contain any character: state, parent, group, session, and the start time as 20th.
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == leader:
                    found[int(entry.name), fields[19]] = (entry / "comm").read_text().strip()
        except OSError:
            continue
    return found


def alive(process):
    try:
        return pathlib.Path(f"/proc/{process[0]}/stat").read_text().rsplit(")", 1)[1].split()[19] == process[1]
    except OSError:
        return False


def member(name):
    """The process of an engine's tree whose name starts with this text."""
    def find(processes):
        return next(process[0] for process, comm in processes.items() if comm.startswith(name))

    return find


def shared_memory(processes):
    """The files in /dev/shm that these processes have mapped."""
    used = set()
    for pid, _ in processes:
        try:
            lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        used |= {line[line.index("/dev/shm/"):].split()[0] for line in lines if "/dev/shm/" in line}
    return {path for path in used if os.path.exists(path)}


def to_leader(number):
    return lambda fleet, engine, processes: os.kill(engine["pid"], number)


def to_member(number, name):
    """Sends a signal to the process of the engine's tree whose name starts with this text."""
    def act(fleet, engine, processes):
        os.kill(next(process[0] for process, known in processes.items() if known.startswith(name)), number)

    return act


def ask_for_restart(fleet, engine, processes):
    fleet.run("restart", engine["id"], "--force")


STEPS = [
    ("xpyd restart", ask_for_restart),
    ("SIGKILL of the API server", to_leader(signal.SIGKILL)),
    ("SIGKILL of EngineCore", to_member(signal.SIGKILL, "VLLM::EngineCor")),
    ("SIGSTOP of a worker", to_member(signal.SIGSTOP, "VLLM::Worker")),
]


def wait_until_back(fleet, name, incarnation):
    """Waits until the next incarnation is ready, and prints each change with its time."""
    began, seen = time.monotonic(), {}
    while time.monotonic() - began < BACK_DEADLINE_SECONDS:
        engine = fleet.engine(name)
        assert engine["incarnation"] <= incarnation + 1, f"{name} started more than once: {engine}"
        assert engine["state"] != "failed", engine
        if engine["incarnation"] > incarnation or engine["state"] != "ready":
            seen.setdefault(engine["state"], time.monotonic() - began)
            if engine["state"] == "ready":
                return ", ".join(f"{state} after {took:.1f} s" for state, took in seen.items())
        time.sleep(0.1)
    raise AssertionError(f"{name} did not come back: {engine}; logs in {fleet.place}")


def step(fleet, what, name, act, references, connector):
    before = fleet.engine(name)
    old = tree(before["pid"])
    files = shared_memory(old)
    assert len(old) >= 3, f"not an API server, EngineCore and a worker: {old}"
    acting = threading.Thread(target=act, args=(fleet, before, old))
    acting.start()
    times = wait_until_back(fleet, name, before["incarnation"])
    acting.join()
    left = [process for process in old if alive(process)]
    assert not left, f"{what} {name}: of the old incarnation are left {left}"
    leaked = {path for path in files if os.path.exists(path)}
    assert not leaked, f"{what} {name}: files of the old incarnation are left: {leaked}"
    moved_before = counter(fleet.decoder(), TRANSFERRED[connector])
    verdicts = []
    for prompt, reference in references.items():
        whole = json.loads(request(f"{fleet.proxy()}/v1/completions", body(prompt)))
        verdicts.append(reference.verdict(whole["choices"][0]["text"]))
    moved = counter(fleet.decoder(), TRANSFERRED[connector]) - moved_before
    print(f"  {what}, {name}: {times}; {verdicts.count('equal')} of {len(verdicts)} equal, {moved:.0f} moved", flush=True)
    assert "wrong" not in verdicts, f"{what}, {name}: {verdicts}"
    assert moved > 0, f"{what}, {name}: no KV moved"


def main():
    xpyd, folder, connector = sys.argv[1:]
    with Fleet(xpyd, folder, connector, SETTINGS) as fleet:
        fleet.wait_for_line("ready: every pair")
        references = {prompt: Reference(fleet.decoder(), prompt) for prompt in PROMPTS[::2]}
        with Load(fleet.proxy(), references) as load:
            for what, act in STEPS:
                for name in ("decoder1", "prefiller1"):
                    step(fleet, what, name, act, references, connector)
        print(f"  load: {load.counts}, wrong: {load.wrong}", flush=True)
        assert not load.wrong, load.wrong
        fleet.stop()
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
