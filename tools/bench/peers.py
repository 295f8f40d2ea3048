"""Pomona beside other engines, measured in turns on one machine.

    python tools/bench/peers.py target/release/pomona MODEL.gguf --llama LLAMA_BIN \\
        --openvino VENV --openvino-model FOLDER --record smollm2

docs/peers.md says how to install each peer, and what is measured. Each round measures every engine
one after the other, beginning with another one each time. A measurement during which other
processes took more than --busy of the cores' time is repeated, --tries times at most, and then
left out; what has too few rounds left gets no verdict. Printed are medians, smallest and largest,
and the median of the rounds' ratios; everything is recorded in bench/record/DATE-NAME.json.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys

import engines
import machine

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ("engine", "long", "served", "shared")
BITS = ("16", "8")
KV_TYPES = ("auto", "float32", "float16", "bfloat16", "int8")


def measure(engine, kind, args):
    """Figures by name, all but times better when larger, and what else the record has of them."""
    if kind == "engine":
        return engine.engine(512, shallow=True)
    if kind == "long":
        return engine.engine(args.long_tokens, shallow=False)
    load = ["--requests-per-client", str(args.requests_per_client), "--output-tokens", "64"]
    if kind == "served":
        load += ["--clients", args.clients, "--input-tokens", "256"]
    else:
        # Three quarters are shared: 512 of 684.
        load += ["--clients", "32", "--input-tokens", "684", "--shared-prefix"]
    figures = {}
    for level in engine.served(load):
        if level["failed"]:
            raise RuntimeError(f"requests failed: {level.get('first_failure')}")
        what = f"{kind}, {level['clients']} clients"
        figures[f"{what}, out tok/s"] = level["output_tokens_per_s"]["median"]
        figures[f"{what}, TTFT p50 ms"] = level["ttft_ms"]["p50"]
        figures[f"{what}, TTFT p99 ms"] = level["ttft_ms"]["p99"]
        figures[f"{what}, token p99 ms"] = level["inter_token_ms"]["p99"]
    return figures, {}


def measure_quietly(engine, kind, round_number, args):
    """One entry for the record, the last try's."""
    for attempt in range(1, args.tries + 1):
        machine.wait_until_quiet(args.busy, args.wait)
        load_average, others = os.getloadavg(), machine.Others()
        entry = {"round": round_number, "engine": engine.name, "kind": kind, "attempt": attempt}
        try:
            entry["figures"], more = measure(engine, kind, args)
            entry |= more
        except RuntimeError as error:
            entry |= {"figures": {}, "error": str(error)}
        share = others.share()
        busy = share > args.busy
        entry |= {"load_average_before": load_average, "others_share": share, "busy": busy}
        note = f"others took {share:.1%}" + (", busy" if busy else "")
        figures = {k: round(v, 1) for k, v in entry["figures"].items()}
        said = f"{round_number} {engine.name} {kind}: {note}: {figures}"
        print(said, file=sys.stderr, flush=True)
        if "error" in entry:
            print(entry["error"], file=sys.stderr, flush=True)
        if "error" in entry or not busy:
            break
    return entry


def summary(entries, ours, args):
    """By figure and engine: spread, and Pomona's ratios to it over the rounds that both have."""
    values = {}
    for entry in entries:
        for what, value in entry["figures"].items() if not entry["busy"] else ():
            values.setdefault(what, {}).setdefault(entry["engine"], {})[entry["round"]] = value
    found = {}
    for what, by_engine in values.items():
        for name, by_round in by_engine.items():
            cell = {"rounds": len(by_round), "value": spread(by_round.values())}
            for our in ours:
                own = by_engine.get(our, {})
                both = [own[r] / value for r, value in by_round.items() if r in own]
                cell[f"ratio of {our}"] = spread(both) if len(both) >= args.rounds_min else None
            found.setdefault(what, {})[name] = cell
    return found


def spread(values):
    values = list(values)
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": middle, "min": low, "max": high}


