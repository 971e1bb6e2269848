"""What a multiprocessor of each compute capability has, and how many blocks it holds."""

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB  # of a multiprocessor, a quarter for each of its four schedulers
RESERVED = 1024  # bytes of shared memory that a block has besides its own


@dataclass(frozen=True)
class Part:
    """A compute capability; `code` is the architecture whose machine code it runs. sm_120 compiles that of sm_100 anew:
    its registers are only likely to be these."""

    code: str
    threads: int
    blocks: int
    shared: int  # bytes of a multiprocessor
    block_shared: int  # that a block can have


PARTS = {
    "80": Part("80", 2048, 32, 164 * KIB, 163 * KIB),
    "86": Part("80", 1536, 16, 100 * KIB, 99 * KIB),
    "89": Part("80", 1536, 24, 100 * KIB, 99 * KIB),
    "90": Part("90", 2048, 32, 228 * KIB, 227 * KIB),
    "100": Part("100", 2048, 32, 228 * KIB, 227 * KIB),
    "120": Part("100", 1536, 24, 100 * KIB, 99 * KIB),
}
LEAST_SHARED = min(part.block_shared for part in PARTS.values())  # what every launch has to do with


def resident(part: Part, threads: int, registers: int, shared: int) -> int:
    """Blocks of a multiprocessor at a time, of so many threads, registers of each and bytes; 0 where none fits."""
    if shared > part.block_shared:
        return 0
    warps = 4 * (REGISTERS // 4 // (32 * (-(-registers // 8) * 8)))
    by_shared = part.shared // (-(-shared // 128) * 128 + RESERVED)
    return min(warps // (threads // 32), part.threads // threads, part.blocks, by_shared)
