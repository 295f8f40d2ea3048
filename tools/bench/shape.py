"""Writes a checkpoint of a common shape with random weights, for measurements of speed.

    python tools/bench/shape.py VOCABULARY.gguf FOLDER [--shape 1b|moe|moe-1b|moe-wide] [--skew 1.0]
        [--quantize LLAMA_BIN/llama-quantize]

The shape 1b is Llama 3.2 1B's with SmolLM2's vocabulary of 49,152: 1.07 G weights, the output
matrix tied to the embeddings. FOLDER gets `shape-1b/` (safetensors, bf16) and the same weights as
`shape-1b-BF16.gguf`. llama.cpp's own quantiser then makes Q8_0, Q4_0 (632 MB) and Q4_K_M (669 MB),
as it would of any model: in the last two the tied embeddings are Q6_K. Tokeniser and template come
from VOCABULARY.gguf, which has to have as many tokens. The same seed writes the same weights.

The shape moe is a small Mixtral: 8 layers of width 1,024 with 16 experts of the same width, two for
each token: 474 M weights, of which a token meets 122 M. The shape moe-1b has 18 of these layers:
1,003 M weights, of which a token meets 211 M. The shape moe-wide has 8 layers of twice the width
with 8 experts: 990 M weights, of which a token meets 386 M.

Routers of random weights choose all experts alike, on the whole. With --skew S, the first column
of the embeddings is one number, which all tokens share, and routers weigh it: of two experts, the
one with the higher index has its logit raised by up to S more, by its place among all, in turns
from layer to layer.

What such a model says has no sense, so that it tells nothing of quality. Its logits are of the
usual size, and rows of the embeddings that are not plain text are small, so that answers are text
and a stream has something to show for each token.

Needs numpy, gguf, and for the folder's tokeniser transformers and torch, by which it reads GGUF
(tools/golden/requirements.txt).
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib

import gguf
import numpy as np

import engines

VOCABULARY, CONTEXT, ROPE_THETA, NORM_EPSILON = 49_152, 16_384, 500_000.0, 1e-5
HEAD_DIM = 64
EMBEDDING_DEVIATION = 0.02
# What the first column of the embeddings is where routers prefer some experts.
SHARED = 1.0
CHUNK_ROWS = 4096
FORMATS = ("Q8_0", "Q4_0", "Q4_K_M")


@dataclasses.dataclass
class Shape:
    name: str
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    experts: int = 0
    experts_per_token: int = 0


SHAPES = {
    "1b": Shape("shape-1b", 2048, 16, 8192, 32, 8),
    "moe": Shape("shape-moe", 1024, 8, 1024, 16, 4, experts=16, experts_per_token=2),
    "moe-1b": Shape("shape-moe-1b", 1024, 18, 1024, 16, 4, experts=16, experts_per_token=2),
    "moe-wide": Shape("shape-moe-wide", 2048, 8, 2048, 32, 8, experts=8, experts_per_token=2),
}


def feed_forward(shape, added):
    """Names, sizes and scales of a layer's second half. All experts are one tensor in GGUF."""
    hidden, ffn = shape.hidden, shape.ffn
    if not shape.experts:
        yield "mlp.gate_proj", "ffn_gate", ffn, hidden, 1.0
        yield "mlp.up_proj", "ffn_up", ffn, hidden, 1.0
        yield "mlp.down_proj", "ffn_down", hidden, ffn, added
        return
    yield "block_sparse_moe.gate", "ffn_gate_inp", shape.experts, hidden, 1.0
    roles = [("w1", "gate", ffn, hidden, 1.0), ("w3", "up", ffn, hidden, 1.0)]
    for theirs, role, rows, columns, scale in roles + [("w2", "down", hidden, ffn, added)]:
        for expert in range(shape.experts):
            name = f"block_sparse_moe.experts.{expert}.{theirs}"
            yield name, f"ffn_{role}_exps", rows, columns, scale


