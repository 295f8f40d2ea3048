"""Writes a checkpoint of a common shape with random weights, for measurements of speed.

    python tools/bench/shape.py VOCABULARY.gguf FOLDER [--quantize LLAMA_BIN/llama-quantize]

The shape is Llama 3.2 1B's with SmolLM2's vocabulary of 49,152: 1.07 G weights, the output matrix
tied to the embeddings. FOLDER gets `shape-1b/` (safetensors, bf16) and the same weights as
`shape-1b-BF16.gguf`. llama.cpp's own quantiser then makes Q8_0, Q4_0 (632 MB) and Q4_K_M (669 MB),
as it would of any model: in the last two the tied embeddings are Q6_K. Tokeniser and template come
from VOCABULARY.gguf, which has to have as many tokens. The same seed writes the same weights.

What such a model says has no sense, so that it tells nothing of quality. Its logits are of the
usual size, and rows of the embeddings that are not plain text are small, so that answers are text
and a stream has something to show for each token.

Needs numpy, gguf, and transformers for the folder's tokeniser (tools/golden/requirements.txt).
"""

import argparse
import json
import math
import pathlib
import subprocess

import gguf
import numpy as np

HIDDEN, LAYERS, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 16, 8192, 32, 8, 64
VOCABULARY, CONTEXT, ROPE_THETA, NORM_EPSILON = 49_152, 16_384, 500_000.0, 1e-5
CHUNK_ROWS = 4096
FORMATS = ("Q8_0", "Q4_0", "Q4_K_M")


def tensors():
    """Names in safetensors and GGUF, shapes, and the standard deviation of the weights."""
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, HIDDEN), 0.02
    # What is added to the residual stream grows by as little in deep models as in shallow ones.
    added = 1 / math.sqrt(2 * LAYERS)
    matrices = [
        ("self_attn.q_proj", "attn_q", HEADS * HEAD_DIM, HIDDEN, 1.0),
        ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
        ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
        ("self_attn.o_proj", "attn_output", HIDDEN, HEADS * HEAD_DIM, added),
        ("mlp.gate_proj", "ffn_gate", FFN, HIDDEN, 1.0),
        ("mlp.up_proj", "ffn_up", FFN, HIDDEN, 1.0),
        ("mlp.down_proj", "ffn_down", HIDDEN, FFN, added),
    ]
    norms = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, short in norms:
            yield f"{ours}.{name}.weight", f"{theirs}.{short}.weight", (HIDDEN,), 0.0
        for name, short, rows, columns, scale in matrices:
            deviation = scale / math.sqrt(columns)
            yield f"{ours}.{name}.weight", f"{theirs}.{short}.weight", (rows, columns), deviation
    yield "model.norm.weight", "output_norm.weight", (HIDDEN,), 0.0


def bf16(values):
    """The nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def chunks(seed, index, shape, deviation, row_scale):
    """A tensor's rows, some at a time. Without a deviation it is a norm's weight: ones."""
    if deviation == 0.0:
        yield bf16(np.ones(shape))
        return
    numbers = np.random.Generator(np.random.Philox(key=[seed, index]))
    for first in range(0, shape[0], CHUNK_ROWS):
        rows = min(CHUNK_ROWS, shape[0] - first)
        values = numbers.standard_normal((rows, shape[1]), dtype=np.float32) * deviation
        if index == 0:
            values *= row_scale[first : first + rows, None]
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


def write_safetensors(path, seed, row_scale):
    """Writes all tensors; returns views of the file by name."""
    entries, offset = {}, 0
    for name, _, shape, _ in tensors():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for index, (name, _, shape, deviation) in enumerate(tensors()):
            for chunk in chunks(seed, index, shape, deviation, row_scale):
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


def write_folder(folder, source, seed, row_scale):
    folder.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
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
    return write_safetensors(folder / "model.safetensors", seed, row_scale)


def write_gguf(path, vocabulary, views):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("shape-1b")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, field in vocabulary.fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    kinds = gguf.GGMLQuantizationType
    for name, short, shape, _ in tensors():
        kind = kinds.BF16 if len(shape) == 2 else kinds.F32
        size = math.prod(shape) * (2 if len(shape) == 2 else 4)
        writer.add_tensor_info(short, shape, np.dtype(np.uint16), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, short, shape, _ in tensors():
        values = views[name]
        if short.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF rotates neighbours, safetensors the two halves of a head.
            halves = values.reshape(-1, 2, HEAD_DIM // 2, HIDDEN)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        writer.write_tensor_data(values)
        print(f"\r{path.name}: {short:<28}", end="", flush=True)
    print()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=pathlib.Path, help="a GGUF file of SmolLM2")
    parser.add_argument("folder", type=pathlib.Path, help="where to write, about 6 GB in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quantize", type=pathlib.Path, help="llama.cpp's llama-quantize")
    args = parser.parse_args()
    vocabulary = gguf.GGUFReader(args.vocabulary)
    views = write_folder(
        args.folder / "shape-1b", args.vocabulary, args.seed, scale_of_rows(vocabulary)
    )
    whole = args.folder / "shape-1b-BF16.gguf"
    write_gguf(whole, vocabulary, views)
    for name in FORMATS if args.quantize else ():
        print(f"llama-quantize {name}", flush=True)
        to = args.folder / f"shape-1b-{name}.gguf"
        subprocess.run([args.quantize, whole, to, name], check=True, capture_output=True)


if __name__ == "__main__":
    main()
