"""From weights and activations to codes and scales, a block at a time."""
