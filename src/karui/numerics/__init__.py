"""Tensors only: decompositions, transforms, packing, entropy coding, proximal operators, fast kernels."""
