"""What dtypes are called, without torch: options are read before it is imported."""

# As other tools spell them.
SPELLED = {
    "fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
    "half": "float16", "fp64": "float64", "f64": "float64", "double": "float64", "fp8": "float8_e4m3fn",
}  # fmt: skip


def dtype_name(name: str) -> str:
    """The one name of a dtype that is spelled otherwise; what is not known stays as it is."""
    short = name.strip().lower().removeprefix("torch.")
    return SPELLED.get(short, short if short in SPELLED.values() else name)
