"""Runs one fleet of real engines through its life and checks it: check.py XPYD FOLDER CONNECTOR."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

xpyd, folder, connector = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve(), sys.argv[3]
here = pathlib.Path(__file__).resolve().parent
MODEL = "tiny"
START_DEADLINE_SECONDS = 900
STOP_DEADLINE_SECONDS = 120
SUBJECTS = ["rivers", "winter", "a very old clock", "bread", "the moon", "engines", "salt", "maps", "rain", "a long road"]
# From a few tokens to several KV blocks and LMCache chunks.
PROMPTS = [f"Tell me about {subject}. " * (1 + 7 * index) for index, subject in enumerate(SUBJECTS)]


def request(url, body=None, stream=False):
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=180) as answer:
        if not stream:
            return answer.read().decode()
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.headers["content-type"]
        return [line[6:].strip().decode() for line in answer if line.startswith(b"data: ")]


def answer(base, prompt, chat, stream):
    """Text, finish reason and usage of one greedy answer."""
    body = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    url = f"{base}/v1/chat/completions" if chat else f"{base}/v1/completions"
    if not stream:
        whole = json.loads(request(url, body))
        choice = whole["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        return text, choice["finish_reason"], whole["usage"]
    events = request(url, body | {"stream": True, "stream_options": {"include_usage": True}}, stream=True)
    assert events[-1] == "[DONE]", events[-1]
    text, reason, usage, ids = "", None, None, set()
    for event in map(json.loads, events[:-1]):
        ids.add(event["id"])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += (choice["delta"].get("content") or "") if chat else choice["text"]
            reason = choice["finish_reason"] or reason
    assert len(ids) == 1, f"several ids in one stream: {ids}"
    return text, reason, usage


def counter(base, names):
    """The sum of the samples whose name is one of `names`."""
    total = 0.0
    for line in request(f"{base}/metrics").splitlines():
        if not line.startswith("#") and re.split(r"[{ ]", line)[0] in names:
            total += float(line.rsplit(" ", 1)[1])
    return total


def processes_in(place):
    """Processes whose current folder is `place`, which everything that the run starts inherits: pid and command line."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(place):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def listeners():
    """Ports that somebody listens on."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def main():
    shared_before = set(os.listdir("/dev/shm"))
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="xpyd-real-")).resolve()
    environment = os.environ | {
        "PYTHONPATH": str(here / "site"),
        "XDG_RUNTIME_DIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LMCACHE_TRACK_USAGE": "false",
    }
    command = [str(xpyd), "up", "--profile", "cpu-1p1d", "--model", str(folder / "tiny-llama"), "--connector", connector]
    command += ["--set", f"served_model_name={MODEL}", "--set", f"vllm.program={folder}/venv/bin/vllm"]
    command += ["--set", "force_connector=true", "--logs", str(scratch / "logs")]
    print(f"== {connector}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    fleet = subprocess.Popen(command, env=environment, cwd=scratch, stderr=subprocess.PIPE, text=True)
    ready = threading.Event()

    def relay():
        for line in fleet.stderr:
            print(f"  {time.monotonic() - began:6.1f} s  {line.rstrip()}", flush=True)
            if line.startswith("ready"):
                ready.set()
        ready.set()

    relaying = threading.Thread(target=relay)
    relaying.start()
    try:
        assert ready.wait(START_DEADLINE_SECONDS) and fleet.poll() is None, f"the fleet did not get ready; logs in {scratch}"
        plan = json.loads((scratch / "logs/latest/plan.json").read_text())
        ports = {use["port"] for engine in plan["engines"] for use in engine["ports"]} | {plan["proxy"]["port"]}
        check_answers(f"http://127.0.0.1:{plan['proxy']['port']}", decode_base(plan))
        fleet.send_signal(signal.SIGINT)
        stopped = time.monotonic()
        status = fleet.wait(STOP_DEADLINE_SECONDS)
        relaying.join()
        print(f"  Ctrl+C to exit: {time.monotonic() - stopped:.1f} s, code {status}")
        assert status == 0, f"exit code {status}"
        left = processes_in(scratch)
        assert not left, f"processes are left: {left}"
        assert not ports & listeners(), f"listeners are left: {ports & listeners()}"
        shared = set(os.listdir("/dev/shm")) - shared_before
        assert not shared, f"files in /dev/shm are left: {shared}"
    finally:
        if fleet.poll() is None:
            fleet.kill()
            fleet.wait()
    print(f"== {connector}: passed", flush=True)


def decode_base(plan):
    engine = next(engine for engine in plan["engines"] if engine["role"] == "decode")
    return f"http://127.0.0.1:{engine['endpoint']['port']}"


def check_answers(proxy, decoder):
    names = {
        "nixl": {"vllm:nixl_bytes_transferred_sum"},
        "lmcache": {"vllm:external_prefix_cache_hits_total"},
    }[connector]
    unit = {"nixl": "bytes pulled", "lmcache": "tokens found in the decode engine's buffer"}[connector]
    kinds = [(chat, stream) for chat in (False, True) for stream in (False, True)]
    differing = []
    for chat, stream in kinds:
        kind = f"{'chat' if chat else 'completions'}, {'streamed' if stream else 'whole'}"
        before = counter(decoder, names)
        # One at a time: the order of additions in a batch is not that of a single request, and greedy text may turn on it.
        through = [answer(proxy, prompt, chat, stream) for prompt in PROMPTS]
        moved = counter(decoder, names) - before
        assert moved > 0, f"{kind}: the decode engine saw no KV arrive"
        for prompt, got in zip(PROMPTS, through):
            alone = answer(decoder, prompt, chat, stream)
            if got != alone:
                differing.append((kind, prompt[:40], got, alone))
        print(f"  {kind}: {len(PROMPTS)} answers compared; {moved:.0f} {unit}", flush=True)
    before = counter(decoder, names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: answer(proxy, prompt, False, True), PROMPTS))
    assert all(reason in ("length", "stop") for _, reason, _ in together), together
    moved = counter(decoder, names) - before
    print(f"  four at a time: {len(together)} whole answers; {moved:.0f} {unit}", flush=True)
    assert moved > 0
    assert not differing, "answers differ from the decode engine's own:\n" + "\n".join(map(str, differing))


if __name__ == "__main__":
    main()
