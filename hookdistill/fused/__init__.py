"""Losses in closed form: values and gradients computed together, without autograd, near the memory bandwidth."""
