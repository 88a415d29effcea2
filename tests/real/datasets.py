"""Writes the prompts that the real dataset classes of vLLM's bench client make of small inputs, and the tokenizers for them.

    <venv>/bin/python tests/real/datasets.py <venv>/../tiny-llama

PYTHONHASHSEED must be 0 for the timed trace, so the script restarts itself with it. The tests of `crates/bench/src/workload` read the
files and expect the same prompts, byte for byte. If the folder `tests/fixtures/bench/tokenizers` is missing, the script trains new ones.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests/fixtures/bench"
TOKENIZERS = VECTORS / "tokenizers"
DATA = VECTORS / "datasets"


def text():
    """Words of this project, and invented words in other scripts, so that merges include characters beyond ASCII."""
    own = "\n".join((ROOT / name).read_text() for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
    rng = random.Random(7)
    alphabets = ["абвгдежзиклмнопрстуфхцчшыэюя", "αβγδεζηθικλμνξοπρστυφχψω", "äöüßéèêçñ", "日本語文字漢仮名交事"]
    made = [
        " ".join("".join(rng.choices(alphabet, k=rng.randint(1, 7))) for _ in range(400)) for alphabet in alphabets
    ]
    return [own, *made, "0123456789 " * 30, "  \n\n\t  " * 30, "😀🚀👩‍💻 " * 30]


def save(tokenizer, name, config, template=None):
    folder = TOKENIZERS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    body = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    if template:
        (folder / "chat_template.jinja").write_text(template)


def train():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    # Like Llama 3: the special tokens are behind the vocabulary, and a text starts with one.
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text(), trainer)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(specials)
    begin = tokenizer.token_to_id(specials[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{specials[0]} $A", pair=f"{specials[0]} $A {specials[0]}:1 $B:1", special_tokens=[(specials[0], begin)]
            ),
        ]
    )
    template = (
        "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|' + message['role'] + '|>\\n' + "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|assistant|>' }}{% if thinking is defined and thinking %}\n<think>{% endif %}\n{%- endif %}"
    )
    save(
        tokenizer,
        "behind",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": specials[0],
            "eos_token": {"__type": "AddedToken", "content": specials[2], "lstrip": False, "normalized": False,
                          "rstrip": False, "single_word": False, "special": True},
            "clean_up_tokenization_spaces": True,
        },
        template,
    )

    # Like Llama 2: metaspace, byte fallback, special tokens at the start of the vocabulary.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200, show_progress=False, max_token_length=12, limit_alphabet=160,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
    )
    words = [line.split(" ") for part in text() for line in part.split("\n")]
    tokenizer.train_from_iterator([" " + word for line in words for word in line], trainer)
    body = json.loads(tokenizer.to_str())
    body["added_tokens"] = [token for token in body["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(body))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    save(
        tokenizer,
        "metaspace",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False},
    )

    # Like Qwen: no token before a text, and a special padding token.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    save(
        tokenizer,
        "within",
        {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
            "bos_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": template,
        },
    )


def fold(prompts):
    """FNV-1a with 64 bits over all prompts, a zero byte after each."""
    value = 0xCBF29CE484222325
    for prompt in prompts:
        for byte in (prompt if isinstance(prompt, str) else json.dumps(prompt)).encode() + b"\0":
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def case(name, tokenizer, settings, requests, whole):
    prompts = [request.prompt for request in requests]
    return {
        "dataset": name,
        "tokenizer": tokenizer,
        "settings": settings,
        "prompts": prompts if whole else None,
        "fold": fold(prompts),
        "lengths": [request.prompt_len for request in requests],
        "outputs": [request.expected_output_len for request in requests],
        "times": [request.timestamp for request in requests],
    }


def write(name, cases):
    DATA.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (DATA / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    print(name, len(cases), "cases")


def random_cases(load, names):
    from vllm.benchmarks.datasets.datasets import RandomDataset

    rows = []
    for seed, count, whole, settings in [
        (0, 4, True, dict(input_len=20, output_len=7)),
        (1, 5, True, dict(input_len=33, output_len=9, range_ratio=0.5)),
        (2, 4, True, dict(input_len=12, output_len=5, prefix_len=9)),
        (3, 6, False, dict(input_len=300, output_len=60, range_ratio={"input": 0.3, "output": 0.9}, prefix_len=17)),
        (1763800000, 12, False, dict(input_len=700, output_len=20, range_ratio=0.2, prefix_len=100)),
        (4294967295, 40, False, dict(input_len=128, output_len=1)),
    ]:
        for name in names:
            requests = RandomDataset(random_seed=seed).sample(load(name), count, **settings)
            rows.append(case("random", name, dict(seed=seed, count=count, **settings), requests, whole))
    write("random", rows)


def prefix_cases(load, names):
    from vllm.benchmarks.datasets.datasets import PrefixRepetitionRandomDataset

    rows = []
    for seed, count, shuffle, settings in [
        (0, 6, True, dict(prefix_len=9, suffix_len=5, num_prefixes=2, output_len=3)),
        (5, 10, True, dict(prefix_len=64, suffix_len=31, num_prefixes=3, output_len=8)),
        (6, 8, False, dict(prefix_len=20, suffix_len=20, num_prefixes=4, output_len=8)),
    ]:
        for name in names:
            dataset = PrefixRepetitionRandomDataset(random_seed=seed, disable_shuffle=not shuffle)
            requests = dataset.sample(load(name), count, **settings)
            rows.append(
                case("prefix_repetition", name, dict(seed=seed, count=count, shuffle=shuffle, **settings), requests, True)
            )
    write("prefix_repetition", rows)


def conversations():
    """Invented conversations. Some are too short or too long for the dataset's filter."""
    rng = random.Random(11)
    words = "the fleet has two engines that read and two that write so what does a proxy do with them all day".split()
    say = lambda low, high: " ".join(rng.choices(words, k=rng.randint(low, high)))
    entries = []
    for number in range(40):
        turns = [{"from": "human", "value": say(1, 60)}, {"from": "gpt", "value": say(1, 90)}]
        turns += [{"from": "human", "value": say(3, 9)}] * rng.randint(0, 2)
        entries.append({"id": f"c{number}", "conversations": turns[: rng.choice([0, 1, 2, 3, 4, 4, 4])]})
    entries.append({"id": "long", "conversations": [{"from": "human", "value": say(1500, 1600)}, {"from": "gpt", "value": say(9, 9)}]})
    entries.append({"id": "other"})
    return entries


