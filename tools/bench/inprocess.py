"""Load on an engine from inside its process, for engines whose packages bring no server.

    VENV/bin/python tools/bench/inprocess.py openvino|mistralrs MODEL --json FILE [--clients 1,8,32]

Does what `pomona bench --url` does, without HTTP and text on a wire: so many clients ask for one
answer after another, and what they saw is written in the same words. This favours the engine a
little. It runs in the engine's own environment and needs nothing beside it.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import sys
import threading
import time

# One token each, after a space, in the vocabularies at hand.
WORDS = "time year people way day man thing woman life child world school state family".split()
SHARED = 0.75
WARM_TOKENS = 512


class OpenVino:
    """OpenVINO GenAI's continuous batching; prompts are token ids."""

    template_tokens = 0

    def __init__(self, model, args):
        import openvino
        import openvino_genai as genai

        self.tensor, self.genai = openvino.Tensor, genai
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = args.cache_gb
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": args.threads}
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.next_id = 0

    def prompt(self, tokens, numbers):
        return [numbers.randrange(1000, 40_000) for _ in range(tokens)]

    def run(self, prompts, clients, output_tokens):
        waiting, active, samples = list(reversed(prompts)), [], []
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_tokens, True, False
        while waiting or active:
            while waiting and len(active) < clients:
                ids = waiting.pop()
                sample = Sample(len(ids))
                self.next_id += 1
                handle = self.pipeline.add_request(self.next_id, self.tensor([ids]), config)
                active.append((handle, sample))
            self.pipeline.step()
            now = time.monotonic()
            for handle, sample in active:
                if handle.can_read():
                    new = sum(len(out.generated_ids) for out in handle.read().values())
                    sample.saw(new, now)
            running = self.genai.GenerationStatus.RUNNING
            samples += [s for h, s in active if h.get_status() != running]
            active = [(h, s) for h, s in active if h.get_status() == running]
        return samples


class MistralRs:
    """mistral.rs's Python package; prompts are words, in the model's template."""

    def __init__(self, model, args):
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)
        import mistralrs

        self.request = mistralrs.ChatCompletionRequest
        path = pathlib.Path(model)
        which = mistralrs.Which.GGUF(
            quantized_model_id=str(path.parent), quantized_filename=path.name
        )
        self.runner = mistralrs.Runner(which=which, max_seqs=max(args.clients))
        self.template_tokens = 0
        [probe] = self.run([WORDS[:1]], 1, 1)
        self.template_tokens = probe.input_tokens - 1

    def prompt(self, tokens, numbers):
        return numbers.choices(WORDS, k=tokens)

    def run(self, prompts, clients, output_tokens):
        waiting, samples = list(reversed(prompts)), []

        def client():
            while True:
                try:
                    prompt = waiting.pop()
                except IndexError:
                    return
                samples.append(self.ask(" ".join(prompt), output_tokens))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return samples

    def ask(self, text, output_tokens):
        sample = Sample(0)
        request = self.request(
            messages=text,
            model="default",
            max_tokens=output_tokens,
            temperature=0.0,
            stream=True,
            ignore_eos=True,
        )
        for chunk in self.runner.send_chat_completion_request(request):
            if chunk.choices and chunk.choices[0].delta.content:
                sample.saw(1, time.monotonic())
            usage = getattr(chunk, "usage", None)
            if usage:
                sample.input_tokens = usage.prompt_tokens
                sample.output_tokens = usage.completion_tokens
        return sample


class Sample:
    """What one client saw of one request."""

    def __init__(self, input_tokens):
        self.begun = time.monotonic()
        self.times = []
        self.input_tokens, self.output_tokens = input_tokens, 0

    def saw(self, tokens, now):
        if tokens:
            self.times.append(now)
            self.output_tokens += tokens


def level(engine, args, clients):
    requests = clients * args.requests_per_client
    tokens = max(args.input_tokens - engine.template_tokens, 1)
    shared = int(tokens * SHARED) if args.shared_prefix else 0
    first = engine.prompt(shared, random.Random(0))
    seeds = [f"{clients} {index}" for index in range(requests)]
    prompts = [first + engine.prompt(tokens - shared, random.Random(seed)) for seed in seeds]
    begun = time.monotonic()
    samples = engine.run(prompts, clients, args.output_tokens)
    seconds = time.monotonic() - begun
    done = [s for s in samples if s.times]
    if not done:
        raise SystemExit("no request gave any token")
    output = sum(s.output_tokens for s in done)
    ttft = [(s.times[0] - s.begun) * 1e3 for s in done]
    gaps = [(b - a) * 1e3 for s in done for a, b in zip(s.times, s.times[1:])]
    return {
        "clients": clients,
        "requests": requests,
        "failed": requests - len(done),
        "input_tokens_mean": statistics.mean(s.input_tokens for s in done),
        "output_tokens_mean": output / len(done),
        "output_tokens_per_s": {"median": output / seconds},
        "ttft_ms": percentiles(ttft),
        "inter_token_ms": percentiles(gaps),
    }


def percentiles(values):
    if len(values) < 2:
        return {"p50": sum(values), "p99": sum(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=("openvino", "mistralrs"))
    parser.add_argument("model")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix", action="store_true")
    args = parser.parse_args()
    args.clients = [int(n) for n in args.clients.split(",")]
    engine = {"openvino": OpenVino, "mistralrs": MistralRs}[args.engine](args.model, args)
    # The first prompt makes engines allocate, compile and choose; it is not timed.
    warm = min(args.input_tokens, WARM_TOKENS)
    engine.run([engine.prompt(warm, random.Random("warm"))], 1, 8)
    levels = [level(engine, args, clients) for clients in args.clients]
    args.json.write_text(json.dumps({"served": levels}))
    # Engines with threads of their own may not come to an end by themselves.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
