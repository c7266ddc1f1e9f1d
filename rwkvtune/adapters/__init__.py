"""What is trained beside a frozen base: LoRA and its family, quantization, the initial state."""
