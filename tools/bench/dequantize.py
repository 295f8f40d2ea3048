"""A GGUF file's weights as a folder with safetensors in bf16, for engines that read nothing else.

    python tools/bench/dequantize.py MODEL.gguf FOLDER

Needs torch, transformers, accelerate and gguf (tools/golden/requirements.txt).
"""

import argparse
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    source = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    args.folder.mkdir(parents=True, exist_ok=True)
    # `save_pretrained` refuses a model that was read from GGUF, though its weights are plain now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(args.folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, args.folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
