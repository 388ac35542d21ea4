"""The engine against PyTorch with transformers, against its own services and the machine's limits.

    python -m benchmarks.engine

`models` writes the random models, `reference` is the PyTorch side, `embedding`, `reranking` and
`generation` compare the two, `serving` measures gRPC, hop and starts, `limits` the machine.
"""
