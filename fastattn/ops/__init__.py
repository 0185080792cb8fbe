"""Pure functions on tensors: one folder per op, all with the same rooms."""
