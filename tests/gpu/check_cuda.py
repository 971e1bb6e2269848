"""Loads both libraries into the CUDA build of torch that runs this and looks for a CUDA kernel of every operator.

It needs no GPU and not the tilewise package: `make check-cuda` runs it with a torch that the libraries were not built
against.
"""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if torch.version.cuda is None:
        sys.exit(f"check-cuda needs a CUDA build of torch, found {torch.__version__}.")
    for name in ("libtilewise_cpu.so", "libtilewise_cuda.so"):
        torch.ops.load_library(ROOT / "pysrc" / "lib" / name)
    schemas = (ROOT / "csrc" / "library.h").read_text()
    with_kernels = schemas[: schemas.index("define_composites")]  # the others are composed of PyTorch's own
    operators = re.findall(r'm\.def\(\s*"(\w+)\(', with_kernels)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [
        f"{op} on {key}" for op in operators for key in ("CPU", "CUDA") if not has_kernel(f"tilewise::{op}", key)
    ]
    if missing or not operators:
        sys.exit(f"no kernel for: {', '.join(missing) or 'csrc/library.h names no operator'}")
    print(f"torch {torch.__version__}: {len(operators)} operators, each with a CPU and a CUDA kernel")


if __name__ == "__main__":
    main()
