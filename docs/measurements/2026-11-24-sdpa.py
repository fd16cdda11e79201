# The baseline: PyTorch's flash attention (FA2) on the same dense shapes.
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

print(torch.cuda.get_device_name(), torch.__version__)
for heads, kv, d, L in [(32, 8, 64, 4096), (32, 8, 64, 8192), (32, 8, 64, 32768), (12, 2, 128, 4096), (12, 2, 128, 8192), (12, 2, 128, 32768),
                        (32, 8, 128, 4096), (32, 8, 128, 8192), (32, 8, 128, 32768), (32, 8, 80, 8192), (32, 8, 96, 8192), (8, 4, 256, 8192)]:
    q = torch.randn(1, heads, L, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv, L, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        try:
            call = lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)
            call()
            how = "gqa"
        except RuntimeError:
            k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
            call = lambda: sdpa(q, k, v, is_causal=True)
            how = "repeated"
        times = []
        for i in range(4 if L > 20000 else 12):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); call(); b.record(); b.synchronize()
            if i: times.append(a.elapsed_time(b))
    ms = sorted(times)[len(times) // 2]
    print(f"SDPA flash ({heads},{kv},{d}) {L // 1024}k: {ms:.3f} ms {4 * L * L / 2 * heads * d / ms / 1e9:.1f} TFLOP/s ({how})", flush=True)
