"""The formulas that operators are composed of in Python. The oracle (`tilewise.reference`) has its own text of them."""
