"""What operators compose in Python. The oracle (`tilewise.reference`) takes from here what no test compares it with:
types, reductions, the projection of a column and the search of sparse transport."""
