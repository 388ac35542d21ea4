"""mini-MMEB: small tasks in MMEB-V2's own layouts, built from what the package registries hold.

Every task takes the layout of one data set of the benchmark, and the benchmark's readers read it.
They are no MMEB-V2 figures: they show that the whole way works and what a change does to a model.
`tasks` lists them, `building` makes them, `packages` gets what they are made of.
"""

from tte_jax.evaluation.mini.building import build, check, data_of
from tte_jax.evaluation.mini.tasks import DEFAULT, TASKS, MiniTask, select

__all__ = ["DEFAULT", "TASKS", "MiniTask", "build", "check", "data_of", "select"]
