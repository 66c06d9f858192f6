"""What vectors tell of texts: `search` finds neighbours, `pairs` all similar pairs, `clusters` groups them.

The first two score through a `scores.Scorer`: NumPy's, or one that is handed in and runs on a GPU.
NumPy only; of ours it imports nothing but `errors`.
"""
