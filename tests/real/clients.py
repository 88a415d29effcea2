"""Uses a fleet through real clients, and compares their results with those of the decode engine alone: clients.py XPYD FOLDER CONNECTOR.

    clients.py --fleet URL --engine URL [--model NAME]    asks running engines; needs the package `openai`, and curl
"""

import asyncio
import json
import subprocess
import sys

import openai
from fleet import MODEL, engine_key
from matrix import NAMED, TOOL, addresses, started

PROMPT = "Tell me about maps."
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"temperature": 0, "max_tokens": 16}


def failed(call):
    """Returns type and status of the exception of a call. The SDK must raise the same one for both."""
    try:
        call()
    except openai.APIStatusError as error:
        return type(error).__name__, error.status_code
    return "nothing was raised"


def synchronous(base, model):
    """Results of the synchronous client."""
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=engine_key(), max_retries=0)
    seen = {"models": [found.id for found in client.models.list()]}
    whole = client.completions.create(model=model, prompt=PROMPT, logprobs=2, **GREEDY)
    seen["completion"] = whole.choices[0].text, whole.choices[0].finish_reason, whole.choices[0].logprobs.token_logprobs
    seen["usage"] = whole.usage.to_dict()
    chat = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    seen["chat"] = chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.to_dict()
    several = client.completions.create(model=model, prompt=[PROMPT, "One day"], **GREEDY)
    seen["several"] = [choice.text for choice in several.choices]
    tools = {"tools": [TOOL], "tool_choice": "none"}
    seen["tools unused"] = client.chat.completions.create(model=model, messages=MESSAGES, **tools, **GREEDY).choices[0].message.content
    seen["tool"] = tool(client, model)
    response = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=12)
    seen["response"] = response.output_text, response.status
    events = client.responses.create(model=model, input=PROMPT, temperature=0, max_output_tokens=12, stream=True)
    seen["response streamed"] = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    seen["no such model"] = failed(lambda: client.completions.create(model="other", prompt="x"))
    seen["bad request"] = failed(lambda: client.completions.create(model=model, prompt="x", max_tokens=-1))
    seen["no such route"] = failed(lambda: client.embeddings.create(model=model, input="x"))
    return seen


def tool(client, model):
    """A required tool call, or the engine's refusal if it has no parser."""
    try:
        asked = {"tools": [TOOL], "tool_choice": NAMED, "temperature": 0, "max_tokens": 60}
        choice = client.chat.completions.create(model=model, messages=MESSAGES, **asked).choices[0]
    except openai.BadRequestError as error:
        return error.status_code
    # A random model can fail to finish its call within this number of tokens. Then there is no call.
    calls = choice.message.tool_calls or []
    return choice.finish_reason, choice.message.content, [(call.function.name, call.function.arguments) for call in calls]


def streamed(base, model):
    """Results of the synchronous client for streams. It disconnects from one of them."""
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=engine_key(), max_retries=0)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(client.completions.create(model=model, prompt=PROMPT, **usage, **GREEDY))
    assert len({event.id for event in events}) == 1, "several ids in one stream"
    seen = {"text": "".join(choice.text for event in events for choice in event.choices)}
    seen["usage"] = events[-1].usage.to_dict()
    with client.chat.completions.create(model=model, messages=MESSAGES, stream=True, max_tokens=500) as left:
        next(iter(left))
    chat = list(client.chat.completions.create(model=model, messages=MESSAGES, **usage, **GREEDY))
    seen["chat"] = "".join(choice.delta.content or "" for event in chat for choice in event.choices)
    seen["reasons"] = [choice.finish_reason for event in chat for choice in event.choices][-1]
    return seen


async def asynchronous(base, model):
    """Results of the asynchronous client for four concurrent streams with a common prefix."""
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=engine_key(), max_retries=0) as client:
        async def one(number):
            prompt = PROMPT * number
            events = await client.completions.create(model=model, prompt=prompt, stream=True, **GREEDY)
            return "".join([choice.text async for event in events for choice in event.choices])

        # One request at a time: a batch adds in another order than a single request.
        texts = [await one(number) for number in range(1, 5)]
        together = await asyncio.gather(*map(one, range(1, 5)))
        assert all(together), together
        return texts


def curl(base, model):
    """Results of curl: a whole response, a stream, a large body that waits for `100 Continue`, and a refusal."""
    def run(path, body, *options):
        command = ["curl", "-sS", "--max-time", "300", "-w", "\n%{http_code} %{content_type}", *options, base + path]
        command += ["-H", "content-type: application/json", "-H", f"authorization: Bearer {engine_key()}"]
        command += ["--data-binary", "@-"]
        done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True)
        text, _, status = done.stdout.rpartition("\n")
        return text, status

    body = {"model": model, "prompt": PROMPT, **GREEDY}
    whole, status = run("/v1/completions", body)
    seen = {"whole": (json.loads(whole)["choices"][0]["text"], status)}
    stream, status = run("/v1/completions", body | {"stream": True}, "-N")
    assert stream.rstrip().endswith("data: [DONE]"), stream[-200:]
    seen["stream"] = stream.count("data: "), status
    large, status = run("/v1/completions", body | {"user": "x" * 2_000_000}, "-H", "expect: 100-continue")
    seen["large"] = json.loads(large)["choices"][0]["text"], status
    old, status = run("/v1/completions", body, "--http1.0")
    seen["http 1.0"] = json.loads(old)["choices"][0]["text"], status
    seen["refused"] = run("/v1/completions", body | {"max_tokens": -1})[1]
    return seen


def compare(fleet, engine, model):
    for client in (synchronous, streamed, asynchronous, curl):
        through, alone = client(fleet, model), client(engine, model)
        if asyncio.iscoroutine(through):
            through, alone = asyncio.run(through), asyncio.run(alone)
        assert through == alone, f"{client.__name__}:\n  fleet  {through}\n  engine {alone}"
        print(f"  {client.__name__}: {len(through)} answers equal", flush=True)


def main():
    running = addresses(__doc__)
    if running:
        return compare(running.fleet, running.engine, running.model)
    xpyd, folder, connector = sys.argv[1:]
    with started(xpyd, folder, connector) as (proxy, decoder):
        compare(proxy, decoder, MODEL)
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
