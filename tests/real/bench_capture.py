"""Runs the real `vllm bench serve` against a server in this script, and keeps what it prints and saves:

    venv/bin/python tests/real/bench_capture.py FOLDER [NAME...]

FOLDER is that of setup.sh. Every case writes `NAME.flags`, `NAME.txt` (what the client printed, without its settings in the
first line and its log) and `NAME.json` (what it saved) into tests/fixtures/bench/captures. The tests of
src/cli/bench/captures.rs read them: the same flags and the same clock readings must give the same bytes.
"""

import asyncio
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import threading

from aiohttp import web

CAPTURES = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/bench/captures"
EVERY_METRIC = "ttft,tpot,itl,e2el,client_queue_time,e2el_including_client_queue"
SAVE = "--save-result --save-detailed"
SMALL = "--random-input-len 16 --random-output-len 5 --model tiny --tokenizer tiny-llama --disable-tqdm"
RAMP = "--ramp-up-strategy {} --ramp-up-start-rps {} --ramp-up-end-rps {}"

# Name, flags, and special behaviour of the server: `fails` decides which requests (from 0) are refused.
CASES = {
    "plain": (f"{SMALL} {SAVE} --request-rate 6 --num-prompts 12", {}),
    "burst": (f"{SMALL} {SAVE} --num-prompts 4", {"tokens_per_chunk": 4}),
    "brief": (f"{SMALL} --save-result --num-prompts 3 --metadata tensor_parallel_size=2 run=a=b --label mine", {}),
    "everything": (
        f"{SMALL} {SAVE} --request-rate 12 --burstiness 2 --max-concurrency 2 --num-prompts 20 --goodput ttft:80 e2el:110"
        f" --percentile-metrics {EVERY_METRIC} --metric-percentiles 50,99.9,90",
        {"fails": lambda index: index % 5 == 4},
    ),
    "many_failures": (f"{SMALL} {SAVE} --num-prompts 14", {"fails": lambda index: index > 1}),
    "all_failed": (
        f"{SMALL} {SAVE} --num-prompts 3 --goodput tpot:9 --percentile-metrics {EVERY_METRIC} --request-rate 50"
        " --max-concurrency 1",
        {"fails": lambda index: True},
    ),
    "one_token": (f"{SMALL} --random-output-len 1 {SAVE} --num-prompts 3 --goodput tpot:1 ttft:99999", {}),
    "queue": (
        f"{SMALL} {SAVE} --request-rate 40 --burstiness inf --num-prompts 5 --max-concurrency 1"
        " --percentile-metrics e2el_including_client_queue,client_queue_time",
        {},
    ),
    "queue_of_a_burst": (
        f"{SMALL} {SAVE} --num-prompts 5 --max-concurrency 2 --percentile-metrics {EVERY_METRIC}",
        {},
    ),
    "ramp": (
        f"{SMALL} {SAVE} --num-prompts 12 {RAMP.format('linear', 2, 9)} --max-concurrency 3 --percentile-metrics {EVERY_METRIC}",
        {},
    ),
    "exponential_ramp": (f"{SMALL} {SAVE} --num-prompts 8 --burstiness 100 {RAMP.format('exponential', 1, 40)}", {}),
    "probe": (
        f"{SMALL} {SAVE} --num-prompts 8 --request-rate 8 --max-concurrency 1 --probe-request-rate 10",
        {"fails": lambda index: index in (3, 6), "fails_only_probes": True},
    ),
    "failed_probes": (
        f"{SMALL} {SAVE} --num-prompts 2 --probe-request-rate 20.5",
        {"fails": lambda index: True, "fails_only_probes": True},
    ),
    "speculation": (f"{SMALL} {SAVE} --num-prompts 4 --request-rate 20", {"metrics": "speculation"}),
    "diffusion": (f"{SMALL} {SAVE} --num-prompts 4 --percentile-metrics e2el", {"metrics": "diffusion"}),
    "preparation": (
        f"{SMALL} {SAVE} --num-prompts 2 --ready-check-timeout-sec 5 --num-warmups 3 --temperature 0.5 --request-rate 1e2",
        {},
    ),
    "first_model": (f"{SMALL.replace('--model tiny ', '')} {SAVE} --num-prompts 2 --backend vllm", {}),
    "chat": (f"{SMALL} {SAVE} --num-prompts 3 --backend openai-chat --endpoint /v1/chat/completions", {}),
    "without_tokenizer": (
        f"{SMALL} --skip-tokenizer-init {SAVE} --num-prompts 3 --percentile-metrics {EVERY_METRIC} --max-concurrency 2",
        {},
    ),
}


