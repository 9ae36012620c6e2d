"""The documented formats, with what they are: what `qjax formats` prints."""

from qjax.formats import parse_format

EXAMPLES = (
    ("fp32", "IEEE float32: the baseline"),
    ("bf16", "bfloat16"),
    ("fp16", "IEEE float16"),
    ("int8-channel", "8-bit affine, one scale and zero point per output channel"),
    ("int8-channel-sym-max", "8-bit symmetric, scale max|w|/127: LLM.int8's and SmoothQuant's weights"),
    ("int8-g128", "8-bit affine in groups of 128"),
    ("int6-g128", "6-bit affine"),
    ("int5-g128", "5-bit affine"),
    ("int4-channel", "4-bit affine, one scale per output channel (the GPTQ paper's main tables)"),
    ("int4-g128", "4-bit affine in groups of 128 (GPTQ and AWQ checkpoints)"),
    ("int4-g64", "4-bit affine in groups of 64"),
    ("int4-g32", "4-bit affine in groups of 32"),
    ("int4-g128-sym", "4-bit symmetric, scale max|w|/7.5 (compressed-tensors, torchao)"),
    ("int4-g128-sym-max", "4-bit symmetric, scale max|w|/7 (QuaRot, AutoAWQ)"),
    ("int4-g64-dq", "4-bit affine, 8-bit scales"),
    ("int4-g64-z16", "4-bit affine with real zero points in float16 (HQQ)"),
    ("int3-g128", "3-bit affine in groups of 128"),
    ("int3-channel", "3-bit affine per output channel"),
    ("int2-g128", "2-bit affine in groups of 128"),
    ("int2-g64", "2-bit affine in groups of 64"),
    ("int2-g32-sym-full", "2-bit symmetric, levels -2 to 1 times a scale of either sign (AutoRound)"),
    ("int1-g64-sym", "binary: -1 or 1 times the scale"),
    ("nf4-g64", "NormalFloat4 (QLoRA), groups of 64 along the input axis"),
    ("nf4-g64-dq", "NormalFloat4 with doubly quantized scales"),
    ("nf4-b64", "NormalFloat4 in bitsandbytes' flat blocks"),
    ("nf4-b64-dq", "the same, doubly quantized"),
    ("fp4_e2m1-g64", "FP4: 0 .5 1 1.5 2 3 4 6 and their negatives (`fp4` for short)"),
    ("fp4_bnb-g64", "bitsandbytes' FP4 table, which is not E2M1"),
    ("mxfp4", "FP4 in groups of 32, scales are powers of two (Microscaling)"),
    ("mxfp8_e4m3", "FP8 with 4 exponent bits, the same way; `mxfp8` for short"),
    ("mxfp8_e5m2", "FP8 with 5 exponent bits, the same way"),
    ("nvfp4", "FP4 in groups of 16, scales are FP8 times one float32"),
    ("iq4_nl-g32-fp16", "16 values denser around 0, of llama.cpp's IQ4_NL"),
    ("int4-g32-m16", "GGUF's Q4_1: 4-bit with float16 minima"),
    ("int5-g32-m16", "GGUF's Q5_1: 5-bit with float16 minima"),
    ("int2-g16-k4m-k4", "GGUF's Q2_K (read only): 4-bit scales and minima times a float16 of 256 weights"),
    ("int3-g16-sym-full-k6s", "GGUF's Q3_K: 6-bit scales times a float16 of 256 weights"),
    ("int4-g32-k6m-k6", "GGUF's Q4_K (read only): 6-bit scales and minima; Q5_K is int5-g32-k6m-k6"),
    ("int6-g16-sym-full-k8s", "GGUF's Q6_K: 8-bit scales times a float16 of 256 weights"),
    ("fp8_e4m3-channel", "FP8 with 4 exponent and 3 mantissa bits, largest 448"),
    ("fp8_e4m3-g128-fp32x128", "FP8 in tiles of 128 x 128, one scale each (DeepSeek-V3)"),
    ("fp8_e5m2-channel", "FP8 with 5 exponent and 2 mantissa bits, largest 57344"),
)


def format_table(in_features: int = 4096, out_features: int = 4096) -> list[dict[str, object]]:
    """One record per documented format, with exact bits per weight of an (in_features, out_features) weight."""
    return [
        {
            "format": name,
            "bits_per_weight": parse_format(name).bits_per_weight(in_features, out_features),
            "ratio_to_fp16": 16 / parse_format(name).bits_per_weight(in_features, out_features),
            "what": what,
        }
        for name, what in EXAMPLES
    ]
