#!/usr/bin/env python3
"""The `openai` package, unmodified, against a running server.

    POMONA_URL=http://127.0.0.1:8000 python3 tests/e2e/test_openai.py [-v] [Name.of.test]

POMONA_MODEL chooses the model (default: the first one listed), POMONA_API_KEY the key if the server
wants one. POMONA_DISCONNECTS (default 200) is the number of clients that hang up at random.
"""

import asyncio
import json
import os
import random
import re
import time
import unittest
import urllib.parse
import urllib.request

import openai

URL = os.environ.get("POMONA_URL", "http://127.0.0.1:8000").rstrip("/")
KEY = os.environ.get("POMONA_API_KEY")
DISCONNECTS = int(os.environ.get("POMONA_DISCONNECTS", "200"))
PATIENCE_S = 120

OPTIONS = {"base_url": URL + "/v1", "api_key": KEY or "none", "max_retries": 0, "timeout": PATIENCE_S}
CLIENT = openai.OpenAI(**OPTIONS)
MODEL = os.environ.get("POMONA_MODEL") or CLIENT.models.list().data[0].id
QUESTION = [{"role": "user", "content": "Name three fruits and say what each of them tastes like."}]
PROMPT = "Once upon a time there was a gardener who"


def post(path, body):
    """An endpoint that the package does not know."""
    headers = {"content-type": "application/json"}
    if KEY:
        headers["authorization"] = "Bearer " + KEY
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)


def metric(name):
    """The sum over all models."""
    with urllib.request.urlopen(URL + "/metrics", timeout=PATIENCE_S) as response:
        text = response.read().decode()
    found = re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not among the metrics"
    return sum(map(float, found))


def chat(**fields):
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields
    return CLIENT.chat.completions.create(**fields)


def complete(**fields):
    fields = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 16} | fields
    return CLIENT.completions.create(**fields)


def text(answer, index=0):
    return answer.choices[index].message.content


