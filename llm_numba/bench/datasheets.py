"""Peaks from NVIDIA's data sheets and architecture white papers."""

import re

# a GPU's name -> dense bf16 on tensor cores with float32 sums, in TFLOP/s. Data sheets often give twice as much, for
# matrices half of whose elements are zero. Sources: the GPUs' data sheets; for GeForce and RTX the white papers "NVIDIA
# Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture" and "NVIDIA RTX Blackwell GPU Architecture".
DENSE_BF16 = {
    "B200": 2250,
    "H200|H100 80GB HBM3": 989,  # SXM
    "H100 NVL|H200 NVL": 835,
    "H100 PCIe": 756,
    "A100[- ].*": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada Generation": 364.2,
    "RTX A6000": 154.8,
    "GeForce RTX 5090": 209.5,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 4080": 97.5,
    "GeForce RTX 3090 Ti": 80,
    "GeForce RTX 3090": 71,
    "GeForce RTX 3080": 59.5,
}


def datasheet_peak(name: str, dtype: str) -> float:
    """Dense FLOP/s of the GPU of this name; 0.0 if it is not in the table, or for another dtype than bf16."""
    name = name.removeprefix("NVIDIA ")
    found = [peak for pattern, peak in DENSE_BF16.items() if re.fullmatch(pattern, name) and dtype == "bf16"]
    return 1e12 * found[0] if found else 0.0