def tensors(shape):
    """Names in safetensors and GGUF, shapes, and the standard deviation of the weights."""
    hidden, heads, kv_heads = shape.hidden, shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
    table = (VOCABULARY, hidden)
    yield "model.embed_tokens.weight", "token_embd.weight", table, EMBEDDING_DEVIATION
    # What is added to the residual stream grows by as little in deep models as in shallow ones.
    added = 1 / math.sqrt(2 * shape.layers)
    matrices = [
        ("self_attn.q_proj", "attn_q", heads, hidden, 1.0),
        ("self_attn.k_proj", "attn_k", kv_heads, hidden, 1.0),
        ("self_attn.v_proj", "attn_v", kv_heads, hidden, 1.0),
        ("self_attn.o_proj", "attn_output", hidden, heads, added),
        *feed_forward(shape, added),
    ]
    norms = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]
    for layer in range(shape.layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, short in norms:
            yield f"{ours}.{name}.weight", f"{theirs}.{short}.weight", (hidden,), 0.0
        for name, short, rows, columns, scale in matrices:
            deviation = scale / math.sqrt(columns)
            yield f"{ours}.{name}.weight", f"{theirs}.{short}.weight", (rows, columns), deviation
    yield "model.norm.weight", "output_norm.weight", (hidden,), 0.0


def bf16(values):
    """The nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def prefer(model, name, values, skew):
    """Gives all tokens a number in common, and has routers weigh it, expert by expert."""
    if name == "model.embed_tokens.weight":
        values[:, 0] = SHARED
    elif name.endswith("block_sparse_moe.gate.weight"):
        layer = int(name.split(".")[2])
        # About the root mean square of what a layer's norm divides by.
        added = layer / (2 * model.layers)
        size = math.sqrt(SHARED**2 / model.hidden + EMBEDDING_DEVIATION**2 + added)
        places = (np.arange(model.experts) + 5 * layer) % model.experts / (model.experts - 1)
        values[:, 0] = skew * places * size / SHARED


def chunks(seed, index, model, skew, row_scale):
    """A tensor's rows, some at a time. Without a deviation it is a norm's weight: ones."""
    name, _, shape, deviation = list(tensors(model))[index]
    if deviation == 0.0:
        yield bf16(np.ones(shape))
        return
    numbers = np.random.Generator(np.random.Philox(key=[seed, index]))
    for first in range(0, shape[0], CHUNK_ROWS):
        rows = min(CHUNK_ROWS, shape[0] - first)
        values = numbers.standard_normal((rows, shape[1]), dtype=np.float32) * deviation
        if index == 0:
            values *= row_scale[first : first + rows, None]
        if skew:
            prefer(model, name, values, skew)
        yield bf16(values)


def scale_of_rows(vocabulary):
    """1 for tokens of plain text, 1/16 for control tokens and pieces of characters."""
    kinds = vocabulary.fields["tokenizer.ggml.token_type"].contents()
    plain = [
        kind == gguf.TokenType.NORMAL and all(c == "\u0120" or "!" <= c <= "~" for c in text)
        for text, kind in zip(vocabulary.fields["tokenizer.ggml.tokens"].contents(), kinds)
    ]
    if len(plain) != VOCABULARY:
        raise SystemExit(f"the vocabulary has {len(plain)} tokens, not {VOCABULARY}")
    return np.where(plain, 1.0, 1 / 16).astype(np.float32)


def write_safetensors(path, model, seed, skew, row_scale):
    """Writes all tensors; returns views of the file by name."""
    entries, offset = {}, 0
    for name, _, shape, _ in tensors(model):
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for index, (name, *_) in enumerate(tensors(model)):
            for chunk in chunks(seed, index, model, skew, row_scale):
                file.write(chunk.tobytes())
            done = entries[name]["data_offsets"][1]
            print(f"\r{path.name}: {done / 1e9:.2f} of {offset / 1e9:.2f} GB", end="", flush=True)
    print()
    data = np.memmap(path, np.uint16, "r", 8 + len(header))
    views = {}
    for name, entry in entries.items():
        first, end = (at // 2 for at in entry["data_offsets"])
        views[name] = data[first:end].reshape(entry["shape"])
    return views


def write_folder(folder, source, model, seed, skew, row_scale):
    folder.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

    kind, extra = LlamaConfig, {}
    if model.experts:
        kind = MixtralConfig
        extra = dict(
            num_local_experts=model.experts, num_experts_per_tok=model.experts_per_token
        )
    config = kind(
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        intermediate_size=model.ffn,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        **extra,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=NORM_EPSILON,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    return write_safetensors(folder / "model.safetensors", model, seed, skew, row_scale)


def gguf_tensors(model):
    """Names in GGUF, shapes, and which tensors of the folder each consists of."""
    for short, parts in itertools.groupby(tensors(model), key=lambda tensor: tensor[1]):
        parts = list(parts)
        shape = parts[0][2]
        if short.endswith("_exps.weight"):
            shape = (len(parts), *shape)
        yield short, shape, [name for name, *_ in parts]


def write_gguf(path, vocabulary, model, views):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(model.name)
    writer.add_block_count(model.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.experts_per_token)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, field in vocabulary.fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    kinds = gguf.GGMLQuantizationType
    # llama.cpp multiplies by norms and routers in f32 only.
    exact = {name for name, shape, _ in gguf_tensors(model) if len(shape) == 1}
    exact |= {name for name, *_ in gguf_tensors(model) if "ffn_gate_inp" in name}
    for name, shape, _ in gguf_tensors(model):
        kind, bytes_each = (kinds.F32, 4) if name in exact else (kinds.BF16, 2)
        size = math.prod(shape) * bytes_each
        writer.add_tensor_info(name, shape, np.dtype(np.uint16), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, parts in gguf_tensors(model):
        values = views[parts[0]]
        if name.endswith("_exps.weight"):
            values = np.stack([views[part] for part in parts])
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF rotates neighbours, safetensors the two halves of a head.
            halves = values.reshape(-1, 2, HEAD_DIM // 2, model.hidden)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)
        if name in exact:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(values)
        print(f"\r{path.name}: {name:<28}", end="", flush=True)
    print()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=pathlib.Path, help="a GGUF file of SmolLM2")
    parser.add_argument("folder", type=pathlib.Path, help="where to write, about 6 GB in all")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skew", type=float, default=0.0, help="how much routers prefer experts")
    parser.add_argument("--quantize", type=pathlib.Path, help="llama.cpp's llama-quantize")
    args = parser.parse_args()
    if args.quantize:
        engines.link_libraries(args.quantize.parent)
    vocabulary = gguf.GGUFReader(args.vocabulary)
    model = SHAPES[args.shape]
    folder, row_scale = args.folder / model.name, scale_of_rows(vocabulary)
    views = write_folder(folder, args.vocabulary, model, args.seed, args.skew, row_scale)
    whole = args.folder / f"{model.name}-BF16.gguf"
    write_gguf(whole, vocabulary, model, views)
    for name in FORMATS if args.quantize else ():
        print(f"llama-quantize {name}", flush=True)
        to = args.folder / f"{model.name}-{name}.gguf"
        engines.run([args.quantize, whole, to, name])


if __name__ == "__main__":
    main()