def streamed(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


class Case(unittest.TestCase):
    def wait(self, what, condition):
        deadline = time.monotonic() + 20
        while not (value := condition()):
            self.assertLess(time.monotonic(), deadline, f"waited in vain for {what()}")
            time.sleep(0.05)
        return value

    def settle(self):
        """Waits until nothing runs, and no block of KV is held."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        held = lambda: [metric(name) for name in names]
        self.wait(lambda: f"{names} to be 0, they are {held()}", lambda: not any(held()))


class Chat(Case):
    def test_an_answer(self):
        answer = chat()
        self.assertEqual((answer.object, answer.model), ("chat.completion", MODEL))
        self.assertEqual(len(answer.choices), 1)
        choice = answer.choices[0]
        self.assertEqual((choice.index, choice.message.role), (0, "assistant"))
        self.assertTrue(text(answer))
        self.assertIsNone(choice.message.tool_calls)
        self.assertIsNone(choice.message.refusal)
        self.assertIsNone(choice.logprobs)
        self.assertIn(choice.finish_reason, ("stop", "length"))
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertTrue(0 < usage.completion_tokens <= 24)
        tokens = post("/tokenize", {"model": MODEL, "messages": QUESTION})["count"]
        self.assertEqual(usage.prompt_tokens, tokens)

    def test_a_stream_adds_up_to_the_answer(self):
        whole = chat()
        chunks = list(chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual(streamed(chunks), text(whole))
        self.assertTrue(all(chunk.object == "chat.completion.chunk" for chunk in chunks))
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(chunks[-2].choices[0].finish_reason, whole.choices[0].finish_reason)
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual(chunks[-1].usage.prompt_tokens, whole.usage.prompt_tokens)
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))

    def test_the_packages_own_stream_helper(self):
        with CLIENT.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0,
                                            max_tokens=24) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.current_completion_snapshot
        self.assertEqual("".join(pieces), text(final))
        self.assertEqual(text(final), text(chat()))

    def test_logprobs(self):
        answer = chat(logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        raw = b"".join(bytes(token.bytes) for token in content)
        self.assertEqual(raw.decode(), text(answer))
        for token in content:
            self.assertEqual(len(token.top_logprobs), 3)
            values = [other.logprob for other in token.top_logprobs]
            self.assertEqual(values, sorted(values, reverse=True))
            self.assertLessEqual(token.logprob, 0)
            # Greedy: the likeliest one was taken.
            self.assertEqual(token.logprob, values[0])
        chunks = chat(logprobs=True, top_logprobs=3, stream=True)
        again = [token for chunk in chunks for choice in chunk.choices if choice.logprobs
                 for token in choice.logprobs.content]
        self.assertEqual(again, content)

    def test_stop_strings(self):
        whole = text(chat())
        middle = len(whole) // 2
        stop = whole[middle:middle + 3]
        want = whole[:whole.index(stop)]
        answer = chat(stop=[stop, "never to be seen"])
        self.assertEqual((text(answer), answer.choices[0].finish_reason), (want, "stop"))
        chunks = list(chat(stop=stop, stream=True))
        self.assertEqual(streamed(chunks), want)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")
        self.settle()

    def test_a_seed_repeats_and_another_does_not(self):
        draw = lambda seed: text(chat(temperature=1.0, seed=seed, max_tokens=20))
        first = draw(1)
        self.assertEqual(draw(1), first)
        self.assertGreater(len({first, draw(2), draw(3), draw(4)}), 1)

    def test_each_choice_is_what_its_seed_gives_alone(self):
        many = chat(n=3, seed=7, temperature=1.0, max_tokens=16)
        self.assertEqual([choice.index for choice in many.choices], [0, 1, 2])
        alone = [chat(seed=7 + index, temperature=1.0, max_tokens=16) for index in range(3)]
        self.assertEqual([text(many, index) for index in range(3)], [text(one) for one in alone])
        self.assertEqual(many.usage.prompt_tokens, alone[0].usage.prompt_tokens)
        total = sum(one.usage.completion_tokens for one in alone)
        self.assertEqual(many.usage.completion_tokens, total)
        chunks = list(chat(n=3, seed=7, temperature=1.0, max_tokens=16, stream=True))
        self.assertEqual([streamed(chunks, index) for index in range(3)],
                         [text(one) for one in alone])

    def test_vllms_fields(self):
        extra = {"ignore_eos": True, "min_tokens": 5, "top_k": 5, "min_p": 0.01,
                 "repetition_penalty": 1.1, "skip_special_tokens": False}
        answer = chat(max_tokens=12, temperature=0.7, seed=1, extra_body=extra)
        self.assertEqual(answer.usage.completion_tokens, 12)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_fields_at_their_defaults_are_accepted(self):
        chat(max_tokens=2, tools=[], tool_choice="none", response_format={"type": "text"},
             store=False, service_tier="auto", user="someone", metadata={"a": "b"},
             frequency_penalty=0.1, presence_penalty=-0.1, logit_bias={"1": -5},
             parallel_tool_calls=True, modalities=["text"])

    def test_parts_of_text(self):
        parts = [{"type": "text", "text": QUESTION[0]["content"]}]
        messages = [{"role": "user", "content": parts}]
        self.assertEqual(text(chat(messages=messages)), text(chat()))

    def test_a_repeated_prompt_comes_from_the_cache(self):
        messages = [{"role": "user", "content": f"{random.random()} " + "apple " * 60}]
        chat(messages=messages, max_tokens=1)
        usage = chat(messages=messages, max_tokens=1).usage
        self.assertGreaterEqual(usage.prompt_tokens_details.cached_tokens, 32)


class Many(Case):
    def test_32_streams_at_once_say_what_they_say_alone(self):
        prompts = [f"The number {number} is" for number in range(32)]
        alone = [complete(prompt=prompt, max_tokens=12).choices[0].text for prompt in prompts]

        async def one(client, prompt):
            stream = await client.completions.create(
                model=MODEL, prompt=prompt, temperature=0, max_tokens=12, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def together():
            async with openai.AsyncOpenAI(**OPTIONS) as client:
                return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

        self.assertEqual(asyncio.run(together()), alone)
        self.settle()

    def test_hanging_up_frees_the_blocks(self):
        stream = chat(stream=True, max_tokens=1000, extra_body={"ignore_eos": True})
        for _, _ in zip(range(3), stream):
            pass
        self.assertGreater(metric("vllm:num_requests_running"), 0)
        self.assertGreater(metric("vllm:kv_cache_usage_perc"), 0)
        stream.close()
        self.settle()

    def test_giving_up_on_an_answer_frees_the_blocks(self):
        impatient = CLIENT.with_options(timeout=0.2)
        with self.assertRaises(openai.APITimeoutError):
            impatient.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1500,
                                         extra_body={"ignore_eos": True})
        self.settle()

    def test_random_disconnects_leave_nothing_behind(self):
        chance = random.Random(7)
        address = urllib.parse.urlparse(URL)
        ended = metric("vllm:request_success_total")

        async def client(slots):
            async with slots:
                body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 1000,
                                   "ignore_eos": True, "stream": chance.random() < 0.7,
                                   "n": chance.choice((1, 1, 2))})
                key = f"Authorization: Bearer {KEY}\r\n" if KEY else ""
                head = (f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n{key}"
                        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                whole = (head + body).encode()
                writer.write(whole[:len(whole) // 2] if chance.random() < 0.1 else whole)
                await writer.drain()
                try:
                    seen = await asyncio.wait_for(reader.read(1 << 14), chance.random() * 0.3)
                except TimeoutError:
                    seen = b""
                writer.close()
                return seen.startswith(b"HTTP/1.1 200")

        async def all_of_them():
            slots = asyncio.Semaphore(48)
            return await asyncio.gather(*(client(slots) for _ in range(DISCONNECTS)))

        answered = sum(asyncio.run(all_of_them()))
        self.settle()
        # Whoever saw an answer begin had a request at work, and each of those was told its end.
        told = lambda: metric("vllm:request_success_total") - ended
        self.wait(lambda: f"{answered} ends, {told()} were told", lambda: told() >= max(answered, 1))
        self.assertTrue(complete(max_tokens=2).choices[0].text)


class Completions(Case):
    def test_an_answer(self):
        answer = complete()
        self.assertEqual((answer.object, answer.model), ("text_completion", MODEL))
        self.assertTrue(answer.choices[0].text)
        self.assertIsNone(answer.choices[0].logprobs)
        self.assertLessEqual(answer.usage.completion_tokens, 16)

    def test_tokens_and_lists_as_prompts(self):
        ids = post("/tokenize", {"model": MODEL, "prompt": PROMPT})["tokens"]
        want = complete().choices[0].text
        self.assertEqual(complete(prompt=ids).choices[0].text, want)
        self.assertEqual([choice.text for choice in complete(prompt=[PROMPT, PROMPT]).choices], [want] * 2)
        self.assertEqual([choice.text for choice in complete(prompt=[ids, ids]).choices], [want] * 2)

    def test_text_to_tokens_and_back(self):
        ids = post("/tokenize", {"model": MODEL, "prompt": PROMPT, "add_special_tokens": False})
        self.assertEqual(ids["count"], len(ids["tokens"]))
        back = post("/detokenize", {"model": MODEL, "tokens": ids["tokens"]})["prompt"]
        self.assertEqual(back.strip(), PROMPT)

    def test_echo_and_logprobs(self):
        answer = complete(echo=True, logprobs=2, max_tokens=4)
        choice = answer.choices[0]
        self.assertTrue(choice.text.startswith(PROMPT))
        columns = choice.logprobs
        lengths = {len(columns.tokens), len(columns.token_logprobs), len(columns.top_logprobs),
                   len(columns.text_offset)}
        self.assertEqual(len(lengths), 1, lengths)
        self.assertGreaterEqual(len(columns.tokens), answer.usage.prompt_tokens)
        self.assertIsNone(columns.token_logprobs[0])
        self.assertTrue(all(value <= 0 for value in columns.token_logprobs[1:]))
        self.assertTrue(all(2 <= len(top) <= 3 for top in columns.top_logprobs[1:]))
        only = complete(echo=True, logprobs=1, max_tokens=0)
        self.assertEqual((only.choices[0].text, only.usage.completion_tokens), (PROMPT, 0))
        count = only.usage.prompt_tokens
        self.assertEqual(only.choices[0].logprobs.token_logprobs, columns.token_logprobs[:count])

    def test_a_stream_adds_up_to_the_answer(self):
        whole = complete(logprobs=1, echo=True)
        chunks = list(complete(logprobs=1, echo=True, stream=True,
                               stream_options={"include_usage": True}))
        self.assertEqual(chunks[-1].usage, whole.usage)
        pieces = [choice for chunk in chunks for choice in chunk.choices]
        self.assertEqual("".join(piece.text for piece in pieces), whole.choices[0].text)
        tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens]
        self.assertEqual(tokens, whole.choices[0].logprobs.tokens)


class Errors(Case):
    def check(self, kind, param, words, call):
        with self.assertRaises(kind) as caught:
            call()
        error = caught.exception
        self.assertEqual(error.param, param, error.message)
        for word in words:
            self.assertIn(word, error.message)
        return error

    def test_bad_requests(self):
        check = lambda param, words, **fields: self.check(
            openai.BadRequestError, param, words, lambda: chat(**fields))
        check("temperature", ["0 to 2"], temperature=9)
        check("n", ["1 to"], n=0)
        check("messages", ["messages"], messages=[])
        check("messages[0].role", ["role"], messages=[{"role": "robot", "content": "x"}])
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        check("messages[0].content[0].type", ["images"],
              messages=[{"role": "user", "content": image}])
        check("tools", ["not supported"],
              tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        check("response_format", ["not supported"], response_format={"type": "json_object"})
        check("max_token", ["max_tokens"], extra_body={"max_token": 3})

    def test_a_context_that_is_too_long(self):
        limit = CLIENT.models.retrieve(MODEL).max_model_len
        error = self.check(openai.BadRequestError, "max_tokens", [str(limit)],
                           lambda: complete(max_tokens=limit))
        self.assertEqual(error.code, "context_length_exceeded")

    def test_an_unknown_model(self):
        error = self.check(openai.NotFoundError, "model", [MODEL], lambda: chat(model="no-such"))
        self.assertEqual(error.code, "model_not_found")
        with self.assertRaises(openai.NotFoundError):
            CLIENT.models.retrieve("no-such")

    def test_an_unknown_path(self):
        with self.assertRaises(openai.NotFoundError):
            CLIENT.embeddings.create(model=MODEL, input="x")

    @unittest.skipUnless(KEY, "the server wants no key (set POMONA_API_KEY)")
    def test_a_wrong_key(self):
        stranger = CLIENT.with_options(api_key="wrong")
        with self.assertRaises(openai.AuthenticationError) as caught:
            stranger.models.list()
        self.assertEqual(caught.exception.code, "invalid_api_key")


class Server(Case):
    def test_models(self):
        models = CLIENT.models.list().data
        self.assertIn(MODEL, [model.id for model in models])
        model = CLIENT.models.retrieve(MODEL)
        self.assertEqual((model.id, model.object), (MODEL, "model"))

    def test_probes(self):
        for path in ("/health", "/ready", "/version", "/metrics", "/"):
            with urllib.request.urlopen(URL + path, timeout=PATIENCE_S) as response:
                self.assertEqual(response.status, 200, path)

    def test_metrics_count_tokens(self):
        names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        self.settle()
        before = [metric(name) for name in names]
        usage = complete(max_tokens=5).usage
        self.settle()
        grown = [metric(name) - old for name, old in zip(names, before)]
        self.assertEqual(grown, [usage.prompt_tokens, usage.completion_tokens])


if __name__ == "__main__":
    unittest.main()
