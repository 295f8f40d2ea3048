"""Pomona's logits against transformers running the same dequantised weights in f32.

    cargo build --release -p pomona-models --example logits
    python tools/golden/compare.py target/release/examples/logits MODEL.gguf [TEXT]

Without TEXT it takes the language reference that ships with Python. Prints top-1 agreement, mean
KL divergence (transformers || Pomona) and both perplexities.
"""

import json
import pathlib
import pydoc_data.topics
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers as tf

SEQUENCES, LENGTH = 8, 300


def main():
    program, gguf = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    if len(sys.argv) > 3:
        text = pathlib.Path(sys.argv[3]).read_text()
    else:
        text = "\n".join(str(t) for _, t in sorted(pydoc_data.topics.topics.items()))
    where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = tf.AutoTokenizer.from_pretrained(**where)
    model = tf.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ids = tokenizer(text[: SEQUENCES * LENGTH * 12], add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    step = LENGTH - len(start)
    sequences = [start + ids[i * step : (i + 1) * step] for i in range(SEQUENCES)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(sequences, file)
        file.flush()
        run = subprocess.Popen([program, str(gguf), file.name], stdout=subprocess.PIPE)
        count = agree = 0
        kl = ours_nll = theirs_nll = 0.0
        for sequence in sequences:
            with torch.no_grad():
                theirs = model(torch.tensor([sequence])).logits[0].double()
            vocab = theirs.shape[1]
            for position, expected in enumerate(theirs):
                data = run.stdout.read(4 * vocab)
                found = torch.from_numpy(np.frombuffer(data, "<f4").copy()).double()
                p, q = expected.log_softmax(0), found.log_softmax(0)
                count += 1
                agree += int(expected.argmax() == found.argmax())
                kl += float((p.exp() * (p - q)).sum())
                if position + 1 < len(sequence):
                    theirs_nll -= float(p[sequence[position + 1]])
                    ours_nll -= float(q[sequence[position + 1]])
        if run.wait() != 0:
            sys.exit("the logits program failed")
    predicted = count - len(sequences)
    print(f"tokens               {count}")
    print(f"top-1 agreement      {100 * agree / count:.2f} %")
    print(f"mean KL divergence   {kl / count:.2e}")
    print(f"perplexity           {np.exp(ours_nll / predicted):.4f}")
    print(f"  transformers       {np.exp(theirs_nll / predicted):.4f}")


if __name__ == "__main__":
    main()
