"""What drafts bring: one server without them and one for each way to make them, in turns.

    python tools/bench/speculation.py POMONA MODEL.gguf [--rounds 5] [--threads 2] [--clients 1]
        [--output-tokens 128] [--draft SMALLER.gguf]

POMONA is the release binary. Texts that repeat their prompt, summaries and ordinary chat, greedy;
answers that are not those of the server without drafts end the run. Printed are medians, smallest
and largest, the median of the rounds' ratios, and the share of drafts that were right.
"""

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import re
import subprocess
import tempfile
import time
import urllib.request

from engines import free_port, wait_until_ready
from peers import in_words, spread

METHODS = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
    "suffix": {"method": "suffix"},
}
TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "architecture.md").read_text()[:1800]
PROMPTS = {
    "repeat": [
        f"Repeat the following text word for word:\n\n{TEXT}",
        f"Copy this JSON exactly, then stop:\n\n{json.dumps(METHODS, indent=2)}",
    ],
    "summarise": [
        f"Summarise the following text, quoting its sentences:\n\n{TEXT}",
        f"List the main points of this text:\n\n{TEXT}",
    ],
    "chat": [
        "Why do apples fall?",
        "Write a short story about a lighthouse keeper.",
        "What is a good breakfast?",
        "Explain how a bicycle stays upright.",
    ],
}


class Server:
    def __init__(self, args, stack, drafting):
        port, self.output_tokens = free_port(), args.output_tokens
        self.url = f"http://127.0.0.1:{port}"
        command = [args.pomona, "serve", args.model, "--port", str(port)]
        command += ["--threads", str(args.threads), "--served-model-name", "m"]
        command += ["--max-model-len", "2048"]
        if drafting:
            command += ["--speculative-config", json.dumps(drafting)]
        log = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
        stack.callback(process.terminate)
        wait_until_ready(self.url, process, log)

    def ask(self, prompt):
        body = {"model": "m", "temperature": 0, "max_tokens": self.output_tokens}
        body["messages"] = [{"role": "user", "content": prompt}]
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data, headers)
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)
        return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]

    def round(self, prompts, clients):
        """Answers and output tokens per second."""
        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(self.ask, prompts))
        rate = sum(tokens for _, tokens in answers) / (time.monotonic() - begun)
        return [text for text, _ in answers], rate

    def drafts(self):
        """Drafts made and accepted so far."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            text = answer.read().decode()
        pattern = r"^vllm:spec_decode_num_(draft|accepted)_tokens_total.* (\d+)$"
        found = dict(re.findall(pattern, text, re.M))
        return int(found["draft"]), int(found["accepted"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pomona", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--draft", type=pathlib.Path)
    args = parser.parse_args()
    methods = {"plain": None, **METHODS}
    if args.draft:
        drafting = {"method": "draft_model", "model": str(args.draft), "num_speculative_tokens": 6}
        methods["draft model"] = drafting
    load = f"{args.threads} threads, {args.clients} clients, {args.rounds} rounds"
    print(f"{args.model.name}, {load}, {args.output_tokens} tokens each", flush=True)
    print(f"{'':<10} {'':<12} {'tok/s':>24} {'ratio':>20} {'drafts right':>20}")
    with contextlib.ExitStack() as stack:
        servers = {name: Server(args, stack, method) for name, method in methods.items()}
        for kind, prompts in PROMPTS.items():
            compare(args, servers, kind, prompts * -(-args.clients // len(prompts)))


def compare(args, servers, kind, prompts):
    for server in servers.values():
        server.round(prompts, args.clients)
    before = {name: server.drafts() for name, server in servers.items()}
    rates = {name: [] for name in servers}
    for _ in range(args.rounds):
        expected = None
        for name, server in servers.items():
            texts, rate = server.round(prompts, args.clients)
            expected = expected or texts
            if texts != expected:
                raise SystemExit(f"{kind}: {name} answers otherwise than plain")
            rates[name].append(rate)
    for name, server in servers.items():
        ratios = [mine / plain for mine, plain in zip(rates[name], rates["plain"])]
        tried, right = (now - then for now, then in zip(server.drafts(), before[name]))
        share = f"{right} of {tried}" if tried else ""
        rate, ratio = in_words(spread(rates[name])), in_words(spread(ratios), 2)
        print(f"{kind:<10} {name:<12} {rate:>24} {ratio:>20} {share:>20}", flush=True)


if __name__ == "__main__":
    main()
