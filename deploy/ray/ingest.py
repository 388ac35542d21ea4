"""`tte ingest` for more files than one machine reads: Ray Data hands them to workers.

    python deploy/ray/ingest.py --gateway dns:///tte-gateway:50060 --workers 16 /shared/pictures

Every worker does to its share of the files what `tte ingest` does: it reads them, sends documents
through the gateway and is held back by it. So nothing is reasoned about twice: what is stored
unchanged is skipped, a copy takes the ECR of its content, and the same command after a crash of any
part goes on. The files must lie where every worker sees them, under the same path. Workers do not
see each other's share: unlike with `tte ingest`, copies in different shares are stored each under
its id, and of two manifest lines with one id in different manifests the last one written stays.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tte_jax.cascade.messages import IngestOptions
from tte_jax.cli import sources
from tte_jax.cli.ingest import Run, metadata_rules
from tte_jax.cli.manifests import MANIFEST_SUFFIXES
from tte_jax.client import Client
from tte_jax.errors import TteError

OUTCOME = "outcome"  # a row with the counts of a share; every other row is a bad file


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      paths: images, videos, PDFs, .jsonl manifests, and folders of them.
      gateway: `host:port`, or `dns:///name:port` of several.
      cluster: address of a Ray cluster, `auto` on one of its machines; empty = Ray on this machine.
      workers: that read and send at the same time; the gateway holds them back when it must.
      share: files that a worker takes at a time. A share that was interrupted is sent again whole.
      metadata: field=value for every document, or a JSON file, as for `tte ingest`.
      id_prefix: put before every id.
      reasoning_tokens: new tokens for each document's ECR; 0 = without.
      instruction: the task, for reasoner and embedder.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    gateway: str = "127.0.0.1:50060"
    cluster: str = ""
    workers: int = 4
    share: int = 64
    metadata: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    id_prefix: str = ""
    reasoning_tokens: int = IngestOptions.reasoning_tokens
    instruction: str = ""


class Worker:
    """An actor of Ray Data: one client for its life."""

    def __init__(self, config: Config) -> None:
        self._client = Client(config.gateway)
        self._rules = metadata_rules(list(config.metadata))
        self._prefix = config.id_prefix
        self._choice = IngestOptions(
            reasoning_tokens=config.reasoning_tokens, instruction=config.instruction
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Ingests a share of ("path", "name"); returns rows of ("source", "message").

        An error that ends the stream (a stage stays away, the disk is full) is raised: Ray then
        ends the job, and the same command goes on later.
        """
        files = [(Path(p), str(n)) for p, n in zip(batch["path"], batch["name"], strict=True)]
        run = Run(files, self._rules, self._prefix)
        counts: Counter[str] = Counter()
        for update in self._client.ingest(run.documents(), self._choice):
            run.note_failures(update)
            counts = Counter(stored=update.stored, unchanged=update.skipped)
        counts["duplicates"] = run.duplicates
        return {
            "source": [OUTCOME, *(bad.source for bad in run.bad)],
            "message": [json.dumps(counts), *(bad.message for bad in run.bad)],
        }


def main(config: Config) -> int:
    """0 when every file is stored; 1 when some are bad, which are listed; 2 when it broke off."""
    try:
        import ray
    except ImportError:
        print("Ray is not installed: pip install tte-jax[ray]", file=sys.stderr)
        return 2
    unreadable: list[sources.BadSource] = []
    try:
        metadata_rules(list(config.metadata))
        found, others = sources.find(config.paths, unreadable)
    except TteError as error:
        print(error.message, file=sys.stderr)
        return 2
    files, taken = _distinct(found)
    bad = [(one.source, one.message) for one in [*unreadable, *taken]]
    if not files:
        print("No image, video, PDF or .jsonl manifest in there.", file=sys.stderr)
        return 2
    if config.cluster:
        ray.init(address=config.cluster)
    else:
        # Ray gives its workers nice 15. Beside services that keep every core busy they would take
        # minutes to import anything, and look as if they hung.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(num_cpus=max(2, config.workers), include_dashboard=False)
    totals: Counter[str] = Counter()
    try:
        rows = ray.data.from_items(
            [{"path": str(path.absolute()), "name": name} for path, name in files],
            # So many pieces that every worker has some.
            override_num_blocks=max(1, -(-len(files) // config.share)),
        ).map_batches(
            Worker,
            fn_constructor_args=(config,),
            batch_size=config.share,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
            # Waiting for the gateway is most of the work.
            num_cpus=0.5,
        )
        for row in rows.iter_rows():
            if row["source"] == OUTCOME:
                totals.update(json.loads(row["message"]))
            else:
                bad.append((row["source"], row["message"]))
    except Exception as error:
        print(f"The ingest broke off; run it again to go on: {error}", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()
    for source, message in sorted(bad):
        print(f"{source}: {message}", file=sys.stderr)
    print(json.dumps({**totals, "bad": len(bad), "others": others}))
    return 1 if bad else 0


def _distinct(
    found: list[tuple[Path, str]],
) -> tuple[list[tuple[Path, str]], list[sources.BadSource]]:
    """The files with an id of their own; workers do not see each other's, so this is done here."""
    first: dict[str, Path] = {}
    taken: list[sources.BadSource] = []
    manifests: list[tuple[Path, str]] = []
    seen: set[Path] = set()
    for path, name in found:
        if path.absolute() in seen:
            continue  # named twice, such as a folder and a file in it
        seen.add(path.absolute())
        if path.suffix.lower() in MANIFEST_SUFFIXES:
            manifests.append((path, name))  # its documents have ids of their own
        elif name in first:
            why = f"the id {name!r} is already taken by {first[name]}; use another --id-prefix"
            taken.append(sources.BadSource(str(path), why))
        else:
            first[name] = path
    return [*((path, name) for name, path in first.items()), *manifests], taken


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
