"""Starts, checks and stops one fleet of real engines: check.py XPYD FOLDER CONNECTOR."""

import concurrent.futures
import json
import re
import sys
import uuid

from fleet import MODEL, Fleet, request

SUBJECTS = ["rivers", "winter", "a very old clock", "bread", "the moon", "engines", "salt", "maps", "rain", "a long road"]
# The lengths range from a few tokens to several KV blocks and LMCache chunks.
PROMPTS = [f"Tell me about {subject}. " * (1 + 7 * index) for index, subject in enumerate(SUBJECTS)]

# The decode engine's counters of received KV.
TRANSFERRED = {
    "nixl": {"vllm:nixl_bytes_transferred_sum"},
    "lmcache": {"vllm:external_prefix_cache_hits_total"},
    # The other counters include KV from the decode engine's own cache server.
    "lmcache-mp": {"vllm:nixl_bytes_transferred_sum"},
}


def answer(base, prompt, chat, stream, **more):
    """Text, finish reason and usage of one greedy answer."""
    body = {"model": MODEL, "temperature": 0, "max_tokens": 24} | more
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


def main():
    xpyd, folder, connector = sys.argv[1:]
    with Fleet(xpyd, folder, connector) as fleet:
        fleet.wait_for_line("ready: every pair")
        check_answers(fleet.proxy(), fleet.decoder(), connector)
        fleet.stop()
    print(f"== {connector}: passed", flush=True)


def check_answers(proxy, decoder, connector):
    names = TRANSFERRED[connector]
    unit = "tokens found in the decode engine's buffer" if connector == "lmcache" else "bytes pulled"
    kinds = [(chat, stream) for chat in (False, True) for stream in (False, True)]
    differing = []
    for chat, stream in kinds:
        kind = f"{'chat' if chat else 'completions'}, {'streamed' if stream else 'whole'}"
        before = counter(decoder, names)
        # One request at a time: a batch adds in another order than a single request, which can change greedy text.
        through = [answer(proxy, prompt, chat, stream) for prompt in PROMPTS]
        moved = counter(decoder, names) - before
        assert moved > 0, f"{kind}: the decode engine saw no KV arrive"
        for prompt, got in zip(PROMPTS, through):
            # With a salt, no cache returns the KV of the hand-off before.
            alone = answer(decoder, prompt, chat, stream, cache_salt=uuid.uuid4().hex)
            if connector == "lmcache-mp":
                # The prefill engine's cache server has the KV of an earlier prompt. With a salt, no cache has it.
                for _, _, usage in (got, alone):
                    usage["prompt_tokens_details"].pop("cached_tokens")
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
