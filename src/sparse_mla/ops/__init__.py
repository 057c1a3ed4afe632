"""One folder per op; in each: interface, kernels by backend, launch configuration."""
