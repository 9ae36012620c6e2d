"""qjax: quantization of language models in JAX, and its evaluation.

Names are imported when first used, so that `import qjax` and `qjax --help` stay fast.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    # formats and quantized tensors
    "Format": "formats",
    "parse_format": "formats",
    "register_codebook": "formats",
    "register_scales": "formats",
    "QTensor": "qtensor",
    "nbytes": "qtensor",
    "to_qwix": "qwix",
    "from_qwix": "qwix",
    "matmul": "kernels.matmul",
    # layers: what stands in a kernel's place
    "Linear": "linear",
    "Outliers": "linear",
    "LowRank": "linear",
    "apply_linear": "linear",
    "dequantize": "linear",
    "dequantize_tree": "linear",
    "prepare": "linear",
    "InputMap": "maps",
    "register_map": "maps",
    "parse_activation": "activations",
    # roundings
    "Info": "rounding.parts.info",
    "rtn": "rounding.nearest",
    "gptq": "rounding.gptq",
    "factorize": "rounding.parts.feedback",
    "output_loss": "rounding.parts.info",
    # refining
    "descend": "refining.descend",
    "Block": "refining.block",
    "BlockInfo": "refining.block",
    # transforms
    "awq": "transforms.awq",
    # calibration
    "Calibration": "calibrate.tokens",
    "load_calibration": "calibrate.tokens",
    # recipes and the driver
    "Recipe": "recipe",
    "parse_recipe": "recipe",
    "parse_rule": "driver.placement",
    "register": "methods",
    "register_statistic": "methods",
    "Statistic": "calibrate.statistics",
    "quantize": "driver.decoder",
    "quantize_to": "driver.decoder",
    "quantize_function": "driver.traced",
    "apply_function": "driver.traced",
    "capture_function": "driver.traced",
    "dequantize_function": "tracing.kernel",
    "coverage": "tracing.coverage",
    "quantize_nnx": "driver.nnx",
    "coverage_nnx": "driver.nnx",
    "quantize_flax": "driver.function",
    "apply_flax": "driver.function",
    "dequantize_flax": "driver.function",
    "quantized_kernels": "interception.linen",
    # training
    "TrainConfig": "train.loop",
    "LoraConfig": "train.lora",
    "train_adapters": "train.lora",
    "QatConfig": "train.qat",
    "train_quantized": "train.qat",
    "attach": "models.adapters",
    "load_adapter": "checkpoints.peft",
    "save_adapter": "checkpoints.peft",
    # models
    "Model": "models.model",
    "DecoderConfig": "models.config",
    "apply": "models.model",
    "inject_outliers": "models.injection",
    "rotate": "models.rotation",
    "load": "checkpoints.load",
    "save": "checkpoints.packed",
    "save_huggingface": "checkpoints.huggingface",
    "export": "checkpoints.export",
    # evaluation
    "Corpus": "evaluate.corpora",
    "load_corpus": "evaluate.corpora",
    "parse_convention": "evaluate.windows",
    "perplexity": "evaluate.perplexity",
    "accuracy": "evaluate.choices",
    "load_task": "evaluate.tasks",
    "divergence": "evaluate.divergence",
    "paired_difference": "evaluate.statistics",
    "accuracy_difference": "evaluate.statistics",
    "estimate": "evaluate.statistics",
    "count_flips": "evaluate.statistics",
    "input_outliers": "evaluate.inputs",
    "generate": "evaluate.generate",
    "generate_text": "evaluate.generate",
    "measure_speed": "evaluate.speed",
    # sweeps
    "Sweep": "sweep.runner",
    "run_sweep": "sweep.runner",
    "sweep_function": "sweep.function",
    "Column": "sweep.columns",
    "Measurement": "sweep.columns",
    "register_measurement": "sweep.columns",
    "data_dictionary": "sweep.columns",
    "write_reports": "report.reports",
    # errors
    "QjaxError": "errors",
    "QjaxWarning": "errors",
}
__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qjax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
