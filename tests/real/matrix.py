"""Compares the fleet's response for each cell of docs/matrix.md with that of the decode engine alone.

    matrix.py XPYD FOLDER CONNECTOR                                    starts real engines
    matrix.py --fleet URL --engine URL [--model NAME] [--prefiller]    asks running ones; --prefiller: it makes the first token
"""

import argparse
import contextlib
import json
import pathlib
import re
import sys
import urllib.error
import urllib.request

from fleet import MODEL, Fleet, engine_key

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# The fields that differ between any two responses.
IDS = re.compile(r"\b(cmpl|chatcmpl|resp|msg|chatcmpl-tool|call)[-_][0-9a-f]{8,32}")
TIMES = re.compile(r'"(created|created_at)":\d+')
OPTIONS = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
MANNERS = [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}, COUNTED]

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
          "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}

# Name, fields, and the fates if the decode engine or the prefill engine makes the first token. A request that the engine
# refuses is refused in any case. `"-"` removes a field, and `{"of": x, "times": n}` repeats x n times.
GENERATIONS = json.loads((pathlib.Path(__file__).resolve().parent.parent / "fixtures/cells.json").read_text())
CELLS = GENERATIONS | {
    "/v1/responses": [("responses", {"input": "Tell me about salt.", "max_output_tokens": 12, "max_tokens": "-"},
                       "passed", "passed")],
    "/v1/messages": [("messages", {"messages": [{"role": "user", "content": "Hi"}]}, "passed", "passed")],
    "/tokenize": [("tokenize", {"prompt": "one day"}, "passed", "passed")],
    "/detokenize": [("detokenize", {"tokens": [50, 60]}, "passed", "passed")],
    "/v1/embeddings": [("embeddings", {"input": "x"}, "passed", "passed")],
}
PROMPTS = {COMPLETIONS: {"prompt": "Tell me about bread."},
           CHAT: {"messages": [{"role": "user", "content": "Tell me about bread."}]}}


def repeated(value):
    return value["of"] * value["times"] if isinstance(value, dict) and "times" in value else value


def ask(base, path, body):
    """Status and body of a response."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {engine_key()}"}
    call = urllib.request.Request(base + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(call, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def normalised(answer):
    status, text = answer
    return status, TIMES.sub(r'"\1":0', IDS.sub(r"\1-ID", text))


def content(answer):
    """The content of a response, however its text is split into events. A busy API server sends several tokens in one event, and
    so fewer counts if each event has one. Only the last count matters."""
    status, text = normalised(answer)
    if text.startswith('data: {"error"'):
        # A single engine has already sent 200. The proxy has not, so it returns the refusal's own status.
        refusal = json.loads(text.splitlines()[0][6:])
        return refusal["error"]["code"], json.dumps(refusal)
    if not text.startswith(("data:", "event:")):
        return status, text
    told, rest = {}, []
    for event in (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")):
        if "choices" not in event:
            rest.append(event)
        rest.append(event.get("usage"))
        for choice in event.get("choices", []):
            said = told.setdefault(choice["index"], {"text": ""})
            said["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            said["reason"] = choice["finish_reason"] or said.get("reason")
    usages = [usage for usage in rest if usage]
    if usages and all("completion_tokens" in usage for usage in usages):
        usages = usages[-1:]
    return status, told, usages


def outcomes(base):
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        samples = re.findall(r'^xpyd_handoff_total\{outcome="(\w+)"\} (\d+)', answer.read().decode(), re.M)
    seen = {outcome: int(count) for outcome, count in samples}
    # A stream without usage proves nothing.
    seen["transferred"] = seen.get("transferred", 0) + seen.pop("sent", 0)
    return seen


def counted(before, after):
    return sorted(name for name in after for _ in range(after[name] - before.get(name, 0)))


def compare(fleet, engine, model, prefiller):
    """Runs all cells, and returns the differences."""
    wrong, cut, total = [], [], 0
    due = {"handed": ["transferred"], "alone": ["bypassed"], "refused": ["refused"], "passed": []}
    for path, cells in CELLS.items():
        for name, fields, by_decoder, by_prefiller in cells:
            # Responses as long as the context take minutes on a CPU.
            manners = MANNERS[:2] if "ends" in name else MANNERS
            for stream in manners if path in PROMPTS else [{}]:
                body = {"model": model, "max_tokens": 16, "temperature": 0} | PROMPTS.get(path, {}) | stream | fields
                body = {key: repeated(value) for key, value in body.items() if value != "-"}
                # A direct request with these fields crashes the decode engine.
                harmless = {key: value for key, value in body.items() if key != "kv_transfer_params"}
                alone, before = ask(engine, path, harmless), outcomes(fleet)
                through = ask(fleet, path, body)
                fate, seen = by_prefiller if prefiller else by_decoder, counted(before, outcomes(fleet))
                if stream is COUNTED and prefiller and fate == "handed":
                    # Per-event usage includes the first token, which the first-token path cannot count.
                    fate = "alone"
                expected = ["refused"] if alone[0] >= 400 and fate != "passed" else due[fate]
                total += 1
                if content(through) != content(alone) or seen != expected:
                    wrong.append((path, name, stream, body, seen, expected, through, alone))
                elif normalised(through) != normalised(alone):
                    cut.append(f"{path} {name}")
            print(f"  {path} {name}: {total} answers compared, {len(wrong)} differ", flush=True)
    print(f"  {total} answers compared, {len(wrong)} differ; split into other events: {cut or 'none'}", flush=True)
    return wrong


@contextlib.contextmanager
def started(xpyd, folder, connector, *settings):
    """Starts a fleet of real engines with full usage reports. Yields the addresses of its proxy and of its decode engine."""
    options = json.dumps(OPTIONS)
    own = (f"prefill.args={options}", f"decode.args={options}", "vllm.max_model_len=2048")
    with Fleet(xpyd, folder, connector, (*own, *settings)) as fleet:
        fleet.wait_for_line("ready: every pair")
        yield fleet.proxy(), fleet.decoder()


def addresses(description):
    """The addresses on the command line of a script that can ask running engines; None if there are none."""
    if len(sys.argv) < 2 or not sys.argv[1].startswith("--"):
        return None
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prefiller", action="store_true")
    return parser.parse_args()


def check(*arguments):
    wrong = compare(*arguments)
    told = [f"{path} {name} {stream}: {seen}, due {expected}\n  fleet  {through}\n  engine {alone}"
            for path, name, stream, _, seen, expected, through, alone in wrong]
    assert not wrong, "cells differ from the decode engine's own answers:\n" + "\n".join(told)


def main():
    running = addresses(__doc__)
    if running:
        return check(running.fleet, running.engine, running.model, running.prefiller)
    xpyd, folder, connector = sys.argv[1:]
    with started(xpyd, folder, connector) as (proxy, decoder):
        check(proxy, decoder, MODEL, False)
    if connector == "lmcache":
        with started(xpyd, folder, connector, "lmcache.first_token=prefiller") as (proxy, decoder):
            check(proxy, decoder, MODEL, True)
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
