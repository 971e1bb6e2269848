"""What GPUs can do, as the predictions take it: constants of data sheets, and how much of them is reached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU: rates of all of it, and of each of its multiprocessors."""

    copy: float  # bytes a second, read and written: 0.9 of the data sheet's
    bfloat16: float  # FLOP a second of a product in 16 bits: 0.8 of the data sheet's
    float32: float  # of fused multiply-adds in float32: the data sheet's
    tf32: float  # of a kernel's own products on the tensor cores, a warp at a time: 0.9 of A100's sheet, 0.6 of newer
    multiprocessors: int
    clock: float  # Hz under load
    capability: str  # and so what a multiprocessor has (tests/gpu/cuda_emulator/multiprocessors.py)
    schedulers: int = 4  # each issues an instruction a clock
    special: int = 16  # results of the special function unit a clock

    def product(self, item: int) -> float:
        """FLOP a second of a matrix product; float32 is not tf32, and the BLAS reaches 0.8 of its rate."""
        return self.bfloat16 if item == 2 else 0.8 * self.float32


# Data sheets of the SXM parts: bandwidth TB/s, bfloat16, float32 and tf32 TFLOP/s, multiprocessors, clock GHz.
GPUS = {
    # A100 80GB (2020): 2.04, 312, 19.5, 156; clock: boost
    "A100": Gpu(1.84e12, 250e12, 19.5e12, 140e12, 108, 1.41e9, "80"),
    # H100 (2022): 3.35, 989, 67, 495; clock: what is left of 1.98 under load
    "H100": Gpu(3.0e12, 800e12, 67e12, 300e12, 132, 1.755e9, "90"),
    # H200 (2023): 4.8, 989, 67, 495; the multiprocessors of H100
    "H200": Gpu(4.3e12, 800e12, 67e12, 300e12, 132, 1.755e9, "90"),
    # B200 (2024): 8.0, 2250, 75, 1100; clock: in the proportion of H100's
    "B200": Gpu(7.2e12, 1800e12, 75e12, 660e12, 148, 1.74e9, "100"),
}

LAUNCH = 2.5e-6  # seconds between the beginnings of two kernels that do nothing
LATENCY = 320  # clocks of an access that waits for the one before, in the second-level cache
PACE = 8  # clocks between two instructions of one warp, which waits for its own results
MOST_ISSUED = 0.75  # of the issue slots, however many warps there are
LONE = 2  # times its share of the bandwidth that one multiprocessor draws while others idle
