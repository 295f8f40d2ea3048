"""Tiny random checkpoints in GPTQ's and AWQ's int4 layouts, with the logits that transformers
computes for the numbers they stand for.

    python tools/golden/int4.py crates/models/tests/golden

Packing is written from the published layouts; `--gptqmodel FOLDER` and `--autoawq FOLDER` (source
trees of those packages) also unpack everything with their own code and compare.
"""

import argparse
import importlib.util
import json
import pathlib

import numpy as np
import torch
import transformers as tf
from safetensors.torch import save_file

from make import SIZES as TINY, TOKENS

SIZES = TINY | dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.2
)
# The matrix whose numbers are kept beside the logits, to be compared bit by bit.
ONE_MATRIX = "model.layers.0.self_attn.k_proj"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack(values, axis, order=range(8)):
    """Eight 4-bit integers along an axis to a 32-bit word."""
    values = np.moveaxis(np.asarray(values, dtype=np.uint32), axis, -1)
    values = values.reshape(*values.shape[:-1], -1, 8)
    words = sum(values[..., place] << (4 * i) for i, place in enumerate(order))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32), -1, axis)).view(np.int32)


def quantise(weight, groups, symmetric):
    """Scales and zero points `[groups, out]`, integers `[in, out]`, for `weight: [in, out]`."""
    count = int(groups.max()) + 1
    scales = np.zeros((count, weight.shape[1]), np.float16)
    zeros = np.zeros((count, weight.shape[1]), np.int64)
    for g in range(count):
        rows = weight[groups == g]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if symmetric:
            scales[g], zeros[g] = np.maximum(-low, high) / 7.5, 8
        else:
            scales[g] = (high - low) / 15
            # Version 1 cannot hold a zero point of 0.
            zeros[g] = np.clip(np.round(-low / scales[g]), 1, 15)
    integers = np.clip(np.round(weight / scales[groups].astype(np.float32)) + zeros[groups], 0, 15)
    return scales, zeros, integers.astype(np.int64)


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(out, name, kind, config, quantisation, others):
    torch.manual_seed(len(name))
    random = np.random.default_rng(len(name))
    model = kind(config).eval()
    method, size = quantisation["quant_method"], quantisation["group_size"]
    tensors = {}
    for key, parameter in list(model.named_parameters()):
        with torch.no_grad():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if key.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            layer, projection = key.rsplit(".", 2)[0], key.split(".")[-2]
            head = projection == "lm_head" and quantisation.get("lm_head")
            if not key.endswith("weight") or projection not in PROJECTIONS and not head:
                # What is not quantised keeps 16 bits.
                parameter.copy_(parameter.half().float())
                tensors[key] = parameter.half().contiguous()
                continue
            weight = parameter.numpy().T
            cols = weight.shape[0]
            groups = np.arange(cols) // (cols if size == -1 else size)
            if quantisation.get("desc_act"):
                # Matrices with one input have one order.
                order = np.random.default_rng([cols, len(layer), projection in ("o_proj", "lm_head")])
                groups = order.permutation(groups)
            symmetric = quantisation.get("sym", not quantisation.get("zero_point", True))
            scales, zeros, integers = quantise(weight, groups, symmetric)
            exact = scales[groups].astype(np.float32) * (integers - zeros[groups])
            base = key.removesuffix(".weight")
            tensors[f"{base}.scales"] = torch.from_numpy(scales)
            if method == "gptq":
                stored = zeros - (quantisation["checkpoint_format"] == "gptq")
                tensors[f"{base}.qweight"] = torch.from_numpy(pack(integers, 0))
                tensors[f"{base}.qzeros"] = torch.from_numpy(pack(stored, 1))
                tensors[f"{base}.g_idx"] = torch.from_numpy(groups.astype(np.int32))
            else:
                tensors[f"{base}.qweight"] = torch.from_numpy(pack(integers, 1, AWQ_ORDER))
                tensors[f"{base}.qzeros"] = torch.from_numpy(pack(zeros, 1, AWQ_ORDER))
            others(method, quantisation, tensors, base, exact)
            parameter.copy_(torch.from_numpy(exact.T.copy()))
            if base == ONE_MATRIX:
                one = exact.T.astype("<f4").tobytes()
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"quantization_config": quantisation, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = random.integers(3, SIZES["vocab_size"], TOKENS).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    (folder / "expected.f32").write_bytes(logits.numpy().astype("<f4").tobytes())
    (folder / "tokens.json").write_text(json.dumps(tokens))
    (folder / "k_proj.f32").write_bytes(one)


