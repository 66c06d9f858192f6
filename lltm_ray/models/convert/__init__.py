"""From a Hugging Face checkpoint to a GGUF file: `convert.convert`.

checkpoint (tensors of a folder, untrusted) -> families (names, numbers, transforms) + vocabulary + pooling -> one file,
streamed.
"""
