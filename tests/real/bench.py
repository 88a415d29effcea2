"""Compares `xpyd bench serve` with the real `vllm bench serve`: bench.py XPYD FOLDER [--server URL --model NAME] [CASE...]

Both run one after the other with the same flags and the same seed, through a recorder, against the same server: `xpyd sim` unless
a URL is given. The script compares the request bodies byte for byte, the arrival times, the printed lines without measured
values, and the keys of the saved files in their order.
"""

import argparse
import asyncio
import json
import os
import pathlib
import re
import subprocess
import tempfile
import threading
import time

import aiohttp
from aiohttp import web

ID_PREFIX = "compared-"
# The allowed difference of the same arrival time in seconds. It depends on the shared machine, not on the clients.
TOLERANCE_SECONDS = 0.25
EVERY_METRIC = "ttft,tpot,itl,e2el,client_queue_time,e2el_including_client_queue"
RANDOM = "--random-input-len 40 --random-output-len 8"
CASES = {
    "rate": f"{RANDOM} --num-prompts 24 --request-rate 8 --seed 7 --goodput ttft:500 e2el:1000",
    "even": f"{RANDOM} --num-prompts 12 --request-rate 6 --burstiness 100 --random-range-ratio 0.4 --random-prefix-len 6",
    "queue": (
        f"{RANDOM} --num-prompts 16 --request-rate 12 --burstiness 0.5 --max-concurrency 2"
        f" --percentile-metrics {EVERY_METRIC} --metric-percentiles 50,99.9 --num-warmups 2 --ready-check-timeout-sec 30"
    ),
    "burst": f"{RANDOM} --num-prompts 20 --seed 3 --temperature 0 --top-p 0.9",
    "ramp": f"{RANDOM} --num-prompts 20 --ramp-up-strategy exponential --ramp-up-start-rps 2 --ramp-up-end-rps 20 --label up",
    "chat": f"{RANDOM} --num-prompts 6 --request-rate 6 --backend openai-chat --endpoint /v1/chat/completions",
    "probe": f"{RANDOM} --num-prompts 8 --request-rate 8 --probe-request-rate 5",
    "adapters": f"{RANDOM} --num-prompts 8 --request-rate 8 --lora-modules NAME NAME NAME",
}


class Recorder:
    """Forwards everything to a server, and records requests and their arrival times."""

    def __init__(self, server):
        self.server, self.seen, self.port = server, [], None
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self.serve, args=[started])
        self.thread.start()
        started.wait()

    def serve(self, started):
        async def start():
            self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{path:.*}", self.forward)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            started.set()
            return runner

        async def end(runner):
            await runner.cleanup()
            await self.session.close()

        runner = self.loop.run_until_complete(start())
        self.loop.run_forever()
        self.loop.run_until_complete(end(runner))

    async def forward(self, request):
        now, body = time.monotonic(), await request.read()
        name = request.headers.get("x-request-id", "")
        if name.startswith(ID_PREFIX) and name.removeprefix(ID_PREFIX).isdigit():
            self.seen.append((int(name.removeprefix(ID_PREFIX)), now, body))
        headers = {key: value for key, value in request.headers.items() if key.lower() not in ("host", "content-length")}
        call = self.session.request(request.method, self.server + request.path_qs, data=body, headers=headers)
        async with call as upstream:
            kept = {"content-type": upstream.headers.get("content-type", "text/plain")}
            answer = web.StreamResponse(status=upstream.status, headers=kept)
            await answer.prepare(request)
            async for piece in upstream.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
            return answer

    def taken(self):
        """Returns the requests since the last call, in the order of their ids."""
        seen, self.seen = sorted(self.seen), []
        return seen

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def without_value(line):
    """A printed line without its measured value."""
    is_row = len(line) >= 51 and line[40] == " " and line[0] not in "=-"
    return line[:40] if is_row else line


