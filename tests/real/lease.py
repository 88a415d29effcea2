"""A decode engine hangs for longer than vLLM's own KV lease: lease.py XPYD FOLDER CONNECTOR.

The script stops its processes with SIGSTOP during two requests, lets other requests use the prefill engine's free blocks, and
continues the processes. Every answer must equal the decode engine's earlier one. With XPYD_REAL_CONTROL=1 the engines have
vLLM's default lease, and the answers must be wrong: this is what clients would get without xpyd's lease.
"""

import concurrent.futures
import json
import os
import pathlib
import signal
import sys
import time

from check import answer, counter
from fleet import MODEL, Fleet, request

# vLLM's default lease is 30 s, and xpyd ends a hung engine after two minutes.
STILL_SECONDS = 34
OTHERS = 60
# With so few blocks, the other prompts soon use those of the two requests if they are free.
BLOCKS = 40
PROMPT = "You are a geography teacher. " * 12 + "Tell me about the capital of France."


def tree(leader):
    """The compute processes of an engine: process id and name."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
                name = (entry / "comm").read_text().strip()
                if session == leader and name.startswith("VLLM::"):
                    found[int(entry.name)] = name
        except OSError:
            continue
    return found


def ask(base, stream):
    """The text of one greedy answer through the fleet."""
    return answer(base, PROMPT, chat=False, stream=stream)[0]


def fill_free_blocks(prefiller):
    """Sends other prompts to the prefill engine alone, which overwrite every free block."""
    def one(number):
        prompt = f"Number {number}. " + f"Bananas are yellow, and {number} is larger than a cow. " * 9
        request(f"{prefiller}/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 2})

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(OTHERS)))


def ask_while_hung(fleet, prefiller):
    """Returns two answers, streamed and whole, whose requests were sent while the decode engine hung."""
    processes = tree(fleet.engine("decoder1")["pid"])
    assert processes, "no process of decoder1 computes"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            asked = [pool.submit(ask, fleet.proxy(), stream) for stream in (False, True)]
            time.sleep(STILL_SECONDS)
            fill_free_blocks(prefiller)
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        print(f"  {', '.join(processes.values())} hung for {time.monotonic() - began:.0f} s", flush=True)
        return [future.result() for future in asked]


def main():
    xpyd, folder, connector = sys.argv[1:]
    if connector == "lmcache":
        print("== lmcache pushes KV and has no lease", flush=True)
        return
    is_control = os.environ.get("XPYD_REAL_CONTROL") == "1"
    arguments = {"prefill": ["--num-gpu-blocks-override", str(BLOCKS)], "decode": []}
    if is_control:
        for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
            own = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
            arguments[role] += ["--kv-transfer-config", json.dumps(own)]
    settings = [f"{role}.args={json.dumps(words)}" for role, words in arguments.items()]
    with Fleet(xpyd, folder, connector, settings) as fleet:
        fleet.wait_for_line("ready: every pair")
        engine = next(engine for engine in fleet.plan()["engines"] if engine["role"] == "prefill")
        prefiller = f"http://127.0.0.1:{engine['endpoint']['port']}"
        right = ask(fleet.decoder(), False)
        assert ask(fleet.proxy(), False) == right, "the fleet's answer differs before anything stood still"
        counters = [f"vllm:nixl_num_{name}_total" for name in ("kv_expired_reqs", "notifications_after_expiry")]
        before = [counter(prefiller, {name}) for name in counters]
        texts = ask_while_hung(fleet, prefiller)
        after = [counter(prefiller, {name}) for name in counters]
        for kind, text in zip(("whole", "streamed"), texts):
            print(f"  during the hang, {kind}: {'right' if text == right else 'WRONG'}", flush=True)
        print(f"  expired leases, late reads: {[now - then for now, then in zip(after, before)]}", flush=True)
        if is_control:
            assert texts != [right, right], "vLLM's own lease did no harm: this check proves nothing"
            print(fleet.run("status"), flush=True)
        else:
            assert texts == [right, right], "an answer was made of blocks of another request"
            assert after == before, "a lease ended"
        assert ask(fleet.proxy(), True) == right, "the fleet's answer differs afterwards"
        fleet.stop()
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
