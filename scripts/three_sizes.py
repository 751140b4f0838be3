"""Prints what a token reads in the paper's three shapes, dense and sliced to 3B, and the rate that memory allows.

python -m scripts.three_sizes [--bandwidth 120e9]        bytes per second; 120e9 is Apple's figure for an M4
"""

from __future__ import annotations

import argparse
import math

import mlx.core as mx

from ifprune_convert.synthetic import SHAPES, NoiseSource

BITS = {"bf16": 16.0, "4 bit": 4.5}
"""Bits per weight; at 4 bit two 16-bit numbers for every 64 weights are among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=120e9)
    bandwidth = parser.parse_args().bandwidth
    heads = (
        "shape",
        "parameters",
        "sliced",
        "allowed",
        "GB dense, bf16",
        "sliced",
        "GB dense, 4 bit",
        "sliced",
        "tokens/s",
    )
    print("| " + " | ".join(heads) + " |" + "\n" + "|---" * len(heads) + "|")
    for name in ("paper-6b", "paper-9b", "paper-12b"):
        shape = SHAPES[name]
        total = sum(math.prod(size) for size in NoiseSource(shape, mx.float32).shapes.values())  # nothing is computed
        width, layers = shape.config["intermediate_size"], shape.config["num_hidden_layers"]
        sliced = total - (width - round(width * shape.density)) * layers * 3 * shape.config["hidden_size"]
        cells = [name, f"{total / 1e9:.2f}B", f"{sliced / 1e9:.2f}B", f"{total / sliced:.2f}"]
        for bits in BITS.values():
            cells += [f"{count * bits / 8e9:.2f}" for count in (total, sliced)]
        rates = [bandwidth / (count * BITS["4 bit"] / 8) for count in (total, sliced)]
        cells.append(f"{rates[0]:.0f} -> {rates[1]:.0f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
