"""Faces for outside products, one product a file; nothing else in the package needs them.

They take a `Cluster` as it is given, for `driver` is above them. May import `gateway` and what is below it.
"""
