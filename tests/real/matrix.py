"""Compares each cell of docs/matrix.md through the fleet with the decode engine's own answer.

    matrix.py XPYD FOLDER CONNECTOR                                    starts real engines
    matrix.py --fleet URL --engine URL [--model NAME] [--prefiller]    asks those that run; --prefiller: it makes the first token
"""

import argparse
import contextlib
import json
import re
import sys
import urllib.error
import urllib.request

from fleet import MODEL, Fleet

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ABSENT = object()
# What differs between any two answers.
IDS = re.compile(r"\b(cmpl|chatcmpl|resp|msg|chatcmpl-tool|call)[-_][0-9a-f]{8,32}")
TIMES = re.compile(r'"(created|created_at)":\d+')
OPTIONS = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

LONG = "Tell me about rivers, winter and a very old clock. " * 30
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
          "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}

# Name, fields, and what becomes of it where the decode engine, and where the prefill engine makes the first token. What the
# engine refuses is refused, whatever stands here.
CELLS = {
    COMPLETIONS: [
        ("plain", {}, "handed", "handed"),
        ("several blocks", {"prompt": LONG}, "handed", "handed"),
        ("token ids", {"prompt": [50, 60, 70, 80]}, "handed", "handed"),
        ("list of texts", {"prompt": ["one day", "two ships"]}, "alone", "alone"),
        ("lists of token ids", {"prompt": [[50, 60], [70]]}, "alone", "alone"),
        ("n", {"n": 2, "temperature": 1, "seed": 5}, "alone", "alone"),
        ("n, greedy", {"n": 2}, "alone", "alone"),
        ("best_of", {"best_of": 2}, "alone", "alone"),
        ("beam search", {"use_beam_search": True, "n": 2}, "alone", "alone"),
        ("echo", {"echo": True}, "alone", "alone"),
        ("echo with logprobs", {"echo": True, "logprobs": 2}, "alone", "alone"),
        ("echo and nothing more", {"echo": True, "max_tokens": 0}, "alone", "alone"),
        ("logprobs", {"logprobs": 3}, "handed", "alone"),
        ("prompt_logprobs", {"prompt_logprobs": 1}, "alone", "alone"),
        ("min_tokens", {"min_tokens": 10}, "handed", "alone"),
        ("max_tokens 1", {"max_tokens": 1}, "handed", "handed"),
        ("max_tokens absent", {"max_tokens": ABSENT}, "handed", "handed"),
        ("max_tokens null", {"max_tokens": None}, "handed", "handed"),
        ("max_tokens huge", {"max_tokens": 1_000_000}, "handed", "handed"),
        ("max_tokens 0", {"max_tokens": 0}, "alone", "alone"),
        ("stop", {"stop": ["e"]}, "handed", "alone"),
        ("seed", {"seed": 7, "temperature": 1}, "handed", "alone"),
        ("penalties", {"presence_penalty": 0.5, "repetition_penalty": 1.2}, "handed", "alone"),
        ("structured output", {"structured_outputs": {"choice": ["yes", "no"]}}, "handed", "alone"),
        ("json schema", {"response_format": FORMAT, "max_tokens": 60}, "handed", "alone"),
        ("return_token_ids", {"return_token_ids": True}, "handed", "alone"),
        ("truncated prompt", {"prompt": LONG, "truncate_prompt_tokens": 20}, "alone", "alone"),
        ("counts in every event", {"stream": True, "stream_options": STREAMED["stream_options"] |
                                   {"continuous_usage_stats": True}}, "handed", "alone"),
        ("a field of a later vLLM", {"a_new_field": [1.5]}, "handed", "alone"),
        ("no prompt", {"prompt": ABSENT}, "alone", "alone"),
        ("an unknown model", {"model": "other"}, "handed", "handed"),
        ("a text for a number", {"max_tokens": "7"}, "alone", "alone"),
    ],
    CHAT: [
        ("plain", {}, "handed", "handed"),
        ("turns", {"messages": [{"role": role, "content": "Hello, is it late?"} for role in
                                ("system", "user", "assistant", "user")]}, "handed", "handed"),
        ("parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "handed", "alone"),
        ("limit absent", {"max_tokens": ABSENT, "max_completion_tokens": 9}, "handed", "handed"),
        ("one token", {"max_completion_tokens": 1}, "handed", "handed"),
        ("n", {"n": 2, "temperature": 1, "seed": 3}, "alone", "alone"),
        ("logprobs", {"logprobs": True, "top_logprobs": 2}, "handed", "alone"),
        ("tools that may not be used", {"tools": [TOOL], "tool_choice": "none"}, "handed", "alone"),
        ("tools", {"tools": [TOOL], "tool_choice": "auto"}, "handed", "alone"),
        ("a tool that must be used", {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 60}, "handed", "alone"),
        ("json schema", {"response_format": FORMAT, "max_tokens": 60}, "handed", "alone"),
        ("reasoning", {"reasoning_effort": "low", "include_reasoning": False}, "handed", "alone"),
        ("template", {"chat_template_kwargs": {"enable_thinking": False}}, "handed", "alone"),
        ("stop", {"stop": ["e"]}, "handed", "alone"),
        ("messages of another kind", {"messages": "hi"}, "alone", "alone"),
    ],
    "/v1/responses": [("responses", {"input": "Tell me about salt.", "max_output_tokens": 12, "max_tokens": ABSENT},
                       "passed", "passed")],
    "/v1/messages": [("messages", {"messages": [{"role": "user", "content": "Hi"}]}, "passed", "passed")],
    "/tokenize": [("tokenize", {"prompt": "one day"}, "passed", "passed")],
    "/detokenize": [("detokenize", {"tokens": [50, 60]}, "passed", "passed")],
    "/v1/embeddings": [("embeddings", {"input": "x"}, "passed", "passed")],
}
PROMPTS = {COMPLETIONS: {"prompt": "Tell me about bread."},
           CHAT: {"messages": [{"role": "user", "content": "Tell me about bread."}]}}


def ask(base, path, body):
    """Status and body of an answer."""
    call = urllib.request.Request(base + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def normalised(answer):
    status, text = answer
    return status, TIMES.sub(r'"\1":0', IDS.sub(r"\1-ID", text))


def content(answer):
    """What an answer says, however its text was cut into events."""
    status, text = normalised(answer)
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
    return status, told, [usage for usage in rest if usage]


def outcomes(base):
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        samples = re.findall(r'^xpyd_handoff_total\{outcome="(\w+)"\} (\d+)', answer.read().decode(), re.M)
    return {outcome: int(count) for outcome, count in samples}


def counted(before, after):
    return sorted(name for name in after for _ in range(after[name] - before.get(name, 0)))


def compare(fleet, engine, model, prefiller):
    """Goes through all cells; the differences."""
    wrong, cut, total = [], [], 0
    due = {"handed": ["transferred"], "alone": ["bypassed"], "passed": []}
    for path, cells in CELLS.items():
        for name, fields, by_decoder, by_prefiller in cells:
            streams = [{}, {"stream": True}, STREAMED] if path in PROMPTS and "stream" not in fields else [{}]
            for stream in streams:
                body = {"model": model, "max_tokens": 16, "temperature": 0} | PROMPTS.get(path, {}) | stream | fields
                body = {key: value for key, value in body.items() if value is not ABSENT}
                alone, before = ask(engine, path, body), outcomes(fleet)
                through = ask(fleet, path, body)
                fate, seen = by_prefiller if prefiller else by_decoder, counted(before, outcomes(fleet))
                expected = ["refused"] if alone[0] >= 400 and fate != "passed" else due[fate]
                total += 1
                if content(through) != content(alone) or seen != expected:
                    wrong.append((path, name, stream, body, seen, expected, through, alone))
                elif normalised(through) != normalised(alone):
                    cut.append(f"{path} {name}")
    print(f"  {total} answers compared, {len(wrong)} differ; cut into other events: {cut or 'none'}", flush=True)
    return wrong


@contextlib.contextmanager
def started(xpyd, folder, connector, *settings):
    """A fleet of real engines that tell all that they can; the addresses of its proxy and of its decode engine."""
    options = json.dumps(OPTIONS)
    with Fleet(xpyd, folder, connector, (f"prefill.args={options}", f"decode.args={options}", *settings)) as fleet:
        fleet.wait_for_line("ready: every pair")
        yield fleet.proxy(), fleet.decoder()


def addresses(description):
    """The command line of a script that can ask engines that run already; None where it names none."""
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
    assert not wrong, "cells differ from the decode engine's own answers:\n" + "\n".join(map(str, wrong))


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
