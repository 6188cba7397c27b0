"""Names on disk, PEFT's own: two files, and the keys of the tensors in one of them."""

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

MODEL_PREFIX = "base_model.model."
LAMBDA_SUFFIX = ".randlora_lambda"
GAMMA_SUFFIX = ".randlora_gamma"
BASIS_A = "randlora_A"
BASIS_B = "randlora_B"
TOP_BASIS_A = f"base_model.{BASIS_A}"
TOP_BASIS_B = f"base_model.{BASIS_B}"

HEADER_KEY = "randlora"
FORMAT_VERSION = 1
