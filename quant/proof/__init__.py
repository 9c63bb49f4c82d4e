"""What quantization did to the model, in numbers, and the gate on them."""
