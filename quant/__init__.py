"""From a trainer's folder to a sealed, quantized artifact. Knows nothing of serving."""
