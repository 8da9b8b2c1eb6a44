"""Speed beside others, on a CPU and on a GPU: `python -m jax_flashattn bench`."""