def run(command, place):
    """Runs one client. Returns its output about the run, and the saved file."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (saved,) = (place / "saved").iterdir()
    noise = ("Namespace(", "(MainProcess", "tip: install termplotlib")
    lines = [without_value(line) for line in done.stdout.splitlines() if not line.startswith(noise)]
    return lines, re.sub(r"\d{8}-\d{6}", "TIME", saved.name), json.loads(saved.read_text())


def differ(what, ours, theirs):
    """Prints the differences of two lists, and returns their number."""
    pairs = list(zip(ours, theirs))
    wrong = [(index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1]]
    for index, (own, other) in wrong[:3]:
        print(f"  {what} {index}:\n    xpyd {str(own)[:400]}\n    vllm {str(other)[:400]}")
    if len(ours) != len(theirs):
        print(f"  {what}: xpyd has {len(ours)}, vllm {len(theirs)}")
    return len(wrong) + abs(len(ours) - len(theirs))


def compare(name, clients, recorder):
    """Runs both clients, and returns the number of differences."""
    results = {}
    for client, command in clients.items():
        with tempfile.TemporaryDirectory() as place:
            printed = run(command, pathlib.Path(place))
        results[client] = (*printed, recorder.taken())
    (lines, file, saved, asked), (other_lines, other_file, other_saved, other_asked) = results["xpyd"], results["vllm"]
    found = differ("body", [body for _, _, body in asked], [body for _, _, body in other_asked])
    found += differ("line", lines, other_lines)
    found += differ("key", [key for key in saved if key != "xpyd"], list(other_saved))
    found += differ("file", [file], [other_file])
    same = ("num_prompts", "request_rate", "burstiness", "max_concurrency", "completed", "model_id", "tokenizer_id", "input_lens")
    found += differ("value", [saved.get(key) for key in same], [other_saved.get(key) for key in same])
    since = [[when - requests[0][1] for _, when, _ in requests] for requests in (asked, other_asked)]
    apart = max((abs(own - other) for own, other in zip(*since)), default=0)
    found += apart > TOLERANCE_SECONDS
    print(f"{name}: {len(asked)} requests, releases at most {apart * 1000:.1f} ms apart, {found} differences", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("xpyd", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--server")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("cases", nargs="*")
    given = parser.parse_args()
    xpyd, folder = given.xpyd.resolve(), given.folder.resolve()
    simulated = None
    server = given.server
    if server is None:
        with web_port() as port:
            server = f"http://127.0.0.1:{port}"
        command = [xpyd, "sim", folder / "tiny-llama", "--served-model-name", given.model, "--port", str(port)]
        simulated = subprocess.Popen([*command, "--preset", "h100-llama-3.1-8b"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    recorder = Recorder(server)
    try:
        wait_until_up(server)
        found = 0
        for name in given.cases or CASES:
            flags = CASES[name].replace("NAME", given.model).split()
            common = ["--base-url", f"http://127.0.0.1:{recorder.port}", "--model", given.model]
            common += ["--tokenizer", str(folder / "tiny-llama"), "--request-id-prefix", ID_PREFIX, "--disable-tqdm"]
            common += ["--save-result", "--save-detailed", "--result-dir", "saved", *flags]
            clients = {
                "vllm": [str(folder / "venv/bin/vllm"), "bench", "serve", *common],
                "xpyd": [str(xpyd), "bench", "serve", *common],
            }
            found += compare(name, clients, recorder)
    finally:
        recorder.stop()
        if simulated is not None:
            simulated.terminate()
            simulated.wait()
    assert found == 0, f"{found} differences"
    print("no differences")


class web_port:
    """A port that was free a moment ago."""

    def __enter__(self):
        import socket

        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    def __exit__(self, *_):
        self.socket.close()


def wait_until_up(server):
    import urllib.request

    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{server}/v1/models", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {server}"
            time.sleep(0.2)


if __name__ == "__main__":
    main()
