"""Kills xpyd with SIGKILL at a moment of a fleet's life, and checks that nothing of it is left: kill.py XPYD FOLDER CONNECTOR."""

import signal
import sys
import threading
import time
import urllib.error

from fleet import MODEL, Fleet, request

EMPTY_DEADLINE_SECONDS = 60
PROMPT = "Tell me about rivers and winter. " * 60


def ask(proxy, tokens):
    """Sends a request whose response is ignored, because it ends with the fleet."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        request(f"{proxy}/v1/completions", body, stream=True)
    except (urllib.error.URLError, OSError):
        pass


def during_start(fleet):
    fleet.wait_for_line("loading weights")


def during_load(fleet):
    fleet.wait_for_line("ready: every pair")
    for _ in range(4):
        threading.Thread(target=ask, args=(fleet.proxy(), 1000), daemon=True).start()
    while "vllm:generation_tokens_total" not in request(f"{fleet.decoder()}/metrics"):
        time.sleep(0.1)
    time.sleep(3)


def during_handoff(fleet):
    fleet.wait_for_line("ready: every pair")
    threading.Thread(target=ask, args=(fleet.proxy(), 10), daemon=True).start()
    # The prefill of long prompts takes about a second here, so this is before the first byte of the decode leg.
    while "xpyd_handoffs_open 1" not in request(f"{fleet.proxy()}/metrics"):
        time.sleep(0.01)


def main():
    xpyd, folder, connector = sys.argv[1:]
    for moment in (during_start, during_load, during_handoff):
        with Fleet(xpyd, folder, connector) as fleet:
            moment(fleet)
            fleet.process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            while fleet.processes() and time.monotonic() - killed < EMPTY_DEADLINE_SECONDS:
                time.sleep(0.02)
            took = time.monotonic() - killed
            fleet.assert_nothing_is_left()
        print(f"== {connector}, SIGKILL {moment.__name__.replace('_', ' ')}: nothing is left after {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()