def in_words(s, digits=1):
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def show(found, ours):
    print("\n| | engine | value |" + "".join(f" ratio of {our} |" for our in ours))
    print("| --- | --- | --- |" + " --- |" * len(ours))
    for what, by_engine in found.items():
        for name, cell in by_engine.items():
            ratios = [cell[f"ratio of {our}"] for our in ours]
            ratios = [in_words(ratio, 2) if ratio else "too few quiet rounds" for ratio in ratios]
            print(f"| {what} | {name} | {in_words(cell['value'])} | {' | '.join(ratios)} |")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    path = pathlib.Path
    parser.add_argument("pomona", type=path, help="the release binary")
    parser.add_argument("model", type=path, help="for Pomona, llama.cpp and mistral.rs")
    parser.add_argument("--activation-bits", default="16,8", help="of Pomona; default: 16,8")
    parser.add_argument("--kv-cache-dtype", choices=KV_TYPES, help="of Pomona; default: its own")
    parser.add_argument("--llama", type=path, metavar="BIN", help="has llama-bench, llama-server")
    parser.add_argument("--openvino", type=path, metavar="VENV")
    parser.add_argument("--openvino-model", type=path, metavar="FOLDER", help="default: MODEL")
    parser.add_argument("--vllm", type=path, metavar="VENV")
    parser.add_argument("--vllm-model", type=path, metavar="FOLDER")
    parser.add_argument("--mistralrs", type=path, metavar="VENV")
    parser.add_argument("--what", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--long-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounds-min", type=int, default=3, help="fewer give no verdict")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=float, default=0.05, help="share of the cores' time")
    parser.add_argument("--wait", type=float, default=120, help="seconds, for others to be quiet")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--record", metavar="NAME", help="writes bench/record/DATE-NAME.json")
    args = parser.parse_args()
    args.openvino_model = args.openvino_model or args.model
    unknown = set(args.what.split(",")) - set(KINDS)
    if unknown:
        parser.error(f"--what knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    args.activation_bits = args.activation_bits.split(",")
    if sorted(set(args.activation_bits) & set(BITS)) != sorted(args.activation_bits):
        parser.error("--activation-bits takes 16, 8, or 16,8")
    if args.vllm and not args.vllm_model:
        parser.error("--vllm needs --vllm-model, a folder with safetensors")
    return args


def model_facts(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {"name": path.name, "bytes": sum(f.stat().st_size for f in files if f.is_file())}


def main():
    args = arguments()
    machine.adopt_orphans()
    # Ended early, it still ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    peers = [engines.Pomona(args, bits) for bits in args.activation_bits]
    ours = [pomona.name for pomona in peers]
    peers += [engines.LlamaCpp(args)] if args.llama else []
    peers += [engines.OpenVino(args)] if args.openvino else []
    peers += [engines.Vllm(args)] if args.vllm else []
    peers += [engines.MistralRs(args)] if args.mistralrs else []
    # With what has not been committed told by `-dirty`.
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": machine.facts(),
        "threads": args.threads,
        "busy_share": args.busy,
        "rounds_min": args.rounds_min,
        "engines": {p.name: {**p.about(), "model": model_facts(p.model)} for p in peers},
        "entries": [],
    }
    for round_number in range(args.rounds):
        # What comes first in one round comes later in the next.
        turn = round_number % len(peers)
        for kind in args.what.split(","):
            for engine in peers[turn:] + peers[:turn]:
                entry = measure_quietly(engine, kind, round_number, args)
                record["entries"].append(entry)
        record["summary"] = summary(record["entries"], ours, args)
        if args.record:
            write(record, args.record)
    show(record["summary"], ours)


def write(record, name):
    """After each round, so that a run that is cut short leaves what it found."""
    text = json.dumps(record, indent=1, default=str).replace(str(pathlib.Path.home()), "~")
    folder = ROOT / "bench/record"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['date']}-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
