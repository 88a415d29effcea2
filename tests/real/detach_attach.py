"""Kills xpyd with SIGKILL under load, and lets another one attach to its engines: detach_attach.py XPYD FOLDER CONNECTOR."""

import json
import signal
import sys
import threading
import time

from check import PROMPTS, TRANSFERRED, counter
from fleet import Fleet, request
from kill import ask
from restart import Reference, body, wait_until_back

STREAMS = 3


def check(fleet, references, connector, when):
    """Checks that every answer is right and that KV was transferred."""
    before = counter(fleet.decoder(), TRANSFERRED[connector])
    answers = [json.loads(request(f"{fleet.proxy()}/v1/completions", body(prompt))) for prompt in references]
    verdicts = [
        reference.verdict(answer["choices"][0]["text"]) for reference, answer in zip(references.values(), answers)
    ]
    moved = counter(fleet.decoder(), TRANSFERRED[connector]) - before
    print(f"  {when}: {verdicts.count('equal')} of {len(verdicts)} answers equal, {moved:.0f} moved", flush=True)
    assert "wrong" not in verdicts and moved > 0, f"{when}: {verdicts}, {moved} moved"


def kill_under_load(fleet):
    for _ in range(STREAMS):
        threading.Thread(target=ask, args=(fleet.proxy(), 500), daemon=True).start()
    time.sleep(3)
    fleet.process.send_signal(signal.SIGKILL)
    fleet.process.wait()
    fleet.relaying.join()


def main():
    xpyd, folder, connector = sys.argv[1:]
    with Fleet(xpyd, folder, connector, ("deadlines.keep=10m",)) as fleet:
        fleet.wait_for_line("ready: every pair")
        references = {prompt: Reference(fleet.decoder(), prompt) for prompt in PROMPTS[::2]}
        check(fleet, references, connector, "before")
        engines = [fleet.engine(name)["pid"] for name in ("prefiller1", "decoder1")]
        kill_under_load(fleet)
        fleet.up()
        fleet.wait_for_line("ready: every pair")
        print(f"  attached and ready after {time.monotonic() - fleet.began:.1f} s", flush=True)
        assert engines == [fleet.engine(name)["pid"] for name in ("prefiller1", "decoder1")], "other engines"
        check(fleet, references, connector, "attached")
        fleet.run("restart", "decoder1", "--force")
        print(f"  decoder1: {wait_until_back(fleet, 'decoder1', 1)}", flush=True)
        check(fleet, references, connector, "decoder1 restarted by the second xpyd")
        kill_under_load(fleet)
        began = time.monotonic()
        fleet.run("down")
        print(f"  down without an xpyd: {time.monotonic() - began:.1f} s", flush=True)
        fleet.assert_nothing_is_left()
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
