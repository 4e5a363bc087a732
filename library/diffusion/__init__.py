"""Pure functions of tensors and numbers: noise schedule, draws, losses and their weights."""
