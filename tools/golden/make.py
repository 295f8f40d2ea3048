"""Tiny random checkpoints with the logits that transformers computes for them.

Run by hand when an architecture is added; the results are small and in the tree.
Needs torch, transformers 5, safetensors and gguf (see requirements.txt). NAMES are those to make;
without any, all are.

    python tools/golden/make.py crates/models/tests/golden [NAMES]
"""

import json
import pathlib
import sys

import gguf
import torch
import transformers as tf

TOKENS = 44
SIZES = dict(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.25,
    bos_token_id=1,
    eos_token_id=2,
)


# Experts take room.
SMALL = SIZES | dict(num_hidden_layers=2, intermediate_size=24)


def llama3_rope():
    return dict(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )


MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES)),
    "llama3": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**SIZES, rope_parameters=llama3_rope(), tie_word_embeddings=True),
    ),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**SIZES, sliding_window=9)),
    "qwen2": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    ),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES)),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**SMALL, num_local_experts=5, num_experts_per_tok=2),
    ),
    "qwen3-moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(
            **SMALL,
            moe_intermediate_size=32,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        ),
    ),
    "qwen3-moe-joined": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(
            **SMALL,
            moe_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
    ),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **SIZES,
            sliding_window=9,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
    ),
}


SEEDS = {
    "llama": 0,
    "llama3": 1,
    "mistral": 2,
    "qwen2": 3,
    "qwen3": 4,
    "gemma3": 5,
    "mixtral": 6,
    "qwen3-moe": 7,
    "qwen3-moe-joined": 8,
}


def save(folder, model, tokens, dtype, **how):
    """Writes the checkpoint in `dtype` and the logits of exactly those weights in f32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(dtype)
    model.save_pretrained(folder, **how)
    # Loaded anew: converting a model to half precision would round its rotary frequencies too.
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expect(folder, model, tokens)


def expect(folder, model, tokens):
    """Writes what the model makes of the tokens."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    (folder / "expected.f32").write_bytes(logits.numpy().astype("<f4").tobytes())
    (folder / "tokens.json").write_text(json.dumps(tokens))


GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def gguf_tensors(model, neighbours):
    """Names of GGUF and tensors; with `neighbours`, rows of q and k so that these are rotated."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, value in model.state_dict().items():
        if name in outer:
            yield outer[name], value
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        short = GGUF_NAMES[rest]
        if neighbours and short in ("attn_q", "attn_k"):
            halves = value.reshape(-1, 2, SIZES["head_dim"] // 2, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if short == "ffn_gate_up_exps" and neighbours:
            # Most files have the two apart.
            for part, half in zip(("gate", "up"), value.chunk(2, dim=1)):
                yield f"blk.{layer}.ffn_{part}_exps.weight", half
            continue
        yield f"blk.{layer}.{short}.weight", value


def save_gguf(folder, model, tokens, architecture, kind):
    """Writes the model as a GGUF file with experts in the format `kind`, and its logits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            stored = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.tensor(gguf.quants.dequantize(stored, kind))
    expect(folder, model, tokens)
    config = model.config
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for name, value in gguf_tensors(model, neighbours=architecture == "llama"):
        values = value.contiguous().numpy()
        if name.endswith("_exps.weight"):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    out, names = pathlib.Path(sys.argv[1]), sys.argv[2:] or MODELS
    for name in names:
        kind, config = MODELS[name]
        torch.manual_seed(SEEDS[name])
        config._attn_implementation = "eager"
        model = kind(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                if parameter_name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
                if ".mlp.gate." in parameter_name:
                    # So that experts are chosen clearly.
                    parameter.mul_(4)
        tokens = torch.randint(3, SIZES["vocab_size"], (TOKENS,)).tolist()
        joined = dict(save_original_format=False) if name == "qwen3-moe-joined" else {}
        save(out / name, model, tokens, torch.float32, **joined)
        if name == "llama":
            small = dict(max_shard_size="40KB")
            save(out / "llama-f16-sharded", model, tokens, torch.float16, **small)
        if name == "qwen3":
            save(out / "qwen3-bf16", model, tokens, torch.bfloat16)
        if name == "mixtral":
            kind = gguf.GGMLQuantizationType.F16
            save_gguf(out / "mixtral-gguf", model, tokens, "llama", kind)
        if name == "qwen3-moe":
            kind = gguf.GGMLQuantizationType.Q8_0
            save_gguf(out / "qwen3-moe-gguf", model, tokens, "qwen3moe", kind)


if __name__ == "__main__":
    main()
