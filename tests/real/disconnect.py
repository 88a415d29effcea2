"""Clients disconnect at every moment of a hand-off, and no KV must be left: disconnect.py XPYD FOLDER CONNECTOR."""

import http.client
import json
import random
import sys
import threading
import time
import urllib.parse

from check import TRANSFERRED, answer, counter
from fleet import MODEL, Fleet

CLIENTS = 24
LONGEST_STAY_SECONDS = 3.0
# A NIXL lease ends by itself only after 16 minutes, so all KV must be freed before.
SETTLED_WITHIN_SECONDS = 40
# Room for eight of the prompts below: if every third client leaked, later hand-offs would find a full buffer.
SMALL_BUFFER = "16MiB"


def disconnect(base, number, stay):
    """Sends a unique prompt, and disconnects after `stay` seconds."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(base).netloc, timeout=stay)
    prompt = f"Number {number}. " + "Tell me about the sea. " * 150
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 200, "stream": bool(number % 2), "ignore_eos": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        connection.getresponse().read()
    except (TimeoutError, OSError):
        pass
    finally:
        connection.close()


def held_kv(fleet, prefiller, connector):
    """Describes the KV that is still held; empty if there is none."""
    held = {
        "hand-offs open": counter(fleet.proxy(), {"xpyd_handoffs_open"}),
        "requests in flight": counter(fleet.proxy(), {"xpyd_requests_in_flight"}),
        "requests on the decode engine": counter(fleet.decoder(), {"vllm:num_requests_running"}),
    }
    if connector == "nixl":
        held["KV on the prefill engine"] = counter(prefiller, {"vllm:kv_cache_usage_perc"})
    return {name: amount for name, amount in held.items() if amount}


def check_disconnects(fleet, connector):
    """Lets clients of one fleet disconnect, and checks that no KV is left."""
    random.seed(4)
    engine = next(engine for engine in fleet.plan()["engines"] if engine["role"] == "prefill")
    prefiller = f"http://127.0.0.1:{engine['endpoint']['port']}"
    expired_before = counter(prefiller, {"vllm:nixl_num_kv_expired_reqs_total"})
    stays = [random.uniform(0.05, LONGEST_STAY_SECONDS) for _ in range(CLIENTS)]
    # Three at a time, so that hand-offs overlap, and a small machine still makes progress.
    for first in range(0, CLIENTS, 3):
        together = [
            threading.Thread(target=disconnect, args=(fleet.proxy(), number, stays[number]))
            for number in range(first, first + 3)
        ]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
    last = time.monotonic()
    while held := held_kv(fleet, prefiller, connector):
        assert time.monotonic() - last < SETTLED_WITHIN_SECONDS, f"still held: {held}"
        time.sleep(0.2)
    print(f"  {CLIENTS} clients disconnected; no KV is held {time.monotonic() - last:.1f} s after the last one", flush=True)
    if connector == "nixl":
        expired = counter(prefiller, {"vllm:nixl_num_kv_expired_reqs_total"}) - expired_before
        print(f"  expired leases: {expired:.0f} of {CLIENTS}", flush=True)
        assert expired == 0, "KV was freed by its lease only"
    cleanups = counter(fleet.proxy(), {"xpyd_handoff_cleanups_total"})
    print(f"  cleanups: {cleanups:.0f}", flush=True)
    before = counter(fleet.decoder(), TRANSFERRED[connector])
    prompt = "And now about the land. " * 150
    got = answer(fleet.proxy(), prompt, chat=False, stream=True)
    moved = counter(fleet.decoder(), TRANSFERRED[connector]) - before
    assert moved > 0, "the next hand-off found no room"
    assert got == answer(fleet.decoder(), prompt, chat=False, stream=True), got
    print(f"  the next answer is right, and {moved:.0f} of its KV transferred", flush=True)


def settings_for(connector):
    if connector == "lmcache":
        return [f'lmcache.decode_buffer="{SMALL_BUFFER}"', 'deadlines.handoff="8s"']
    return []


def main():
    xpyd, folder, connector = sys.argv[1:]
    with Fleet(xpyd, folder, connector, settings_for(connector)) as fleet:
        fleet.wait_for_line("ready: every pair")
        check_disconnects(fleet, connector)
        fleet.stop()
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
