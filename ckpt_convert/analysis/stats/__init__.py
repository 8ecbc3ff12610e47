"""What tensors hold, in numbers."""
