"""The runtime of a request: its state, the vision hooks, the prefill, decoding and the record."""
