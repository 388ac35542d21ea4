"""Evaluation: what a ranking is worth, MMEB-V2 exactly, and quality against the token budget.

`mmeb_v2/` knows the 78 data sets and reads their published files into `task.EvalTask`; `runner`
runs the cascade (`tte_jax.cascade`, the object that the gateway serves) over a task; `metrics` and
`significance` score rankings; `outputs` and `report` write and read the result files.
"""