class Server:
    """One model server that streams nonsense at a steady pace."""

    def __init__(self, fails=lambda index: False, fails_only_probes=False, tokens_per_chunk=1, metrics=None):
        self.fails, self.fails_only_probes, self.tokens_per_chunk = fails, fails_only_probes, tokens_per_chunk
        self.metrics, self.seen, self.answered, self.bodies = metrics, 0, 0, []

    async def models(self, _):
        return web.json_response({"data": [{"id": "tiny", "root": "tiny-llama"}]})

    async def counters(self, _):
        count = self.answered
        if self.metrics == "speculation":
            lines = [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {7.0 * count}',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {21.0 * count}',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {10.0 * count}',
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {6.0 * count}',
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {3.0 * count}',
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="2"}} {1.0 * count}',
            ]
        elif self.metrics == "diffusion":
            lines = [
                f"vllm:diffusion_num_denoising_steps_total {110.0 * count}",
                f"vllm:diffusion_num_canvas_positions_total {3520.0 * count}",
                f"vllm:diffusion_num_committed_tokens_total {650.0 * count}",
            ]
        else:
            raise web.HTTPNotFound
        return web.Response(text="# HELP x y\n" + "\n".join(lines) + "\n")

    async def complete(self, request):
        text = await request.text()
        body = json.loads(text)
        is_chat, is_probe = "messages" in body, body.get("prompt") == "Hi"
        counts = is_probe or not self.fails_only_probes
        index, self.seen = self.seen, self.seen + counts
        self.bodies.append(text)
        if counts and self.fails(index):
            return web.json_response({"error": {"message": "out of luck"}}, status=500)
        asked = body["max_completion_tokens" if is_chat else "max_tokens"]
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await asyncio.sleep(0.05 + 0.01 * (index % 3))
        left = asked
        while left > 0:
            # Every text is different and contains characters beyond ASCII.
            words = " ".join(f"ü{index}" for _ in range(min(left, self.tokens_per_chunk)))
            choice = {"delta": {"content": words}} if is_chat else {"text": words}
            await answer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            left -= self.tokens_per_chunk
            if left > 0:
                await asyncio.sleep(0.01 + 0.002 * (left % 2))
        usage = {"choices": [], "usage": {"prompt_tokens": 17, "completion_tokens": asked}}
        await answer.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        self.answered += not is_probe
        return answer

    @contextlib.contextmanager
    def running(self):
        """Serves in a separate thread, and returns the port."""
        app = web.Application(client_max_size=1 << 26)
        app.add_routes([web.get("/v1/models", self.models), web.get("/metrics", self.counters)])
        app.add_routes([web.post(path, self.complete) for path in ("/v1/completions", "/v1/chat/completions")])
        loop, started, port = asyncio.new_event_loop(), threading.Event(), []

        async def start():
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port.append(runner.addresses[0][1])
            started.set()
            return runner

        def serve():
            runner = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=serve)
        thread.start()
        started.wait()
        try:
            yield port[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def without_tokenizer():
    """Replaces the client's datasets, which need a tokenizer, by requests like those of other datasets. The report needs none."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest

    count, kept = 3, serve.get_samples
    requests = [SampleRequest(prompt="a b c", prompt_len=3, expected_output_len=5) for _ in range(count)]
    serve.get_samples = lambda *_: requests
    return lambda: setattr(serve, "get_samples", kept)


def run(flags, port):
    """Runs the client like its command, and returns its output."""
    from vllm.entrypoints.cli.main import main

    printed = io.StringIO()
    sys.argv = ["vllm", "bench", "serve", "--port", str(port), *flags.split()]
    with contextlib.redirect_stdout(printed):
        main()
    return printed.getvalue()


def capture(name, folder):
    flags, behaviour = CASES[name]
    undo = without_tokenizer() if "--skip-tokenizer-init" in flags else lambda: None
    with tempfile.TemporaryDirectory() as place, Server(**behaviour).running() as port:
        os.chdir(folder)
        try:
            printed = run(f"{flags} --result-dir {place}", port)
        finally:
            undo()
        (saved,) = pathlib.Path(place).iterdir()
        result = saved.read_text(encoding="utf-8")
        lines = printed.splitlines(keepends=True)
        assert lines[0].startswith("Namespace("), lines[0]
        (CAPTURES / f"{name}.flags").write_text(f"{flags}\n{saved.name}\n")
        told = [line for line in lines[1:] if not line.startswith("(MainProcess")]
        (CAPTURES / f"{name}.txt").write_text("".join(told))
        (CAPTURES / f"{name}.json").write_text(result, encoding="utf-8")


if __name__ == "__main__":
    environment, names = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2:]
    for case in names or CASES:
        print(case, file=sys.stderr)
        capture(case, environment)
