"""Random blocks of every GGUF format with the numbers that the gguf package decodes them to.

    python tools/golden/gguf_blocks.py crates/kernels/tests/golden

Writes FORMAT.bytes (the blocks) and FORMAT.f32 (little-endian floats).
"""

import pathlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

FORMATS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
WEIGHTS = 2048


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for name in FORMATS:
        kind = GGMLQuantizationType[name]
        block_len, block_bytes = GGML_QUANT_SIZES[kind]
        # Any bytes are a block: scales may be infinite or no number.
        data = random.integers(0, 256, WEIGHTS // block_len * block_bytes, dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = dequantize(data, kind).astype("<f4")
        (out / f"{name}.bytes").write_bytes(data.tobytes())
        (out / f"{name}.f32").write_bytes(values.tobytes())


if __name__ == "__main__":
    main()
