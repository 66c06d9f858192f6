"""GPU compute from Python; every module says what runs where there is no GPU.

Without PyTorch: `native` finds `csrc/`, which `LLTM_RAY_NATIVE=1 pip install .` builds into `_native`; `tensors` is its
face: tensors, matrix products, exchange with other libraries.

With PyTorch (extra `torch`, which brings Triton on Linux):

- Weights: `nf4` quantizes to 4 bits and multiplies with such weights, `gguf_blocks` reads GGUF's block formats. Both
  take NumPy arrays too.
- Steps of a model: `fused` has them in one pass over memory each (norms, softmax, SwiGLU, RoPE), `attention.attend`
  takes the fastest of PyTorch's attention kernels, `precision` says what products may round.
- Serving a model of one's own: `batcher.Batcher` answers many requests at once. It plans a step, `batch_step` runs the
  model over it, `paged_attention` reads the keys and values that `paged_cache` holds where `block_tables` says, and
  `sampling` picks the tokens. A model speaks `batcher.Decoder`; `reference_llama` is one. ::

      shape = LlamaShape()
      room = CacheShape(n_layers=shape.n_layers, n_kv_heads=shape.n_kv_heads, head_dim=shape.head_dim, n_blocks=64)
      batcher = Batcher(ReferenceLlama(shape), PagedCache(room))
      tokens = batcher.submit([1, 2, 3], max_tokens=8).read()

- Launches: `tuning.Tuner`, given to a call, finds and keeps the fastest settings; `cuda_graphs.GraphPool` replays a
  whole function.
- Vectors: `similarity.TorchScorer` searches on a GPU, as `VectorIndex(scorer=TorchScorer())` and
  `similar_pairs(..., scorer=TorchScorer())` of `knowledge`.

The command `lltm-ray models diff A B` compares two GGUF files with `gguf_blocks`.

Modules named `_x_triton` hold the kernels of `x`; `_launch` starts them. May import `errors` and `_optional`.
"""