def sharegpt_cases(load, names):
    from vllm.benchmarks.datasets.datasets import ShareGPTDataset

    path = DATA / "sharegpt_input.json"
    path.write_text(json.dumps(conversations(), indent=0) + "\n")
    rows = []
    for seed, count, settings in [
        (0, 5, dict()),
        (1, 5, dict(output_len=3)),
        (2, 5, dict(disable_shuffle=True)),
        (3, 60, dict()),
        (4, 60, dict(no_oversample=True)),
    ]:
        for name in names:
            dataset = ShareGPTDataset(
                random_seed=seed, dataset_path=str(path), disable_shuffle=settings.get("disable_shuffle", False)
            )
            requests = dataset.sample(
                load(name), count, output_len=settings.get("output_len"), no_oversample=settings.get("no_oversample", False),
                request_id_prefix="p",
            )
            rows.append(case("sharegpt", name, dict(seed=seed, count=count, **settings), requests, False))
    write("sharegpt", rows)


def custom_cases(load, names):
    from vllm.benchmarks.datasets.datasets import CustomDataset

    rng = random.Random(12)
    path = DATA / "custom_input.jsonl"
    lines = [
        {"prompt": f"Ünder {number} «{rng.choice('abc')}»\n  {'x' * rng.randint(0, 9)} ", "output_tokens": rng.randint(1, 99)}
        for number in range(17)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    rows = []
    for seed, count, settings in [
        (0, 5, dict(output_len=256)),
        (1, 9, dict(output_len=-1)),
        (2, 9, dict(output_len=-1, disable_shuffle=True, skip_chat_template=True)),
        (3, 30, dict(output_len=-1)),
        (4, 30, dict(output_len=12, no_oversample=True)),
        (5, 0, dict(output_len=12)),
        (6, 4, dict(output_len=12, chat_template_kwargs={"thinking": True})),
    ]:
        for name in names:
            if name == "metaspace" and not settings.get("skip_chat_template"):
                continue
            dataset = CustomDataset(
                random_seed=seed, dataset_path=str(path), disable_shuffle=settings.get("disable_shuffle", False)
            )
            requests = dataset.sample(
                load(name), count, output_len=settings["output_len"], no_oversample=settings.get("no_oversample", False),
                skip_chat_template=settings.get("skip_chat_template", False), request_id_prefix="p",
                chat_template_kwargs=settings.get("chat_template_kwargs"),
            )
            rows.append(case("custom", name, dict(seed=seed, count=count, **settings), requests, count == 5))
    write("custom", rows)


def burstgpt_cases(load, names):
    from vllm.benchmarks.datasets.datasets import BurstGPTDataset

    rng = random.Random(13)
    path = DATA / "burstgpt_input.csv"
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    for number in range(60):
        asked, told = rng.randint(1, 300), rng.choice([0, 3, 40, 500])
        model = rng.choice(["ChatGPT", "GPT-4", "GPT-4"])
        rows.append(f"{number * 5},{model},{asked},{told},{asked + told},{rng.choice(['API log', 'Conversation log'])}")
    path.write_text("\n".join(rows) + "\n")
    cases = []
    for seed, count in [(0, 8), (1, 20), (2, 90)]:
        for name in names:
            requests = BurstGPTDataset(random_seed=seed, dataset_path=str(path)).sample(load(name), count)
            cases.append(case("burstgpt", name, dict(seed=seed, count=count), requests, False))
    write("burstgpt", cases)


def trace_cases(load, names):
    from vllm.benchmarks.datasets.datasets import TimedTrace

    rng = random.Random(14)
    path = DATA / "trace_input.jsonl"
    lines, time = [], 0
    for number in range(15):
        time += rng.choice([0, 250, 1333])
        length = rng.randint(1, 90)
        chunks = (length + 15) // 16
        hashes = [0, 1, 2][: min(chunks, rng.randint(0, 3))]
        hashes += [100 * number + chunk for chunk in range(chunks - len(hashes))]
        lines.append({"timestamp": time, "input_length": length, "output_length": rng.randint(1, 40), "hash_ids": hashes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases = []
    for count, size, multiplier in [(15, 16, 0.001), (100, 16, 1.0), (4, 8, 0.001), (15, 40, 0.001)]:
        for name in names:
            dataset = TimedTrace(
                dataset_path=str(path), random_seed=0, timed_trace_chunk_hash_size=size, timed_trace_sec_multiplier=multiplier,
                timed_trace_label_timestamp="timestamp", timed_trace_label_input_length="input_length",
                timed_trace_label_output_length="output_length", timed_trace_label_hash_ids="hash_ids",
            )
            requests = dataset.sample(load(name), count)
            cases.append(
                case("timed_trace", name, dict(seed=0, count=count, chunk=size, multiplier=multiplier), requests, False)
            )
    write("timed_trace", cases)


def python_cases():
    """Draws, shuffles and hashes of Python, and legacy integers and permutations of numpy."""
    rows = []
    for seed in [0, 1, 42, 2**32 - 1, 2**40 + 5]:
        rng = random.Random(seed)
        row = {"seed": seed, "random": [rng.random().hex() for _ in range(3)], "bits": [rng.getrandbits(20) for _ in range(3)]}
        row["below"] = [rng.randrange(n) for n in [1, 2, 3, 10, 1000, 2**31, 2**32, 2**33]]
        shuffled = list(range(50))
        rng.shuffle(shuffled)
        row["shuffle"] = shuffled
        row["choice"] = [rng.choice(range(17)) for _ in range(10)]
        row["choices"] = rng.choices(range(1000), k=10)
        rows.append(row)
    legacy = []
    for seed in [0, 7, 2**32 - 1]:
        state = np.random.RandomState(seed)
        row = {"seed": seed, "randint": [state.randint(0, n, size=6).tolist() for n in [1, 2, 1000, 128256, 2**31]]}
        row["permutation"] = state.permutation(60).tolist()
        legacy.append(row)
    hashes = [[text, hash(text) & 0xFFFFFFFFFFFFFFFF] for text in ["a", "0:16", "1234567:512", "46:9", "αβ:3", "12345678", "", "x" * 31]]
    script = "print([[t, hash(t) & 0xFFFFFFFFFFFFFFFF] for t in ['0:16', '46:9', 'long enough:512']])"
    seeded = []
    for seed in ["1", "42", "4294967295"]:
        output = subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        seeded.append({"seed": int(seed), "hashes": eval(output)})
    (VECTORS / "python.json").write_text(
        json.dumps({"random": rows, "legacy": legacy, "hashes": [{"seed": 0, "hashes": hashes}, *seeded]}) + "\n"
    )


def about(load, names):
    """Results of transformers for each tokenizer."""
    rows = []
    samples = ["Hello world, it's 2026!", " two  spaces\n\nlines\t", "naïve 日本語 😀 <s> <|eot_id|><|im_end|>", "café"]
    for name in names:
        tokenizer = load(name)
        rng = random.Random(3)
        ids = [[rng.randrange(len(tokenizer)) for _ in range(30)] for _ in range(6)]
        rows.append(
            {
                "tokenizer": name,
                "vocabulary_size": tokenizer.vocab_size,
                "special_ids": sorted(tokenizer.all_special_ids),
                "added_to_text": tokenizer.num_special_tokens_to_add(),
                "encoded": [[text, tokenizer.encode(text, add_special_tokens=False), tokenizer(text).input_ids] for text in samples],
                "decoded": [[row, tokenizer.decode(row)] for row in ids],
                "vocabulary_values": len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)),
            }
        )
    (VECTORS / "tokenizers.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the tiny model that tests/real/setup.sh makes")
    arguments = parser.parse_args()
    # Training is not deterministic to the last merge, so existing tokenizers are kept.
    if not TOKENIZERS.exists():
        train()
        tiny = TOKENIZERS / "tiny"
        tiny.mkdir()
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
            shutil.copyfile(arguments.model / name, tiny / name)
        body = json.loads((tiny / "tokenizer.json").read_text())
        (tiny / "tokenizer.json").write_text(json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n")

    from functools import cache

    from vllm.tokenizers import get_tokenizer

    load = cache(lambda name: get_tokenizer(str(TOKENIZERS / name)))
    names = ["tiny", "behind", "metaspace", "within"]
    about(load, names)
    python_cases()
    random_cases(load, names)
    prefix_cases(load, names)
    sharegpt_cases(load, names)
    custom_cases(load, names)
    burstgpt_cases(load, names)
    trace_cases(load, names)


if __name__ == "__main__":
    main()
