"""Tiny random checkpoints with the logits that transformers computes for them.

Run by hand when an architecture is added; the results are small and in the tree.
Needs torch, transformers 5 and safetensors (see requirements.txt).

    python tools/golden/make.py crates/models/tests/golden
"""

import json
import pathlib
import sys

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


def save(folder, model, tokens, dtype, shard):
    """Writes the checkpoint in `dtype` and the logits of exactly those weights in f32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(dtype)
    size = dict(max_shard_size="40KB") if shard else {}
    model.save_pretrained(folder, **size)
    # Loaded anew: converting a model to half precision would round its rotary frequencies too.
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    (folder / "expected.f32").write_bytes(logits.numpy().astype("<f4").tobytes())
    (folder / "tokens.json").write_text(json.dumps(tokens))


def main():
    out = pathlib.Path(sys.argv[1])
    for seed, (name, (kind, config)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = kind(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                if parameter_name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        tokens = torch.randint(3, SIZES["vocab_size"], (TOKENS,)).tolist()
        save(out / name, model, tokens, torch.float32, shard=False)
        if name == "llama":
            save(out / "llama-f16-sharded", model, tokens, torch.float16, shard=True)
        if name == "qwen3":
            save(out / "qwen3-bf16", model, tokens, torch.bfloat16, shard=False)


if __name__ == "__main__":
    main()
