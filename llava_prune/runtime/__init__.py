"""What happens in a request: its state, vision hooks, prefill and decoding."""
