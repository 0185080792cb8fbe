"""The parts of a training step: its settings, optimisers, rates, precision, memory and state."""
