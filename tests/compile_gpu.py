"Compile the GPU kernels for sm_90 without a GPU; print registers, bytes spilled and atomics of each."
import json

import torch

from localmamba.kernels import gpu


def inputs(Bt, K, T, D, N, dtype, along, constant, full=True):
    x = lambda *shape: torch.randn(*shape).to(dtype)
    B, C = (x(K, D, N) if constant else x(Bt, K, T, N) for _ in 'BC')
    skip, z, bias = (torch.randn(K, D), x(Bt, T, 2 * D)[..., D:], torch.randn(K, D)) if full else (None, None, None)
    u = x(Bt, K, T, D) if along else x(Bt, T, 2 * D)[..., :D]
    order = torch.stack([torch.randperm(T) for _ in range(K)])
    return u, x(Bt, K, T, D), -torch.rand(K, D, N), B, C, skip, z, bias, order, full, along


def call():
    cases = [inputs(2, 4, 196, 384, 16, torch.bfloat16, True, False),
             inputs(1, 1, 1, 1, 1, torch.float16, False, True, full=False)]
    for args in cases:
        y, last, saved = gpu.scan_forward(*args)
        gpu.scan_backward(y, None if args[-2] else last, *args, saved)
    x, order = torch.randn(2, 196, 768).bfloat16()[..., :384], cases[0][8]
    weight, bias = torch.randn(4, 384, 4), torch.randn(4, 384)
    gpu.conv_backward(gpu.conv_forward(x, weight, bias, order), x, weight, bias, order)


if __name__ == '__main__': print(json.dumps(gpu.compile_only(call)))
