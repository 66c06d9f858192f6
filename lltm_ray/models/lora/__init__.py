"""LoRA adapters: `file` reads one as llama.cpp loads it, `peft` as PEFT saves it.

`convert` makes the first of the second, `merge` writes some into their model.
"""
