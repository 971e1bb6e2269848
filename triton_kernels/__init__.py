"""The Triton kernels: one module per operator family, each with a dictionary ``OPS`` from operator name to function.

A function in ``OPS`` has exactly the signature of ``torch.ops.tilewise.<name>`` and returns what that operator returns.
``rows`` holds what every operator that streams over the rows of a logit matrix shares. Nothing here waits for the GPU.
"""
