"""GPU kernels, one file per operation; installed as geofast.kernels."""
