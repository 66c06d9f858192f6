"""What vectors tell of texts: `search` finds neighbours, `clusters` groups them.

NumPy only; of ours it imports nothing but `errors`.
"""
