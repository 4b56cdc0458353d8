"""How fast can this device multiply matrices, measured in the same run, and what does its vendor say?"""

import torch

from bench.throughput.clock import synchroniser, time_turn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": 2048, "cuda": 8192}  # of square matrices
VENDOR_BF16 = (  # part of the device's name -> dense bf16 FLOP/s in its data sheet; the first that fits
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
)


def measure_peak(device: torch.device, precision: str, size: int = 0, repeats: int = 5) -> float:
    """FLOP/s of a large matrix product, the fastest of a few."""
    size = size or SIZES.get(device.type, SIZES["cpu"])
    one, other = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    wait = synchroniser(device)
    time_turn(lambda: one @ other, wait, 2)
    return 2 * size**3 / min(time_turn(lambda: one @ other, wait, 1) for _ in range(repeats))


def vendor_peak(device_name: str, precision: str) -> float | None:
    """FLOP/s; None where it is not known."""
    if precision != "bf16":
        return None
    return next((flops for part, flops in VENDOR_BF16 if part in device_name), None)