def comparison(arguments):
    """Unpacks with the packages' own code, in f32, and compares bit by bit."""

    def compare(method, quantisation, tensors, base, exact):
        qweight, qzeros, scales = (tensors[f"{base}.{k}"] for k in ("qweight", "qzeros", "scales"))
        if method == "awq" and arguments.autoawq:
            unpack = loaded(arguments.autoawq / "awq/utils/packing_utils.py")
            size = quantisation["group_size"]
            found = unpack.dequantize_gemm(qweight, qzeros, scales.float(), 4, size)
        elif method == "gptq" and arguments.gptqmodel:
            found = gptqmodel(arguments.gptqmodel, quantisation, tensors, base)
        else:
            return
        assert np.array_equal(found.numpy(), exact), base
        print(f"{method}: {base} is what the package reads")

    return compare


def gptqmodel(root, quantisation, tensors, base):
    """`BaseQuantLinear.dequantize_weight` of GPTQModel, taken from its source: importing the
    package needs a compiler for devices."""
    import ast
    import textwrap
    import types

    source = (root / "gptqmodel/nn_modules/qlinear/__init__.py").read_text()
    wanted = ("dequantize_weight", "_dequantize_from_codes")
    functions = [
        textwrap.dedent(ast.get_source_segment(source, node, padded=True))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    scope = {"t": torch, "_torch_right_shift": torch.bitwise_right_shift}
    # The first two of the names: those of the packed linear layer.
    for text in functions[:2]:
        exec(text, scope)
    qzeros = tensors[f"{base}.qzeros"].clone()
    if quantisation["checkpoint_format"] == "gptq":
        qzeros += 0b00010001000100010001000100010001
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).unsqueeze(0)
    linear = types.SimpleNamespace(
        planar=False,
        bits=4,
        pack_factor=8,
        maxq=15,
        dequant_dtype=torch.int16,
        in_features=tensors[f"{base}.g_idx"].shape[0],
        qweight=tensors[f"{base}.qweight"],
        qzeros=qzeros,
        scales=tensors[f"{base}.scales"].float(),
        g_idx=tensors[f"{base}.g_idx"],
        wf_unsqueeze_zero=shifts.unsqueeze(0),
        wf_unsqueeze_neg_one=shifts.unsqueeze(-1),
        _init_wf_unsqueeze_buffers=lambda: None,
    )
    linear._dequantize_from_codes = types.MethodType(scope["_dequantize_from_codes"], linear)
    return scope["dequantize_weight"](linear)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--gptqmodel", type=pathlib.Path)
    parser.add_argument("--autoawq", type=pathlib.Path)
    arguments = parser.parse_args()
    others = comparison(arguments)

    def gptq(size, version="gptq", **settings):
        kind = dict(quant_method="gptq", bits=4, checkpoint_format=version, group_size=size)
        return kind | dict(sym=False, desc_act=False) | settings

    llama = (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES))
    qwen2 = (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    )
    awq = dict(quant_method="awq", bits=4, version="gemm", zero_point=True, group_size=32)
    for name, (kind, config), quantisation in [
        ("gptq-v1", llama, gptq(64)),
        ("gptq-v2-row", qwen2, gptq(-1, "gptq_v2", sym=True)),
        ("gptq-desc-act", llama, gptq(32, desc_act=True, lm_head=True)),
        ("awq", llama, awq),
    ]:
        config._attn_implementation = "eager"
        make(arguments.out, name, kind, config, quantisation, others)


if __name__ == "__main__":
    main()
