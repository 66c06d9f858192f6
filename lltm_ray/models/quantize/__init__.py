"""From a GGUF file to a smaller one, as llama.cpp's `llama-quantize` does it: `quantize.quantize`.

kinds (names) -> mixtures (a type for each tensor) + imatrix (what matters) -> plan -> rewrite (one file, streamed), or
llama-quantize itself. What computes the blocks is handed in: see `encoder`.
"""
